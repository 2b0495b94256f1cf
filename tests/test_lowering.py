"""PyTorch's own kernels under the same call: equal to the reference, and what they cannot do refused by name."""

import math
import re

import pytest
import torch

import regard
from agreement import assert_close, qkv
from regard import biases, masks
from regard.lowering import suffices
from regard.positions import Frame

Q, S = 5, 7  # seq_len_q and seq_len_kv of `qkv`
OFFSETS = {"none": 2, "one a batch row": torch.tensor([2, -3])}
MASKS = {
    "none": lambda: None,
    "causal": masks.causal,
    "window": lambda: masks.sliding_window(2, 1),
    "lengths": lambda: masks.padding([3, 0]),
    "keep": lambda: masks.padding(torch.rand(2, S) > 0.5),
    "documents": lambda: masks.documents(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 2, 1, 0])),
    "prefix": lambda: masks.causal() | masks.prefix(torch.tensor([1, 2])),
    "a tensor": lambda: masks.from_tensor(torch.rand(2, 4, Q, S) > 0.5),
    "many ranges": lambda: masks.from_tensor(torch.rand(1, 4, Q, 1) > 0.3) & ~masks.causal(),
    "a function": lambda: masks.from_function(lambda b, h, p, j: (b + h + p + j) % 3 > 0),
    "joined": lambda: masks.causal() & masks.from_function(lambda b, h, p, j: p % 2 == j % 2) | ~masks.padding([4, 6]),
    "nothing": lambda: ~masks.prefix(S + 3),
}  # fmt: skip
BIASES = {
    "none": lambda: None,
    "dense": lambda: torch.randn(2, 4, Q, S),
    "dense, one axis": lambda: torch.randn(1, 1, 1, S),
    "dense with -inf": lambda: torch.randn(Q, S).masked_fill(torch.rand(Q, 1) > 0.5, -math.inf),
    "alibi": biases.alibi,
    "relative": lambda: biases.relative_position(torch.randn(4, 5), lambda d: d.clamp(-2, 2) + 2),
}


def compared(backend, q, k, v, **terms):
    want = regard.attention(q, k, v, **terms, backend="reference")
    got = regard.attention(q, k, v, **terms, backend=backend)
    assert got.dtype == want.dtype
    assert_close(got, want, q.dtype, 32)
    return got


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(
    ("mask", "bias"),
    [
        *((mask, "none") for mask in MASKS),
        *((mask, "relative") for mask in MASKS),
        *(("joined", bias) for bias in BIASES),
    ],
)
def test_every_mask_and_bias_gives_what_the_reference_gives(backend, mask, bias, offset):
    compared(backend, *qkv(), mask=MASKS[mask](), bias=BIASES[bias](), query_offset=OFFSETS[offset], key_offset=1)


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype_gives_what_the_reference_gives(backend, dtype):
    q, k, v = qkv(dtype=dtype)
    compared(backend, q, k, v, mask=masks.causal(), bias=biases.alibi(), query_offset=2, scale=-0.3)
    compared(backend, q, k, v, bias=torch.randn(Q, S).to(dtype))


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_causal_meets_at_the_first_keys_where_offsets_are_equal(backend):
    for lengths in ((5, 7), (7, 5), (6, 6)):
        q, k, v = qkv(seq_len_q=lengths[0], seq_len_kv=lengths[1])
        compared(backend, q, k, v, mask=masks.causal(), query_offset=3, key_offset=3)


@pytest.mark.parametrize("mask", ["none", "causal", "lengths", "nothing"])
def test_flex_has_softcap_sinks_and_lse(mask):
    q, k, v = qkv()
    terms = {"mask": MASKS[mask](), "bias": biases.alibi(), "softcap": 0.8, "query_offset": 2}
    for sinks in (None, torch.randn(4)):
        want = regard.attention_with_stats(q, k, v, **terms, sinks=sinks, backend="reference")
        got = regard.attention_with_stats(q, k, v, **terms, sinks=sinks, backend="flex")
        assert_close(got.out, want.out, q.dtype, S)
        assert_close(got.lse, want.lse, q.dtype, S)
        assert got.lse.dtype == torch.float32
        assert got[2:] == (None,) * 7
    half = [t.bfloat16() for t in (q, k, v)]
    got = regard.attention_with_stats(*half, sinks=torch.randn(4).bfloat16(), backend="flex")
    assert (got.out.dtype, got.lse.dtype) == (torch.bfloat16, torch.float32)
    assert regard.attention_with_stats(q.double(), k.double(), v.double(), backend="flex").lse.dtype == torch.float64


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
@pytest.mark.parametrize("lengths", [(0, 4), (4, 0)])
def test_lengths_of_zero_give_what_the_reference_gives(backend, lengths):
    compared(backend, *qkv(seq_len_q=lengths[0], seq_len_kv=lengths[1]))


