"""The contract of attention and the public names, sentence by sentence, on every backend."""

import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from agreement import assert_close, causal_in_long_double, qkv, spelt_out, tolerance
from regard import biases, masks

F32 = torch.float32
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def causal_pairs(seq_len_q: int, seq_len_kv: int, offset: int = 0) -> np.ndarray:
    return np.arange(seq_len_kv)[None] <= np.arange(seq_len_q)[:, None] + offset


# ---- Shapes ----


def test_out_has_the_heads_and_length_of_q_and_the_head_dim_of_v(backend):
    q, k, v = qkv(2, 4, 2, 5, 7, 8, 6)
    assert regard.attention(q, k, v, backend=backend).shape == (2, 4, 5, 6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_keeps_the_dtype_of_q(backend, dtype):
    q, k, v = qkv(dtype=dtype)
    out = regard.attention(q, k, v, backend=backend)
    assert out.dtype == dtype
    assert_close(out, spelt_out(q, k, v)["out"], dtype, 7)


def test_any_strides_give_the_same_answer(backend):
    q, k, v = qkv()
    want = regard.attention(q, k, v, backend=backend)
    layouts = [
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: torch.nn.functional.pad(t, (3, 2, 1, 1))[:, :, 1:-1, 3:-2],
    ]
    for layout in layouts:
        assert torch.equal(regard.attention(layout(q), layout(k), layout(v), backend=backend), want)
    one = k[:, :, :1].expand_as(k)  # stride 0
    assert torch.equal(
        regard.attention(q, one, v, backend=backend), regard.attention(q, one.contiguous(), v, backend=backend)
    )


def test_num_heads_that_num_kv_heads_does_not_divide_is_refused(backend):
    q, k, v = qkv(num_heads=6, num_kv_heads=4)
    message = "attention: num_heads must be a multiple of num_kv_heads; got 6 and 4. Change the number of k/v heads."
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.") + "$"):
        regard.attention(q, k, v, backend=backend)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_query_head_h_reads_kv_head_h_over_the_group(backend, num_kv_heads):
    q, k, v = qkv(num_heads=6, num_kv_heads=num_kv_heads)
    got = regard.attention(q, k, v, backend=backend)
    for h in range(6):
        kv = h // (6 // num_kv_heads)
        alone = spelt_out(q[:, h : h + 1], k[:, kv : kv + 1], v[:, kv : kv + 1])["out"]
        assert_close(got[:, h : h + 1], alone, F32, 7)


def test_k_and_v_are_never_repeated_in_memory(native):
    q, k, v = qkv(1, 32, 1, 4, 8192, 64, 64)
    regard.attention(q, k, v, backend=native)
    with torch.profiler.profile(profile_memory=True) as profile:
        regard.attention(q, k, v, backend=native)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < allocated < k.nbytes / 4  # repeated, k and v would take 64 times k


# ---- Order ----


def test_scores_are_scaled_capped_biased_masked_softmaxed_and_mixed_in_this_order(backend):
    q, k, v = qkv()
    bias, visible = torch.randn(2, 4, 5, 7), torch.rand(2, 4, 5, 7) > 0.3
    given = {"scale": 0.9, "softcap": 1.5, "sinks": torch.randn(4)}
    want = spelt_out(q, k, v, visible=visible.numpy(), bias=bias.double().numpy(), **given)
    stats = regard.attention_with_stats(q, k, v, mask=visible, bias=bias, **given, backend=backend)
    assert_close(stats.out, want["out"], F32, 7)
    assert_close(stats.lse, want["lse"], F32, 7)


def test_a_sink_adds_to_the_denominator_only(backend):
    q, k, v = qkv()
    sinks = torch.tensor([0.0, 1.0, -2.0, 5.0])
    with_sinks = regard.attention_with_stats(q, k, v, sinks=sinks, backend=backend)
    without = regard.attention_with_stats(q, k, v, backend=backend)
    shrink = (without.lse.double().exp() / (without.lse.double().exp() + sinks.double()[:, None].exp())).numpy()
    assert_close(with_sinks.out, without.out.double().numpy() * shrink[..., None], F32, 7)


def test_dropout_comes_after_the_softmax_and_before_v(backend):
    q, k, _ = qkv(1, 1, 1, 40, 30)
    v = torch.eye(30)[None, None]  # out is the weights
    want = spelt_out(q, k, v)["weights"]
    out = regard.attention(q, k, v, dropout=0.25, backend=backend).double().numpy()
    kept = out != 0.0
    assert np.abs(out - want / 0.75)[kept].max() < tolerance(F32, 30)
    assert 0.65 < kept.mean() < 0.85


def test_scale_defaults_to_one_over_the_root_of_head_dim(backend):
    q, k, v = qkv(head_dim=16)
    assert torch.equal(
        regard.attention(q, k, v, backend=backend), regard.attention(q, k, v, scale=0.25, backend=backend)
    )


# ---- Positions ----


@pytest.mark.parametrize("query_offset", [0, 3, -2, torch.tensor([4, -1])])
@pytest.mark.parametrize("key_offset", [0, 2, -3, torch.tensor([-2, 1])])
def test_query_i_stands_at_i_plus_query_offset_and_key_j_at_j_plus_key_offset(backend, query_offset, key_offset):
    q, k, v = qkv()
    p = np.arange(5)[:, None] + np.broadcast_to(np.asarray(query_offset), 2)[:, None, None]
    j = np.arange(7)[None] + np.broadcast_to(np.asarray(key_offset), 2)[:, None, None]
    want = spelt_out(q, k, v, visible=(j <= p)[:, None])["out"]
    where = {"query_offset": query_offset, "key_offset": key_offset}
    assert_close(regard.attention(q, k, v, mask=masks.causal(), **where, backend=backend), want, F32, 7)


def test_causal_lets_a_query_see_its_own_position_and_before(backend):
    q, k, v = qkv(seq_len_q=7)
    want = spelt_out(q, k, v, visible=causal_pairs(7, 7))["out"]
    assert_close(regard.attention(q, k, v, mask=masks.causal(), backend=backend), want, F32, 7)


@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 0), (0, 2), (2, 1), (None, 1), (1, None), (None, None)])
def test_a_sliding_window_keeps_left_plus_one_plus_right_keys_and_none_leaves_a_side_open(backend, left, right):
    q, k, v = qkv(seq_len_q=9, seq_len_kv=9)
    distance = np.arange(9)[None] - np.arange(9)[:, None]
    visible = (distance >= -(9 if left is None else left)) & (distance <= (9 if right is None else right))
    if left is not None and right is not None:
        assert visible[4].sum() == left + 1 + right
    want = spelt_out(q, k, v, visible=visible)["out"]
    assert_close(regard.attention(q, k, v, mask=masks.sliding_window(left, right), backend=backend), want, F32, 9)


