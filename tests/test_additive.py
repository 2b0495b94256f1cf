"""Additive attention against its formula in float64: masks, gradients, empty rows, NaN that leaks, bad input."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from regard import additive_attention, masks, native
from regard.additive import spelt_out

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# batch, seq_len_q, seq_len_kv, dim, dim_v
SHAPES = [(2, 5, 7, 3, 2), (2, 70, 130, 24, 20), (1, 1, 600, 16, 70), (1, 3, 1100, 5, 1)]


def example(batch: int, n: int, m: int, dim: int, dim_v: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and weight."""
    return [torch.randn(shape).to(dtype) for shape in ((batch, n, dim), (batch, m, dim), (batch, m, dim_v), (dim,))]


def visible(name: str, batch: int, n: int, m: int) -> tuple[masks.Mask | Tensor | None, Tensor | None]:
    """A mask as it is handed in, and the pairs that it lets through."""
    if name == "none":
        return None, None
    if name == "padding":
        lengths = torch.tensor([m // 2, m])[:batch]
        return masks.padding(lengths), (torch.arange(m) < lengths[:, None])[:, None]
    if name == "tensor":
        pairs = torch.rand(batch, n, m) > 0.5
        return pairs, pairs
    pairs = torch.rand(n, m) > 0.3
    return masks.from_tensor(pairs) & ~masks.from_tensor(~pairs), pairs


def off(got: Tensor, want: Tensor) -> float:
    """Relative error of the whole tensor."""
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def allowed(dtype: torch.dtype) -> float:
    """Scores and sums in the wide type; a half type rounds the result once, and the backward pass meets a rounded out,
    whose error stands against a difference of like size in the score gradients."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return 64 * torch.finfo(wide).eps + (dtype != wide) * 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "padding", "tensor", "object"])
@pytest.mark.parametrize("shape", SHAPES)
def test_out_and_gradients_match_the_formula(shape, mask, dtype, isa):
    torch.manual_seed(0)
    given, pairs = visible(mask, *shape[:3])
    ours = [t.requires_grad_() for t in example(*shape, dtype)]
    exact = [t.detach().double().requires_grad_() for t in ours]
    with native.forced_isa(isa):
        out = additive_attention(*ours, mask=given)
        want = spelt_out(*exact, pairs)
        weight = torch.randn(out.shape).to(dtype)
        out.backward(weight)
        want.backward(weight.double())
    assert out.dtype == dtype
    assert off(out, want) < allowed(dtype)
    for a, b in zip(ours, exact, strict=True):
        assert a.grad.dtype == dtype
        assert off(a.grad, b.grad) < allowed(dtype)


@pytest.mark.parametrize("mask", ["none", "padding", "tensor"])
def test_gradients_match_finite_differences(mask):
    torch.manual_seed(0)
    given, _ = visible(mask, 2, 4, 5)
    tensors = [t.requires_grad_() for t in example(2, 4, 5, 3, 2, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: additive_attention(*t, mask=given), tensors)


def test_causal_attends_to_the_past_alone():
    q, k, v, weight = example(2, 90, 90, 8, 4)
    want = spelt_out(q, k, v, weight, torch.ones(90, 90, dtype=torch.bool).tril())
    assert off(additive_attention(q, k, v, weight, mask=masks.causal()), want) < allowed(torch.float32)


def test_scores_beyond_exp_are_no_matter():
    q, k, v, _ = example(1, 70, 90, 8, 4)
    for size in (1e3, -1e3):
        tensors = [t.requires_grad_() for t in (q.clone(), k.clone(), v.clone(), torch.full((8,), size))]
        out = additive_attention(*tensors)
        assert off(out, spelt_out(*tensors)) < 1e-3
        out.sum().backward()
        assert all(t.grad.isfinite().all() for t in tensors)


def test_leading_axes_are_a_batch():
    q, k, v, weight = example(6, 3, 5, 4, 2)
    flat = additive_attention(q, k, v, weight)
    shaped = additive_attention(*(t.view(2, 3, *t.shape[1:]) for t in (q, k, v)), weight)
    assert torch.equal(shaped, flat.view(2, 3, 3, 2))
    assert torch.equal(additive_attention(q[0], k[0], v[0], weight), flat[0])


@pytest.mark.parametrize("shape", [(5,), (3, 5), (1, 3, 5), (4, 3, 5), (2, 1, 3, 5), (2, 4, 1, 5), (1, 4, 3, 1), ()])
def test_a_mask_broadcasts_over_the_leading_axes(shape):
    q, k, v = torch.randn(2, 4, 3, 6), torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 2)
    weight, pairs = torch.randn(6), torch.rand(shape) > 0.4
    want = spelt_out(q, k, v, weight, pairs)
    torch.testing.assert_close(additive_attention(q, k, v, weight, mask=pairs), want.float())


def test_a_query_without_keys_gives_zero_and_zero_gradient():
    tensors = [t.requires_grad_() for t in example(2, 4, 5, 3, 2)]
    pairs = torch.ones(2, 4, 5, dtype=torch.bool)
    pairs[0, 1] = pairs[1] = False
    out = additive_attention(*tensors, mask=pairs)
    assert (out[0, 1] == 0).all() and (out[1] == 0).all() and (out[0, 0] != 0).all()
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in tensors)
    assert (tensors[0].grad[0, 1] == 0).all() and (tensors[1].grad[1] == 0).all()
    none = additive_attention(torch.zeros(1, 2, 3), torch.zeros(1, 0, 3), torch.zeros(1, 0, 4), torch.zeros(3))
    assert torch.equal(none, torch.zeros(1, 2, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [1, 2])
def test_what_is_masked_never_leaks(where, value):
    # Key 40 is hidden from all, key 50 from the first ten queries; its tile is full of others.
    clean = example(1, 70, 90, 8, 4)
    pairs = torch.ones(70, 90, dtype=torch.bool)
    pairs[:, 40] = False
    pairs[:10, 50] = False
    broken = [t.clone() for t in clean]
    broken[where][:, [40, 50]] = value
    ours, exact = ([t.requires_grad_() for t in tensors] for tensors in (broken, clean))
    out, want = (additive_attention(*tensors, mask=pairs) for tensors in (ours, exact))
    torch.testing.assert_close(out[:, :10], want[:, :10])
    out[:, :10].sum().backward()
    want[:, :10].sum().backward()
    only_hidden = [t.detach().clone() for t in broken]
    only_hidden[where][:, 50] = clean[where][:, 50].detach()
    leaves = [t.requires_grad_() for t in only_hidden]
    additive_attention(*leaves, mask=pairs)[:, :10].sum().backward()
    for a, b in zip(leaves, exact, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    if where == 2 or math.isnan(value):
        assert not out[:, 10:].isfinite().any()


def test_any_number_of_threads_gives_the_same_bits():
    tensors = example(3, 130, 1100, 16, 8)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in tensors]
            out = additive_attention(*leaves)
            out.square().sum().backward()
            results.append([out, *(t.grad for t in leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_call_that_needs_no_gradient_gives_the_same_bits():
    tensors = example(2, 70, 90, 8, 4)
    assert torch.equal(additive_attention(*tensors), additive_attention(*(t.requires_grad_() for t in tensors)))


def test_any_strides_give_the_same_bits():
    q, k, v, weight = example(2, 70, 90, 8, 4)
    odd = [torch.stack((t, t), -1)[..., 0] for t in (q.mT, k.mT, v.mT)]
    strided = additive_attention(*(t.mT for t in odd), torch.stack((weight, weight), -1)[..., 0])
    assert torch.equal(strided, additive_attention(q, k, v, weight))


GROWTH = """
import resource, torch, regard
q, k, v = (torch.randn(1, 2000, dim, requires_grad=True) for dim in (64, 64, 8))
weight = torch.randn(64, requires_grad=True)
def run(n):
    regard.additive_attention(q[:, :n], k[:, :n], v[:, :n], weight).sum().backward()
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(2000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_far_below_the_tanh_of_all_pairs():
    # 2,000 x 2,000 x 64 values of tanh would take 1 GiB; forward and backward may grow a fresh process by 64 MiB.
    path = os.pathsep.join([str(Path(native.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", GROWTH],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 64 * 1024  # KiB


def test_numpy_arrays_come_back_as_numpy_arrays():
    tensors = example(2, 3, 5, 4, 2)
    out = additive_attention(*(t.numpy() for t in tensors), mask=np.ones((3, 5), bool))
    assert isinstance(out, np.ndarray)
    np.testing.assert_array_equal(out, additive_attention(*tensors).numpy())


# ---- under torch's own machinery ----


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.sliding_window(2, 0) & masks.padding(torch.tensor([4]))])
def test_opcheck_passes(mask):
    tensors = [t.requires_grad_() for t in example(1, 6, 6, 4, 3)]
    program = ("", [], []) if mask is None else mask.encode()
    results = torch.library.opcheck(torch.ops.regard.additive_attention.default, (*tensors, *program))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("mask", [None, masks.causal() & masks.padding(torch.tensor([4])), torch.ones(6, 6).tril() > 0])
def test_compile_traces_the_whole_graph(mask):
    tensors = [t.requires_grad_() for t in example(1, 6, 6, 4, 3)]

    def function(*tensors: Tensor) -> Tensor:
        return additive_attention(*tensors, mask=mask).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    grads = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, function))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- bad input ----

Q, K, V, W = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5, 6), torch.zeros(4)
REFUSED = {
    "one axis": (
        (W, K, V, W), None, ValueError,
        "additive_attention: q must have the axes (..., seq_len_q, dim); got (4,). Reshape it.",
    ),
    "leading axes": (
        (Q[0], K, V, W), None, ValueError,
        "additive_attention: q, k and v must have the same leading axes; got (), (2,) and (2,). Expand the smaller "
        "ones.",
    ),
    "keys and values": (
        (Q, K, V[:, :4], W), None, ValueError,
        "additive_attention: k and v must have one seq_len_kv; got 5 and 4. Give a value for each key.",
    ),
    "dims": (
        (Q, K[..., :3], V, W), None, ValueError,
        "additive_attention: q and k must have one dim; got 4 and 3. Project them alike.",
    ),
    "no columns": (
        (Q, K, V[..., :0], W), None, ValueError,
        "additive_attention: dim and dim_v must be at least 1; got 4 and 0. Give each some numbers.",
    ),
    "weight": (
        (Q, K, V, W[:3]), None, ValueError,
        "additive_attention: weight must be (dim,) = (4,); got (3,). Give one number for each column of q.",
    ),
    "integers": (
        tuple(t.long() for t in (Q, K, V, W)), None, TypeError,
        "additive_attention: q must be float32, bfloat16, float16 or float64; got torch.int64. Convert it with "
        ".float().",
    ),
    "dtypes": (
        (Q, K, V.double(), W), None, TypeError,
        "additive_attention: v must be in q's dtype, torch.float32; got torch.float64. Convert it with .to(q.dtype).",
    ),
    "shape of mask": (
        (Q, K, V, W), torch.ones(4, 5, dtype=torch.bool), ValueError,
        "additive_attention: mask must be broadcastable to (..., seq_len_q, seq_len_kv) = (2, 3, 5); got (4, 5). Give "
        "each axis its full length or 1.",
    ),
    "too many axes of mask": (
        (Q, K, V, W), torch.ones(1, 2, 3, 5, dtype=torch.bool), ValueError,
        "additive_attention: mask must be broadcastable to (..., seq_len_q, seq_len_kv) = (2, 3, 5); got "
        "(1, 2, 3, 5). Give each axis its full length or 1.",
    ),
    "positional mask": (
        (Q, K, V, W), masks.causal(), ValueError,
        "additive_attention: a positional mask must meet seq_len_q = seq_len_kv; got 3 and 5. Pass the mask as a bool "
        "tensor.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_the_fix(case):
    tensors, mask, kind, message = REFUSED[case]
    with pytest.raises(kind) as caught:
        additive_attention(*tensors, mask=mask)
    assert str(caught.value) == message


def test_a_float_mask_is_refused():
    with pytest.raises(TypeError, match=r"^additive_attention: mask must be"):
        additive_attention(Q, K, V, W, mask=torch.zeros(3, 5))
