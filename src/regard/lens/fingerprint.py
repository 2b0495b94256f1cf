"""Which model and tokenizer a recording came from.

Enters: a model, a tokenizer.
Leaves: names and SHA-256 sums that say whether another model or tokenizer is the same one.
Sums are taken when first asked for: hashing reads every weight once.
Floor 5: imports torch alone."""

from __future__ import annotations

import hashlib
import json
import weakref
from importlib import metadata
from typing import Any

import torch
from torch import Tensor


class Weights:
    """A model's weights as they were at one moment, known by a weak reference and each tensor's version."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._state = _state(model)

    def sha256(self) -> str | None:
        """SHA-256 of names, types, shapes and bytes in the order of names; None where they changed or are gone."""
        model = self._model()
        if model is None or _state(model) != self._state:
            return None
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))
        return digest.hexdigest()


def model_facts(model: Any) -> dict[str, Any]:
    """A model's id, as it was loaded, and its class."""
    name = str(getattr(model, "name_or_path", "") or "")
    return {"id": name or type(model).__name__, "class": type(model).__name__}


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's id and the SHA-256 of all that decides how it splits."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        held = json.loads(backend.to_str())
        held.pop("truncation", None)  # these two follow the last call, not the tokenizer
        held.pop("padding", None)
    else:
        held = tokenizer.get_vocab()
    text = json.dumps(held, sort_keys=True, ensure_ascii=True)
    return {"id": str(tokenizer.name_or_path), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def versions() -> dict[str, str]:
    """Versions of the libraries that made a recording."""
    found = {}
    for name in ("regard", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _state(model: Any) -> list[tuple[str, int, int]]:
    return [
        (name, tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
    ]


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