POSITIONAL = [
    masks.causal(),
    masks.sliding_window(2, 0),
    masks.documents([0] * 9),
    masks.from_function(lambda b, h, p, j: j <= p),
    masks.padding([3, 4]) & ~masks.causal(),
]


@pytest.mark.parametrize("mask", POSITIONAL, ids=lambda mask: type(mask).__name__)
def test_a_positional_mask_with_unequal_lengths_and_no_query_offset_is_refused(backend, mask):
    q, k, v = qkv()
    with pytest.raises(
        ValueError, match=r"^attention: query_offset must be given .* got 5 and 7\. Pass query_offset=2 "
    ):
        regard.attention(q, k, v, mask=mask, backend=backend)
    regard.attention(q, k, v, mask=mask, query_offset=2, backend=backend)
    regard.attention(q, k[:, :, :5], v[:, :, :5], mask=masks.causal(), backend=backend)


@pytest.mark.parametrize("left", [None, 3])
def test_a_kv_cache_supplies_both_offsets_itself(backend, left):
    q, k, v = qkv(seq_len_q=12, seq_len_kv=12)
    mask = masks.causal() if left is None else masks.sliding_window(left, 0)
    whole = regard.attention(q, k, v, mask=mask, backend=backend)
    cache, parts = regard.KVCache(left=left), []
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 11), (11, 12)]:
        new = (t[:, :, start:stop] for t in (q, k, v))
        parts.append(regard.attention(*new, mask=mask, cache=cache, backend=backend))
    assert_close(torch.cat(parts, 2), whole.double().numpy(), F32, 12)


# ---- Empty rows ----


def some_rows_empty() -> Tensor:
    mask = torch.rand(2, 4, 5, 7) > 0.4
    mask[:, :, 2] = False
    mask[1, 3] = False
    return mask


EMPTY = pytest.mark.parametrize("how", ["mask", "bias"])


def emptied(how: str) -> dict[str, Tensor]:
    mask = some_rows_empty()
    return {"mask": mask} if how == "mask" else {"bias": torch.where(mask, 0.0, -math.inf)}


@EMPTY
def test_a_row_without_keys_gives_zero_and_lse_of_minus_infinity(backend, how):
    q, k, v = qkv()
    given = emptied(how)
    stats = regard.attention_with_stats(q, k, v, **given, backend=backend)
    weights = regard.attention_weights(q, k, **given, backend=backend)
    for t, empty in ((stats.out, 0.0), (stats.lse, -math.inf), (weights, 0.0)):
        assert not t.isnan().any()
        assert (t[:, :, 2] == empty).all()
        assert (t[1, 3] == empty).all()


@EMPTY
def test_a_row_without_keys_has_gradient_zero(backend, how):
    q, k, v = (t.requires_grad_() for t in qkv())
    stats = regard.attention_with_stats(q, k, v, **emptied(how), backend=backend)
    (stats.out.square().sum() + stats.lse.where(stats.lse.isfinite(), 0.0).sum()).backward()
    assert q.grad is not None
    assert (q.grad[:, :, 2] == 0.0).all()
    for t in (q, k, v):
        assert t.grad is not None
        assert t.grad.isfinite().all()


def test_nan_in_a_query_without_keys_reaches_nothing(backend):
    q, k, v = qkv()
    q[:, :, 2] = math.nan
    for t in (q, k, v):
        t.requires_grad_()
    out = regard.attention(q, k, v, mask=some_rows_empty(), backend=backend)
    out.square().sum().backward()
    for t in (out, q.grad, k.grad, v.grad):
        assert t is not None
        assert t.isfinite().all()


def test_the_lse_of_an_empty_row_is_its_sink(backend):
    q, k, v = qkv()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    stats = regard.attention_with_stats(q, k, v, mask=some_rows_empty(), sinks=sinks, backend=backend)
    assert (stats.out[:, :, 2] == 0.0).all()
    assert_close(stats.lse[:, :, 2], sinks.expand(2, 4).double().numpy(), F32, 1)


