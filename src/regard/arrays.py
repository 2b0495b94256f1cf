"""Arrays of other libraries: taken in without a copy where they allow it, and given back in kind.

Enters: anything on the CPU that speaks DLPack, such as arrays of NumPy and JAX.
Leaves: torch tensors on the same memory, and a function that turns a torch tensor into the caller's kind of array.
Floor 0: pure, imports torch and numpy alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Give = Callable[[Tensor], Any]
_CPU = 1  # kDLCPU


def taken(caller: str, named: dict[str, object]) -> tuple[list[Tensor], Give | None]:
    """The arrays as torch tensors, and how to give a result back; None where they are torch tensors already.

    Raises:
        TypeError: where one is no array, or they are of several kinds, or their library cannot take an array back.
    """
    kinds = {name: _kind(caller, name, array) for name, array in named.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} of {kind}" for name, kind in kinds.items())
        raise TypeError(
            f"{caller}: {', '.join(kinds)} must be arrays of one library; got {listed}. Convert them to one."
        )
    tensors = [_tensor(caller, name, array) for name, array in named.items()]
    return tensors, _give(caller, next(iter(named.values())))


def tensor(caller: str, name: str, array: Any) -> Any:
    """One argument as a torch tensor where it is an array of another library; anything else is passed through."""
    if isinstance(array, Tensor) or not hasattr(array, "__dlpack__"):
        return array
    return _tensor(caller, name, array)


def _kind(caller: str, name: str, array: object) -> str:
    if not isinstance(array, Tensor) and not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"{caller}: {name} must be a torch tensor or an array that speaks DLPack; got {type(array).__name__}. "
            "Make it with torch.tensor(...) or numpy.array(...)."
        )
    return "torch" if isinstance(array, Tensor) else type(array).__module__.partition(".")[0]


def _tensor(caller: str, name: str, array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    if isinstance(array, np.ndarray):
        plain = array.flags.writeable and array.dtype.isnative and all(stride >= 0 for stride in array.strides)
        try:
            return torch.from_numpy(array if plain else array.astype(array.dtype.newbyteorder("=")))
        except TypeError as refused:
            raise TypeError(
                f"{caller}: {name} must hold numbers; got dtype {array.dtype}. Convert it to float32."
            ) from refused
    device = array.__dlpack_device__()[0]
    if device != _CPU:
        raise ValueError(
            f"{caller}: {name} must be on the CPU; got DLPack device {int(device)}. Copy it to the CPU first."
        )
    return torch.from_dlpack(array)


def _give(caller: str, array: Any) -> Give | None:
    if isinstance(array, Tensor):
        return None
    if isinstance(array, np.ndarray):
        return lambda result: result.detach().contiguous().numpy()
    library = type(array).__module__.partition(".")[0]
    namespace = array.__array_namespace__() if hasattr(array, "__array_namespace__") else sys.modules.get(library)
    from_dlpack = getattr(namespace, "from_dlpack", None)
    if from_dlpack is None:
        raise TypeError(
            f"{caller}: the arrays' library must have from_dlpack, to give the answer in kind; got {library}. "
            "Convert them with torch.from_dlpack(...)."
        )
    return lambda result: from_dlpack(result.detach().contiguous())
