"""The public functions: backends agree with the oracle; compile, export, transforms; what was asked is what is done."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import regard
from agreement import assert_close, qkv
from regard import biases, masks

F32 = torch.float32
ASKED = {"top_k": 3, "received": True, "entropy": True, "max_score": True, "block": (3, 5)}
MASKS = {
    "none": lambda q, kv: None,
    "causal": lambda q, kv: masks.causal(),
    "window": lambda q, kv: masks.sliding_window(3, 1),
    "padding": lambda q, kv: masks.padding([kv // 2, kv]),
    "function": lambda q, kv: masks.causal() & masks.from_function(lambda b, h, p, j: (p + j + h) % 3 > 0),
    "tensor": lambda q, kv: torch.rand(2, 4, q, kv) > 0.5,
    "documents": lambda q, kv: masks.documents(torch.arange(q) // 5, torch.arange(kv) // 7),
}
BIASES = {
    "none": lambda q, kv: None,
    "alibi": lambda q, kv: biases.alibi(),
    "table": lambda q, kv: biases.relative_position(torch.randn(4, 9), lambda d: d.clamp(-4, 4) + 4),
    "dense": lambda q, kv: torch.randn(4, 1, kv),
}


@pytest.mark.usefixtures("native")
@given(
    st.sampled_from(sorted(MASKS)),
    st.sampled_from(sorted(BIASES)),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 5, 63, 64, 65, 130]),
    st.sampled_from([1, 7, 64, 127, 129]),
    st.integers(-70, 70),
    st.booleans(),
)
def test_the_native_backend_agrees_with_the_reference(
    mask, bias, num_kv_heads, seq_len_q, seq_len_kv, query_offset, extras
):
    q, k, v = qkv(2, 4, num_kv_heads, seq_len_q, seq_len_kv, 16, 5)
    given = {"mask": MASKS[mask](seq_len_q, seq_len_kv), "bias": BIASES[bias](seq_len_q, seq_len_kv)}
    given |= {"query_offset": query_offset, **({"softcap": 2.0, "sinks": torch.randn(4)} if extras else {})}
    stats, exact = (regard.attention_with_stats(q, k, v, **given, **ASKED, backend=b) for b in ("native", "reference"))
    for name in regard.AttentionStats._fields:
        got, want = getattr(stats, name), getattr(exact, name)
        if name != "top_keys":
            largest = 4.0 * max(seq_len_q, 1) if name in ("received", "block_mass") else 8.0
            assert_close(got, want, F32, seq_len_kv, largest)
    for stage in ("scaled", "capped", "biased", "weights"):
        asked = {"rows": slice(seq_len_q // 2, None), "cols": slice(0, seq_len_kv // 2 + 1), "stage": stage}
        got, want = (regard.attention_weights(q, k, **given, **asked, backend=b) for b in ("native", "reference"))
        assert_close(got, want, F32, seq_len_kv, 8.0)


def test_none_is_the_native_backend(native):
    q, k, v = qkv(seq_len_q=70, seq_len_kv=70)
    assert torch.equal(regard.attention(q, k, v), regard.attention(q, k, v, backend=native))
    assert regard.explain(q, k, v).backend == native


def test_weights_take_no_gradient_and_no_more_rows_than_asked(backend):
    q, k, _ = qkv()
    tile = regard.attention_weights(q.requires_grad_(), k, rows=slice(1, 3), cols=slice(2, 2), backend=backend)
    assert tile.shape == (2, 4, 2, 0)
    assert not regard.attention_weights(q, k, backend=backend).requires_grad


def test_arguments_of_a_call_can_be_handed_on_to_its_weights(backend):
    q, k, v = qkv()
    given = {"mask": masks.causal(), "query_offset": 2, "dropout": 0.5, "cache": None, "backend": backend}
    regard.attention(q, k, v, **given)
    plain = {**given, "dropout": 0.0}
    assert torch.equal(regard.attention_weights(q, k, **given), regard.attention_weights(q, k, **plain))


def test_a_merge_widens_half_results_to_the_dtype_of_lse():
    q, k, v = qkv(dtype=torch.bfloat16)
    out, lse = regard.merge_attention([regard.attention_with_stats(q, k, v)[:2]])
    assert out.dtype == lse.dtype == F32


def test_a_merge_does_not_mix_in_nan_of_a_partial_without_keys():
    whole = torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2)
    nothing = torch.full((1, 1, 2, 3), torch.nan), torch.full((1, 1, 2), -torch.inf)
    assert torch.equal(regard.merge_attention([whole, nothing])[0], whole[0])


def test_numpy_arrays_that_are_read_only_reversed_or_big_endian_are_taken(backend):
    q, k, v = (t.numpy() for t in qkv())
    want = regard.attention(q, k, v, backend=backend)
    q.flags.writeable = False
    got = regard.attention(q, k[:, :, ::-1], v.astype(">f4")[:, :, ::-1], backend=backend)
    assert abs(got - want).max() < 1e-6
    assert type(got) is type(want)


# ---- torch.compile and torch.export ----

DOCUMENTS = masks.documents(torch.tensor([0] * 3 + [1] * 4))
EVEN = masks.from_function(lambda b, h, p, j: (p + j) % 2 == 0)
OUTSIDE = ~masks.padding([2, 3]) | masks.causal()
BUCKETS = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))


def many_calls(q, k, v, lengths, bias):
    """Calls with each kind of mask and bias, made inside and outside of the traced function."""
    return [
        regard.attention(q, k, v),
        regard.attention(q, k, v, mask=masks.causal(), scale=0.3, softcap=2.0),
        regard.attention(q, k, v, mask=(masks.causal() | masks.prefix(2)) & masks.padding(lengths), bias=bias),
        regard.attention(q, k, v, mask=masks.sliding_window(2, None) & masks.Not(DOCUMENTS), bias=biases.alibi()),
        regard.attention(q, k, v, mask=EVEN, bias=biases.relative_position(BUCKETS, lambda d: d.clamp(-4, 4) + 4)),
        regard.attention(q, k, v, mask=torch.ones(7, 7, dtype=torch.bool).tril(), query_offset=lengths),
        regard.attention(q, k, v, mask=OUTSIDE, key_offset=-1, sinks=lengths.new_ones(4, dtype=q.dtype)),
    ]


def inputs_of_many_calls():
    q, k, v = qkv(seq_len_q=7)
    return q, k, v, torch.tensor([3, 7]), torch.randn(7, 7)


@pytest.mark.usefixtures("native")
def test_calls_compile_as_one_graph_with_the_same_bits_and_gradients():
    torch.compiler.reset()
    q, k, v, lengths, bias = inputs_of_many_calls()
    compiled = torch.compile(many_calls, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(q, k, v, lengths, bias), many_calls(q, k, v, lengths, bias), strict=True):
        assert torch.equal(got, want)
    gradients = []
    for function in (compiled, many_calls):
        given = [t.clone().requires_grad_() for t in (q, k, v, bias)]
        sum(out.square().sum() for out in function(*given[:3], lengths, given[3])).backward()
        gradients.append([t.grad for t in given])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("strict", [False, True])
def test_calls_export(strict):
    class Calls(torch.nn.Module):
        def forward(self, q, k, v, lengths, bias):
            return many_calls(q, k, v, lengths, bias)

    given = inputs_of_many_calls()
    program = torch.export.export(Calls(), given, strict=strict)
    for got, want in zip(program.module()(*given), many_calls(*given), strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("native")
def test_an_exported_call_serves_any_batch_and_length():
    class Decoder(torch.nn.Module):
        def forward(self, q, k, v):
            return regard.attention(
                q, k, v, mask=masks.causal(), bias=biases.alibi(), query_offset=k.shape[2] - q.shape[2]
            )

    batch, new, held = (torch.export.Dim(name) for name in ("batch", "new", "held"))
    shapes = {"q": {0: batch, 2: new}, "k": {0: batch, 2: held}, "v": {0: batch, 2: held}}
    program = torch.export.export(Decoder(), qkv(), dynamic_shapes=shapes)
    other = qkv(3, 4, 2, 2, 11)
    assert torch.equal(program.module()(*other), Decoder()(*other))
