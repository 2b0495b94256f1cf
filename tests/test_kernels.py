"""The compiled kernels on every instruction set of this machine, against the float64 formula written out here."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard import masks, native, op
from regard.positions import Frame

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim, head_dim_v
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 5, 7, 3, 5),
    (1, 6, 3, 129, 200, 80, 65),
    (3, 8, 2, 1, 300, 64, 33),
    (1, 2, 1, 200, 70, 128, 1),
]
# Around every edge of a tile (64), a vector (4, 8, 16) and a block of rows (6, 12).
LENGTHS = [
    1,
    2,
    3,
    5,
    6,
    7,
    8,
    12,
    13,
    15,
    16,
    17,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    70,
    96,
    127,
    128,
    129,
    191,
    193,
    255,
    257,
    511,
    513,
    1000,
]


@pytest.fixture(params=native.isas() + native.hidden_isas())
def isa(request):
    with native.forced_isa(request.param):
        yield request.param


def attend(q: Tensor, k: Tensor, v: Tensor, **changes):
    arguments = {
        "mask": None, "bias": None, "diagonal": None, "sinks": None, "scale": q.shape[-1] ** -0.5, "softcap": None,
        "dropout": 0.0, "query_offset": 0, "key_offset": 0,
    }  # fmt: skip
    return op.attend(q, k, v, **(arguments | changes))


def formula(q, k, v, *, mask=None, bias=None, diagonal=None, sinks=None, scale=None, softcap=None, query_offset=0):
    """Attention in float64 as a textbook has it: (out, lse, weights)."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    n, m = q.shape[2], k.shape[2]
    scores = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if diagonal is not None:
        i, j = torch.arange(n)[:, None], torch.arange(m)[None]
        scores = scores + diagonal.double()[:, :, j - i + n - 1]
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(Frame(q.shape[0], q.shape[1], n, m, query_offset)), -math.inf)
    everything = scores
    if sinks is not None:
        everything = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    lse = torch.logsumexp(everything, -1)
    weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    return weights @ v, lse, weights


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(path for path in sys.path if path)
    everything = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "0", **environment}
    return subprocess.run([sys.executable, "-c", code], env=everything, capture_output=True, text=True, check=False)


