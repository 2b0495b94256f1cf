"""The kernels under a sanitizer: reads and writes out of bounds, undefined arithmetic, races of four threads.

`make sanitize` builds each of BUILDS, then runs this file under its library:

    python tests/sanitize.py thread build/sanitize-thread/_kernels*.so

Torch's memory comes from the sanitizer's malloc, so that a tensor's last byte is the last that a kernel may touch. Each
function of CASES runs on every instruction set of the machine; a new kernel is one more function. Before them, errors
are planted, an overrun, an overflow and a race, and the run fails unless the sanitizer reports each.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import regard
from regard import biases, masks, native, op
from regard.positions import Frame

BUILDS = ("address,undefined", "thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim, head_dim_v: around every edge of a tile and a vector
SHAPES = [(1, 1, 1, 1, 1, 1, 1), (2, 4, 2, 5, 7, 3, 5), (1, 6, 3, 129, 200, 80, 65), (2, 4, 1, 1, 300, 64, 33),
          (1, 2, 1, 200, 70, 128, 1), (1, 2, 2, 64, 64, 64, 64), (1, 1, 1, 3, 1100, 16, 16), (1, 2, 1, 0, 5, 4, 4),
          (1, 2, 1, 5, 0, 4, 4)]  # fmt: skip
CASES: list[Callable[[], None]] = []


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES.append(function)
    return function


def laid(layout: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """A random tensor that owns not a byte more than its elements span."""
    batch, heads, rows, dim = shape
    if layout == "rows":  # heads beside one another, as a projection leaves them
        return torch.randn(batch, rows, heads, dim).to(dtype).transpose(1, 2)
    if layout == "columns":
        return torch.randn(batch, heads, dim, rows).to(dtype).transpose(2, 3)
    return torch.randn(shape).to(dtype)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "plain") -> list[Tensor]:
    batch, heads, kv_heads, n, m, dim, dim_v = shape
    each = ((heads, n, dim), (kv_heads, m, dim), (kv_heads, m, dim_v))
    return [laid(layout, batch, *rest, dtype=dtype).requires_grad_() for rest in each]


def backward(*results: Tensor) -> None:
    """The gradient of everything, with an upstream gradient of other strides than the result's."""
    upstream = [torch.randn(t.mT.shape).to(t.dtype).mT if t.dim() > 1 else torch.ones_like(t) for t in results]
    torch.autograd.backward(results, upstream)