@pytest.mark.parametrize("bias", ["none", "dense", "dense with -inf", "alibi", "relative"])
@pytest.mark.parametrize("mask", ["none", "causal", "lengths", "nothing"])
def test_sdpa_gives_the_gradients_of_the_reference(mask, bias):
    q, k, v = (t.double().requires_grad_() for t in qkv())
    kind, own = MASKS[mask](), None
    if bias == "relative":
        own = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        given = biases.relative_position(own, lambda d: d.clamp(-2, 2) + 2)
    elif bias == "alibi":
        own = torch.rand(4, dtype=torch.float64, requires_grad=True)
        given = biases.alibi(own)
    else:
        given = BIASES[bias]()
        if given is not None:
            own = given = given.double().requires_grad_()
    inputs = [t for t in (q, k, v, own) if t is not None]

    def gradients(backend):
        out = regard.attention(q, k, v, mask=kind, bias=given, query_offset=2, backend=backend)
        return torch.autograd.grad((out * torch.arange(6)).sum(), inputs, allow_unused=True)

    for got, want in zip(gradients("sdpa"), gradients("reference"), strict=True):
        assert not got.isnan().any()
        torch.testing.assert_close(got, want)


def test_sdpa_drops_as_many_weights_as_asked():
    q, k = torch.zeros(1, 2, 300, 8), torch.zeros(1, 2, 400, 8)
    v = torch.eye(400).expand(1, 2, 400, 400)
    out = regard.attention(q, k, v, dropout=0.25, backend="sdpa")
    assert float((out == 0.0).double().mean()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_a_cache_works_as_with_native(backend):
    q, k, v = qkv(1, 2, 2, 6, 6, 8, 8)
    cache = regard.KVCache()
    parts = [
        regard.attention(q[:, :, s], k[:, :, s], v[:, :, s], mask=masks.causal(), cache=cache, backend=backend)
        for s in (slice(0, 4), slice(4, 6))
    ]
    assert_close(torch.cat(parts, 2), regard.attention(q, k, v, mask=masks.causal(), backend="reference"), q.dtype, 6)


def test_flex_runs_under_no_grad_with_tensors_that_want_a_gradient():
    q, k, v = (t.requires_grad_() for t in qkv())
    with torch.no_grad():
        compared("flex", q, k, v)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mask", ["prefix", "a function", "many ranges"])
def test_what_flex_is_given_compiles(mask):
    # The form in which other devices use it; on the CPU PyTorch compiles it without lse.
    from torch.nn.attention.flex_attention import flex_attention

    from regard import lowering

    torch.compiler.reset()
    q, k, v = qkv(head_dim=16, head_dim_v=16)
    kind, offset = MASKS[mask](), torch.tensor([2, 1])
    frame = Frame(2, 4, Q, S, offset, 0)
    diagonal = biases.alibi().resolve(frame, q.dtype, q.device)[1]
    want = regard.attention(
        q, k, v, mask=kind, bias=biases.alibi(), softcap=2.0, query_offset=offset, backend="reference"
    )
    try:
        with torch.no_grad():
            got = torch.compile(flex_attention)(
                q, k, v, score_mod=lowering._score(None, diagonal, 2.0, Q), scale=0.25, enable_gqa=True,
                block_mask=lowering._block_mask(kind, frame, q.device),
            )  # fmt: skip
    except torch._inductor.exc.InvalidCxxCompiler:
        pytest.skip("needs tool: a C++ compiler that PyTorch can call")
    assert_close(got, want, q.dtype, S)


def test_a_block_mask_that_numbers_alone_decide_is_made_once():
    from regard import lowering

    frame = Frame(2, 4, Q, S, 2, 0)
    first = lowering._block_mask(masks.causal(), frame, torch.device("cpu"))
    assert lowering._block_mask(masks.causal(), frame, torch.device("cpu")) is first
    keep = masks.padding(torch.ones(2, S, dtype=torch.bool))
    one = lowering._block_mask(keep, frame, torch.device("cpu"))
    assert lowering._block_mask(keep, frame, torch.device("cpu")) is not one


# ---- refusals ----

REFUSED = {
    "softcap": ("sdpa", {"softcap": 2.0}, "it has no softcap. Use backend='flex', or 'native' on the CPU."),
    "sinks": ("sdpa", {"sinks": torch.zeros(4)}, "it has no sinks. Use backend='flex', or 'native' on the CPU."),
    "dropout": ("flex", {"dropout": 0.5}, "it has no dropout. Use backend='sdpa', or 'native' on the CPU."),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_named_backend_refuses_what_it_cannot_do_and_says_who_can(what):
    backend, terms, words = REFUSED[what]
    message = f"attention: backend must be one that can do the call, or None; got {backend!r}, and {words}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        regard.attention(*qkv(), **terms, backend=backend)


def test_flex_refuses_a_gradient_on_the_cpu():
    q, k, v = (t.requires_grad_() for t in qkv())
    with pytest.raises(ValueError, match=r"got 'flex', and on the CPU it gives no gradient\. Use backend='native' or "):
        regard.attention(q, k, v, backend="flex")
    bias = torch.zeros(Q, S, requires_grad=True)
    with pytest.raises(ValueError, match=r"on the CPU it gives no gradient"):
        regard.attention(*qkv(), bias=bias, backend="flex")


def test_statistics_and_weights_are_refused_by_name():
    q, k, v = qkv()
    for backend in ("flex", "sdpa"):
        with pytest.raises(ValueError, match=rf"got '{backend}', and it gives no statistics\. Use backend='native' or"):
            regard.attention_with_stats(q, k, v, received=True, backend=backend)
        with pytest.raises(ValueError, match=rf"^attention_weights: .* got '{backend}', and it gives no weights\."):
            regard.attention_weights(q, k, backend=backend)
    with pytest.raises(ValueError, match=r"got 'sdpa', and it has no lse\. Use backend='flex'"):
        regard.attention_with_stats(q, k, v, backend="sdpa")


def test_a_refused_call_appends_nothing_to_its_cache():
    cache = regard.KVCache()
    with pytest.raises(ValueError, match="no softcap"):
        regard.attention(*qkv(seq_len_q=3, seq_len_kv=3), softcap=1.0, cache=cache, backend="sdpa")
    assert len(cache) == 0


# ---- other devices: the meta device stands in for one that this machine lacks ----


def elsewhere(*tensors):
    return [t.to("meta") for t in tensors]


def test_off_the_cpu_a_call_runs_where_its_tensors_are():
    q, k, v = elsewhere(*qkv())
    kept = masks.padding([3, 7]) & masks.padding(torch.ones(2, S, dtype=torch.bool, device="cpu"))
    for mask in (None, masks.causal(), kept):
        out = regard.attention(q, k, v, mask=mask, query_offset=0)
        assert out.is_meta
        assert out.shape == (2, 4, Q, 6)
    assert regard.attention(q, k, v, bias=torch.zeros(Q, S, device="meta")).is_meta


def test_off_the_cpu_a_mask_that_does_not_fit_is_refused():
    q, k, v = elsewhere(*qkv())
    with pytest.raises(ValueError, match=r"^attention: padding's keep must have seq_len_kv = 7 entries a row; got 3\."):
        regard.attention(q, k, v, mask=masks.padding(torch.ones(2, 3, dtype=torch.bool)))
    for name, terms in {"bias": {"bias": torch.zeros(Q, S)}, "sinks": {"sinks": torch.zeros(4)}}.items():
        message = rf"^attention: {name} must be on q's device, meta; got cpu\. Move it with \.to\(q\.device\)\.$"
        with pytest.raises(ValueError, match=message):
            regard.attention(q, k, v, **terms)


def test_off_the_cpu_what_no_backend_can_do_is_refused_with_each_ones_reason():
    q, k, v = elsewhere(*qkv())
    message = (
        "attention: some backend must be able to do the call on meta; got 'flex', and it does not run on meta; 'sdpa', "
        "and it has no softcap. Move q, k and v with .cpu()."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        regard.attention(q, k, v, softcap=1.0)
    with pytest.raises(
        ValueError, match=r"got 'native', and it runs on the CPU and q is on meta\. Move q, k and v with"
    ):
        regard.attention(q, k, v, backend="native")


# ---- explain ----


def test_explain_names_the_backend_and_why_each_other_was_refused(native):
    q, k, v = qkv()
    plan = regard.explain(q, k, v)
    assert plan.backend == native
    assert plan.refused == {
        "reference": "it holds the whole score matrix in float64, and serves as the oracle of tests",
        "flex": "on the CPU it runs uncompiled, on the whole score matrix",
        "sdpa": "it computes what the mask excludes, which 'native' skips",
    }
    plan = regard.explain(q, k, v, softcap=1.0, dropout=0.1)
    assert plan.refused["flex"] == "it has no dropout"
    assert plan.refused["sdpa"] == "it has no softcap"
    plan = regard.explain(q, k, v, softcap=1.0, backend="flex")
    assert (plan.backend, plan.isa) == ("flex", "torch")
    assert plan.tiles == plan.tiles_total
    assert plan.refused == {
        "native": "'flex' was asked for by name",
        "reference": "'flex' was asked for by name",
        "sdpa": "it has no softcap",
    }
    plan = regard.explain(*elsewhere(q, k, v), mask=masks.causal(), query_offset=0)
    assert (plan.backend, plan.threads) == ("sdpa", 0)
    assert plan.density == pytest.approx(15 / 35)
    assert plan.refused == {
        "native": "it runs on the CPU and q is on meta",
        "reference": "it runs on the CPU and q is on meta",
        "flex": "it does not run on meta",
    }


def test_sdpa_goes_first_only_where_it_needs_no_mask_of_its_own():
    frame = Frame(1, 2, 4, 4)
    diagonal = torch.zeros(1, 2, 7)
    dense = torch.zeros(1, 1, 4, 4)
    assert suffices(None, None, None, frame)
    assert suffices(masks.causal(), None, None, frame)
    assert suffices(None, dense, None, frame)
    assert not suffices(masks.causal(), dense, None, frame)
    assert not suffices(masks.causal(), None, None, Frame(1, 2, 4, 4, 1))
    assert not suffices(masks.sliding_window(1, 0), None, None, frame)
    assert not suffices(None, None, diagonal, frame)


def test_the_choice_off_the_cpu_goes_by_what_each_can_do(monkeypatch):
    from regard import lowering

    monkeypatch.setattr(lowering, "_FLEX_DEVICES", ("cpu", "meta"))
    q, k, v = elsewhere(*qkv(head_dim=16, head_dim_v=16))

    def chosen(*tensors, **terms):
        return regard.explain(*tensors, **terms).backend

    assert chosen(q, k, v) == "sdpa"
    assert chosen(q, k, v, mask=masks.sliding_window(2, 0), query_offset=0) == "flex"
    assert chosen(q, k, v, softcap=1.0) == "flex"
    assert chosen(q, k, v, bias=biases.alibi(), query_offset=0) == "flex"
    assert chosen(q, k, v, mask=masks.sliding_window(2, 0), query_offset=0, dropout=0.1) == "sdpa"
    plan = regard.explain(q, k, v, mask=masks.padding([3, 7]))
    assert plan.refused["sdpa"] == "it would hold a dense mask, and compute what it excludes"
    assert regard.explain(q, k, v).refused["flex"] == "'sdpa' needs no mask of its own here"
    small = elsewhere(*qkv())
    assert chosen(*small, mask=masks.sliding_window(2, 0), query_offset=0) == "sdpa"
    wide = [t.double() for t in (q, k, v)]
    plan = regard.explain(*wide, mask=masks.sliding_window(2, 0), query_offset=0)
    assert (plan.backend, plan.refused["flex"]) == ("sdpa", "it has no float64 on meta")