def test_no_keys_at_all_make_every_row_empty(backend):
    q, k, v = qkv(seq_len_kv=0)
    stats = regard.attention_with_stats(q, k, v, received=True, entropy=True, max_score=True, backend=backend)
    assert stats.out.shape == (2, 4, 5, 6)
    assert (stats.out == 0.0).all()
    assert (stats.lse == -math.inf).all()
    assert stats.received is not None
    assert stats.received.shape == (2, 4, 0)
    assert stats.max_score is not None
    assert (stats.max_score == -math.inf).all()


def test_no_queries_give_an_empty_result(backend):
    q, k, v = qkv(seq_len_q=0)
    stats = regard.attention_with_stats(q, k, v, received=True, top_k=2, backend=backend)
    assert stats.out.shape == (2, 4, 0, 6)
    assert stats.lse.shape == (2, 4, 0)
    assert stats.received is not None
    assert (stats.received == 0.0).all()


# ---- -inf as a bias; masked means absent ----


def test_minus_infinity_as_a_bias_excludes_its_key_as_a_mask_does(backend):
    q, k, v = qkv()
    mask = some_rows_empty()
    by_mask = regard.attention_with_stats(q, k, v, mask=mask, backend=backend)
    by_bias = regard.attention_with_stats(q, k, v, bias=torch.where(mask, 0.0, -math.inf), backend=backend)
    assert_close(by_bias.out, by_mask.out.double().numpy(), F32, 7)
    assert_close(by_bias.lse, by_mask.lse.double().numpy(), F32, 7)


UNSEEN = {
    "padding": masks.padding([4, 4]),
    "window": masks.sliding_window(0, 0),
    "tensor": masks.from_tensor(torch.arange(7) < 5),
    "function": masks.from_function(lambda b, h, p, j: j < 5),
    "causal": masks.causal(),
}


@pytest.mark.parametrize("kind", UNSEEN)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_or_inf_that_no_query_sees_reaches_neither_output_nor_gradient(backend, kind, poison):
    q, clean_k, clean_v = qkv()
    k, v = clean_k.clone(), clean_v.clone()
    k[:, :, 5:], v[:, :, 5:] = poison, poison
    answers = []
    for own_k, own_v in ((k, v), (clean_k, clean_v)):
        given = [t.clone().requires_grad_() for t in (q, own_k, own_v)]
        stats = regard.attention_with_stats(
            *given, mask=UNSEEN[kind], query_offset=0, softcap=3.0, received=True, backend=backend
        )
        (stats.out.square().sum() + stats.lse.sum()).backward()
        answers.append([stats.out, stats.lse, stats.received, *(t.grad for t in given)])
    for poisoned, clean in zip(*answers, strict=True):
        assert_close(poisoned, clean, F32, 7, largest=16.0)
    assert all(torch.equal(poisoned, clean) for poisoned, clean in list(zip(*answers, strict=True))[:3])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_row_that_some_query_sees_poisons_exactly_the_queries_that_see_it(backend, poison, which):
    q, k, v = qkv(seq_len_q=7)
    clean = regard.attention(q, k, v, mask=masks.causal(), backend=backend)
    (k if which == "k" else v)[:, 0, 4] = poison
    q.requires_grad_()
    out = regard.attention(q, k, v, mask=masks.causal(), backend=backend)
    assert torch.equal(out[:, :, :4], clean[:, :, :4])
    assert torch.equal(out[:, 2:], clean[:, 2:])
    if which == "v":
        assert not out[:, :2, 4:].isfinite().any()
    out.sum().backward()
    assert q.grad is not None
    assert q.grad[:, :, :4].isfinite().all()
    assert q.grad[:, 2:].isfinite().all()
    assert not q.grad[:, :2, 4:].isfinite().all()


# ---- Partials ----


def test_partials_over_disjoint_keys_merge_into_the_whole(backend):
    q, k, v = qkv(seq_len_kv=12)
    mask = masks.sliding_window(1, 1)
    whole = regard.attention_with_stats(q, k, v, mask=mask, query_offset=4, backend=backend)
    parts = [
        regard.attention_with_stats(
            q, k[:, :, a:b], v[:, :, a:b], mask=mask, query_offset=4, key_offset=a, backend=backend
        )[:2]
        for a, b in ((0, 3), (3, 4), (4, 12))
    ]  # the first is empty for most queries
    out, lse = regard.merge_attention(parts)
    assert out.dtype == lse.dtype == F32
    assert_close(out, whole.out.double().numpy(), F32, 12)
    assert_close(lse, whole.lse.double().numpy(), F32, 12)


def test_a_merge_of_empty_partials_is_empty_and_has_gradient_zero():
    out, lse = torch.zeros(1, 1, 2, 3, requires_grad=True), torch.full((1, 1, 2), -math.inf, requires_grad=True)
    merged, merged_lse = regard.merge_attention([(out, lse), (out, lse)])
    assert (merged == 0.0).all()
    assert (merged_lse == -math.inf).all()
    (merged.sum() + merged_lse.where(merged_lse.isfinite(), 0.0).sum()).backward()
    assert (out.grad == 0.0).all()
    assert (lse.grad == 0.0).all()


def test_merging_is_differentiable():
    partials = [
        (
            torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True),
            torch.randn(1, 2, 3).double().requires_grad_(),
        )
        for _ in range(3)
    ]
    flat = tuple(t for pair in partials for t in pair)
    assert torch.autograd.gradcheck(lambda *t: regard.merge_attention(list(zip(t[::2], t[1::2], strict=True))), flat)


