"""A recording on disk: one directory of safetensors files and a manifest.

Enters: a `Recording` and a path; later the path.
Leaves: `manifest.json`, one file per layer, one file of what layers share; later a recording whose tensors stay mapped.
Written beside its place and renamed into it; every file's size and header sum is checked before anything is used.
Floor 5: stands on safetensors alone; nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from regard.lens.layers import KINDS, Keys, Layer, RecordedBias, Runs, Step
from regard.lens.stored_mask import NOTE, read_mask, write_mask
from regard.positions import Frame

FORMAT = "regard-recording/1"
MANIFEST = "manifest.json"
SHARED = "shared.safetensors"
LONGEST_HEADER = 100_000_000


class Content(Protocol):
    """What a recording holds (`regard.lens.recording.Recording`)."""

    layers: list[Layer]
    model: dict[str, Any]
    tokenizer: dict[str, Any] | None
    texts: list[str]
    token_ids: dict[str, list[Tensor]]
    notes: list[str]
    versions: dict[str, str]


def save(recording: Content, directory: Path) -> Path:
    """Write a recording as one directory, whole or not at all."""
    directory = Path(directory)
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ValueError(f"recording: directory must be a directory; got the file {directory}. Choose another place.")
    if directory.is_dir() and any(directory.iterdir()) and not _is_recording(directory):
        raise ValueError(
            f"recording: directory must be new, empty or an older recording; got {directory}, which holds others. "
            "Choose another place."
        )
    if not directory.parent.is_dir():
        raise ValueError(f"recording: directory must lie in one that exists; got {directory}. Make {directory.parent}.")
    with _beside(directory) as place:
        _write(recording, place)
        _sync(place)
        older = None
        if directory.exists():
            older = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old-", dir=directory.parent))
            directory.rename(older / "recording")
        try:
            place.rename(directory)
        except OSError:
            if older is not None:
                (older / "recording").rename(directory)
                older.rmdir()
            raise
        if older is not None:
            shutil.rmtree(older, ignore_errors=True)
    _sync(directory.parent)
    return directory


def load(directory: Path) -> dict[str, Any]:
    """The fields of a recording; its tensors stay in their files."""
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        raise ValueError(
            f"recording: directory must hold a {MANIFEST}; got {directory} without one. Pass what Recording.save wrote."
        )
    try:
        manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
        if not isinstance(manifest, dict) or not str(manifest["format"]).startswith("regard-recording/"):
            raise ValueError(f"{MANIFEST} is not a recording's")
        if manifest["format"] != FORMAT:
            raise _Newer(
                f"recording: format must be {FORMAT}; got {manifest['format']} in {directory}. "
                "Update regard to read it."
            )
        files = {name: _map(directory / name, facts) for name, facts in manifest["files"].items()}
        return _read(manifest, files)
    except _Newer as newer:
        raise ValueError(str(newer)) from None
    except (
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        OverflowError,
        RuntimeError,
        OSError,
    ) as broken:
        why = f"no {broken}" if isinstance(broken, KeyError) else str(broken).rstrip(".")
        raise ValueError(
            f"recording: directory must be whole; got {directory}, which is damaged ({why}). Record it again."
        ) from broken


class _Newer(Exception):
    """A format that this version does not know."""


class _Shelf:
    """Tensors that several layers or steps share, each content once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[tuple[Any, ...], str] = {}

    def put(self, tensor: Tensor) -> str:
        """Keep a tensor; its name."""
        own = tensor.detach().contiguous()
        digest = hashlib.sha256(own.reshape(-1).view(torch.uint8).numpy().data).digest() if own.numel() else b""
        key = (str(own.dtype), tuple(own.shape), digest)
        if key not in self.names:
            self.names[key] = f"t{len(self.names)}"
            self.tensors[self.names[key]] = own
        return self.names[key]


