"""What one attention call of transformers says in its arguments: used, or refused by name."""

import math

import pytest
import torch
from torch import Tensor, nn

import regard.huggingface
from regard.huggingface.routed_mask import regard_mask
from regard.huggingface.routing import REFUSED, regard_attention

BATCH, HEADS, KV_HEADS, Q, KV, DIM = 2, 4, 2, 5, 7, 8


class Module(nn.Module):
    """An attention module as transformers passes one."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def qkv(length_q: int = Q, length_kv: int = KV) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(BATCH, HEADS, length_q, DIM),
        torch.randn(BATCH, KV_HEADS, length_kv, DIM),
        torch.randn(BATCH, KV_HEADS, length_kv, DIM),
    )


def dense(q: Tensor, k: Tensor, v: Tensor, added: Tensor | float = 0.0, sinks: Tensor | None = None) -> Tensor:
    """Eager attention with a sum of biases, as the modelling files write it."""
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
    scores = q @ k.mT / math.sqrt(DIM) + added
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


def close(got: tuple[Tensor, None], expected: Tensor) -> None:
    out, weights = got
    assert weights is None and out.is_contiguous()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


# --- masks in every form ---


def test_bool_mask_is_what_may_be_attended_to():
    q, k, v = qkv()
    keep = torch.rand(BATCH, 1, Q, KV) > 0.3
    keep[..., 0] = True
    close(regard_attention(Module(), q, k, v, keep), dense(q, k, v, torch.where(keep, 0.0, -torch.inf)))


def test_float_mask_is_added_and_its_minimum_excludes():
    q, k, v = qkv()
    added = torch.randn(BATCH, 1, Q, KV)
    added[..., 3:5] = torch.finfo(torch.float32).min
    added[1, :, 2] = torch.finfo(torch.float32).min
    out, _ = regard_attention(Module(), q, k, v, added)
    expected = dense(q, k, v, added)
    expected[1, 2] = 0.0  # eager would attend to everything that the mask forbids
    close((out, None), expected)


def test_float_mask_carries_its_gradient():
    q, k, v = qkv()
    grads = []
    for compute in (lambda a: regard_attention(Module(), q, k, v, a)[0], lambda a: dense(q, k, v, a)):
        torch.manual_seed(3)
        added = torch.randn(1, HEADS, Q, KV, requires_grad=True)
        compute(added).square().sum().backward()
        grads.append(added.grad)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_longer_mask_is_cut_to_the_keys():
    q, k, v = qkv()
    added = torch.randn(BATCH, 1, Q, KV + 4)
    close(regard_attention(Module(), q, k, v, added), dense(q, k, v, added[..., :KV]))


def test_no_mask_is_causal_where_the_call_or_the_module_says_so():
    q, k, v = qkv(6, 6)
    future = torch.full((6, 6), -torch.inf).triu(1)
    close(regard_attention(Module(is_causal=True), q, k, v, None), dense(q, k, v, future))
    close(regard_attention(Module(is_causal=False), q, k, v, None, is_causal=True), dense(q, k, v, future))
    close(regard_attention(Module(is_causal=True), q, k, v, None, is_causal=False), dense(q, k, v))
    one = q[:, :, :1]
    close(regard_attention(Module(is_causal=True), one, k, v, None), dense(one, k, v))


def test_packed_lengths_without_a_mask_keep_documents_apart():
    q, k, v = (t[:1] for t in qkv(6, 6))
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    apart = torch.full((6, 6), -torch.inf)
    apart[:2, :2] = apart[2:, 2:] = 0.0
    named = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 4, "max_length_k": 4}
    close(regard_attention(Module(is_causal=False), q, k, v, None, **named), dense(q, k, v, apart))


def test_indices_of_a_sparse_indexer_are_what_may_be_attended_to():
    q, k, v = qkv()
    indices = torch.stack([torch.randperm(KV)[:3] for _ in range(BATCH * Q)]).reshape(BATCH, Q, 3)
    hidden = torch.full((BATCH, 1, Q, KV), -torch.inf).scatter(-1, indices[:, None], 0.0)
    padded = torch.cat([indices, torch.full((BATCH, Q, 2), -1)], dim=-1)
    close(regard_attention(Module(is_causal=False), q, k, v, None, indices=padded), dense(q, k, v, hidden))


def test_one_batch_of_queries_meets_many_of_keys():
    q, k, v = qkv()
    close(regard_attention(Module(is_causal=False), q[:1], k, v, None), dense(q[:1].expand(BATCH, -1, -1, -1), k, v))


# --- biases, sinks, scale, dropout ---


def test_position_bias_by_diagonals_takes_linear_memory():
    q, k, v = qkv()
    diagonal = torch.randn(1, HEADS, Q + KV - 1)
    square = diagonal[..., torch.arange(KV)[None] - torch.arange(Q)[:, None] + Q - 1]
    seen: list[regard.huggingface.Call] = []
    with regard.huggingface.observe(seen.append):
        close(regard_attention(Module(is_causal=False), q, k, v, None, position_bias=square), dense(q, k, v, square))
    assert seen[0].bias is None and torch.equal(seen[0].diagonal, diagonal)


def test_other_position_bias_stays_dense_and_joins_the_mask():
    q, k, v = qkv()
    bias, added = torch.randn(BATCH, HEADS, Q, KV), torch.randn(BATCH, 1, Q, KV)
    seen: list[regard.huggingface.Call] = []
    with regard.huggingface.observe(seen.append):
        close(regard_attention(Module(), q, k, v, added, position_bias=bias), dense(q, k, v, bias + added))
    assert seen[0].diagonal is None and torch.equal(seen[0].bias, bias + added)


def test_position_bias_that_was_changed_in_place_is_read_again():
    q, k, v = qkv()
    bias = torch.zeros(1, HEADS, Q, KV)
    regard_attention(Module(is_causal=False), q, k, v, None, position_bias=bias)
    bias += torch.randn(1, HEADS, Q, KV)
    close(regard_attention(Module(is_causal=False), q, k, v, None, position_bias=bias), dense(q, k, v, bias))


def test_learned_position_bias_gets_a_gradient_for_every_entry():
    q, k, v = qkv()
    bias = torch.zeros(1, HEADS, Q, KV, requires_grad=True)  # equal numbers, but no shared parameter
    regard_attention(Module(is_causal=False), q, k, v, None, position_bias=bias)[0].square().sum().backward()
    assert (bias.grad != 0).all()


@pytest.mark.parametrize("shape", [(HEADS,), (1, HEADS, 1, 1)])
def test_sinks_of_each_head_take_their_share(shape):
    q, k, v = qkv()
    sinks = torch.randn(HEADS)
    expected = dense(q, k, v, sinks=sinks.reshape(1, HEADS, 1, 1))
    close(regard_attention(Module(is_causal=False), q, k, v, None, s_aux=sinks.reshape(shape)), expected)


def test_sinks_of_each_query_take_their_share():
    q, k, v = qkv()
    sinks = torch.randn(BATCH, HEADS, Q, 1)
    seen: list[regard.huggingface.Call] = []
    with regard.huggingface.observe(seen.append):
        close(regard_attention(Module(is_causal=False), q, k, v, None, sinks=sinks), dense(q, k, v, sinks=sinks))
    call = seen[0]
    weights = (call.q @ call.k.repeat_interleave(2, 1).mT * call.scale - call.lse[..., None]).exp()
    torch.testing.assert_close(weights @ call.v.repeat_interleave(2, 1), call.out, atol=1e-5, rtol=1e-5)


def test_scaling_may_be_a_tensor():
    q, k, v = qkv()
    scaling = torch.rand(HEADS, 1, 1)
    expected = dense(q * scaling * math.sqrt(DIM), k, v)
    close(regard_attention(Module(is_causal=False), q, k, v, None, scaling=scaling), expected)


def test_softcap_bounds_the_scores():
    q, k, v = qkv()
    scores = 2.0 * torch.tanh(q @ k.repeat_interleave(2, 1).mT / math.sqrt(DIM) / 2.0)
    expected = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    close(regard_attention(Module(is_causal=False), q, k, v, None, softcap=2.0), expected)


def test_dropout_is_for_training_alone():
    q, k, v = qkv()
    close(regard_attention(Module(is_causal=False).eval(), q, k, v, None, dropout=0.5), dense(q, k, v))
    dropped, _ = regard_attention(Module(is_causal=False).train(), q, k, v, None, dropout=0.5)
    assert not torch.allclose(dropped, dense(q, k, v), atol=1e-3)


# --- refusals ---


@pytest.mark.parametrize("name", REFUSED)
def test_keyword_that_would_change_the_result_is_refused_by_name(name):
    q, k, v = qkv()
    with pytest.raises(ValueError, match=f"Module: {name} must be None; got Tensor, but .*attn_implementation='eager'"):
        regard_attention(Module(is_causal=False), q, k, v, None, **{name: torch.zeros(1)})
    regard_attention(Module(is_causal=False), q, k, v, None, **{name: None})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_attentions": True}, "output_attentions must be False; got True"),
        ({}, "must say whether it is causal; got is_causal=None from a module without that attribute"),
        ({"is_causal": True}, "must have as many queries as keys; got 5 and 7. Pass attention_mask"),
        ({"is_causal": False, "sliding_window": 4}, "sliding_window=4 must bring attention_mask; got None with 7 keys"),
        ({"attention_mask": torch.ones(BATCH, KV)}, r"must have 4 dimensions.*got shape \(2, 7\)"),
        ({"attention_mask": torch.ones(BATCH, 1, Q, KV).long()}, "must be bool or float; got torch.int64"),
        ({"attention_mask": [True]}, "must be a tensor or None; got list"),
        ({"is_causal": False, "position_bias": torch.zeros(3, Q, KV)}, r"must broadcast to .*got \(1, 3, 5, 7\)"),
        ({"attention_mask": regard_mask(BATCH, Q, KV + 1)}, "this call's 5 queries and 7 keys; got one for 5 and 8"),
        (
            {"is_causal": False, "cu_seq_lens_q": torch.tensor([0, 5]), "cu_seq_lens_k": torch.tensor([0, 9])},
            "cu_seq_lens must cover one packed row",
        ),
    ],
)  # fmt: skip
def test_call_that_would_have_to_be_guessed_is_refused(given, message):
    q, k, v = qkv()
    with pytest.raises((ValueError, TypeError), match=message):
        regard_attention(Module(), q, k, v, **{"attention_mask": None, **given})