def relative_error(found: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).item()


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_pytorch(isa, dtype):
    # The largest error of many rows, in the mean of four draws, since that of a few is luck; a rounding of the result
    # is granted on each side, which is all there is at length 1.
    ours, theirs = [], []
    for length in LENGTHS:
        for other in (length, 77):
            heads = max(2, 256 // length)
            mine = yours = 0.0
            for _ in range(4):
                q = torch.randn(1, heads, length, 64).to(dtype)
                k, v = (torch.randn(1, heads, other, 64).to(dtype) for _ in range(2))
                expected = formula(q, k, v)[0]
                mine += relative_error(attend(q, k, v)[0], expected) / 4
                yours += relative_error(F.scaled_dot_product_attention(q, k, v), expected) / 4
            assert mine <= 2 * yours + 2 * rounding(dtype), (length, other)
            ours.append(mine)
            theirs.append(yours)
    assert sum(ours) <= 1.5 * sum(theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_every_term_of_the_scores_matches_the_formula(isa, dtype, shape, softcap):
    batch, heads, kv_heads, n, m, dim, dim_v = shape
    q = torch.randn(batch, heads, n, dim).to(dtype)
    k, v = torch.randn(batch, kv_heads, m, dim).to(dtype), torch.randn(batch, kv_heads, m, dim_v).to(dtype)
    dense = [(batch, heads, n, m), (1, heads, 1, m), (batch, 1, n, 1), (1, 1, 1, 1)]
    biases = [{}] + [{"bias": torch.randn(s).to(dtype)} for s in dense]
    biases += [{"diagonal": torch.randn(b, h, n + m - 1).to(dtype)} for b, h in ((1, heads), (batch, 1))]
    offset = m - n
    rules = [
        None,
        masks.causal(),
        masks.sliding_window(20, 3) | masks.prefix(4),
        masks.from_tensor(torch.rand(batch, heads, n, m) > 0.5),
    ]
    for mask in rules:
        for bias in biases:
            for sinks in (None, torch.randn(heads).to(dtype)):
                out, lse = attend(
                    q, k, v, mask=mask, softcap=softcap, sinks=sinks, query_offset=offset, scale=-0.3, **bias
                )
                expected, expected_lse, _ = formula(
                    q, k, v, mask=mask, softcap=softcap, sinks=sinks, query_offset=offset, scale=-0.3, **bias
                )
                allowed = 40 * torch.finfo(lse.dtype).eps
                assert relative_error(out, expected) <= allowed + rounding(dtype) * 2
                torch.testing.assert_close(lse.double(), expected_lse, rtol=allowed, atol=allowed * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_diagonal_bias_may_be_finer_than_the_half_type(isa, dtype):
    # Distances past 256 have no bfloat16 of their own.
    q, k, v = (torch.randn(1, 2, 700, 32).to(dtype) for _ in range(3))
    diagonal = -0.03 * (torch.arange(1399) - 699).abs().float().expand(1, 2, -1)
    out, lse = attend(q, k, v, diagonal=diagonal)
    expected, expected_lse, _ = formula(q, k, v, diagonal=diagonal)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert relative_error(out, expected) <= 2 * rounding(dtype)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 140), m=st.integers(1, 140), dim=st.integers(1, 40), dim_v=st.integers(1, 40),
    group=st.integers(1, 3),
    left=st.integers(0, 80), right=st.integers(0, 80), offset=st.integers(-70, 140), seed=st.integers(0, 2**31),
    strides=st.sampled_from(["contiguous", "heads last", "every other", "backwards head_dim"]),
)  # fmt: skip
def test_any_size_window_offset_and_stride_matches_the_formula(
    n, m, dim, dim_v, group, left, right, offset, seed, strides
):
    torch.manual_seed(seed)

    def make(heads, length, width):
        if strides == "heads last":
            return torch.randn(2, length, heads, width).transpose(1, 2)
        if strides == "every other":
            return torch.randn(2, heads, length, 2 * width)[..., ::2]
        if strides == "backwards head_dim":
            return torch.randn(2, heads, width, length).mT
        return torch.randn(2, heads, length, width)

    q, k, v = make(2 * group, n, dim), make(2, m, dim), make(2, m, dim_v)
    mask = masks.sliding_window(left, right)
    out, lse = attend(q, k, v, mask=mask, query_offset=offset)
    expected, expected_lse, _ = formula(q, k, v, mask=mask, query_offset=offset)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count_and_batch(isa, dtype):
    q = torch.randn(3, 6, 200, 64).to(dtype)
    k, v = (torch.randn(3, 2, 333, 64).to(dtype) for _ in range(2))
    lengths = torch.tensor([333, 5, 170])
    mask = masks.padding(lengths) & masks.causal()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attend(q, k, v, mask=mask, query_offset=133))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
    for row in range(3):
        alone = masks.padding(lengths[row : row + 1]) & masks.causal()
        one = slice(row, row + 1)
        out, lse = attend(q[one], k[one], v[one], mask=alone, query_offset=133)
        assert torch.equal(out, results[0][0][one]) and torch.equal(lse, results[0][1][one])


