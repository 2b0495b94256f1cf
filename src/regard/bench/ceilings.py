"""What the machine can do at best, measured a moment before it is compared with.

Enters: the instruction set in use.
Leaves: arithmetic peaks in GFLOP/s, reading and copying in GB/s, all threads at work.
Floor 1: above native. Source: Williams et al. 2009 (roofline).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from regard import native

# As in kernels/view.h.
FLOAT32, PAIRS, TILES, READ, COPY = 0, 2, 3, 4, 5
_BYTES = 1 << 28  # of the buffer that is read: many times any cache
_ROUNDS = 200_000  # of a peak


@dataclass(frozen=True)
class Ceilings:
    """Peaks of one moment; None where the instruction set has no such instruction.

    Args:
        float32_gflops: multiply-adds of float32 vectors.
        pairs_gflops: bfloat16 multiplied in pairs and added up in float32.
        tiles_gflops: tile registers (AMX).
        read_gb_per_s: bytes read once.
        copy_gb_per_s: bytes read and written, both counted.
    """

    float32_gflops: float
    pairs_gflops: float | None
    tiles_gflops: float | None
    read_gb_per_s: float
    copy_gb_per_s: float

    def peak(self, dtype: str) -> tuple[str, float]:
        """The largest arithmetic rate that products of this dtype can use exactly, and its name."""
        if dtype == "bfloat16":
            for name, rate in (("tile peak", self.tiles_gflops), ("pair peak", self.pairs_gflops)):
                if rate:
                    return name, rate
        return "FMA peak", self.float32_gflops

    def bound(self, dtype: str, flops: float, moved: float) -> tuple[str, float]:
        """The ceiling that binds a piece of work, and the seconds that it takes at least.

        Example:
            >>> ceilings = Ceilings(400.0, 800.0, None, 40.0, 40.0)
            >>> ceilings.bound("bfloat16", 8e9, 1e6)
            ('pair peak', 0.01)
            >>> ceilings.bound("float32", 1e6, 4e9)
            ('read bandwidth', 0.1)
        """
        name, rate = self.peak(dtype)
        return max((name, flops / rate / 1e9), ("read bandwidth", moved / self.read_gb_per_s / 1e9), key=lambda b: b[1])


def measure(samples: int = 5) -> Ceilings:
    """Measure every ceiling of the instruction set in use: 10 to 40 ms a sample, the best of `samples` counts."""
    source, target = _buffers()
    from_, to = source.data_ptr(), target.data_ptr()
    peaks = [_best(samples, kind, _ROUNDS, 0, 0, 0) for kind in (FLOAT32, PAIRS, TILES)]
    read = _best(samples, READ, 0, from_, to, _BYTES)
    copied = _best(samples, COPY, 0, from_, to, target.nbytes)
    assert peaks[0] is not None and read is not None and copied is not None
    return Ceilings(peaks[0], peaks[1], peaks[2], read, copied)


@cache
def _buffers() -> tuple[Tensor, Tensor]:
    return torch.ones(_BYTES // 4), torch.zeros(_BYTES // 8)


def _best(samples: int, kind: int, rounds: int, source: int, target: int, size: int) -> float | None:
    """Operations or bytes a nanosecond, None where there is no such instruction."""
    best = 0.0
    for _ in range(samples):
        start = time.perf_counter()
        done = native.kernels().ceiling(
            native.isa_number(), kind, rounds, source, target, size, torch.get_num_threads()
        )
        best = max(best, done / (time.perf_counter() - start) / 1e9)
    return best or None