def test_lse_is_the_log_of_the_whole_denominator_so_that_weight_is_exp_of_score_minus_lse(backend):
    q, k, v = qkv()
    given = {"sinks": torch.randn(4), "bias": torch.randn(5, 7), "softcap": 2.0, "mask": torch.rand(5, 7) > 0.3}
    stats = regard.attention_with_stats(q, k, v, **given, backend=backend)
    score = regard.attention_weights(q, k, stage="biased", **given, backend=backend)
    weights = regard.attention_weights(q, k, **given, backend=backend)
    assert_close(weights, (score.double() - stats.lse.double()[..., None]).exp().numpy(), F32, 7)


def test_a_sink_is_one_more_partial_with_out_zero_and_lse_the_sink(backend):
    q, k, v = qkv()
    sinks = torch.randn(4)
    whole = regard.attention_with_stats(q, k, v, sinks=sinks, backend=backend)
    partial = regard.attention_with_stats(q, k, v, backend=backend)[:2]
    out, lse = regard.merge_attention([partial, (torch.zeros(1, 1, 1, 1), sinks[None, :, None])])
    assert_close(out, whole.out.double().numpy(), F32, 7)
    assert_close(lse, whole.lse.double().numpy(), F32, 7)


GIVEN = {
    "plain": {},
    "causal": {"mask": masks.causal(), "query_offset": -1},
    "softcap": {"softcap": 0.7, "scale": -1.3},
    "window": {"mask": masks.sliding_window(1, 2), "query_offset": torch.tensor([0, 4])},
    "holes": {"mask": masks.padding(torch.tensor([[True, False, True, True], [True, True, False, True]]))},
    "heads": {"mask": masks.from_function(lambda b, h, p, j: (p + j + h) % 3 > 0), "query_offset": 0},
}


@pytest.mark.parametrize("kind", GIVEN)
def test_out_and_lse_are_differentiable_in_q_k_v_bias_and_sinks(backend, kind):
    q, k, v = (t.requires_grad_() for t in qkv(2, 2, 1, 3, 4, 3, 2, dtype=torch.float64))
    bias = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, bias, sinks):
        stats = regard.attention_with_stats(q, k, v, bias=bias, sinks=sinks, **GIVEN[kind], backend=backend)
        return stats.out, stats.lse

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks))


