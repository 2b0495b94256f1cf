"""The engine beside PyTorch's: forward, backward, windows, documents, decoding, small calls, statistics.

Enters: names of cases on the command line. Leaves: a table of ratios (above 1: regard is the faster), the
machine's own rates of the same run (a large matrix product, a copy), everything as JSON, and with --markdown a table
for RESULTS.md. Never part of the tests.

    python benchmarks/bench_engine.py                    everything: some minutes
    python benchmarks/bench_engine.py decode window      the cases whose names hold one of these words
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from bench_forward import DTYPES, machine, race
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import regard
from regard import masks

Call = Callable[[], object]


def draw(*shape: int, dtype: torch.dtype, grad: bool = False) -> Tensor:
    """Normal numbers, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).requires_grad_(grad)


def trained(function: Callable[..., Tensor], *inputs: Tensor) -> Call:
    """Forward and backward."""

    def call() -> object:
        out = function(*inputs)
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return call


def cases() -> Iterator[tuple[str, dict[str, Call]]]:
    """Name and contenders. What each needs beforehand (a dense mask) is made here and not timed."""
    for name, dtype in DTYPES.items():
        for dim in (64, 128):
            for length in (2048, 8192):
                q, k, v = (draw(1, 8, length, dim, dtype=dtype) for _ in range(3))
                yield (
                    f"forward {name} {length} x {dim}",
                    {
                        "regard": lambda q=q, k=k, v=v: regard.attention(q, k, v),
                        "torch": lambda q=q, k=k, v=v: sdpa(q, k, v),
                    },
                )
            q, k, v = (draw(1, 8, 2048, dim, dtype=dtype, grad=True) for _ in range(3))
            yield (
                f"forward+backward {name} 2048 x {dim}",
                {"regard": trained(regard.attention, q, k, v), "torch": trained(sdpa, q, k, v)},
            )
        q, k, v = (draw(1, 8, 512, 64, dtype=dtype) for _ in range(3))
        yield (
            f"causal {name} 512 x 64",
            {
                "regard": lambda q=q, k=k, v=v: regard.attention(q, k, v, mask=masks.causal()),
                "torch": lambda q=q, k=k, v=v: sdpa(q, k, v, is_causal=True),
            },
        )
        q, k, v = (draw(1, 8, 128, 64, dtype=dtype) for _ in range(3))
        yield (
            f"small {name} 128 x 64",
            {"regard": lambda q=q, k=k, v=v: regard.attention(q, k, v), "torch": lambda q=q, k=k, v=v: sdpa(q, k, v)},
        )
    index = torch.arange(8192)
    distance = index[:, None] - index
    window, inside = masks.sliding_window(511, 0), (distance >= 0) & (distance < 512)
    documents, together = masks.documents(index // 1024), index[:, None] // 1024 == index // 1024
    for name in ("float32", "bfloat16"):
        dtype = DTYPES[name]
        q, k, v = (draw(1, 8, 8192, 64, dtype=dtype) for _ in range(3))
        for kind, mask, dense in (("window of 512", window, inside), ("eight documents", documents, together)):
            yield (
                f"{kind} {name} 8192 x 64",
                {
                    "regard": lambda q=q, k=k, v=v, mask=mask: regard.attention(q, k, v, mask=mask),
                    "torch": lambda q=q, k=k, v=v, dense=dense: sdpa(q, k, v, attn_mask=dense),
                },
            )
        q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
        yield (
            f"window of 512 forward+backward {name} 8192 x 64",
            {
                "regard": trained(lambda q, k, v: regard.attention(q, k, v, mask=window), q, k, v),
                "torch": trained(lambda q, k, v: sdpa(q, k, v, attn_mask=inside), q, k, v),
            },
        )
        for batch, length in ((1, 8192), (8, 4096)):
            q = draw(batch, 32, 1, 128, dtype=dtype)
            k, v = (draw(batch, 8, length, 128, dtype=dtype) for _ in range(2))
            yield (
                f"decode {name} batch {batch}, 32/8 heads, {length} x 128",
                {
                    "regard": lambda q=q, k=k, v=v: regard.attention(q, k, v),
                    "torch": lambda q=q, k=k, v=v: sdpa(q, k, v, enable_gqa=True),
                },
            )
    q, k, v = (draw(1, 8, 2048, 64, dtype=torch.float32) for _ in range(3))
    asked = {"top_k": 8, "received": True, "entropy": True}
    yield (
        "statistics against the plain forward float32 2048 x 64",
        {"regard": lambda: regard.attention_with_stats(q, k, v, **asked), "torch": lambda: regard.attention(q, k, v)},
    )


def rates() -> dict[str, float]:
    """What the machine itself does now: a 2,048-wide matrix product in GFLOP/s, a copy of 64 MiB in GB/s."""
    a, b = (draw(2048, 2048, dtype=torch.float32) for _ in range(2))
    data = torch.ones(1 << 24)
    target = torch.empty_like(data)
    best = {"matmul": 1e9, "copy": 1e9}
    for _ in range(7):
        for name, call in (("matmul", lambda: a @ b), ("copy", lambda: target.copy_(data))):
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return {"matmul_gflops": 2 * 2048**3 / best["matmul"] / 1e9, "copy_gb_per_s": 2 * data.nbytes / best["copy"] / 1e9}


def main(arguments: list[str]) -> None:
    """Run the cases asked for and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", help="run the cases whose names hold one of these")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for one case")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write the table there")
    options = parser.parse_args(arguments)
    described = {**machine(), **rates()}
    lines = [
        f"{described['processor']}, {described['threads']} threads, {described['isa']}, torch {torch.__version__} "
        f"({described['torch_isa']}), matrix product {described['matmul_gflops']:.0f} GFLOP/s, "
        f"copy {described['copy_gb_per_s']:.0f} GB/s",
        "",
        "| case | ratio | spread |",
        "| --- | ---: | ---: |",
    ]
    print("\n".join(lines))
    measured = []
    for name, calls in cases():
        if options.words and not any(word in name for word in options.words):
            continue
        timings = race(calls, options.seconds, options.repeats)  # type: ignore[arg-type]
        mine, theirs = timings["regard"], timings["torch"]
        lines.append(f"| {name} | {theirs.median / mine.median:.2f} | {(mine.high - mine.low) / mine.median:.0%} |")
        print(lines[-1], flush=True)
        seconds = {who: asdict(timing) for who, timing in timings.items()}
        measured.append({"case": name, "ratio": theirs.median / mine.median, "seconds": seconds})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": described, "cases": measured}, indent=1) + "\n", "utf-8")
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