def test_a_mask_that_excludes_nothing_gives_the_bits_of_no_mask(isa):
    q, k, v = (torch.randn(1, 2, 150, 32) for _ in range(3))
    everything = masks.from_tensor(torch.ones(150, 150, dtype=torch.bool))
    assert torch.equal(attend(q, k, v)[0], attend(q, k, v, mask=everything)[0])
    # The same pairs, kept as ranges and as bits.
    scattered = torch.rand(150, 150) > 0.5
    as_bits = masks.from_function(lambda b, h, p, j: scattered[p, j])
    assert torch.equal(attend(q, k, v, mask=as_bits)[0], attend(q, k, v, mask=masks.from_tensor(scattered))[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_rows_that_hold_nan_or_inf_never_reach_the_output(isa, dtype, bad):
    q, k, v = (torch.randn(1, 2, 130, 32).to(dtype) for _ in range(3))
    clean = attend(q, k, v, mask=masks.causal())[0]
    k[:, :, 100:], v[:, :, 100:] = bad, bad
    out = attend(q, k, v, mask=masks.causal())[0]
    assert torch.equal(out[:, :, :100], clean[:, :, :100])
    k[:, :, 100:] = 0.5
    out, _ = attend(q, k, v, mask=masks.causal())
    assert torch.equal(out[:, :, :100], clean[:, :, :100]) and not out[:, :, 100:].isfinite().any()


def test_scores_of_inf_and_nan_come_out_as_in_float64(isa):
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    for bad in (math.nan, math.inf):
        spoiled = k.clone()
        spoiled[0, 0, 2, 3] = bad
        assert torch.equal(attend(q, spoiled, v)[0].isnan(), formula(q, spoiled, v)[0].isnan())


def test_huge_and_tiny_scores_keep_their_weights(isa):
    for scale in (1e-30, 1.0, 3e4, 1e30):
        q, k, v = (torch.randn(1, 1, 70, 16) for _ in range(3))
        out, lse = attend(q, k, v, scale=scale)
        expected, expected_lse, weights = formula(q, k, v, scale=scale)
        top, second = weights.topk(2).values.unbind(-1)
        clear = (
            top - second > 0.999 if scale > 1 else torch.ones_like(top, dtype=torch.bool)
        )  # near ties are float32's to decide
        torch.testing.assert_close(out.double()[clear], expected[clear], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_every_number_of_the_result_is_written(isa, monkeypatch):
    # Memory that the result is made in is poisoned first.
    poisoned = op._results

    def results(q, v):
        out, lse = poisoned(q, v)
        return out.fill_(math.nan), lse.fill_(math.nan)

    monkeypatch.setattr(op, "_results", results)
    for n, m in ((1, 1), (65, 63), (130, 0), (64, 200)):
        q, k, v = torch.randn(2, 4, n, 24), torch.randn(2, 2, m, 24), torch.randn(2, 2, m, 40)
        out, lse = attend(q, k, v)
        assert not out.isnan().any() and not lse.isnan().any()


def test_rows_without_keys_give_zero_and_minus_infinity(isa):
    q, k, v = torch.randn(1, 2, 80, 16), torch.randn(1, 2, 80, 16), torch.randn(1, 2, 80, 16)
    sinks = torch.tensor([0.5, -math.inf])
    for mask in (masks.causal(), masks.causal() & masks.from_function(lambda b, h, p, j: p >= j)):
        out, lse = attend(q, k, v, mask=mask, query_offset=-30)
        assert (out[:, :, :30] == 0).all() and (lse[:, :, :30] == -math.inf).all() and not out.isnan().any()
        out, lse = attend(q, k, v, mask=mask, query_offset=-30, sinks=sinks)
        assert (out[:, :, :30] == 0).all() and (lse[:, 0, :30] == 0.5).all() and (lse[:, 1, :30] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_match_the_formula(isa, dtype):
    batch, heads, kv_heads, n, m = 2, 4, 2, 150, 210
    q = torch.randn(batch, heads, n, 32).to(dtype)
    k, v = (torch.randn(batch, kv_heads, m, 32).to(dtype) for _ in range(2))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    sinks = torch.randn(heads).to(dtype)
    for mask in (None, masks.causal(), masks.from_tensor(torch.rand(heads, n, m) > 0.7), masks.sliding_window(3, 0)):
        for block in ((64, 64), (50, 1), (1, 70), (200, 300), (37, 41)):
            shared = {
                "mask": mask,
                "bias": None,
                "diagonal": None,
                "scale": 0.4,
                "softcap": None,
                "query_offset": 20,
                "key_offset": 0,
            }
            _, lse = attend(q, k, v, **(shared | {"sinks": sinks}))
            found = op.statistics(
                q, k, lse, **shared, top_k=5, received=True, entropy=True, max_score=True, block=block
            )
            _, _, weights = formula(q, k, v, mask=mask, scale=0.4, query_offset=20, sinks=sinks)
            torch.testing.assert_close(found["received"].double(), weights.sum(2), rtol=tolerance, atol=tolerance)
            surprise = torch.where(weights > 0, -weights * weights.clamp_min(1e-300).log(), 0.0)
            torch.testing.assert_close(found["entropy"].double(), surprise.sum(-1), rtol=tolerance, atol=tolerance)
            top = weights.topk(5)
            torch.testing.assert_close(found["top_weights"].double(), top.values, rtol=tolerance, atol=tolerance)
            keys = found["top_keys"]
            assert torch.equal(keys >= 0, (weights > 0).sum(-1, keepdim=True) > torch.arange(5))
            at_keys = weights.gather(-1, keys.clamp_min(0)).where(keys >= 0, 0.0)
            torch.testing.assert_close(at_keys, top.values, rtol=tolerance, atol=tolerance)
            rows, cols = block
            padded = F.pad(weights, (0, -m % cols, 0, -n % rows)).unflatten(3, (-1, cols)).unflatten(2, (-1, rows))
            torch.testing.assert_close(found["block_mass"].double(), padded.sum((3, 5)), rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(found["block_max"].double(), padded.amax((3, 5)), rtol=tolerance, atol=tolerance)


def test_equal_weights_rank_by_key(isa):
    q, k = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 100, 4)
    _, lse = attend(q, k, k)
    found = op.statistics(
        q, k, lse, mask=None, bias=None, diagonal=None, scale=1.0, softcap=None, query_offset=0, key_offset=0, top_k=7
    )
    assert torch.equal(found["top_keys"], torch.arange(7).expand(1, 1, 3, 7))


STATISTICS = {"top_k": 5, "received": True, "entropy": True, "max_score": True, "block": (37, 41)}
WHOLE = {
    "mask": None, "bias": None, "diagonal": None, "sinks": None, "scale": 0.3, "softcap": None, "dropout": 0.0,
    "query_offset": 0, "key_offset": 0,
}  # fmt: skip


def observed(dtype: torch.dtype, n: int = 150, m: int = 210) -> tuple[Tensor, Tensor, Tensor, dict]:
    """Four heads on two, a softcap, sinks, a bias of -inf in places and rows without keys."""
    q = torch.randn(2, 4, n, 24).to(dtype)
    k, v = (torch.randn(2, 2, m, width).to(dtype) for width in (24, 40))
    bias = torch.randn(1, 4, n, m).masked_fill(torch.rand(1, 4, n, m) < 0.2, -math.inf)
    bias[:, 1, 7] = -math.inf
    given = {"bias": bias.to(dtype), "sinks": torch.randn(4).to(dtype), "softcap": 3.0, "query_offset": -20}
    return q, k, v, WHOLE | given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ranges", "bits", "sparse"])
def test_statistics_in_one_pass_have_the_bits_of_two_passes(isa, dtype, kind):
    q, k, v, given = observed(dtype)
    given["mask"] = {
        "ranges": masks.causal() | masks.prefix(3),
        "bits": masks.from_tensor(torch.rand(4, 150, 210) > 0.4),
        "sparse": masks.from_tensor((torch.rand(4, 150, 210) > 0.99) & (torch.arange(210) % 128 < 64)),
    }[kind]
    out, lse, found = op.attend_with_statistics(q, k, v, **given, **STATISTICS)
    plain_out, plain_lse = attend(q, k, v, **given)
    assert torch.equal(out, plain_out) and torch.equal(lse, plain_lse)
    alone = {name: value for name, value in given.items() if name not in ("sinks", "dropout")}
    for name, value in op.statistics(q, k, lse, **alone, **STATISTICS).items():
        assert torch.equal(found[name], value), name
    recorded = op.attend_with_statistics(q.requires_grad_(), k, v, **given, **STATISTICS)
    assert recorded[0].requires_grad and torch.equal(recorded[0], out)
    for name, value in recorded[2].items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_statistic_alone_has_the_bits_of_all_together(isa, dtype):
    q, k, v, given = observed(dtype)
    given["mask"] = masks.causal() | masks.prefix(3)
    asked = STATISTICS | {"block": (64, 41)}  # blocks of whole tiles leave the order of the sums as it is
    out, lse, found = op.attend_with_statistics(q, k, v, **given, **asked)
    for name, value in asked.items():
        alone_out, alone_lse, alone = op.attend_with_statistics(q, k, v, **given, **{name: value})
        assert torch.equal(alone_out, out) and torch.equal(alone_lse, lse)
        expected = {"top_k": {"top_keys", "top_weights"}, "block": {"block_mass", "block_max"}}.get(name, {name})
        assert set(alone) == expected
        for of_name, statistic in alone.items():
            assert torch.equal(statistic, found[of_name]), of_name


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_under_bias_softcap_sinks_and_groups_match_the_formula(isa, dtype):
    q, k, v, given = observed(dtype)
    for mask in (None, masks.causal(), masks.from_tensor(torch.rand(4, 150, 210) > 0.7)):
        _, _, found = op.attend_with_statistics(q, k, v, **(given | {"mask": mask}), **STATISTICS)
        of_formula = {name: given[name] for name in ("bias", "sinks", "scale", "softcap", "query_offset")}
        _, _, weights = formula(q, k, v, mask=mask, **of_formula)
        near = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
        torch.testing.assert_close(found["received"].double(), weights.sum(2), **near)
        surprise = torch.where(weights > 0, -weights * weights.clamp_min(1e-300).log(), 0.0)
        torch.testing.assert_close(found["entropy"].double(), surprise.sum(-1), **near)
        torch.testing.assert_close(found["top_weights"].double(), weights.topk(5).values, **near)
        padded = F.pad(weights, (0, -210 % 41, 0, -150 % 37)).unflatten(3, (-1, 41)).unflatten(2, (-1, 37))
        torch.testing.assert_close(found["block_mass"].double(), padded.sum((3, 5)), **near)
        torch.testing.assert_close(found["block_max"].double(), padded.amax((3, 5)), **near)
        empty = (weights == 0).all(-1)
        assert empty.any() and (found["entropy"][empty] == 0).all() and (found["max_score"][empty] == -math.inf).all()
        assert (found["top_keys"][empty] == -1).all() and (found["top_weights"][empty] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_too_long_to_keep_give_the_statistics_of_their_parts(isa, dtype):
    # 70 queries over 17,000 keys: more than a worker keeps, so scores are computed a second time.
    q = torch.randn(1, 1, 70, 8).to(dtype)
    k, v = (torch.randn(1, 1, 17000, 8).to(dtype) for _ in range(2))
    asked = {"top_k": 3, "received": True, "entropy": True, "block": (64, 500)}
    out, _, found = op.attend_with_statistics(q, k, v, **WHOLE, **asked)
    assert torch.equal(out, attend(q, k, v, **WHOLE)[0])
    _, _, weights = formula(q, k, v, scale=0.3)
    torch.testing.assert_close(found["received"].double(), weights.sum(2), rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(found["entropy"].double(), torch.special.entr(weights).sum(-1), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found["top_weights"].double(), weights.topk(3).values, rtol=2e-5, atol=1e-7)
    blocks = F.pad(weights, (0, 0, 0, 58)).unflatten(3, (34, 500)).unflatten(2, (2, 64))
    torch.testing.assert_close(found["block_mass"].double(), blocks.sum((3, 5)), rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(found["block_max"].double(), blocks.amax((3, 5)), rtol=2e-5, atol=1e-7)


def test_top_keys_rank_by_score_even_where_the_weights_are_zero(isa):
    # Scores of -300 and below weigh e^-300 = 0 beside a 0, and are visible all the same.
    k = torch.tensor([-400.0, 0.0, -300.0, -400.0, -350.0, -math.inf]).view(1, 1, 6, 1)
    q = torch.ones(1, 1, 65, 1)
    _, _, found = op.attend_with_statistics(q, k, k.clamp_min(-1.0), **(WHOLE | {"scale": 1.0}), top_k=6)
    assert torch.equal(found["top_keys"], torch.tensor([1, 2, 4, 0, 3, -1]).expand(1, 1, 65, 6))
    assert torch.equal(found["top_weights"], torch.tensor([1.0, 0, 0, 0, 0, 0]).expand(1, 1, 65, 6))


@pytest.mark.parametrize("top_k", [1, 2, 3, 64, 100])
def test_ties_among_many_keys_rank_by_key(isa, top_k):
    q, k = torch.ones(1, 1, 70, 1), torch.randint(0, 4, (1, 1, 90, 1)).float()
    _, _, found = op.attend_with_statistics(q, k, k, **(WHOLE | {"scale": 1.0}), top_k=top_k)
    order = torch.sort(k.flatten(), descending=True, stable=True).indices[:top_k]
    expected = F.pad(order, (0, top_k - len(order)), value=-1)
    assert torch.equal(found["top_keys"], expected.expand(1, 1, 70, top_k))


def test_a_query_that_sees_nan_leaves_the_statistics_of_the_others_alone(isa):
    q, k, v = (torch.randn(1, 1, 80, 16) for _ in range(3))
    k[:, :, 70] = math.nan
    _, _, found = op.attend_with_statistics(q, k, v, **(WHOLE | {"mask": masks.causal()}), **STATISTICS)
    assert found["entropy"][:, :, :70].isfinite().all() and found["entropy"][:, :, 70:].isnan().all()
    assert found["max_score"][:, :, :70].isfinite().all() and found["max_score"][:, :, 70:].isnan().all()
    assert found["top_weights"][:, :, :70].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [range(150), range(64, 65), range(10, 131)])
@pytest.mark.parametrize("cols", [range(210), range(63, 66), range(100, 101)])
def test_tiles_match_the_formula_at_every_stage(isa, dtype, rows, cols):
    q = torch.randn(2, 4, 150, 24).to(dtype)
    k, v = (torch.randn(2, 2, 210, 24).to(dtype) for _ in range(2))
    bias = torch.randn(1, 4, 150, 210).to(dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    group = k.double().repeat_interleave(2, 1)
    scaled = q.double() @ group.mT * 0.4
    for mask in (None, masks.causal(), masks.from_tensor(torch.rand(150, 210) > 0.5)):
        shared = {
            "mask": mask,
            "bias": bias,
            "diagonal": None,
            "scale": 0.4,
            "softcap": 3.0,
            "query_offset": 60,
            "key_offset": 0,
        }
        _, lse = attend(q, k, v, **shared)
        _, _, weights = formula(q, k, v, mask=mask, bias=bias, scale=0.4, softcap=3.0, query_offset=60)
        biased = 3 * torch.tanh(scaled / 3) + bias.double()
        if mask is not None:
            biased = biased.masked_fill(~mask.dense(Frame(2, 4, 150, 210, 60)), -math.inf)
        stages = {"scaled": scaled, "capped": 3 * torch.tanh(scaled / 3), "biased": biased, "weights": weights}
        for stage, expected in stages.items():
            found = op.tile(q, k, lse, **shared, rows=rows, cols=cols, stage=stage)
            expected = expected[:, :, rows.start : rows.stop, cols.start : cols.stop]
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_tile_holds_the_bits_of_the_whole_map(isa):
    q, k, v = (torch.randn(1, 2, 300, 32) for _ in range(3))
    shared = {
        "mask": masks.causal(),
        "bias": None,
        "diagonal": None,
        "scale": 0.2,
        "softcap": None,
        "query_offset": 0,
        "key_offset": 0,
    }
    _, lse = attend(q, k, v, **shared)
    whole = op.tile(q, k, lse, **shared, rows=range(300), cols=range(300), stage="weights")
    part = op.tile(q, k, lse, **shared, rows=range(70, 211), cols=range(33, 129), stage="weights")
    assert torch.equal(part, whole[:, :, 70:211, 33:129])


def test_dropout_keeps_its_share_and_repeats_with_the_seed(isa):
    q, k = torch.zeros(1, 2, 200, 8), torch.zeros(1, 2, 500, 8)
    v = torch.eye(500).expand(1, 2, 500, 500)
    torch.manual_seed(5)
    first, lse = attend(q, k, v, dropout=0.3)
    torch.manual_seed(5)
    again, _ = attend(q, k, v, dropout=0.3)
    other, _ = attend(q, k, v, dropout=0.3)
    assert torch.equal(first, again) and not torch.equal(first, other)
    kept = first > 0
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / 500 / 0.7))
    assert abs(kept.double().mean().item() - 0.7) < 0.005
    assert (kept.double().mean(-1) - 0.7).abs().max() < 0.12 and (kept.double().mean(2) - 0.7).abs().max() < 0.2
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(500)))


def test_an_instruction_set_that_the_processor_lacks_is_refused_by_name():
    run = in_fresh_process("from regard import native; native.isa()", REGARD_ISA="avx9000")
    assert run.returncode != 0
    assert "REGARD_ISA must name an instruction set that this processor has; got 'avx9000'. Use one of:" in run.stderr


def test_the_kernels_own_threads_give_the_same_bits():
    code = """
import torch
from regard import op
torch.set_num_threads(3)
q, k, v = (torch.arange(2 * 4 * 200 * 16).reshape(2, 4, 200, 16).sin() for _ in range(3))
nothing = dict.fromkeys(('mask', 'bias', 'diagonal', 'sinks', 'softcap'))
out, _ = op.attend(q, k, v, **nothing, scale=1.0, dropout=0.0, query_offset=0, key_offset=0)
print(hash(out.contiguous().numpy().tobytes()))
"""
    own, shared = in_fresh_process(code, REGARD_THREADS="own"), in_fresh_process(code)
    assert own.returncode == shared.returncode == 0
    assert own.stdout == shared.stdout != ""