# ---- Exact ----


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129, 500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_as_accurate_against_float64_as_pytorch_is(native, dtype, length):
    q, k, v = qkv(1, 2, 2, length, length, 32, 32, dtype=dtype)
    exact = causal_in_long_double(q, k, v)
    ours = regard.attention(q, k, v, mask=masks.causal(), backend=native)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    floor = torch.finfo(dtype).eps / 4  # where PyTorch happens to be exact
    for norm in (lambda error: np.sqrt(np.square(error).mean()), lambda error: np.abs(error).max()):
        error, allowed = (norm(t.double().numpy() - exact) for t in (ours, theirs))
        assert error <= 2.0 * max(allowed, floor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_keep_lse_and_statistics_in_float32(backend, dtype):
    q, k, v = qkv(dtype=dtype)
    asked = {"top_k": 3, "received": True, "entropy": True, "max_score": True, "block": (2, 3)}
    stats = regard.attention_with_stats(q, k, v, **asked, backend=backend)
    want = spelt_out(q, k, v)
    assert_close(stats.lse, want["lse"], F32, 7)
    assert stats.received is not None
    assert_close(stats.received, want["weights"].sum(2), F32, 7)
    assert {t.dtype for name, t in stats._asdict().items() if name not in ("out", "top_keys")} == {F32}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_without_gradient_gives_the_bits_of_one_with(backend, dtype):
    q, k, v = qkv(seq_len_q=70, seq_len_kv=70, dtype=dtype)
    plain = regard.attention(q, k, v, mask=masks.causal(), backend=backend)
    recorded = regard.attention(q.requires_grad_(), k, v, mask=masks.causal(), backend=backend)
    assert recorded.requires_grad
    assert torch.equal(plain, recorded)


def test_attention_with_stats_gives_the_bits_of_attention(backend):
    q, k, v = qkv(seq_len_q=70, seq_len_kv=90)
    asked = {"top_k": 3, "received": True, "entropy": True, "max_score": True, "block": (16, 16)}
    stats = regard.attention_with_stats(q, k, v, mask=masks.padding([50, 90]), **asked, backend=backend)
    assert torch.equal(stats.out, regard.attention(q, k, v, mask=masks.padding([50, 90]), backend=backend))


# ---- Deterministic ----


def everything(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    given = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    asked = {"top_k": 2, "received": True, "entropy": True, "max_score": True, "block": (32, 32)}
    stats = regard.attention_with_stats(*given, mask=masks.causal(), query_offset=20, **asked)
    (stats.out.square().sum() + stats.lse.sum()).backward()
    return [*(t.detach() for t in stats if t is not None), *(t.grad for t in given if t.grad is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_inputs_give_the_same_bits_whatever_the_thread_count_and_the_run(native, dtype):
    q, k, v = qkv(2, 4, 2, 130, 150, 32, 32, dtype=dtype)
    threads, answers = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            answers.append(everything(q, k, v))
    finally:
        torch.set_num_threads(threads)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_row_gives_the_same_bits_whatever_the_batch_around_it(native, dtype):
    q, k, v = qkv(3, 4, 2, 130, 150, 32, 32, dtype=dtype)
    whole, alone = everything(q, k, v), everything(q[1:2], k[1:2], v[1:2])
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


# ---- Return types; names ----


def test_the_return_type_never_depends_on_a_flag(backend):
    q, k, v = qkv()
    for flags in ({}, {"dropout": 0.5}, {"softcap": 2.0, "scale": 0.1}):
        assert type(regard.attention(q, k, v, **flags, backend=backend)) is Tensor
        assert type(regard.attention_with_stats(q, k, v, **flags, backend=backend)) is regard.AttentionStats
    assert type(regard.attention_with_stats(q, k, v, top_k=1, backend=backend)) is regard.AttentionStats


def names(function) -> list[str]:
    return [
        f"{p.name}={p.default}" if p.default is not p.empty else p.name
        for p in inspect.signature(function).parameters.values()
    ]


def test_the_public_functions_take_the_names_of_the_design():
    same = "mask=None bias=None scale=None softcap=None sinks=None dropout=0.0 query_offset=None key_offset=0"
    same += " cache=None backend=None"
    asked = "top_k=0 received=False entropy=False max_score=False block=None"
    every = slice(None)
    assert names(regard.attention) == f"q k v {same}".split()
    assert names(regard.attention_with_stats) == f"q k v {same} {asked}".split()
    assert names(regard.attention_weights) == [
        "q", "k", f"rows={every}", f"cols={every}", "lse=None", "stage=weights", *same.split()
    ]  # fmt: skip
    assert names(regard.explain) == f"q k v {same}".split()
    for function in (regard.attention, regard.attention_with_stats, regard.attention_weights, regard.explain):
        kinds = {p.kind for p in inspect.signature(function).parameters.values() if p.name not in ("q", "k", "v")}
        assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    fields = "out lse top_keys top_weights received entropy max_score block_mass block_max"
    assert regard.AttentionStats._fields == tuple(fields.split())


def test_rooms_above_the_front_door_load_on_first_use():
    program = "import regard, sys; assert not {'regard.huggingface', 'regard.lens', 'transformers'} & set(sys.modules)"
    source = str(Path(regard.__file__).parents[1])
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": source})
    with pytest.raises(AttributeError, match="module 'regard' has no attribute 'nothing'"):
        _ = regard.nothing


# ---- mask, bias, sinks ----


@pytest.mark.parametrize("shape", [(7,), (5, 7), (5, 1), (4, 5, 7), (1, 5, 7), (2, 1, 1, 7), (2, 4, 5, 7)])
def test_a_bool_tensor_is_a_mask_where_true_means_may_attend(backend, shape):
    q, k, v = qkv()
    mask = torch.rand(shape) > 0.4
    want = spelt_out(q, k, v, visible=mask.numpy())["out"]
    assert_close(regard.attention(q, k, v, mask=mask, backend=backend), want, F32, 7)


def test_a_float_mask_is_refused_with_the_fix(backend):
    q, k, v = qkv()
    message = r"^attention: mask must be bool, True = may attend; got torch.float32. Pass it as bias=.$"
    with pytest.raises(TypeError, match=message):
        regard.attention(q, k, v, mask=torch.zeros(5, 7), backend=backend)


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 1), (4, 1, 7), (2, 1, 5, 7), (2, 4, 5, 7)])
def test_a_float_tensor_is_a_bias_and_carries_its_gradient(backend, shape):
    q, k, v = qkv()
    bias = torch.randn(shape, requires_grad=True)
    out = regard.attention(q, k, v, bias=bias, backend=backend)
    assert_close(out, spelt_out(q, k, v, bias=bias.detach().double().numpy())["out"], F32, 7)
    assert torch.equal(out, regard.attention(q, k, v, bias=biases.dense(bias), backend=backend))
    out.square().sum().backward()
    assert bias.grad is not None
    assert bias.grad.shape == shape


def test_a_bias_in_another_dtype_than_q_is_refused(backend):
    q, k, v = qkv(dtype=torch.bfloat16)
    message = (
        r"^attention: bias must be in q's dtype, torch.bfloat16; got torch.float32. Convert it with .to\(q.dtype\).$"
    )
    with pytest.raises(TypeError, match=message):
        regard.attention(q, k, v, bias=torch.zeros(5, 7), backend=backend)


def test_alibi_lowers_a_score_by_the_slope_times_the_distance(backend):
    q, k, v = qkv()
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0], requires_grad=True)
    distance = np.abs(np.arange(7)[None] - (np.arange(5)[:, None] + 2))
    bias = -slopes.detach().double().numpy()[:, None, None] * distance
    out = regard.attention(q, k, v, bias=biases.alibi(slopes), query_offset=2, backend=backend)
    assert_close(out, spelt_out(q, k, v, bias=bias)["out"], F32, 7)
    out.square().sum().backward()
    assert slopes.grad is not None
    assert (slopes.grad != 0.0).all()


@pytest.mark.parametrize("query_offset", [-2, torch.tensor([1, 3])])
def test_a_relative_position_bias_is_read_from_its_table_by_bucket(backend, query_offset):
    q, k, v = qkv()
    table = torch.randn(4, 5, requires_grad=True)
    p = np.arange(5)[:, None] + np.broadcast_to(np.asarray(query_offset), 2)[:, None, None]
    bucket = np.clip(np.arange(7)[None] - p, -2, 2) + 2
    bias = np.moveaxis(table.detach().double().numpy()[:, bucket], 0, 1)
    given = biases.relative_position(table, lambda distance: distance.clamp(-2, 2) + 2)
    out = regard.attention(q, k, v, bias=given, query_offset=query_offset, backend=backend)
    assert_close(out, spelt_out(q, k, v, bias=bias)["out"], F32, 7)
    out.square().sum().backward()
    assert table.grad is not None
    assert (table.grad != 0.0).any()


