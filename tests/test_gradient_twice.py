"""The gradient of the gradient: against finite differences, and against autograd on the float64 reference."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradgradcheck

import regard
from regard import additive_twice, gradient_twice, masks
from test_kernels import attend, in_fresh_process

pytestmark = pytest.mark.usefixtures("native")


def random(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


GENERATOR = torch.Generator().manual_seed(0)
MASKS = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(2, 1),
    "documents": masks.documents(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 1, 3, 3])),
    "padding": masks.padding(torch.tensor([3, 7])),
    "holes": masks.padding(torch.rand(2, 7, generator=GENERATOR) > 0.4),
    "bits": masks.from_tensor(torch.rand(2, 4, 5, 7, generator=GENERATOR) > 0.5),
    "empty rows": masks.causal() & masks.from_tensor(torch.tensor([0, 1, 1, 0, 1])[:, None] > 0),
}
BIASES = {"none": None, "dense": (2, 4, 5, 7), "per key": (1, 4, 1, 7), "per query": (2, 1, 5, 1),
          "diagonal": (1, 4, 11), "diagonals of rows": (2, 1, 11)}  # fmt: skip


def check(shapes, bias, sinks, **terms) -> None:
    """gradgradcheck in all inputs, through out and lse."""
    name = "diagonal" if bias is not None and len(bias) == 3 else "bias"
    extra = [] if bias is None else [random(*bias)]
    extra += [random(shapes[0][1])] if sinks else []

    def function(q, k, v, *extra):
        given = iter(extra)
        named = {} if bias is None else {name: next(given)}
        out, lse = attend(q, k, v, **named, sinks=next(given) if sinks else None, scale=-0.7, **terms)
        return out, torch.where(lse == -math.inf, 0.0, lse)

    inputs = (*(random(*shape) for shape in shapes), *extra)
    assert gradgradcheck(function, inputs, fast_mode=terms["mask"] is not MASKS["causal"])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_second_gradients_match_finite_differences_for_every_mask(mask, softcap, sinks):
    torch.manual_seed(0)
    shapes = [(2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 2)]
    check(shapes, None, sinks, mask=MASKS[mask], softcap=softcap, query_offset=1)


@pytest.mark.parametrize("mask", ["none", "window", "bits"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_second_gradients_match_finite_differences_for_every_bias(mask, bias, softcap):
    torch.manual_seed(0)
    shapes = [(2, 4, 5, 3), (2, 1, 7, 3), (2, 1, 7, 2)]
    check(shapes, BIASES[bias], bias != "none", mask=MASKS[mask], softcap=softcap, query_offset=2)


@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_second_gradients_match_finite_differences_over_many_tiles(mask, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(gradient_twice, "_PAIRS", 1)  # tiles of 16 queries by 64 keys
    shapes = [(2, 2, 37, 2), (2, 1, 151, 2), (2, 1, 151, 1)]
    inputs = [random(*shape) for shape in shapes]
    sinks, diagonal = random(2), random(1, 2, 187)
    rule = {"none": None, "causal": masks.causal(), "padding": masks.padding(torch.tensor([150, 70]))}[mask]

    def function(q, k, v, sinks, diagonal):
        return attend(q, k, v, sinks=sinks, diagonal=diagonal, mask=rule, softcap=2.0, query_offset=60)

    assert gradgradcheck(function, (*inputs, sinks, diagonal), fast_mode=True)


def test_second_gradients_with_dropout_match_finite_differences(monkeypatch):
    monkeypatch.setattr(gradient_twice, "_PAIRS", 1)
    inputs = [random(1, 2, 40, 3), random(1, 1, 150, 3), random(1, 1, 150, 3)]

    def function(q, k, v):
        torch.manual_seed(3)
        return attend(q, k, v, dropout=0.3, mask=masks.causal(), query_offset=120)

    assert gradgradcheck(function, inputs, fast_mode=True)


def penalty(attention, x: Tensor, weights: list[Tensor]) -> Tensor:
    """The gradient penalty of WGAN-GP of a critic that is one layer of attention."""
    q, k, v, o = (x @ w for w in weights)
    heads = [t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v)]
    score = (attention(*heads).transpose(1, 2).flatten(2) * o).sum((1, 2))
    (slope,) = grad(score.sum(), x, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.sliding_window(5, 2)])
def test_a_gradient_penalty_trains_the_critic_as_the_reference_does(dtype, bound, mask):
    torch.manual_seed(0)
    x = torch.randn(3, 70, 32, dtype=dtype)
    weights = [torch.randn(32, 32, dtype=dtype) / 6 for _ in range(4)]

    def gradients(backend, dtype):
        own = [w.to(dtype).requires_grad_() for w in weights]
        found = penalty(
            lambda q, k, v: regard.attention(q, k, v, mask=mask, backend=backend), x.to(dtype).requires_grad_(), own
        )
        return found, *grad(found, own)

    wanted = gradients("reference", torch.float64)
    for ours, theirs in zip(gradients(None, dtype), wanted, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_hessian_vector_product_is_that_of_the_reference(dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(2, h, n, 16).to(dtype) for h, n in ((4, 300), (2, 420), (2, 420))]
    directions = [torch.randn_like(t) for t in tensors]
    bias = torch.randn(4, 300, 420).to(dtype)
    sinks = torch.randn(4).to(dtype)

    def product(backend, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in tensors]
        out, lse, *_ = regard.attention_with_stats(
            *inputs, mask=masks.causal(), bias=bias.to(dtype), sinks=sinks.to(dtype), softcap=4.0, query_offset=100,
            backend=backend,
        )  # fmt: skip
        loss = out.to(lse.dtype).square().sum() + lse.sin().sum()
        slopes = grad(loss, inputs, create_graph=True)
        return grad([s.double() for s in slopes], inputs, [d.double() for d in directions])

    bound = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for ours, theirs in zip(product(None, dtype), product("reference", torch.float64), strict=True):
        assert ours.dtype == dtype
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < bound


def test_nan_in_rows_that_no_query_may_see_reaches_no_second_gradient():
    inputs = [torch.randn(1, 2, 20, 8) for _ in range(3)]
    inputs[1][:, :, 12:], inputs[2][:, :, 12:] = math.nan, math.inf
    inputs = [t.requires_grad_() for t in inputs]
    out, lse = attend(*inputs, mask=masks.padding(torch.tensor([12])), softcap=2.0)
    slopes = grad(out.square().sum() + lse.sum(), inputs, create_graph=True)
    for t in grad([s.square().sum() for s in slopes], inputs):
        assert t.isfinite().all()


def test_asking_for_a_graph_changes_no_bit_of_the_first_gradient():
    inputs = [random(2, 4, 100, 16, dtype=torch.float32) for _ in range(3)]
    loss = attend(*inputs, mask=masks.causal())[0].square().sum()
    plain = grad(loss, inputs, retain_graph=True)
    for ours, theirs in zip(grad(loss, inputs, create_graph=True), plain, strict=True):
        assert ours.requires_grad
        assert torch.equal(ours, theirs)


def test_a_third_derivative_is_refused_with_the_way_out():
    q = random(1, 1, 4, 2)
    (first,) = grad(attend(q, q, q)[0].square().sum(), q, create_graph=True)
    (second,) = grad(first.square().sum(), q, create_graph=True)
    refusal = r'attention: derivatives must be of order 1 or 2; got one more\. Pass backend="reference"\.'
    with pytest.raises(NotImplementedError, match=refusal):
        grad(second.sum(), q)
    (first,) = grad(regard.attention(q, q, q, backend="reference").square().sum(), q, create_graph=True)
    (second,) = grad(first.square().sum(), q, create_graph=True)
    assert grad(second.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "bits", "empty rows"])
@pytest.mark.parametrize("tile", [None, 1])
def test_second_gradients_of_additive_attention_match_finite_differences(mask, tile, monkeypatch):
    torch.manual_seed(0)
    if tile:
        monkeypatch.setattr(additive_twice, "_ROWS", 2)
        monkeypatch.setattr(additive_twice, "_VALUES", tile)
    n = 19
    rule = {
        "none": None, "causal": masks.causal(), "padding": masks.padding(torch.tensor([n, 7])),
        "bits": torch.rand(2, n, n) > 0.5, "empty rows": torch.rand(2, n, 1) > 0.5,
    }[mask]  # fmt: skip
    inputs = random(2, n, 3), random(2, n, 3), random(2, n, 2), random(3)

    def function(q, k, v, weight):
        return regard.additive_attention(q, k, v, weight, mask=rule)

    assert gradgradcheck(function, inputs, fast_mode=True)


def test_nan_of_hidden_keys_reaches_no_second_gradient_of_additive_attention():
    q, k, v, weight = torch.randn(1, 4, 3), torch.randn(1, 9, 3), torch.randn(1, 9, 2), torch.randn(3)
    k[:, 6:], v[:, 6:] = math.nan, math.inf
    inputs = [t.requires_grad_() for t in (q, k, v, weight)]
    out = regard.additive_attention(*inputs, mask=masks.padding(torch.tensor([6])))
    slopes = grad(out.square().sum(), inputs, create_graph=True)
    for t in grad([s.square().sum() for s in slopes], inputs):
        assert t.isfinite().all()


def test_derivatives_past_the_last_one_are_refused_by_the_other_operators():
    q, weight = random(1, 4, 2), random(2)
    (first,) = grad(regard.additive_attention(q, q, q, weight).square().sum(), q, create_graph=True)
    (second,) = grad(first.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="additive_attention: derivatives must be of order 1 or 2; got one"):
        grad(second.sum(), q)
    q = random(1, 1, 4, 2)
    (first,) = grad(regard.linear_attention(q, q, q)[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"linear_attention: derivatives must be of order 1; got one more\."):
        grad(first.square().sum(), q)


def test_a_windows_second_gradient_takes_no_quadratic_memory():
    # 8,192 queries: one dense map in float32 takes 0.25 GiB, this process at most half as much more than before.
    code = """
import resource, torch, regard
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
def run(n):
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
    out = regard.attention(q, k, v, mask=regard.masks.sliding_window(255, 0))
    slopes = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    sum(s.square().sum() for s in slopes).backward()
run(256)
before = peak()
run(8192)
print(peak() - before)
"""
    run = in_fresh_process(code)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.125
