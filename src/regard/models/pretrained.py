"""Models as folders: config.json says how to make one, model.safetensors holds its numbers.

Enters: a model that knows its configuration; a folder.
Leaves: a folder, each file written whole or not at all; a model, after every size and shape was checked.
Floor 5. Nothing is unpickled, and no memory is taken for weights before the file's shapes are the model's.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

FORMAT = 1
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_LONGEST_CONFIG = 1 << 20


class Pretrained(nn.Module):
    """A model that can be saved to a folder and made from one. Its `config` is the arguments that it was made with."""

    config: dict[str, Any]

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors, each whole or not at all.

        Args:
            folder: made where it is not there.
            dtype: what the weights are stored in. Default as they are.

        Example:
            >>> import tempfile
            >>> from regard.models import GPT
            >>> model = GPT(10, dim=16, num_layers=1)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save_pretrained(folder)
            ...     again = GPT.from_pretrained(folder)
            >>> torch.equal(again(torch.tensor([[1, 2]])), model(torch.tensor([[1, 2]])))
            True
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        words = {"library": "regard", "format": FORMAT, "model": type(self).__name__, "arguments": self.config}
        text = json.dumps(words, indent=2, allow_nan=False) + "\n"
        weights = {name: t.detach().to("cpu", dtype).contiguous() for name, t in self.state_dict().items()}
        # both hold the configuration, so that a pair that does not belong together is seen
        replace(folder / _WEIGHTS, lambda file: save_file(weights, file, metadata={"config": text}))
        replace(folder / _CONFIG, lambda file: file.write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | None = None) -> Self:
        """The model that `save_pretrained` wrote, ready to use (`eval`).

        Args:
            folder: what it was written to.
            dtype: of the weights. Default float32 for half types, else as they are stored.

        Raises:
            FileNotFoundError, ValueError: where a file is missing, cut, foreign, or not of this model.
        """
        from safetensors import SafetensorError, safe_open

        folder = Path(folder)
        for name in (_CONFIG, _WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{cls.__name__}.from_pretrained: {folder} must hold {_CONFIG} and {_WEIGHTS}; got no {name}. "
                    "Give the folder that save_pretrained wrote."
                )
        text, arguments = cls._read_config(folder / _CONFIG)
        try:
            with safe_open(folder / _WEIGHTS, framework="pt") as file:
                if (file.metadata() or {}).get("config") != text:
                    raise _bad(cls, f"{_WEIGHTS} must belong to {_CONFIG}", "another model's", "Save it again.")
                held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                model = cls._empty(arguments, held)
                weights = {name: file.get_tensor(name) for name in held}
        except (SafetensorError, OSError) as broken:
            size = (folder / _WEIGHTS).stat().st_size
            raise _bad(
                cls, f"{_WEIGHTS} must be a whole safetensors file", f"{size:,} bytes ({broken})", "Copy it again."
            ) from broken
        for name, t in weights.items():
            if t.is_floating_point():
                wanted = dtype or (torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype)
                weights[name] = t.to(wanted)
        model.load_state_dict(weights, assign=True)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model.eval()

    @classmethod
    def _read_config(cls, path: Path) -> tuple[str, dict[str, Any]]:
        size = path.stat().st_size
        if size > _LONGEST_CONFIG:
            raise _bad(
                cls, f"{_CONFIG} must be at most {_LONGEST_CONFIG:,} bytes", f"{size:,}", "Is it the right file?"
            )
        try:
            text = path.read_text(encoding="utf-8")
            words = json.loads(text)
        except ValueError as broken:
            raise _bad(cls, f"{_CONFIG} must be JSON", str(broken), "Save the model again.") from broken
        if not isinstance(words, dict) or words.get("library") != "regard":
            kind = words.get("model_type") if isinstance(words, dict) else type(words).__name__
            raise _bad(
                cls, f"{_CONFIG} must be regard's", f"one of {kind!r}", "Convert a model of transformers with "
                "regard.models.from_huggingface.",
            )  # fmt: skip
        if words.get("format") != FORMAT or words.get("model") != cls.__name__:
            got = f"format {words.get('format')!r} of {words.get('model')!r}"
            raise _bad(cls, f"{_CONFIG} must be format {FORMAT} of {cls.__name__!r}", got, "Open it by its own class.")
        arguments = words.get("arguments")
        if not isinstance(arguments, dict):
            got = type(arguments).__name__
            raise _bad(cls, f"{_CONFIG} must name the model's arguments", got, "Save the model again.")
        return text, arguments

    @classmethod
    def _empty(cls, arguments: Mapping[str, Any], held: Mapping[str, tuple[int, ...]]) -> Self:
        """The model without memory, once the file's shapes are its own."""
        for name, value in arguments.items():
            if name.endswith("layers") and isinstance(value, int) and value > len(held):
                raise _bad(cls, f"{name} must be at most the {len(held)} tensors held", str(value), "Save it again.")
        try:
            with torch.device("meta"):
                model = cls(**arguments)
        except (TypeError, ValueError, RuntimeError, OverflowError) as unfit:
            raise _bad(cls, f"{_CONFIG} must make a model", str(unfit), "Save the model again.") from unfit
        wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        for name in sorted({*wanted, *held}):
            if wanted.get(name) != held.get(name):
                raise _bad(
                    cls, f"{name} must be {wanted.get(name, 'absent')} as {_CONFIG} says",
                    str(held.get(name, "nothing")), "The two files are of different models.",
                )  # fmt: skip
        return model


def _bad(cls: type, condition: str, got: str, fix: str) -> ValueError:
    return ValueError(f"{cls.__name__}.from_pretrained: {condition}; got {got}. {fix}")


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside, flush to the disk, and put in place at once: whoever looks finds the old file or the new."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.chmod(0o644)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def as_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON has them, so that what is saved is what was given.

    Raises:
        TypeError: where one is no plain number, word, list or dict.
    """
    try:
        return json.loads(json.dumps(dict(arguments)))
    except TypeError as unfit:
        raise TypeError(f"models: arguments must be plain numbers and words; got {unfit}. Pass no objects.") from unfit


def tied_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits by the embedding's own table: `(..., dim)` → `(..., vocab_size)`. Source: Press and Wolf 2017."""
    return nn.functional.linear(x, weight, bias)