def test_a_positional_bias_with_unequal_lengths_and_no_query_offset_is_refused(backend):
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"^attention: query_offset must be given where a positional bias meets"):
        regard.attention(q, k, v, bias=biases.alibi(), backend=backend)


def test_sinks_are_one_number_per_head_in_the_dtype_of_q(backend):
    q, k, v = qkv(dtype=torch.float16)
    regard.attention(q, k, v, sinks=torch.zeros(4, dtype=torch.float16), backend=backend)
    with pytest.raises(ValueError, match=r"^attention: sinks must be \(num_heads,\) = \(4,\); got \(2,\)"):
        regard.attention(q, k, v, sinks=torch.zeros(2, dtype=torch.float16), backend=backend)
    with pytest.raises(TypeError, match=r"^attention: sinks must be in q's dtype, torch.float16; got torch.float32"):
        regard.attention(q, k, v, sinks=torch.zeros(4), backend=backend)


# ---- dropout, scale, cache, stage ----


def test_the_same_seed_gives_the_same_dropout_for_any_thread_count(backend):
    q, k, v = qkv(seq_len_q=100, seq_len_kv=200)
    threads, answers = torch.get_num_threads(), []
    try:
        for count, seed in ((1, 1), (2, 1), (2, 2)):
            torch.set_num_threads(count)
            torch.manual_seed(seed)
            answers.append(regard.attention(q, k, v, dropout=0.5, backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_dropout_has_the_gradient_of_the_weights_it_kept(backend):
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, 1, 3, 4, 3, 2, dtype=torch.float64))

    def call(q, k, v):
        torch.manual_seed(3)
        return regard.attention(q, k, v, dropout=0.4, backend=backend)

    assert torch.autograd.gradcheck(call, (q, k, v))


def test_scale_may_be_negative(backend):
    q, k, v = qkv()
    got = regard.attention(q, k, v, scale=-0.7, backend=backend)
    assert_close(got, spelt_out(q, k, v, scale=-0.7)["out"], F32, 7)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_of_nan_or_inf_is_refused(backend, scale):
    q, k, v = qkv()
    with pytest.raises(ValueError, match=rf"^attention: scale must be finite; got {scale}\. Leave it out for 1/sqrt"):
        regard.attention(q, k, v, scale=scale, backend=backend)


