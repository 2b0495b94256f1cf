"""Checkpoints: a run's weights, optimiser, random generators and place, each file whole and nothing pickled.

Enters: the states of a run. Leaves: folders `checkpoint-000200` with weights.safetensors, optimizer.safetensors and
state.json, which holds every file's size and SHA-256; `weights-000200.safetensors` to average; log.jsonl.
Floor: above the package; `training` stands on it.

A checkpoint is written into a hidden folder, flushed to the disk, and renamed: a full disk, a Ctrl-C or a kill leaves
the one before as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regard.models.pretrained import replace

_FORMAT = 1
_FILES = ("weights.safetensors", "optimizer.safetensors", "generators.safetensors")
_BEST = "best.safetensors"
_NAME = re.compile(r"checkpoint-(\d{6,})$")


@dataclass
class Checkpoint:
    """What a run needs to go on."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    """as `optimizer.state_dict()` gives it; after reading, flat tensors and groups"""
    generators: Mapping[str, Tensor]
    """uint8 (processes, bytes): the state of each process's generator"""
    place: Mapping[str, Any]
    best_weights: dict[str, Tensor] | None = None


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: made where it is not there.
        keep: how many weights of past checkpoints stay, to be averaged.
        writes: whether this process writes; one of several does.
    """

    def __init__(self, folder: Path, keep: int, writes: bool = True) -> None:
        self.folder, self.keep, self.writes = Path(folder), keep, writes
        self.folder.mkdir(parents=True, exist_ok=True)

    def last(self) -> Path | None:
        """The newest checkpoint's folder."""
        found = _numbered(self.folder)
        return found[-1] if found else None

    def newest(self, identity: Mapping[str, Any], resume: bool) -> Checkpoint | None:
        """The newest checkpoint, every byte of it checked, or None where there is none."""
        last = self.last()
        if last is None:
            return None
        if not resume:
            raise ValueError(
                f"train: the folder must hold no checkpoint where resume is off; got {last}. Pass --resume to go on, "
                "or name another folder."
            )
        state = read_state(last)
        _same(identity, state["identity"], last)
        weights, optimizer, generators = (load_file(last / name) for name in _FILES)
        best = load_file(self.folder / _BEST) if state["place"]["best"] else None
        flat = {"state": optimizer, "param_groups": state["param_groups"]}
        return Checkpoint(weights, flat, generators, state["place"], best)

    def save(self, checkpoint: Checkpoint, identity: Mapping[str, Any]) -> Path:
        """Write one, whole or not at all; then let go of those before the last two."""
        step = checkpoint.place["step"]
        target = self.folder / f"checkpoint-{step:06d}"
        beside = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{target.name}."))
        tensors = {
            f"{number}.{key}": value
            for number, values in checkpoint.optimizer["state"].items()
            for key, value in values.items()
        }
        try:
            for name, held in zip(_FILES, (checkpoint.weights, tensors, checkpoint.generators), strict=True):
                write_weights(beside / name, held)
            state = {
                "format": _FORMAT,
                "files": {name: [(beside / name).stat().st_size, _digest(beside / name)] for name in _FILES},
                "identity": identity,
                "place": checkpoint.place,
                "param_groups": checkpoint.optimizer["param_groups"],
            }
            text = json.dumps(state, indent=1, allow_nan=False)
            replace(beside / "state.json", lambda file: file.write_text(text, encoding="utf-8"))
            if self.keep > 1:
                write_weights(self.folder / f"weights-{step:06d}.safetensors", checkpoint.weights)
            if target.exists():
                shutil.rmtree(target)  # of the same step: a run that stopped right after a checkpoint
            beside.rename(target)
            _flush(self.folder)
        except (OSError, SafetensorError) as failed:
            last = self.last()
            kept = "there is none before it" if last is None else f"the last good one is {last}"
            raise OSError(
                f"train: checkpoint {step} must fit on the disk; got {failed}; {kept}. Make room and pass --resume."
            ) from failed
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        for old in _numbered(self.folder)[:-2]:
            shutil.rmtree(old)
        for old in snapshots(self.folder)[: -self.keep]:
            old.unlink()
        return target

    def save_best(self, weights: Mapping[str, Tensor]) -> None:
        """The weights of the best evaluation."""
        if self.writes:
            write_weights(self.folder / _BEST, weights)

    def open_log(self, step: int) -> None:
        """Let go of what log.jsonl says of steps after this one."""
        if not self.writes:
            return
        path = self.folder / "log.jsonl"
        lines = read_log(self.folder) if path.exists() else []
        text = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
        replace(path, lambda file: file.write_text(text, encoding="utf-8"))

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to log.jsonl."""
        if self.writes:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl; a last line that a kill cut is left out."""
    lines = []
    for line in (Path(folder) / "log.jsonl").read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json says, once every file of the checkpoint has the bytes that it names."""
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
    except (OSError, ValueError) as broken:
        raise _cut(folder, f"state.json that cannot be read ({broken})") from broken
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise _cut(folder, "a state.json of another format")
    for name, (size, digest) in state["files"].items():
        held = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if held != size:
            raise _cut(folder, f"{name} with {held:,} of {size:,} bytes")
        if _digest(folder / name) != digest:
            raise _cut(folder, f"{name} with other bytes than were written")
    return state


def snapshots(folder: Path) -> list[Path]:
    """The kept weights of past checkpoints, oldest first."""
    return sorted(Path(folder).glob("weights-*.safetensors"))


def average(files: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of several files of weights, taken in float32. Source: Vaswani et al. 2017, section 6.1.

    Raises:
        ValueError: where there is none, or they are not of one model.
    """
    if not files:
        raise ValueError("average: files must hold at least one; got none. Train with keep above 1.")
    mean: dict[str, Tensor] = {}
    for file in files:
        weights = load_file(file)
        if mean and {n: t.shape for n, t in mean.items()} != {n: t.shape for n, t in weights.items()}:
            raise ValueError(f"average: files must be of one model; got another in {file}. Name those of one run.")
        for name, t in weights.items():
            share = t.float() / len(files) if t.is_floating_point() else t
            mean[name] = mean[name] + share if name in mean and t.is_floating_point() else share
    return mean


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], caller: str) -> None:
    """Put weights into a model, once every shape is the model's.

    Raises:
        ValueError: names the first tensor that does not fit.
    """
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    held = {name: tuple(t.shape) for name, t in weights.items()}
    for name in sorted({*wanted, *held}):
        if wanted.get(name) != held.get(name):
            raise ValueError(
                f"{caller}: {name} must be {wanted.get(name, 'absent')} as in the model; got "
                f"{held.get(name, 'nothing')}. Use the sizes and the vocabulary of the checkpoint."
            )
    model.load_state_dict(dict(weights))


def load_optimizer(optimizer: torch.optim.Optimizer, held: Mapping[str, Any]) -> None:
    """Put flat tensors "number.key" and groups back into an optimiser."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in held["state"].items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": held["param_groups"]})


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """A safetensors file, whole or not at all. What shares memory in the model is written twice."""
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in weights.items()}
    replace(path, lambda file: save_file(tensors, file))


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # the new name, too
    finally:
        os.close(handle)


def _numbered(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if _NAME.match(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cut(folder: Path, got: str) -> ValueError:
    others = [path for path in _numbered(folder.parent) if path != folder]
    fix = f"Remove it to go on from {others[-1].name}." if others else "Remove it and begin anew."
    return ValueError(f"train: the checkpoint {folder} must be whole; got {got}. {fix}")


def _same(wanted: Mapping[str, Any], held: Mapping[str, Any], folder: Path, inside: str = "") -> None:
    for name in sorted({*wanted, *held}):
        one, other = wanted.get(name), held.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            _same(one, other, folder, f"{inside}{name} ")
        elif one != other:
            raise ValueError(
                f"train: {inside}{name} must be {other} as in {folder}; got {one}. Go on with what the run began with, "
                "or name another folder."
            )
