"""Contenders timed in turn, so that a machine that slows down slows them all.

Enters: named calls.
Leaves: for each the median, the quartiles and the fastest, in seconds a call.
Floor 0: knows nothing of attention.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]
_SHORTEST = 2e-3  # seconds of one sample: shorter calls are repeated inside it, for the clock and the first touch


@dataclass(frozen=True)
class Timing:
    """Seconds a call takes: median, quartiles, fastest; and how many samples that rests on."""

    median: float
    low: float
    high: float
    best: float
    samples: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median: half of the samples lie within it."""
        return (self.high - self.low) / self.median


def race(
    calls: Mapping[str, Call], *, seconds: float = 4.0, most: int = 200, least: int = 3, pause: float = 0.0
) -> dict[str, Timing]:
    """Time calls in turns until `seconds` are spent or each has `most` samples; each gets at least `least`.

    Args:
        calls: what is timed; each has run once before, so that memory and caches are warm.
        seconds: for all of them together.
        most, least: samples of each.
        pause: seconds to sleep before a sample: threads of other libraries that wait by spinning give the cores back.

    Raises:
        ValueError: no calls, or `least` not within 1 and `most`.

    Example:
        >>> timings = race({"sum": lambda: sum(range(1000))}, seconds=0.01)
        >>> timings["sum"].low <= timings["sum"].median <= timings["sum"].high
        True
    """
    if not calls or not 1 <= least <= most:
        raise ValueError(
            f"race: calls must be there and 1 <= least <= most; got {len(calls)} calls, least {least} and most {most}. "
            "Pass some."
        )
    names, began = list(calls), time.perf_counter()
    first = {name: _sample(call, 1) for name, call in calls.items()}
    repeats = {name: math.ceil(_SHORTEST / max(once, 1e-7)) for name, once in first.items()}
    # Long calls of a first turn count: three turns of seconds each are enough to wait for.
    whole = all(count == 1 for count in repeats.values())
    spent: dict[str, list[float]] = {name: [once] if whole else [] for name, once in first.items()}
    for turn in range(int(whole), most):
        # Who goes first changes with each turn: the second may find what it reads in the cache.
        for name in names if turn % 2 == 0 else names[::-1]:
            if pause:
                time.sleep(pause)
            spent[name].append(_sample(calls[name], repeats[name]))
        if turn + 1 >= least and time.perf_counter() - began > seconds:
            break
    return {name: summary(times) for name, times in spent.items()}


def _sample(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def summary(times: list[float]) -> Timing:
    """Median, quartiles and fastest of some samples.

    Example:
        >>> summary([3.0, 1.0, 2.0])
        Timing(median=2.0, low=1.0, high=3.0, best=1.0, samples=3)
    """
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return Timing(median, low, high, min(times), len(times))