def test_with_a_cache_the_new_keys_and_values_are_appended_first(backend):
    q, k, v = qkv(seq_len_q=3, seq_len_kv=3)
    cache = regard.KVCache()
    regard.attention(q, k, v, mask=masks.causal(), cache=cache, backend=backend)
    assert torch.equal(cache.keys, k)
    out = regard.attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], cache=cache, backend=backend)
    assert len(cache) == 4
    want = spelt_out(q[:, :, :1], torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2))["out"]
    assert_close(out, want, F32, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("stage", ["scaled", "capped", "biased", "weights"])
def test_the_four_stages_are_the_four_points_of_the_order(backend, stage, dtype):
    q, k, v = qkv(dtype=dtype)
    given = {"scale": 0.9, "softcap": 1.5, "sinks": torch.randn(4).to(dtype)}
    bias, visible = torch.randn(4, 5, 7).to(dtype), torch.rand(2, 1, 5, 7) > 0.3
    want = spelt_out(q, k, v, visible=visible.numpy(), bias=bias.double().numpy(), **given)[stage]
    rows, cols = slice(1, 4), range(2, 7)
    got = regard.attention_weights(
        q, k, rows=rows, cols=cols, stage=stage, mask=visible, bias=bias, **given, backend=backend
    )
    wide = torch.float64 if dtype == torch.float64 else F32
    assert got.dtype == wide
    assert_close(got, want[:, :, 1:4, 2:7], wide, 7)


def test_the_lse_of_a_tile_is_the_full_length_one(backend):
    q, k, v = qkv(seq_len_q=80, seq_len_kv=90)
    given = {"mask": masks.sliding_window(30, 2), "query_offset": 5, "sinks": torch.randn(4), "backend": backend}
    lse = regard.attention_with_stats(q, k, v, **given).lse
    own = regard.attention_weights(q, k, rows=slice(70, 75), **given)
    assert_close(own, regard.attention_weights(q, k, rows=slice(70, 75), lse=lse, **given), F32, 90)
    message = r"^attention_weights: lse must be the full-length .* = \(2, 4, 80\); got torch.float32 \(2, 4, 5\)"
    with pytest.raises(ValueError, match=message):
        regard.attention_weights(q, k, rows=slice(70, 75), lse=lse[:, :, 70:75], **given)


ROW_INDEXED = {
    "tensor": lambda: masks.from_tensor(torch.rand(2, 1, 20, 9) > 0.5),
    "documents": lambda: masks.documents(torch.arange(20) % 3, torch.arange(9) % 3),
    "joined": lambda: ~(masks.causal() & masks.from_tensor(torch.rand(20, 9) > 0.5)),
    "function": lambda: masks.from_function(lambda b, h, p, j: (p + j + h) % 3 > 0),
}


@pytest.mark.parametrize("kind", ROW_INDEXED)
@pytest.mark.parametrize("bias", [None, biases.alibi(), torch.randn(4, 20, 9)], ids=["none", "alibi", "dense"])
def test_a_tile_asked_for_alone_equals_its_part_of_the_whole(backend, kind, bias):
    q, k, _ = qkv(seq_len_q=20, seq_len_kv=9)
    given = {"mask": ROW_INDEXED[kind](), "bias": bias, "query_offset": torch.tensor([-3, 1]), "backend": backend}
    whole = regard.attention_weights(q, k, **given)
    assert torch.equal(
        regard.attention_weights(q, k, rows=slice(11, 17), cols=slice(3, 8), **given), whole[:, :, 11:17, 3:8]
    )


# ---- Statistics ----


STATISTICS = {"top_k": 4, "received": True, "entropy": True, "max_score": True, "block": (2, 3)}


def seen_and_told(backend: str) -> tuple[dict[str, np.ndarray], regard.AttentionStats, Tensor]:
    q, k, v = qkv()
    visible = some_rows_empty()
    want = spelt_out(q, k, v, visible=visible.numpy())
    return want, regard.attention_with_stats(q, k, v, mask=visible, **STATISTICS, backend=backend), visible


def test_received_sums_the_weights_of_each_key_per_query_head(backend):
    want, stats, _ = seen_and_told(backend)
    assert_close(stats.received, want["weights"].sum(2), F32, 7)


def test_entropy_is_minus_the_sum_of_w_ln_w_in_nats_and_zero_for_an_empty_row(backend):
    want, stats, _ = seen_and_told(backend)
    w = want["weights"]
    assert_close(stats.entropy, -(w * np.log(w, where=w > 0.0, out=np.zeros_like(w))).sum(-1), F32, 7)
    assert stats.entropy is not None
    assert (stats.entropy[:, :, 2] == 0.0).all()


def test_max_score_is_per_query_after_bias_and_mask(backend):
    want, stats, _ = seen_and_told(backend)
    assert_close(stats.max_score, want["biased"].max(-1), F32, 7)


def test_top_weights_descend_and_are_zero_past_the_visible_keys(backend):
    want, stats, visible = seen_and_told(backend)
    assert stats.top_keys is not None
    assert stats.top_weights is not None
    assert stats.top_keys.shape == stats.top_weights.shape == (2, 4, 5, 4)
    assert stats.top_keys.dtype == torch.int64
    assert_close(stats.top_weights, -np.sort(-want["weights"], -1)[..., :4], F32, 7)
    past = torch.arange(4) >= visible.sum(-1, keepdim=True)
    assert (stats.top_weights[past] == 0.0).all()
    assert (stats.top_keys[past] == -1).all()
    found = torch.from_numpy(want["weights"]).gather(-1, stats.top_keys.clamp(min=0))
    assert_close(stats.top_weights, found.masked_fill(past, 0.0), F32, 7)


def test_block_mass_and_block_max_count_ragged_edges(backend):
    want, stats, _ = seen_and_told(backend)
    assert stats.block_mass is not None
    assert stats.block_max is not None
    assert stats.block_mass.shape == stats.block_max.shape == (2, 4, 3, 3)
    for r, c in np.ndindex(3, 3):
        part = want["weights"][:, :, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3]
        assert_close(stats.block_mass[:, :, r, c], part.sum((2, 3)), F32, 7)
        assert_close(stats.block_max[:, :, r, c], part.max((2, 3)), F32, 7)


def test_what_was_not_asked_for_is_none(backend):
    q, k, v = qkv()
    assert regard.attention_with_stats(q, k, v, backend=backend)[2:] == (None,) * 7
    stats = regard.attention_with_stats(q, k, v, entropy=True, backend=backend)
    assert [name for name, t in stats._asdict().items() if t is not None] == ["out", "lse", "entropy"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_and_statistics_are_float32_and_float64_for_float64(backend, dtype):
    q, k, v = qkv(dtype=dtype)
    stats = regard.attention_with_stats(q, k, v, **STATISTICS, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else F32
    assert {t.dtype for name, t in stats._asdict().items() if name not in ("out", "top_keys")} == {wide}


def test_statistics_are_of_the_weights_before_dropout(backend):
    q, k, v = qkv()
    plain = regard.attention_with_stats(q, k, v, **STATISTICS, backend=backend)
    dropped = regard.attention_with_stats(q, k, v, **STATISTICS, dropout=0.5, backend=backend)
    assert not torch.equal(plain.out, dropped.out)
    for name in regard.AttentionStats._fields[1:]:
        assert torch.equal(getattr(plain, name), getattr(dropped, name))


# ---- Masks of the table ----


P, J = np.arange(5)[:, None] + 2, np.arange(7)[None]
KEEP = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) > 0.4
IDS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 0, 0, 3, 1]])
TABLE = {
    "padding(lengths)": (masks.padding([3, 6]), J[None] < np.array([3, 6])[:, None, None]),
    "padding(keep)": (masks.padding(KEEP), KEEP.numpy()[:, None]),
    "documents(ids)": (masks.documents(IDS), IDS.numpy()[:, P[:, 0]][:, :, None] == IDS.numpy()[:, None]),
    "documents(query_ids, key_ids)": (
        masks.documents([1, 0, 2, 2, 3], IDS),
        np.array([1, 0, 2, 2, 3])[None, :, None] == IDS.numpy()[:, None],
    ),
    "prefix(length)": (masks.prefix(3), J < 3),
    "prefix(lengths)": (masks.prefix([1, 4]), J[None] < np.array([1, 4])[:, None, None]),
    "causal() | prefix(n)": (masks.causal() | masks.prefix(6), (J <= P) | (J < 6)),
    "a & ~b": (masks.causal() & ~masks.sliding_window(1, 0), (J <= P) & ~((J >= P - 1) & (J <= P))),
    "from_tensor(t)": (masks.from_tensor(KEEP[:, None, None]), KEEP.numpy()[:, None]),
    "from_function(f)": (masks.from_function(lambda b, h, p, j: (p + j + b) % 2 == 0), None),
}


