"""The door to the compiled kernels, seen from Python.

Enters: torch tensors that `check` has passed, and plain numbers.
Leaves: kernel calls on their addresses and strides; the instruction set in use; the threads, which are PyTorch's own.
Floor 0: knows torch and `_kernels`, nothing of masks or gradients.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
STAGES = {"scaled": 0, "capped": 1, "biased": 2, "weights": 3}
_PRECISIONS = {"highest": 0, "high": 1, "medium": 2}
LANES = KEYS = 64  # queries and keys of one score tile, as in kernels/view.h

View = tuple[int, int, int, int, int]
BiasView = tuple[int, int, int, int, int, bool]
ABSENT: View = (0, 0, 0, 0, 0)
_SMALL = 1 << 18  # multiplications below which waking a second thread costs more than it saves


@cache
def kernels() -> ModuleType:
    """The compiled module, loaded on first use and joined to PyTorch's pool of threads."""
    try:
        from regard import _kernels
    except ImportError as error:
        raise ImportError(
            f"regard: the compiled kernels must be importable; got {error}. Install the package (pip install .), or "
            'pass backend="reference".'
        ) from error
    if left_out := _kernels.left_out():
        warnings.warn(
            f"regard: an instruction set of this processor is left out: {left_out}. The next best one serves; please "
            "report the processor and the system.",
            RuntimeWarning,
            stacklevel=2,
        )
    if os.environ.get("REGARD_THREADS") != "own":
        _kernels.use_openmp(_gomp_parallel())
    return _kernels


def _gomp_parallel() -> int:
    """Address of GOMP_parallel in the OpenMP library that torch has loaded, or 0: two pools would fight."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return 0
    here = str(Path(torch.__file__).parent.parent)
    loaded = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if "omp" in line and ".so" in line}
    for path in sorted(loaded, key=lambda p: (not p.startswith(here), p)):
        try:
            function = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_NOLOAD).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def isas() -> list[str]:
    """Instruction sets that this processor can run, best first."""
    return kernels().isas()


def hidden_isas() -> list[str]:
    """Instruction sets that are computed in others' stead, for tests: "amx_emulated". Never picked but by name."""
    return kernels().hidden_isas()


_forced: str | None = None


def isa() -> str:
    """The instruction set in use: the best one, or the one that REGARD_ISA names.

    Raises:
        ValueError: REGARD_ISA names one that this processor lacks.
    """
    name = _forced or os.environ.get("REGARD_ISA")
    if not name:
        return isas()[0]
    if name not in _all():
        raise ValueError(
            f"REGARD_ISA must name an instruction set that this processor has; got {name!r}. "
            f"Use one of: {', '.join(isas())}."
        )
    return name


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Run the block on one instruction set, whatever REGARD_ISA says."""
    global _forced
    before, _forced = _forced, name
    try:
        isa_number.cache_clear()
        isa()
        yield
    finally:
        _forced = before
        isa_number.cache_clear()


@cache
def isa_number() -> int:
    """Index of the instruction set in use among all that there are."""
    return _all().index(isa())


def statistics_repeat_forward() -> bool:
    """Whether the statistics' pass over the values gives the forward kernel's bits: where it has no tiles."""
    return not isa().startswith("amx")


def _all() -> list[str]:
    return isas() + hidden_isas()


def precision() -> int:
    """How float32 is to be multiplied, as kernels/view.h numbers it."""
    return _PRECISIONS[torch.get_float32_matmul_precision()]


def threads(work: int) -> int:
    """Threads for a call of `work` multiplications."""
    return 1 if work < _SMALL else torch.get_num_threads()


def view(t: Tensor) -> View:
    """Address and strides of a 4-D tensor; a dimension of size 1 broadcasts."""
    n0, n1, n2, n3 = t.shape
    s0, s1, s2, s3 = t.stride()
    return (t.data_ptr(), s0 if n0 > 1 else 0, s1 if n1 > 1 else 0, s2 if n2 > 1 else 0, s3 if n3 > 1 else 0)


def operand(t: Tensor) -> View:
    """Address and strides of q, k, v or out: the last stride counts even where there is one column."""
    s0, s1, s2, s3 = t.stride()
    return (t.data_ptr(), s0, s1, s2, s3 if t.shape[3] > 1 else 1)


def down(view: View, t: Tensor, rows: int) -> View:
    """The view of `t` from row `rows` on."""
    return (view[0] + rows * view[3] * t.element_size(), *view[1:])


def rows_view(t: Tensor, first: int = 0) -> View:
    """Address, from row `first`, and strides of a (batch, num_heads, seq_len_q) tensor."""
    s0, s1, s2 = t.stride()
    return (t.data_ptr() + first * s2 * t.element_size(), s0, s1, s2, 0)


def bias_view(bias: Tensor | None, diagonal: Tensor | None, first_row: int, seq_len_q: int) -> BiasView:
    """A bias as the kernel reads it, from query `first_row` on, and whether it is float32; a diagonal steps back."""
    if bias is not None:
        address, s0, s1, s2, s3 = view(bias)
        return (address + first_row * s2 * bias.element_size(), s0, s1, s2, s3, bias.dtype == torch.float32)
    if diagonal is not None:
        n0, n1, _ = diagonal.shape
        s0, s1, s2 = diagonal.stride()
        address = diagonal.data_ptr() + (seq_len_q - 1 - first_row) * s2 * diagonal.element_size()
        return (address, s0 if n0 > 1 else 0, s1 if n1 > 1 else 0, -s2, s2, diagonal.dtype == torch.float32)
    return (*ABSENT, False)
