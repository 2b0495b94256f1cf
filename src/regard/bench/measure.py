"""One case measured: that all contenders compute the same, how far from float64, how long they take.

Enters: a `Case`.
Leaves: an item of `results`.
Floor 5: above the peers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from regard.bench import ceilings
from regard.bench.cases import Case, Inputs, inputs
from regard.bench.peers import Field, contenders
from regard.bench.timing import race

# What contenders may differ by, of the largest number: roundings of the inputs' dtype, and of 16-bit partial sums.
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2, "float16": 4e-3}
LOWER_PRECISION = 2e-2  # where float32 products may be made of bfloat16
_ROWS = 64  # queries whose error to float64 is measured
_PAUSE = 5e-3


class Unequal(AssertionError):
    """A contender computes something else: a race is only worth something if all arrive."""


def measure(
    case: Case, *, seconds: float = 4.0, longest: float = 20.0, held: bool = False, quick: bool = False
) -> dict[str, Any]:
    """Check and time all contenders of a case.

    Args:
        case: what is computed.
        seconds: for all samples together; each contender gets three at least.
        longest: a call of a sweep that would take longer is not made.
        held: whether this process is held to an instruction set.
        quick: one sample of the ceilings, and no libraries but PyTorch.

    Returns:
        An item without its stamps: seconds, absent, prepared, errors, ceilings, bound, share; or skipped.

    Raises:
        Unequal: a contender's numbers are not the others'.
    """
    now = ceilings.measure(1 if quick else 3)
    bound, least = now.bound(case.dtype, case.flops, case.moved)
    if case.sweep and 2 * least > longest:
        return {"seconds": {}, "skipped": f"a call would take some {2 * least:.0f} s", "ceilings": asdict(now)}
    trains = case.kind == "forward+backward"
    with _precision(case.precision), nullcontext() if trains else torch.no_grad():
        given = inputs(case)
        field = contenders(case, given, held=held, foreign=not quick and not case.sweep)
        if case.sweep:
            _leave_out_slow(case, field, now, longest)
        errors = check(case, given, field)
        foreign = set(field.calls) & {"onnxruntime", "openvino"}
        timings = race(field.calls, seconds=seconds, pause=_PAUSE if foreign else 0.0)
    return {
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
        "absent": field.absent,
        "prepared": field.prepared,
        "errors": errors,
        "ceilings": asdict(now),
        "bound": bound,
        "share": least / timings["regard"].median,
        "tokens": case.batch * case.queries,
    }


def _leave_out_slow(case: Case, field: Field, now: ceilings.Ceilings, longest: float) -> None:
    """PyTorch computes what a mask excludes: that is a reason to leave it out of a long call, and regard in."""
    size = case.seq_len**2 * case.head_dim * case.num_heads * 4
    if "torch" in field.calls and size / now.float32_gflops / 1e9 * 4 > longest:
        del field.calls["torch"]
        field.absent["torch"] = f"a call would take some {4 * size / now.float32_gflops / 1e9:.0f} s"


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision(name)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def check(case: Case, given: Inputs, field: Field) -> dict[str, float]:
    """Run every contender once on the same tensors; the largest error of each to float64, where there is one result.

    Raises:
        Unequal: a contender is further off than rounding allows.
    """
    given.turning = False
    results = {name: call() for name, call in field.calls.items()}
    given.turning = True
    tolerance = LOWER_PRECISION if case.precision != "highest" else TOLERANCE[case.dtype]
    if case.kind == "forward+backward":
        for which, name in enumerate("qkv"):
            _compare({who: grads[which] for who, grads in results.items()}, f"gradient of {name}", case, tolerance)
        return {}
    rows = torch.linspace(0, case.queries - 1, min(_ROWS, case.queries)).long()
    exact = expected(case, *given.sets[0], rows)
    found = {name: (out[:, :, rows].double() - exact).abs().max().item() for name, out in results.items()}
    for name, error in found.items():
        if not error <= tolerance * exact.abs().max().item():
            raise Unequal(f"{case.name}: {name} must compute what regard computes; got an error of {error:.1e}.")
    return found


def _compare(results: Mapping[str, Tensor], what: str, case: Case, tolerance: float) -> None:
    mine = results["regard"].double()
    for name, other in results.items():
        error = (other.double() - mine).abs().max().item()
        if not error <= 2 * tolerance * mine.abs().max().item():
            raise Unequal(f"{case.name}: {name} must have regard's {what}; got a difference of {error:.1e}.")


def expected(case: Case, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Attention of some queries in float64, `(batch, num_heads, rows, head_dim)`, spelt out."""
    group = case.num_heads // case.num_kv_heads
    seen = case.bool_mask(rows)
    out = torch.empty(case.batch, case.num_heads, len(rows), case.head_dim, dtype=torch.float64)
    for batch in range(case.batch):
        for head in range(case.num_heads):
            keys, values = k[batch, head // group].double(), v[batch, head // group].double()
            scores = q[batch, head, rows].double() @ keys.T * case.head_dim**-0.5
            out[batch, head] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return out
