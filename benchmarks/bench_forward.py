"""How long a forward pass of `regard.attention` takes beside PyTorch's own, in one process, taking turns.

Enters: sizes on the command line. Leaves: a table of medians and ratios on standard output (a ratio above 1: regard is
the faster), and everything that was measured as JSON. Never part of the tests: numbers depend on the machine.

    python benchmarks/bench_forward.py                              the whole table
    python benchmarks/bench_forward.py --lengths 512 --repeats 5    a quick look
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import regard
from regard import masks, native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One call: which keys a query sees, and the shapes. `window` keys up to and with its own, where it is set."""

    kind: str
    dtype: str
    batch: int
    num_heads: int
    num_kv_heads: int
    seq_len: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender: the median, and the quartiles on both sides of it."""

    median: float
    low: float
    high: float
    repeats: int


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Dense and causal at every length, dtype and head size; then the window, against a bool mask."""
    heads = (options.batch, options.heads, options.kv_heads)
    for kind in ("dense", "causal"):
        for dtype in options.dtypes:
            for head_dim in options.head_dims:
                for seq_len in options.lengths:
                    yield Case(kind, dtype, *heads, seq_len, head_dim)
    for dtype in options.dtypes:
        for head_dim in options.head_dims:
            yield Case("window", dtype, *heads, max(options.lengths), head_dim, window=options.window)


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a case: the same for every run."""
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int) -> Tensor:
        shape = (case.batch, num_heads, case.seq_len, case.head_dim)
        return torch.randn(shape, generator=generator).to(DTYPES[case.dtype])

    return draw(case.num_heads), draw(case.num_kv_heads), draw(case.num_kv_heads)


def contenders(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The same attention, computed by each. What each needs beforehand (a mask) is made here and not timed."""
    grouped = case.num_heads != case.num_kv_heads
    if case.kind == "dense":
        return {
            "regard": lambda: regard.attention(q, k, v),
            "torch": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=grouped),
        }
    if case.kind == "causal":
        causal = masks.causal()
        return {
            "regard": lambda: regard.attention(q, k, v, mask=causal),
            "torch": lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped),
        }
    assert case.window is not None
    window = masks.sliding_window(case.window - 1, 0)
    position = torch.arange(case.seq_len)
    distance = position[:, None] - position[None, :]
    seen = (distance >= 0) & (distance < case.window)
    return {
        "regard": lambda: regard.attention(q, k, v, mask=window),
        "torch": lambda: scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped),
    }


def race(calls: dict[str, Callable[[], Tensor]], seconds: float, repeats: int) -> dict[str, Timing]:
    """Time the contenders in turn, so that a machine that slows down slows both, until either limit is reached."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # memory, threads and caches are warm from here on
    began = time.perf_counter()
    for turn in range(repeats):
        # Who goes first changes with each turn: the second finds k and v in the cache.
        order = list(calls) if turn % 2 == 0 else list(reversed(calls))
        for name in order:
            start = time.perf_counter()
            calls[name]()
            spent[name].append(time.perf_counter() - start)
        if turn >= 4 and time.perf_counter() - began > seconds:
            break
    return {name: summary(times) for name, times in spent.items()}


def summary(times: list[float]) -> Timing:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return Timing(median, low, high, len(times))


def multiplications(case: Case) -> float:
    """Multiply-adds of the visible pairs: q k and weights v."""
    length, window = case.seq_len, min(case.window or case.seq_len, case.seq_len)
    pairs = {
        "dense": length * length,
        "causal": length * (length + 1) / 2,
        "window": window * (window + 1) / 2 + (length - window) * window,
    }[case.kind]
    return case.batch * case.num_heads * pairs * case.head_dim * 2


def machine() -> dict[str, object]:
    """What the numbers depend on besides the code."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": native.isa(),
        "isas": native.isas(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The processor's name as its maker gives it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def row(case: Case, timings: dict[str, Timing]) -> str:
    """One line of the table."""
    mine, theirs = timings["regard"], timings["torch"]
    rate = 2e-9 * multiplications(case) / mine.median
    spread = (mine.high - mine.low) / mine.median
    return (
        f"{case.kind:8}{case.dtype:10}{case.seq_len:6}{case.head_dim:5}{mine.median * 1e3:11.2f}"
        f"{theirs.median * 1e3:11.2f}{theirs.median / mine.median:8.2f}{spread:8.0%}{rate:10.1f}"
    )


HEADER = (
    f"{'mask':8}{'dtype':10}{'n':>6}{'d':>5}{'regard ms':>11}{'torch ms':>11}{'ratio':>8}{'spread':>8}{'GFLOP/s':>10}"
)


def difference(calls: dict[str, Callable[[], Tensor]]) -> float:
    """The largest difference between the two results: a race is only worth something if both arrive."""
    results = [call().float() for call in calls.values()]
    return (results[0] - results[1]).abs().max().item()


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--window", type=int, default=512, help="keys that a query sees in the window case")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--repeats", type=int, default=50, help="turns at most; at least five are taken")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for one line of the table")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Run every case and print a line for each."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    described = machine()
    print(f"{described['processor']}, {described['threads']} threads, {described['isa']}, torch {torch.__version__}")
    print(HEADER)
    measured = []
    with torch.inference_mode():
        for case in cases(options):
            calls = contenders(case, *tensors(case))
            error = difference(calls)
            timings = race(calls, options.seconds, options.repeats)
            print(row(case, timings), flush=True)
            seconds = {name: asdict(timing) for name, timing in timings.items()}
            ratio = timings["torch"].median / timings["regard"].median
            measured.append({**asdict(case), "seconds": seconds, "ratio": ratio, "largest_difference": error})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": described, "cases": measured}, indent=1) + "\n", "utf-8")
        print(f"written to {options.json}")


if __name__ == "__main__":
    main(sys.argv[1:])
