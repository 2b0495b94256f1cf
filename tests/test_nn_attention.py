"""MultiHeadAttention: against the formula in float64, in every form; caches, observers, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from regard import KVCache, masks
from regard.nn import MultiHeadAttention, Rotary, observe


def heads(t, weight, bias, num_heads):
    """(batch, seq_len, dim) -> (batch, heads, seq_len, head_dim)."""
    return nn.functional.linear(t, weight, bias).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def spelt_out(layer, x, memory, seen, bias=None):
    """The formula, from the layer's own numbers."""
    memory = x if memory is None else memory
    h, g = layer.num_heads, layer.num_kv_heads
    sizes = [h * layer.head_dim, g * layer.head_dim, g * layer.head_dim]
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.split(sizes)
    else:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.split(sizes)
    q = heads(x, weights[0], biases[0], h)
    k, v = (heads(memory, w, b, g).repeat_interleave(h // g, 1) for w, b in zip(weights[1:], biases[1:], strict=True))
    if layer.score == "additive":
        scores = (torch.tanh(q[:, :, :, None] + k[:, :, None]) * layer.score_weight[:, None, None]).sum(-1)
    elif layer.score == "linear":
        a, b = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
        scores = (a @ b.mT).log()
    else:
        scores = q @ k.mT * (layer.head_dim**-0.5 if layer.scale is None else layer.scale)
        if layer.softcap:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, -math.inf)
    if layer.sinks is not None:
        scores = torch.cat((scores, layer.sinks[:, None, None].expand(*scores.shape[:3], 1)), -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : k.shape[2]]
    return layer.out_proj((weights @ v).transpose(1, 2).flatten(2))


FORMS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one k/v head": {"num_kv_heads": 1, "bias": False},
    "wide heads": {"head_dim": 5},
    "scaled and capped": {"scale": 0.7, "softcap": 2.0},
    "sinks": {"sinks": True},
    "additive": {"score": "additive"},
    "additive and grouped": {"score": "additive", "num_kv_heads": 2},
    "linear": {"score": "linear"},
    "linear and grouped": {"score": "linear", "num_kv_heads": 2},
}
LENGTHS = torch.tensor([6, 4, 1])
PADDED = torch.arange(6) < LENGTHS[:, None, None, None]
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
MASKS = {
    "none": (None, torch.ones(1, 1, 6, 6, dtype=torch.bool)),
    "causal": (masks.causal(), CAUSAL),
    "padding": (masks.padding(LENGTHS), PADDED.expand(3, 1, 6, 6)),
    "causal and padding": (masks.causal() & masks.padding(LENGTHS), CAUSAL & PADDED),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_formula(native, form, mask):
    layer = MultiHeadAttention(16, 4, **FORMS[form]).double()
    for name, parameter in layer.named_parameters():
        if "bias" in name or name == "sinks":
            nn.init.normal_(parameter)
    x = torch.randn(3, 6, 16, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    given, seen = MASKS[mask]
    gradient = torch.randn(3, 6, 16, dtype=torch.float64)
    out, expected = layer(x, mask=given), spelt_out(layer, x, None, seen)
    torch.testing.assert_close(out, expected)
    own = torch.autograd.grad((out * gradient).sum(), wanted)
    torch.testing.assert_close(own, torch.autograd.grad((expected * gradient).sum(), wanted))


@pytest.mark.parametrize("form", ["plain", "grouped", "additive", "linear"])
@pytest.mark.parametrize("kv_dim", [None, 10])
def test_cross_attention_reads_a_memory_of_any_length_and_size(native, form, kv_dim):
    layer = MultiHeadAttention(16, 4, kv_dim=kv_dim, **FORMS[form]).double()
    x = torch.randn(3, 4, 16, dtype=torch.float64)
    memory = torch.randn(3, 6, kv_dim or 16, dtype=torch.float64)
    expected = spelt_out(layer, x, memory, PADDED.expand(3, 1, 4, 6))
    torch.testing.assert_close(layer(x, memory, mask=masks.padding(LENGTHS)), expected)
    kept = layer.project_memory(memory)
    torch.testing.assert_close(layer(x, kept, mask=masks.padding(LENGTHS)), expected)


def test_a_mask_and_a_bias_may_be_tensors(native):
    layer, x = MultiHeadAttention(16, 4).double(), torch.randn(3, 6, 16, dtype=torch.float64)
    bias = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x, mask=CAUSAL, bias=bias), spelt_out(layer, x, None, CAUSAL, bias))