def every_mask(shape: tuple[int, ...]) -> Iterator[masks.Mask | Tensor | None]:
    batch, heads, _, n, m, _, _ = shape
    yield None
    yield masks.causal()
    yield masks.sliding_window(3, 1)
    yield masks.padding(torch.randint(0, m + 1, (batch,)))
    yield masks.padding(torch.rand(batch, m) > 0.5)
    yield masks.documents(torch.arange(n) // 3, torch.arange(m) // 3)
    yield masks.causal() | masks.prefix(2)
    yield masks.strided(3) & masks.sliding_window(9, 0)
    yield torch.rand(batch, heads, n, m) > 0.5
    yield torch.rand(1, 1, n, m) > 0.5


@case
def every_shape_dtype_and_layout() -> None:
    for shape, dtype, layout in itertools.product(SHAPES, DTYPES, ("plain", "rows", "columns")):
        backward(regard.attention(*inputs(shape, dtype, layout)))


@case
def every_mask_and_shape() -> None:
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        for mask in every_mask(shape):
            out, lse, *_ = regard.attention_with_stats(*inputs(shape, dtype), mask=mask, query_offset=shape[4] // 2)
            backward(out, lse)


@case
def every_bias_softcap_sinks_and_dropout() -> None:
    for shape, dtype in itertools.product(SHAPES[1:6], DTYPES):
        batch, heads, _, n, m, _, _ = shape
        dense = [(batch, heads, n, m), (1, heads, 1, m), (batch, 1, n, 1), (n, m)]
        every = [torch.randn(size).to(dtype).requires_grad_(grad) for size in dense for grad in (False, True)]
        table = torch.randn(heads, 32, requires_grad=True).to(dtype)
        buckets = biases.relative_position(table, lambda d: d.clamp(-16, 15) + 16)
        for bias in (None, *every, biases.alibi(), buckets):
            sinks = torch.randn(heads).to(dtype).requires_grad_()
            backward(regard.attention(*inputs(shape, dtype), bias=bias, sinks=sinks, softcap=5.0, query_offset=m - n))
        backward(regard.attention(*inputs(shape, dtype), dropout=0.3))


@case
def statistics_and_tiles() -> None:
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        q, k, v = (t.detach() for t in inputs(shape, dtype, "rows"))
        n, m = shape[3:5]
        for mask in (None, masks.causal(), masks.sliding_window(3, 1), torch.rand(n, m) > 0.5):
            found = regard.attention_with_stats(
                q, k, v, mask=mask, query_offset=m - n, top_k=9, received=True, entropy=True, max_score=True,
                block=(48, 20),
            )  # fmt: skip
            for stage in ("scaled", "biased", "weights"):
                rows, cols = slice(n // 3, n), slice(m // 5, m)
                regard.attention_weights(
                    q, k, rows=rows, cols=cols, stage=stage, lse=found.lse, mask=mask, query_offset=m - n
                )


@case
def steps_with_a_cache() -> None:
    kinds = (
        {},
        {"page_size": 64},
        {"dtype": torch.int8},
        {"left": 40, "first": 3},
        {"page_size": 64, "dtype": torch.int8},
    )
    for dtype, heads, kind in itertools.product(DTYPES, ((4, 4), (8, 2), (3, 1)), kinds):
        cache = regard.KVCache(**kind)
        mask = masks.sliding_window(40, 0) if "left" in kind else masks.causal()
        with torch.no_grad():
            for n in (70, 1, 1, 5, 1):
                q, k, v = inputs((2, *heads, n, n, 33, 20), dtype, "rows")
                sinks = torch.randn(heads[0]).to(dtype)
                regard.attention_with_stats(
                    q, k, v, mask=mask, cache=cache, sinks=sinks, softcap=7.0, received=n == 1 and not kind
                )


@case
def few_queries_over_many_keys() -> None:
    for dtype, layout, n, m in itertools.product(DTYPES, ("plain", "rows", "columns"), (1, 3, 8), (1, 64, 129, 2500)):
        q, k, v = (t.detach() for t in inputs((2, 6, 2, n, m, 40, 33), dtype, layout))
        for mask in (None, masks.causal(), masks.padding(torch.tensor([m // 2, m])), torch.rand(n, m) > 0.5):
            regard.attention_with_stats(
                q, k, v, mask=mask, query_offset=m - n, bias=torch.randn(1, 6, n, m).to(dtype), received=True
            )


@case
def linear_attention() -> None:
    rules = ("linear", "gated", "delta", "gated_delta")
    for rule, dtype, shape in itertools.product(rules, DTYPES, ((2, 4, 2, 5, 3, 5), (1, 3, 1, 150, 65, 33))):
        batch, heads, kv_heads, n, dim, dim_v = shape
        q, k, v = inputs((batch, heads, kv_heads, n, n, dim, dim_v), dtype, "rows")
        gates = {}
        if "gated" in rule:
            gates["decay"] = (-torch.rand(batch, kv_heads, n, dim)).requires_grad_().to(dtype)
        if "delta" in rule:
            gates["beta"] = torch.rand(batch, kv_heads, n, 1, requires_grad=True).to(dtype)
        state = torch.randn(batch, kv_heads, dim, dim_v, requires_grad=True).to(dtype)
        k = torch.nn.functional.normalize(k, dim=-1)
        backward(*regard.linear_attention(q, k, v, rule=rule, **gates, state=state, chunk_size=48))


@case
def additive_attention() -> None:
    for dtype, shape in itertools.product(DTYPES, ((2, 5, 7, 3, 5), (1, 70, 130, 33, 65), (1, 1, 600, 16, 1))):
        batch, n, m, dim, dim_v = shape
        for mask in (None, torch.rand(batch, n, m) > 0.5, masks.padding(torch.randint(0, m, (batch,)))):
            q, k, v, weight = (
                torch.randn(size).to(dtype).requires_grad_()
                for size in ((batch, n, dim), (batch, m, dim), (batch, m, dim_v), (dim,))
            )
            backward(regard.additive_attention(q, k, v, weight, mask=mask))


@case
def second_gradients_with_the_kernels_dropout() -> None:
    q, k, v = inputs((1, 2, 1, 70, 90, 8, 8), torch.float32)
    slopes = torch.autograd.grad(regard.attention(q, k, v, dropout=0.2).square().sum(), (q, k, v), create_graph=True)
    torch.autograd.backward([t.square().sum() for t in slopes])


# ---- planted errors, each in a process of its own ----


def forward(out: Tensor, q: Tensor, lse: Tensor) -> None:
    frame = Frame(q.shape[0], q.shape[1], q.shape[2], q.shape[2])
    op._forward(q, q, q, None, None, None, None, frame, 1.0, 0.0, 0.0, 0, (out, lse))


def overrun() -> None:
    """One row less than the kernel is told to write."""
    q = torch.randn(1, 1, 65, 16)
    short = torch.empty(64 * 16)
    forward(torch.as_strided(short, (1, 1, 64, 16), (1024, 1024, 16, 1)), q, torch.empty(1, 1, 65))


def overflow() -> None:
    """A stride past what an index may be multiplied with."""
    q = torch.randn(4, 1, 1, 16)
    view = (*native.operand(q)[:1], 1 << 62, *native.operand(q)[2:])
    native.operand = lambda t: view
    forward(torch.empty(4, 1, 1, 16), q, torch.empty(4, 1, 1))


def race() -> None:
    """All heads write to one place."""
    q = torch.randn(1, 64, 200, 16)
    forward(torch.empty(1, 1, 200, 16).expand(1, 64, 200, 16), q, torch.empty(1, 64, 200))


PLANTED = {
    "address": {overrun: "heap-buffer-overflow", overflow: "signed integer overflow"},
    "thread": {race: "data race"},
}


def load(module: Path) -> None:
    """The kernels of that file in place of the installed ones; four threads of our own pool, whatever the work."""
    spec = importlib.util.spec_from_file_location("regard._kernels", module)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    sys.modules["regard._kernels"] = found
    regard._kernels = found  # pyright: ignore[reportAttributeAccessIssue]  # where the import looks first
    torch.set_num_threads(1)  # PyTorch's own are not instrumented: what they do looks like races
    native.threads = lambda work: 4


def sees_what_is_planted(kind: str, module: str) -> None:
    for plant, report in PLANTED[kind].items():
        run = subprocess.run(
            [sys.executable, __file__, kind, module, plant.__name__], capture_output=True, text=True, check=False
        )
        if run.returncode == 0 or report not in run.stderr:
            sys.exit(f"sanitize: {plant.__name__} was planted and must be reported as {report!r}; got\n{run.stderr}")
        print(f"{kind}: planted {plant.__name__}: reported", flush=True)


def main(kind: str, module: str, planted: str = "") -> None:
    load(Path(module))
    assert os.environ.get("REGARD_THREADS") == "own"
    if planted:
        next(plant for plant in PLANTED[kind] if plant.__name__ == planted)()
        return
    sees_what_is_planted(kind, module)
    for isa in native.isas():
        with native.forced_isa(isa):
            for function in CASES:
                torch.manual_seed(0)
                start = time.perf_counter()
                function()
                print(f"{kind}: {isa}: {function.__name__}: clean, {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