@pytest.mark.parametrize("kind", TABLE)
def test_every_mask_of_the_table_lets_through_what_it_says(backend, kind):
    mask, visible = TABLE[kind]
    if visible is None:
        visible = (P + J + np.arange(2)[:, None, None]) % 2 == 0
    q, k, v = qkv()
    visible = visible[:, None] if visible.ndim == 3 else visible
    out = regard.attention(q, k, v, mask=mask, query_offset=2, backend=backend)
    assert_close(out, spelt_out(q, k, v, visible=visible)["out"], F32, 7)


def test_padding_keep_and_from_tensor_index_the_call_and_the_others_go_by_positions(backend):
    q, k, v = qkv()
    at = {"query_offset": 12, "key_offset": 10, "backend": backend}
    by_index = spelt_out(q, k, v, visible=KEEP.numpy()[:, None, None])["out"]
    assert_close(regard.attention(q, k, v, mask=masks.padding(KEEP), **at), by_index, F32, 7)
    assert_close(regard.attention(q, k, v, mask=KEEP[:, None, None], **at), by_index, F32, 7)
    by_position = spelt_out(q, k, v, visible=J + 10 < 13)["out"]
    assert_close(regard.attention(q, k, v, mask=masks.prefix(13), **at), by_position, F32, 7)
    assert_close(regard.attention(q, k, v, mask=masks.padding([13, 13]), **at), by_position, F32, 7)
    ids = torch.arange(20) // 3
    documents = (np.arange(12, 17) // 3)[:, None] == (np.arange(10, 17) // 3)[None]
    got = regard.attention(q, k, v, mask=masks.documents(ids), **at)
    assert_close(got, spelt_out(q, k, v, visible=documents)["out"], F32, 7)


# ---- Arrays of other libraries ----


class Foreign:
    """An array that speaks DLPack and no more, like those of other libraries on the CPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **given):
        return self.tensor.__dlpack__(**given)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self):
        return Namespace


class Namespace:
    @staticmethod
    def from_dlpack(array) -> Foreign:
        return Foreign(torch.from_dlpack(array))


KINDS = {
    "numpy": (lambda t: t.numpy(), np.ndarray, np.asarray),
    "foreign": (Foreign, Foreign, lambda array: array.tensor.numpy()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_another_library_come_back_in_kind(backend, kind):
    q, k, v = qkv()
    make, array, read = KINDS[kind]
    mask, bias, sinks = torch.rand(5, 7) > 0.3, torch.randn(5, 7), torch.randn(4)
    given = {"mask": mask, "bias": bias, "sinks": sinks, "query_offset": torch.tensor([1, 2]), "backend": backend}
    foreign = {name: make(t) if isinstance(t, Tensor) else t for name, t in given.items()}
    want = regard.attention_with_stats(q, k, v, **given, **STATISTICS)
    arrays = [make(t) for t in (q, k, v)]
    out = regard.attention(*arrays, **foreign)
    assert isinstance(out, array)
    np.testing.assert_array_equal(read(out), want.out.numpy())
    stats = regard.attention_with_stats(*arrays, **foreign, **STATISTICS)
    for got, t in zip(stats, want, strict=True):
        assert isinstance(got, array)
        np.testing.assert_array_equal(read(got), t.numpy())
    weights = regard.attention_weights(arrays[0], arrays[1], lse=stats.lse, **foreign)
    assert isinstance(weights, array)
    np.testing.assert_array_equal(read(weights), regard.attention_weights(q, k, lse=want.lse, **given).numpy())
    merged, lse = regard.merge_attention([(stats.out, stats.lse)])
    assert isinstance(merged, array)
    assert isinstance(lse, array)


# ---- explain ----


def test_explain_tells_backend_isa_tiles_flops_bytes_and_why_the_others_were_refused(native):
    q, k, v = qkv(1, 2, 1, 256, 256, 64, 64)
    plan = regard.explain(q, k, v, mask=masks.causal())
    assert plan.backend == native
    assert plan.isa
    assert plan.threads >= 1
    assert (plan.tiles, plan.tiles_total) == (20, 32)
    assert plan.flops == 20 * 64 * 64 * 2 * (64 + 64)
    assert plan.bytes > 0
    assert plan.density == pytest.approx((256 + 1) / 512)
    assert set(plan.refused) == {"reference", "flex", "sdpa"}
    other = regard.explain(q, k, v, mask=masks.causal(), backend="reference")
    assert other.backend == "reference"
    assert set(other.refused) == {"native", "flex", "sdpa"}
    assert "tiles    20 of 32" in str(plan)


def test_explain_leaves_a_cache_as_it_is(native):
    q, k, v = qkv(seq_len_q=3, seq_len_kv=3)
    cache = regard.KVCache()
    regard.explain(q, k, v, cache=cache, backend=native)
    assert len(cache) == 0


def test_a_named_backend_that_does_not_exist_is_refused():
    q, k, v = qkv()
    message = r"^attention: backend must be 'native', 'reference', 'flex', 'sdpa' or None; got 'cuda'. Leave it out"
    with pytest.raises(ValueError, match=message):
        regard.attention(q, k, v, backend="cuda")