@pytest.mark.parametrize("form", ["plain", "grouped", "sinks", "additive"])
@pytest.mark.parametrize("rotated", [True, False])
def test_token_by_token_with_a_cache_gives_what_the_whole_gives(native, form, rotated):
    layer, x = MultiHeadAttention(16, 4, **FORMS[form]), torch.randn(3, 7, 16)
    positions = Rotary(4) if rotated else None
    cache = KVCache()
    with torch.no_grad():
        whole = layer(x, mask=masks.causal(), positions=positions)
        parts = [
            layer(part, mask=masks.causal(), positions=positions, cache=cache) for part in x.split([3, 1, 1, 2], 1)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_rotary_meets_a_memory_at_its_own_places(native):
    layer, x = MultiHeadAttention(16, 4), torch.randn(1, 6, 16)
    whole = layer(x, mask=masks.causal(), positions=Rotary(4))
    last = layer(x[:, 4:], x, mask=masks.causal(), positions=Rotary(4), query_offset=4)
    torch.testing.assert_close(last, whole[:, 4:])


def test_whoever_observes_sees_queries_keys_mask_and_positions(native):
    layer, x, seen = MultiHeadAttention(16, 4, num_kv_heads=2), torch.randn(2, 5, 16), []
    model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    alone = layer(x, mask=masks.causal(), positions=Rotary(4))
    with observe(seen.append, model):
        out = layer(x, mask=masks.causal(), positions=Rotary(4))
        layer(x, torch.randn(2, 3, 16))
    assert torch.equal(out, alone)
    own, cross = seen
    assert (own.name, own.layer_index, own.is_cross, cross.is_cross) == ("layers.0", 0, False, True)
    assert own.q.shape == (2, 4, 5, 4) and own.k.shape == (2, 2, 5, 4) and cross.k.shape == (2, 2, 3, 4)
    assert own.mask.encode()[0] == "causal" and own.module is layer
    scores = own.q @ own.k.repeat_interleave(2, 1).mT * own.scale
    weights = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    torch.testing.assert_close((weights @ own.v.repeat_interleave(2, 1)), own.out)
    assert not own.q.requires_grad


def test_whoever_observes_a_cache_sees_all_it_holds(native):
    layer, seen, cache = MultiHeadAttention(16, 4), [], KVCache()
    with torch.no_grad(), observe(seen.append):
        for part in torch.randn(1, 5, 16).split([4, 1], 1):
            layer(part, mask=masks.causal(), cache=cache)
    assert [(call.q.shape[2], call.k.shape[2], call.query_offset, call.key_offset) for call in seen] == [
        (4, 4, 0, 0),
        (1, 5, 4, 0),
    ]


def test_autocast_narrows_and_stays_close(native):
    layer, x = MultiHeadAttention(32, 4, sinks=True), torch.randn(2, 9, 32)
    bias = torch.randn(1, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, mask=masks.causal(), positions=Rotary(8), bias=bias)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), layer(x, mask=masks.causal(), positions=Rotary(8), bias=bias), atol=0.05, rtol=0.05
    )
    assert layer.in_proj_weight.grad.dtype == torch.float32


def test_what_does_not_fit_is_refused_in_words(native):
    x = torch.zeros(1, 3, 16)
    for make, words in (
        (
            lambda: MultiHeadAttention(16, 4, num_kv_heads=3),
            "num_heads must be a multiple of num_kv_heads; got 4 and 3",
        ),
        (lambda: MultiHeadAttention(15, 4), "dim must be a multiple of num_heads; got 15 and 4"),
        (
            lambda: MultiHeadAttention(16, 4, score="cosine"),
            "score must be one of softmax, additive, linear; got 'cosine'",
        ),
        (lambda: MultiHeadAttention(16, 4)(x[0]), r"x must be \(batch, seq_len, dim = 16\); got \(3, 16\)"),
        (
            lambda: MultiHeadAttention(16, 4, score="linear")(x, mask=masks.sliding_window(1, 0)),
            "mask must be causal\\(\\), padding or both for score 'linear'",
        ),
        (
            lambda: MultiHeadAttention(16, 4, score="linear").eval()(x, cache=KVCache()),
            "cache must be None for score 'linear'",
        ),
        (
            lambda: MultiHeadAttention(16, 4, score="additive", dropout=0.5)(x),
            "dropout must be left out for score 'additive'; got float",
        ),
        (
            lambda: MultiHeadAttention(16, 4)(x, bias=torch.zeros(3, 3), positions=_relative()),
            "bias must be None where the positions add to the scores; got Tensor",
        ),
    ):
        with pytest.raises(ValueError, match=f"^MultiHeadAttention: {words}"):
            make()


def _relative():
    from regard.nn import RelativePosition

    return RelativePosition(4)