def _write(recording: Content, place: Path) -> None:
    shelf, notes = _Shelf(), list(recording.notes)
    layers = []
    for index, layer in enumerate(recording.layers):
        name = f"layer-{index:04d}.safetensors"
        entry, tensors = _layer_entry(layer, shelf, notes)
        _write_tensors(tensors, place / name)
        layers.append({"file": name, **entry})
    token_ids = {side: [shelf.put(ids) for ids in sequences] for side, sequences in recording.token_ids.items()}
    _write_tensors(shelf.tensors, place / SHARED)
    model = {"weights_sha256": None, **recording.model}
    if model["weights_sha256"] is None:
        notes.append("The model was gone, or its weights had changed, when this was saved: their sum is unknown.")
    manifest = {
        "format": FORMAT,
        "versions": recording.versions,
        "model": model,
        "tokenizer": recording.tokenizer,
        "texts": recording.texts,
        "token_ids": token_ids,
        "notes": list(dict.fromkeys(notes)),
        "files": {path.name: _facts(path) for path in sorted(place.glob("*.safetensors"))},
        "layers": layers,
    }
    with (place / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _layer_entry(layer: Layer, shelf: _Shelf, notes: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[int, int] = {}
    steps = []
    for at, step in enumerate(layer.steps):
        keys = numbers.setdefault(id(step.keys), len(numbers))
        tensors |= {f"k.{keys}": step.keys.rows, f"value_norms.{keys}": step.keys.value_norms}
        if step.keys.received is not None:
            tensors[f"received.{keys}"] = step.keys.received
        tensors |= {f"q.{at}": step.q, f"lse.{at}": step.lse}
        tensors |= {f"{name}.{at}": tensor for name, tensor in step.statistics.items()}
        steps.append({
            "sequence": step.sequence,
            "keys": keys,
            "key_runs": [list(run) for run in step.key_runs],
            "scale": step.scale,
            "softcap": step.softcap,
            "query_offset": _offset_entry(step.query_offset, shelf),
            "key_offset": _offset_entry(step.key_offset, shelf),
            "mask": _mask_entry(step, shelf, notes),
            "bias": None if step.bias is None or step.bias.bias is None else shelf.put(step.bias.bias),
            "diagonal": None if step.bias is None or step.bias.diagonal is None else shelf.put(step.bias.diagonal),
            "sinks": None if step.sinks is None else shelf.put(step.sinks),
            "statistics": sorted(step.statistics),
        })  # fmt: skip
    return {"module": layer.module, "number": layer.number, "kind": layer.kind, "steps": steps}, tensors


def _mask_entry(step: Step, shelf: _Shelf, notes: list[str]) -> dict[str, Any] | None:
    if step.mask is None:
        return None
    entry, tensors = write_mask(step.mask, _frame(step.q, step.seq_len_kv, step.query_offset, step.key_offset))
    if "tiles" in entry:
        notes.append(NOTE)
    return {**entry, "tensors": [shelf.put(tensor) for tensor in tensors]}


def _offset_entry(offset: int | Tensor, shelf: _Shelf) -> int | str:
    return shelf.put(offset) if isinstance(offset, Tensor) else int(offset)


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    whole = {}
    for name, tensor in tensors.items():
        own = tensor.detach().contiguous()
        whole[name] = own if own.untyped_storage().nbytes() == own.nbytes else own.clone()
    seen: set[int] = set()
    for name, tensor in whole.items():  # safetensors refuses two names for one storage
        if tensor.data_ptr() in seen and tensor.numel():
            whole[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    save_file(whole, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _facts(path: Path) -> dict[str, Any]:
    header = _header(path)
    return {"bytes": path.stat().st_size, "header_sha256": hashlib.sha256(header).hexdigest()}


def _header(path: Path) -> bytes:
    """The length and JSON at the head of a safetensors file, as bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{path.name} has no header")
        return head + file.read(length)


def _map(path: Path, facts: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of one file, mapped, after its size and header were found as they were written."""
    from safetensors import SafetensorError, safe_open

    if Path(path.name).name != path.name or path.suffix != ".safetensors":
        raise ValueError(f"{path.name} is no file of a recording")
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if path.stat().st_size != facts["bytes"]:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {facts['bytes']}")
    if hashlib.sha256(_header(path)).hexdigest() != facts["header_sha256"]:
        raise ValueError(f"{path.name} has another header than it was written with")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as broken:
        raise ValueError(f"{path.name} cannot be read: {broken}") from broken


def _read(manifest: dict[str, Any], files: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    shared = files[SHARED]
    layers = []
    for entry in manifest["layers"]:
        tensors, keys = files[entry["file"]], {}
        steps = [_read_step(at, step, tensors, shared, keys) for at, step in enumerate(entry["steps"])]
        if entry["kind"] not in KINDS or not steps:
            raise ValueError(f"layer {entry['number']} has no steps or an unknown kind")
        layers.append(Layer(str(entry["module"]), int(entry["number"]), entry["kind"], steps))
    return {
        "layers": layers,
        "model": dict(manifest["model"]),
        "tokenizer": manifest["tokenizer"],
        "texts": [str(text) for text in manifest["texts"]],
        "token_ids": {side: [shared[name] for name in names] for side, names in manifest["token_ids"].items()},
        "notes": [str(note) for note in manifest["notes"]],
        "versions": dict(manifest["versions"]),
    }


def _read_step(
    at: int, entry: dict[str, Any], tensors: dict[str, Tensor], shared: dict[str, Tensor], held: dict[int, Keys]
) -> Step:
    number = int(entry["keys"])
    if number not in held:
        held[number] = Keys(tensors[f"k.{number}"], tensors[f"value_norms.{number}"], tensors.get(f"received.{number}"))
    keys, q, lse = held[number], tensors[f"q.{at}"], tensors[f"lse.{at}"]
    runs: Runs = tuple((int(start), int(stop)) for start, stop in entry["key_runs"])
    if any(not 0 <= start < stop <= keys.rows.shape[2] for start, stop in runs):
        raise ValueError(f"step {at} reads keys that are not there")
    if lse.shape != q.shape[:3] or q.shape[3] != keys.rows.shape[3] or q.shape[1] % keys.rows.shape[1]:
        raise ValueError(f"step {at} has queries, keys and sums that do not fit together")
    query_offset, key_offset = (_read_offset(entry[name], shared) for name in ("query_offset", "key_offset"))
    mask = None
    if entry["mask"] is not None:
        frame = _frame(q, sum(stop - start for start, stop in runs), query_offset, key_offset)
        mask = read_mask(entry["mask"], [shared[name] for name in entry["mask"]["tensors"]], frame)
    dense, diagonal, sinks = (
        None if entry[name] is None else shared[entry[name]] for name in ("bias", "diagonal", "sinks")
    )
    return Step(
        sequence=int(entry["sequence"]),
        q=q,
        lse=lse,
        keys=keys,
        key_runs=runs,
        scale=float(entry["scale"]),
        softcap=None if entry["softcap"] is None else float(entry["softcap"]),
        mask=mask,
        bias=None if dense is None and diagonal is None else RecordedBias(dense, diagonal),
        sinks=sinks,
        query_offset=query_offset,
        key_offset=key_offset,
        statistics={name: tensors[f"{name}.{at}"] for name in entry["statistics"]},
    )


def _read_offset(entry: int | str, shared: dict[str, Tensor]) -> int | Tensor:
    return shared[entry] if isinstance(entry, str) else int(entry)


def _frame(q: Tensor, seq_len_kv: int, query_offset: int | Tensor, key_offset: int | Tensor) -> Frame:
    return Frame(q.shape[0], q.shape[1], q.shape[2], seq_len_kv, query_offset, key_offset)


def _is_recording(directory: Path) -> bool:
    try:
        manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
        return str(manifest["format"]).startswith("regard-recording/")
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new directory next to the target; gone after the block unless it was renamed."""
    place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    place.chmod(0o777 & ~_umask())
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
