"""The operator under autograd, torch.compile, torch.export and opcheck."""

import math

import pytest
import torch
from torch import Tensor

import regard
from regard import masks, native
from test_kernels import attend, formula, in_fresh_process


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


MASKS = {
    "none": None,
    "causal": masks.causal(),
    "scattered": masks.from_tensor(torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5),
    "padded window": masks.padding(torch.tensor([3, 7])) & masks.sliding_window(2, 1),
}
BIASES = {
    "none": None,
    "dense": (2, 4, 5, 7),
    "per key": (1, 4, 1, 7),
    "per query": (2, 1, 5, 1),
    "diagonal": (1, 4, 11),
    "diagonals of rows": (2, 1, 11),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_match_finite_differences(mask, bias, softcap):
    torch.manual_seed(0)
    q, k, v, sinks = random(2, 4, 5, 3), random(2, 2, 7, 3), random(2, 2, 7, 2), random(4)
    shape = BIASES[bias]
    name = "diagonal" if shape is not None and len(shape) == 3 else "bias"
    extra = [] if shape is None else [random(*shape)]

    def function(q, k, v, sinks, *extra):
        biases = {name: extra[0]} if extra else {}
        return attend(q, k, v, sinks=sinks, mask=MASKS[mask], softcap=softcap, query_offset=2, scale=-0.7, **biases)

    assert torch.autograd.gradcheck(function, (q, k, v, sinks, *extra))


def test_gradients_with_dropout_match_finite_differences():
    q, k, v = random(1, 2, 70, 4), random(1, 1, 90, 4), random(1, 1, 90, 4)

    def function(q, k, v):
        torch.manual_seed(3)
        return attend(q, k, v, dropout=0.3, mask=masks.causal(), query_offset=20)

    assert torch.autograd.gradcheck(function, (q, k, v), fast_mode=True)


@pytest.fixture(params=native.isas())
def isa(request):
    with native.forced_isa(request.param):
        yield request.param


@pytest.mark.parametrize("shape", ["BHQK", "1HQK", "B1QK", "11QK", "1H1K", "BHQ1", "1111"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_a_dense_bias_is_gathered_whatever_it_broadcasts_over(isa, dtype, shape):
    # several key parts (512 keys each), several tiles, groups, odd sizes
    size = {"B": 2, "H": 4, "Q": 70, "K": 1100, "1": 1}
    q, k, v = torch.randn(2, 4, 70, 24), torch.randn(2, 2, 1100, 24), torch.randn(2, 2, 1100, 17)
    bias, grad = torch.randn([size[axis] for axis in shape]), torch.randn(2, 4, 70, 17)
    wide = [t.to(dtype).double().requires_grad_() for t in (q, k, v, bias)]
    arguments = {"mask": masks.sliding_window(400, 300), "softcap": 4.0, "query_offset": 600}
    want = torch.autograd.grad(regard.attention(*wide[:3], bias=wide[3], backend="reference", **arguments), wide, grad)

    inputs = [t.detach().to(dtype).requires_grad_() for t in wide]
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = regard.attention(*inputs[:3], bias=inputs[3], **arguments)
        found.append(torch.autograd.grad(out, inputs, grad.to(dtype)))
    torch.set_num_threads(2)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for one, other, exact in zip(*found, want, strict=True):
        assert torch.equal(one, other)
        summed = (2 * 4 * 70 * 1100 / exact.numel()) ** 0.5  # what broadcasts adds up many roundings, to 0 at best
        assert (one.double() - exact).abs().max() <= tolerance * (exact.abs().max() + 0.1 * max(1.0, summed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_at_length_match_float64(isa, dtype):
    # Several panels of rows, several parts of keys, groups of heads, ranges and bits.
    shapes = [(1, 4, 700, 32), (1, 2, 900, 32), (1, 2, 900, 24)]
    scattered = torch.rand(700, 900) > 0.5
    for mask in (
        masks.causal(),
        masks.sliding_window(100, 0),
        masks.from_function(lambda b, h, p, j: scattered[p - 200, j]),
    ):
        inputs = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
        wide = [t.detach().double().requires_grad_() for t in inputs]
        out, lse = attend(*inputs, mask=mask, query_offset=200)
        expected, expected_lse, _ = formula(*wide, mask=mask, query_offset=200)
        seen = expected_lse > -math.inf
        weight = torch.randn(out.shape)
        ((out.double() * weight).sum() + lse[seen].double().sum()).backward()
        ((expected * weight).sum() + expected_lse[seen].sum()).backward()
        for ours, theirs in zip(inputs, wide, strict=True):
            assert ours.grad.dtype == dtype
            error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
            assert error < {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


def test_nan_in_rows_that_no_query_may_see_reaches_no_gradient():
    inputs = [torch.randn(1, 2, 20, 8) for _ in range(3)]
    inputs[1][:, :, 12:], inputs[2][:, :, 12:] = math.nan, math.inf
    inputs = [t.requires_grad_() for t in inputs]
    out, lse = attend(*inputs, mask=masks.padding(torch.tensor([12])))
    (out.sum() + lse.sum()).backward()
    for t in inputs:
        assert t.grad.isfinite().all()
    assert (inputs[1].grad[:, :, 12:] == 0).all() and (inputs[2].grad[:, :, 12:] == 0).all()


def test_a_row_without_keys_has_zero_gradient():
    q, k, v, sinks = random(1, 1, 4, 3), random(1, 1, 4, 3), random(1, 1, 4, 3), random(1)
    out, lse = attend(q, k, v, mask=masks.causal(), query_offset=-2, sinks=sinks)
    (out.sum() + lse.sum()).backward()
    assert (q.grad[:, :, :2] == 0).all() and q.grad.isfinite().all() and sinks.grad.isfinite().all()
    q.grad = None
    out, lse = attend(q, k, v, mask=masks.causal(), query_offset=-2)
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    assert (q.grad[:, :, :2] == 0).all() and not k.grad.isnan().any()


def test_a_call_that_needs_no_gradient_gives_the_same_bits():
    q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    with_gradient = attend(q.clone().requires_grad_(), k, v, mask=masks.causal())
    without = attend(q, k, v, mask=masks.causal())
    assert torch.equal(with_gradient[0], without[0]) and torch.equal(with_gradient[1], without[1])
    assert with_gradient[0].stride() == without[0].stride()


def test_gradients_are_the_same_bits_for_any_thread_count():
    inputs = [torch.randn(2, 4, 300, 32) for _ in range(3)]
    grads = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in inputs]
            attend(*leaves, mask=masks.causal())[0].square().sum().backward()
            grads.append([t.grad for t in leaves])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("mask", [None, masks.causal() & masks.padding(torch.tensor([4])), masks.sliding_window(3, 0)])
@pytest.mark.parametrize("bias", [None, (1, 4, 1, 6)])
def test_opcheck_passes(mask, bias):
    q, k, v = (torch.randn(1, h, 6, 8, requires_grad=True) for h in (4, 2, 2))
    program = ("", [], []) if mask is None else mask.encode()
    bias = None if bias is None else torch.randn(bias, requires_grad=True)
    sinks = torch.randn(4, requires_grad=True)
    arguments = (q, k, v, bias, None, sinks, *program, 0.3, 2.0, 0.0, None, 0, 0, None, None)
    results = torch.library.opcheck(torch.ops.regard.attention.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_compile_and_export_trace_the_whole_graph():
    q, k, v = (torch.randn(1, h, 6, 8, requires_grad=True) for h in (4, 2, 2))

    def function(q, k, v):
        return attend(q * 2, k, v, mask=masks.causal() & masks.sliding_window(3, 0))[0] + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), function(q, k, v))
    grads = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    for ours, theirs in zip(grads, torch.autograd.grad(function(q, k, v).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs)

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return function(q, k, v)

    plain = tuple(t.detach() for t in (q, k, v))
    exported = torch.export.export(Module(), plain)
    torch.testing.assert_close(exported.module()(*plain), function(*plain))


def test_a_windows_gradient_takes_no_quadratic_memory():
    # 32,768 queries: a dense map in float32 takes 4 GiB, this process at most 0.5 GiB more than before.
    code = """
import resource, torch
from regard import masks, op
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
def run(n, bias):
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
    diagonal = torch.zeros(1, 1, 2 * n - 1, requires_grad=True) if bias else None
    nothing = dict.fromkeys(('bias', 'sinks', 'softcap'))
    out, lse = op.attend(q, k, v, mask=masks.sliding_window(255, 0), diagonal=diagonal, **nothing, scale=0.25,
                         dropout=0.0, query_offset=0, key_offset=0)
    (out.sum() + lse.sum()).backward()
run(256, True)
before = peak()
run(32768, True)
print(peak() - before)
"""
    run = in_fresh_process(code)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.5


@pytest.mark.parametrize("changed", ["lengths", "offset", "q"])
def test_what_is_changed_in_place_before_the_backward_is_noticed(changed):
    q, k, v = (torch.randn(2, 2, 6, 8, requires_grad=True) for _ in range(3))
    held = {"lengths": torch.tensor([3, 5]), "offset": torch.tensor([0, 1]), "q": q * 2}
    mask = masks.padding(held["lengths"]) & masks.causal()
    out, _ = attend(held["q"], k, v, mask=mask, query_offset=held["offset"])
    held[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_result_may_be_changed_in_place_where_a_gradient_is_wanted():
    q = torch.randn(1, 2, 6, 8, requires_grad=True)
    _, lse = attend(q, q, q)
    lse[lse < -1e9] = 0.0  # a view would be refused
    out, _ = attend(q, q, q)
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # it is needed as it was
        out.sum().backward()


def test_autocast_does_not_reach_into_gradients():
    inputs = [torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3)]
    bias = torch.randn(1, 2, 40, 40, requires_grad=True)
    loss = attend(*inputs, bias=bias)[0].square().sum()
    plain = torch.autograd.grad(loss, (*inputs, bias), create_graph=True)
    twice = torch.autograd.grad([t.square().sum() for t in plain], inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        under = torch.autograd.grad(loss, (*inputs, bias), create_graph=True)
        under_twice = torch.autograd.grad([t.square().sum() for t in under], inputs)
    for ours, theirs in zip((*under, *under_twice), (*plain, *twice), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
