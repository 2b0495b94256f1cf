"""The tile kernel, on emulated tiles: errors against float64, numbers that pieces cannot hold, precision settings."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard import masks, native, op
from test_kernels import attend, formula, in_fresh_process, relative_error

EMULATED = "amx_emulated"
pytestmark = pytest.mark.skipif(
    EMULATED not in native.hidden_isas(), reason="needs processor: avx512_bf16, for the vectors beside the tiles"
)
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _tiles():
    with native.forced_isa(EMULATED):
        yield
    torch.set_float32_matmul_precision("highest")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    heads, rows, keys, dim = shape
    q, k, v = (torch.randn(1, heads, n, dim).to(dtype) for n in (rows, keys, keys))
    return q, k, v


def test_emulated_tiles_are_picked_by_name_alone():
    assert EMULATED not in native.isas()
    run = in_fresh_process("from regard import native; print(native.isa())", REGARD_ISA=EMULATED)
    assert run.stdout.strip() == EMULATED
    run = in_fresh_process("from regard import native; native.isa()", REGARD_ISA="avx9000")
    assert run.returncode != 0 and EMULATED not in run.stderr


def test_explain_names_the_target():
    q, k, v = random(1, 64, 64, 64)
    assert regard.explain(q, k, v).isa == EMULATED


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [257, 1024])
def test_float32_in_six_products_is_nearer_to_float64_than_pytorch(dim, length):
    q, k, v = random(2, length, length, dim)
    expected = formula(q, k, v)[0]
    ours = relative_error(attend(q, k, v)[0], expected)
    assert ours <= relative_error(F.scaled_dot_product_attention(q, k, v), expected)
    assert ours < 6e-7


@pytest.mark.parametrize(("precision", "allowed"), [("highest", 1e-6), ("high", 2e-5), ("medium", 1e-2)])
def test_precision_settings_keep_their_errors(precision, allowed):
    q, k, v = random(2, 300, 300, 64)
    torch.set_float32_matmul_precision(precision)
    out, lse = attend(q, k, v, mask=masks.causal())
    expected, expected_lse, _ = formula(q, k, v, mask=masks.causal())
    error = relative_error(out, expected)
    assert error < allowed and (lse - expected_lse).abs().max() < allowed
    finer = {"highest": 0.0, "high": 1e-6, "medium": 3e-4}[precision]
    assert error >= finer  # each setting is another computation


def test_targets_that_multiply_float32_have_one_precision():
    q, k, v = random(2, 100, 100, 32)
    for name in native.isas():
        if name == "amx":
            continue
        with native.forced_isa(name):
            found = []
            for precision in ("highest", "high", "medium"):
                torch.set_float32_matmul_precision(precision)
                found.append(attend(q, k, v)[0])
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 6e-3), (torch.float16, 6e-4)])
def test_half_types_err_by_one_rounding_of_weights_and_result(dtype, allowed):
    q, k, v = random(2, 500, 500, 64, dtype=dtype)
    expected, expected_lse, _ = formula(q, k, v)
    out, lse = attend(q, k, v)
    with native.forced_isa("avx512_bf16"):
        by_vectors = relative_error(attend(q, k, v)[0], expected)
    assert relative_error(out, expected) <= min(allowed, 1.2 * by_vectors)
    assert (lse - expected_lse).abs().max() < 3e-6


# ---- numbers that pieces of bfloat16 cannot hold ----


@pytest.mark.parametrize("size", [1e-44, 1e-39, 1e-36, 1e-31, 1e-20, 1e20, 1e25, 1e30, 1e35])
def test_v_of_any_finite_size_comes_out_exact(size):
    q, k, v = random(1, 70, 150, 40)
    v = v.clamp(-1, 1) * size
    assert relative_error(
        attend(q, k, v, mask=masks.causal(), query_offset=80)[0],
        formula(q, k, v, mask=masks.causal(), query_offset=80)[0],
    ) < max(1e-6, 1e-43 / size)


@pytest.mark.parametrize("of_q", [1e-42, 1e-36, 1e-25, 1e-10, 1e10, 1e20, 3e37])
def test_q_and_k_of_any_finite_size_whose_products_are_scores(of_q):
    q, k, v = random(1, 90, 150, 40)
    q, k = q.clamp(-3, 3) * of_q, k.clamp(-3, 3) * min(0.5 / of_q, 3e37)
    for a, b in ((q, k), (k[:, :, :90], torch.cat([q, q], 2)[:, :, :150])):
        exact = attend(a.double(), b.double(), v.double())
        out, lse = attend(a, b, v)
        assert relative_error(out, exact[0]) < 2e-6 and (lse - exact[1]).abs().max() < 5e-6


def test_a_large_scale_brings_small_products_back():
    q, k, v = random(1, 90, 150, 40)
    for scale, by in ((1e30, 1e-15), (1e20, 1e-10), (1e12, 1e-6), (1e-30, 1e15)):
        out, _ = attend(q * by, k * by, v, scale=scale * 0.1)
        exact, _ = attend((q * by).double(), (k * by).double(), v.double(), scale=scale * 0.1)
        assert relative_error(out, exact) < 3e-6


@pytest.mark.parametrize("spoiled", [0, 1, 3])
def test_rows_of_all_sizes_side_by_side(spoiled):
    tensors = list(random(1, 90, 150, 40))
    for which, t in enumerate(tensors):
        if which == spoiled or spoiled == 3:
            t[:, :, 7::11] *= 1e-37
            t[:, :, 5::13] *= 1e30 if which == 2 or spoiled != 3 else 1e15
    q, k, v = tensors
    out, lse = attend(q, k, v, mask=masks.causal(), query_offset=60, softcap=5.0)
    expected, expected_lse, _ = formula(q, k, v, mask=masks.causal(), query_offset=60, softcap=5.0)
    assert relative_error(out, expected) < 1e-6 and (lse - expected_lse).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("mask", [None, masks.causal()])
def test_nan_and_inf_come_out_as_in_float64(dtype, bad, where, mask):
    q, k, v = random(1, 70, 130, 40, dtype=dtype)
    clean = attend(q, k, v, mask=mask, query_offset=60)[0]
    spoiled = {"q": q, "k": k, "v": v}[where]
    row = 20 if where == "q" else 100
    spoiled[:, :, row, 3] = bad
    out = attend(q, k, v, mask=mask, query_offset=60)[0]
    expected = formula(q, k, v, mask=mask, query_offset=60)[0]
    if mask is not None and where == "v":  # 0 times inf is NaN in the formula, where masked means absent
        expected[:, :, : row - 60] = clean.double()[:, :, : row - 60]
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    finite = expected.isfinite()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double()[finite], expected[finite], rtol=tolerance, atol=tolerance)
    untouched = torch.arange(70) < row - 60 if where != "q" else torch.arange(70) != row
    if mask is not None or where == "q":
        assert torch.equal(out[:, :, untouched], clean[:, :, untouched])


# ---- the same, however it lies ----


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_layout_changes_no_bit(dtype):
    q, k, v = random(2, 90, 200, 64, dtype=dtype)
    want = attend(q, k, v)
    for lay in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: F.pad(t, (3, 5))[..., 3:-5],
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
    ):
        got = attend(lay(q), lay(k), lay(v))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_dropout_drops_what_other_targets_drop(dtype):
    q, k, v = random(2, 90, 200, 40, dtype=dtype)
    found = []
    for name in (EMULATED, "avx512_bf16"):
        with native.forced_isa(name):
            torch.manual_seed(3)
            found.append(attend(q, k, v, dropout=0.4, mask=masks.causal(), query_offset=110)[0])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


def test_few_queries_and_float64_go_to_the_vectors():
    for q, k, v in (random(4, 4, 200, 64), tuple(t.double() for t in random(2, 90, 90, 32))):
        got = attend(q, k, v)
        with native.forced_isa("avx512_bf16"):
            assert torch.equal(got[0], attend(q, k, v)[0])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_weights_by_lse_sum_to_one_and_give_the_output(dtype):
    q, k, v = random(2, 130, 190, 64, dtype=dtype)
    given = {
        "mask": masks.causal(), "bias": None, "diagonal": None, "scale": 0.2, "softcap": None, "query_offset": 60,
        "key_offset": 0,
    }  # fmt: skip
    out, lse = attend(q, k, v, **given)
    weights = op.tile(q, k, lse, **given, rows=range(130), cols=range(190), stage="weights")
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 130), rtol=3e-6, atol=3e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), weights @ v.float(), rtol=tolerance, atol=tolerance)


def test_long_calls_and_many_heads_share_what_was_laid_out():
    q = torch.randn(2, 6, 150, 48)
    k, v = torch.randn(2, 2, 700, 48), torch.randn(2, 2, 700, 100)
    scattered = masks.from_tensor(torch.rand(2, 6, 150, 700) > 0.9)
    for mask in (None, masks.sliding_window(100, 0), scattered):
        out, lse = attend(q, k, v, mask=mask, query_offset=550)
        expected, expected_lse, _ = formula(q, k, v, mask=mask, query_offset=550)
        assert relative_error(out, expected) < 2e-6 and (lse - expected_lse).abs().max() < 5e-6
