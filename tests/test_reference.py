"""The oracle itself, against attention spelt out number by number."""

import math

import pytest
import torch

from agreement import qkv, spelt_out
from regard import masks, reference
from regard.reference import Terms

F64 = torch.float64


def case():
    """Queries, keys, values and terms with everything in them, and what must come out."""
    q, k, v = qkv(dtype=F64)
    bias, visible, sinks = torch.randn(2, 1, 5, 7, dtype=F64), torch.rand(2, 4, 5, 7) > 0.4, torch.randn(4, dtype=F64)
    visible[:, 1, 3] = False
    terms = Terms(masks.from_tensor(visible), bias, None, sinks, scale=0.8, softcap=1.7)
    want = spelt_out(q, k, v, visible=visible.numpy(), bias=bias.numpy(), scale=0.8, softcap=1.7, sinks=sinks)
    return q, k, v, terms, {name: torch.from_numpy(array) for name, array in want.items()}


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_out_and_lse_are_those_of_the_contract():
    q, k, v, terms, want = case()
    out, lse = reference.attention(q, k, v, terms)
    close(out, want["out"])
    close(lse, want["lse"])


@pytest.mark.parametrize("name", reference.STAGES)
def test_the_four_stages_are_those_of_the_contract(name):
    q, k, _, terms, want = case()
    close(reference.stage(q, k, terms, name), want[name])


def test_weights_follow_the_lse_that_was_handed_in():
    q, k, _, terms, want = case()
    close(reference.stage(q, k, terms, "weights", want["lse"] + math.log(2.0)), want["weights"] / 2)


def test_answers_are_float64_whatever_came_in():
    q, k, v = qkv(dtype=torch.bfloat16)
    out, lse = reference.attention(q, k, v, Terms())
    assert out.dtype == lse.dtype == F64
    close(out, reference.attention(q.double(), k.double(), v.double(), Terms())[0])


def test_a_keep_mask_drops_weights_and_scales_the_others():
    q, k, v, terms, want = case()
    keep = torch.rand(2, 4, 5, 7) > 0.3
    out, lse = reference.attention(q, k, v, terms, keep=keep, dropout=0.3)
    mixed = (want["weights"] * keep / 0.7) @ v.repeat_interleave(2, 1)
    close(out, mixed)
    close(lse, want["lse"])


def test_a_diagonal_bias_is_a_dense_one_written_short():
    q, k, v, terms, _ = case()
    diagonal = torch.randn(2, 4, 11, dtype=F64)
    index = torch.arange(7) - torch.arange(5)[:, None] + 4
    short = reference.attention(q, k, v, Terms(terms.mask, diagonal=diagonal))
    close(short[0], reference.attention(q, k, v, Terms(terms.mask, bias=diagonal[..., index]))[0])


def test_statistics_are_those_of_the_contract():
    q, k, _, terms, want = case()
    found = reference.statistics(q, k, terms, top_k=9, received=True, entropy=True, max_score=True, block=(2, 4))
    weights, biased = want["weights"], want["biased"]
    close(found["received"], weights.sum(2))
    close(found["entropy"], -torch.special.xlogy(weights, weights).sum(-1))
    close(found["max_score"], biased.amax(-1))
    descending, keys = weights.sort(-1, descending=True)
    close(found["top_weights"], torch.nn.functional.pad(descending, (0, 2)))
    seen = (biased > -math.inf).sum(-1, keepdim=True)
    want_keys = torch.nn.functional.pad(keys, (0, 2)).where(torch.arange(9) < seen, -1)
    assert torch.equal(found["top_keys"], want_keys)
    assert found["block_mass"].shape == (2, 4, 3, 2)
    close(found["block_mass"].sum((2, 3)), weights.sum((2, 3)))
    close(found["block_max"][:, :, 2, 1], weights[:, :, 4:, 4:].amax((2, 3)))


def test_equal_weights_are_listed_by_key():
    q, k = torch.zeros(1, 1, 2, 4), torch.randn(1, 1, 5, 4)
    found = reference.statistics(q, k, Terms(masks.causal(), query_offset=2), top_k=4)
    assert found["top_keys"].tolist() == [[[[0, 1, 2, -1], [0, 1, 2, 3]]]]


def test_statistics_are_empty_where_there_are_no_queries_or_keys():
    for lengths in ((0, 3), (3, 0), (0, 0)):
        q, k = torch.zeros(1, 1, lengths[0], 4), torch.zeros(1, 1, lengths[1], 4)
        found = reference.statistics(q, k, Terms(), top_k=2, received=True, entropy=True, max_score=True, block=(2, 2))
        assert found["top_keys"].shape == (1, 1, lengths[0], 2)
        assert found["received"].shape == (1, 1, lengths[1])
        assert found["block_max"].shape == (1, 1, (lengths[0] + 1) // 2, (lengths[1] + 1) // 2)


def test_gradients_are_those_of_finite_differences():
    q, k, v, terms, _ = case()
    inputs = [t.requires_grad_() for t in (q[:1, :2, :, :2], k[:1, :1, :, :2], v[:1, :1, :, :2])]
    mask = masks.from_tensor(torch.rand(5, 7) > 0.5)

    def call(q, k, v, bias, sinks):
        return reference.attention(q, k, v, Terms(mask, bias, None, sinks, scale=0.8, softcap=1.7))

    bias, sinks = terms.bias[:1].clone().requires_grad_(), terms.sinks[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (*inputs, bias, sinks))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_key_reaches_the_gradients_of_the_queries_that_see_it_alone(poison):
    q, k, v = qkv(1, 1, 1, 6, 6, dtype=F64)
    k[:, :, 3] = v[:, :, 4] = poison
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out, lse = reference.attention(q, k, v, Terms(masks.causal()))
    (out.sum() + lse.sum()).backward()
    assert q.grad[:, :, :3].isfinite().all()
    assert not q.grad[:, :, 4:].isfinite().any()
    assert out[:, :, :3].isfinite().all()
    assert not out[:, :, 4:].isfinite().any()
