"""Holding every library to one instruction set.

Enters: the name of an instruction set.
Leaves: the environment of a process in which regard and PyTorch use no more than that; both read it when they load.
Floor 1: above native.

What binds PyTorch: its own loops obey ATEN_CPU_CAPABILITY, oneDNN's products (bfloat16, float16) ONEDNN_MAX_CPU_ISA,
and MKL's float32 products MKL_ENABLE_INSTRUCTIONS on Intel's processors. On AMD's, MKL takes no such order;
RESULTS.md says what was seen there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from regard import native

# ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS
HELD = {
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "portable": ("default", "SSE41", "SSE4_2"),
}
NAMES = ("REGARD_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
FREE = "best"  # the column in which each library takes the best that it finds


def check_column(name: str) -> str:
    """Return a column's name if this machine can run it.

    Raises:
        ValueError: the processor lacks it, or there is no order to hold PyTorch to it.

    Example:
        >>> check_column("best")
        'best'
    """
    able = [FREE, *(isa for isa in native.isas() if isa in HELD)]
    if name not in able:
        raise ValueError(f"bench: isa must be one of {', '.join(able)} on this processor; got {name!r}. Choose one.")
    return name


def environment(column: str, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that measures a column.

    Args:
        column: "best" (everything as the user's environment has it) or an instruction set of this processor.
        inherited: what it starts from; default this process's.

    Example:
        >>> held = environment("portable", {"HOME": "/"})
        >>> held["REGARD_ISA"], held["ATEN_CPU_CAPABILITY"], held["ONEDNN_MAX_CPU_ISA"]
        ('portable', 'default', 'SSE41')
    """
    base = dict(os.environ if inherited is None else inherited)
    if check_column(column) == FREE:
        return base
    return {**base, **dict(zip(NAMES, (column, *HELD[column]), strict=True))}
