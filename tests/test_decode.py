"""Few queries over many keys: the decode kernel on every instruction set, in pages and codes, and the weights it tells.

The formula of test_kernels is the oracle. Lengths lie around the edges of a tile (64) and of a part (1,024).
"""

import math

import pytest
import torch
from torch import Tensor

import regard
from regard import decode, masks, native, op
from regard.held import Held, HeldRows, coded, decoded
from test_kernels import attend, formula, in_fresh_process, relative_error, rounding

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim, head_dim_v
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 4, 1, 63, 64, 64),
    (1, 6, 3, 1, 65, 80, 33),
    (3, 8, 2, 1, 1025, 64, 128),
    (1, 9, 3, 1, 1500, 64, 64),
    (2, 4, 2, 8, 130, 32, 16),
    (1, 8, 1, 8, 2100, 16, 40),
    (1, 2, 1, 3, 200, 96, 48),
]


@pytest.fixture(params=native.isas())
def isa(request):
    with native.forced_isa(request.param):
        yield request.param


def draw(shape, dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, n, m, dim, dim_v = shape
    q = torch.randn(batch, heads, n, dim).to(dtype)
    return q, torch.randn(batch, kv_heads, m, dim).to(dtype), torch.randn(batch, kv_heads, m, dim_v).to(dtype)


def in_pages(rows: Tensor, size: int, order: Tensor, spare: int = 3) -> tuple[Tensor, Tensor]:
    """(pool, table): rows cut into pages, laid out in another order, NaN wherever no key lies."""
    batch, heads, length, dim = rows.shape
    pages = -(-length // size)
    pool = torch.full((batch * pages + spare, heads, size, dim), math.nan if rows.is_floating_point() else 77)
    pool = pool.to(rows.dtype)
    table = order[: batch * pages].reshape(batch, pages).to(torch.int32)
    for b in range(batch):
        for page in range(pages):
            part = rows[b, :, page * size : (page + 1) * size]
            pool[table[b, page], :, : part.shape[1]] = part
    return pool, table


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_every_term_of_the_scores_matches_the_formula(isa, dtype, shape, softcap):
    batch, heads, _, n, m, _, _ = shape
    q, k, v = draw(shape, dtype)
    assert decode.few(q, k.shape[1])
    biases = [{}] + [{"bias": torch.randn(s).to(dtype)} for s in ((batch, heads, n, m), (1, 1, n, 1), (1, heads, 1, m))]
    biases += [
        {"diagonal": torch.randn(1, heads, n + m - 1).to(torch.float64 if dtype == torch.float64 else torch.float32)}
    ]
    rules = [
        None,
        masks.causal(),
        masks.sliding_window(20, 3) | masks.prefix(4),
        masks.padding(torch.arange(batch) * 100 + 1),
        masks.from_tensor(torch.rand(batch, heads, n, m) > 0.5),
    ]
    for mask in rules:
        for bias in biases:
            for sinks in (None, torch.randn(heads).to(dtype)):
                named = {"mask": mask, "softcap": softcap, "sinks": sinks, "query_offset": m - n, "scale": -0.3, **bias}
                out, lse = attend(q, k, v, **named)
                expected, expected_lse, _ = formula(q, k, v, **named)
                allowed = 40 * torch.finfo(lse.dtype).eps
                assert relative_error(out, expected) <= allowed + rounding(dtype) * 2
                torch.testing.assert_close(lse.double(), expected_lse, rtol=allowed, atol=allowed * 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_change_a_bit(isa, dtype):
    q, k, v = draw((2, 4, 2, 1, 700, 64, 64), dtype)
    want = attend(q, k, v)
    wide = [t.repeat_interleave(2, -1)[..., ::2] for t in (q, k, v)]
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    for layout in (wide, turned):
        assert all(torch.equal(a, b) for a, b in zip(attend(*layout), want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_threads_nor_on_the_batch_nor_on_a_gradient(isa, dtype):
    q, k, v = draw((3, 8, 2, 2, 5000, 64, 64), dtype)
    threads = torch.get_num_threads()
    named = {"mask": masks.causal(), "query_offset": 4998}
    try:
        answers = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            answers.append(attend(q, k, v, **named))
    finally:
        torch.set_num_threads(threads)
    alone = attend(q[1:2], k[1:2], v[1:2], **named)
    recorded = attend(q.clone().requires_grad_(), k, v, **named)
    for other in (*answers[1:], recorded):
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))
    assert all(torch.equal(a[1:2], b) for a, b in zip(answers[0], alone, strict=True))


def test_the_split_is_decided_by_the_length_alone():
    assert decode.part_keys(1) == decode.part_keys(131_072) == 1024
    assert decode.part_keys(1_000_000) == 7872  # a multiple of 64, at most 128 parts
    assert all(decode.part_keys(n) % 64 == 0 and decode.part_keys(n) * 128 >= n for n in range(1, 3_000_000, 77_777))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 192])
def test_pages_give_the_bits_of_one_tensor(isa, dtype, size):
    q, k, v = draw((3, 8, 2, 2, 1300, 64, 48), dtype)
    order = torch.randperm(3 * -(-1300 // size) + 3)
    (keys, table), (values, _) = in_pages(k, size, order), in_pages(v, size, order)
    held = Held(keys, values, 1300, table)
    for mask in (None, masks.causal() & masks.padding(torch.tensor([1300, 1, 777]))):
        named = {
            "mask": mask, "bias": None, "diagonal": None, "sinks": None, "scale": 0.2, "softcap": None,
            "query_offset": 1298, "key_offset": 0,
        }  # fmt: skip
        want = attend(q, k, v, **named)
        assert all(torch.equal(a, b) for a, b in zip(op.attend_held(q, held, **named), want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(held.written_out(), (k, v), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (40, 24)])
def test_codes_are_read_as_the_numbers_they_stand_for(isa, dtype, paged, dims):
    q, k, v = draw((2, 8, 2, 1, 1100, *dims), dtype)
    (k, key_scales), (v, value_scales) = coded(k), coded(v)
    plain = [decoded(k, key_scales, torch.float64), decoded(v, value_scales, torch.float64)]
    named = {
        "mask": masks.padding(torch.tensor([1100, 600])), "bias": None, "diagonal": None, "sinks": None, "scale": 0.2,
        "softcap": None, "query_offset": 1099, "key_offset": 0,
    }  # fmt: skip
    held = Held(k, v, 1100, None, key_scales, value_scales, dtype)
    if paged:
        order = torch.randperm(39)
        parts = [in_pages(t, 64, order) for t in (k, v, key_scales[..., None], value_scales[..., None])]
        held = Held(parts[0][0], parts[1][0], 1100, parts[0][1], parts[2][0][..., 0], parts[3][0][..., 0], dtype)
    out, lse = op.attend_held(q, held, **named)
    expected, expected_lse, _ = formula(q, *plain, mask=named["mask"], scale=0.2, query_offset=1099)
    assert relative_error(out, expected) <= 60 * torch.finfo(lse.dtype).eps + rounding(dtype) * 2
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_a_code_is_off_by_at_most_a_254th_of_its_row():
    rows = torch.randn(3, 2, 50, 33) * torch.logspace(-20, 20, 50)[:, None]
    rows[0, 0, 7] = 0
    codes, scales = coded(rows)
    largest = rows.abs().amax(-1)
    assert ((decoded(codes, scales, torch.float64) - rows).abs().amax(-1) <= largest.double() / 254 * (1 + 1e-5)).all()
    assert (decoded(codes, scales, torch.float32)[0, 0, 7] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_codes_cannot_hold_is_nan_to_who_sees_it(isa, bad):
    q, k, v = draw((1, 2, 1, 3, 100, 16, 16), torch.float32)
    k[:, :, 98, 3] = bad  # query 0 stands at 97
    v[:, :, 99, 5] = bad
    (k, key_scales), (v, value_scales) = coded(k), coded(v)
    out, _ = op.attend_held(
        q, Held(k, v, 100, None, key_scales, value_scales, torch.float32), mask=masks.causal(), bias=None,
        diagonal=None, sinks=None, scale=0.25, softcap=None, query_offset=97, key_offset=0,
    )  # fmt: skip
    assert out[:, :, 0].isfinite().all()
    assert out[:, :, 1:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_a_query_may_not_see_does_not_reach_it(isa, dtype, bad):
    q, k, v = draw((1, 4, 2, 4, 1100, 64, 64), dtype)
    named = {"mask": masks.causal(), "query_offset": 1095}
    clean = attend(q, k, v, **named)
    k[:, :, 1099], v[:, :, 1099] = bad, bad  # nobody sees it: the last query stands at 1098
    v[:, 0, 1097] = bad  # seen by the last two queries of the first group
    out, lse = attend(q, k, v, **named)
    assert torch.equal(lse, clean[1])
    assert torch.equal(out[:, 2:], clean[0][:, 2:])
    assert torch.equal(out[:, :2, :2], clean[0][:, :2, :2])
    assert not out[:, :2, 2:].isfinite().any()


def test_rows_without_keys_give_zero_and_every_number_is_written(isa):
    q, k, v = draw((2, 4, 2, 1, 1200, 32, 32), torch.float32)
    out, lse = torch.full((2, 4, 1, 32), math.nan), torch.full((2, 4, 1), math.nan)
    received = torch.full((2, 4, 1200), math.nan)
    decode.run(
        q, Held(k, v, 1200), out, lse, mask=masks.padding(torch.tensor([0, 70])), bias=None, diagonal=None, sinks=None,
        scale=1.0, softcap=0.0, query_offset=0, key_offset=0, received=received,
    )  # fmt: skip
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all() and (received[0] == 0).all()
    assert out[1].isfinite().all() and (received[1, :, 70:] == 0).all() and (received[1, :, :70] > 0).all()
    q, k, v = draw((2, 4, 2, 1, 0, 32, 32), torch.float32)
    out, lse = attend(q, k, v)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sinks", [False, True])
def test_one_query_tells_each_keys_weight_on_the_way(isa, dtype, sinks):
    q, k, v = draw((2, 6, 2, 1, 2300, 64, 64), dtype)
    given = {
        "mask": masks.sliding_window(1500, 0) | masks.prefix(3),
        "query_offset": 2299,
        "sinks": torch.randn(6).to(dtype) if sinks else None,
    }
    stats = regard.attention_with_stats(q, k, v, received=True, **given)
    assert torch.equal(stats.out, regard.attention(q, k, v, **given))
    weights = formula(q, k, v, **given)[2][:, :, 0]
    assert (stats.received.double() - weights).abs().max() <= 200 * torch.finfo(stats.lse.dtype).eps
    more = regard.attention_with_stats(q, k, v, received=True, top_k=3, entropy=True, **given)
    assert torch.equal(more.received, stats.received)
    assert torch.equal(more.top_keys, weights.topk(3).indices[:, :, None])
    recorded = regard.attention_with_stats(q.clone().requires_grad_(), k, v, received=True, **given)
    assert torch.equal(recorded.received, stats.received)
    assert recorded.out.requires_grad


def test_gradients_of_few_queries_match_finite_differences():
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 7, 7))
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, mask=masks.causal(), query_offset=5), (q, k, v))


def test_rows_held_elsewhere_are_tensors_to_everyone_else():
    q, k, v = draw((2, 4, 2, 1, 100, 16, 16), torch.float32)
    order = torch.randperm(8)
    (keys, table), (values, _) = in_pages(k, 64, order), in_pages(v, 64, order)
    rows = HeldRows.pair(Held(keys, values, 100, table))
    assert [tuple(t.shape) for t in rows] == [(2, 2, 100, 16)] * 2
    assert torch.equal(rows[0] + 0, k) and torch.equal(torch.cat([rows[1], v]), torch.cat([v, v]))
    assert torch.equal(regard.attention(q, *rows), regard.attention(q, k, v))
    assert torch.equal(regard.attention(q, *rows, backend="reference"), regard.attention(q, k, v, backend="reference"))
    assert repr(rows[0]) == "HeldRows(keys, shape=(2, 2, 100, 16))"


def test_an_own_pool_of_threads_gives_the_same_bits():
    code = """
import torch, regard, hashlib
torch.manual_seed(0); torch.set_num_threads(4)
q, k, v = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 5000, 64), torch.randn(2, 2, 5000, 64)
for _ in range(20):
    print(hashlib.sha256(regard.attention(q, k, v).contiguous().numpy().tobytes()).hexdigest())
"""
    lines = [in_fresh_process(code, REGARD_THREADS=which).stdout.split() for which in ("own", "torch")]
    assert len(lines[0]) == 20
    assert len(set(lines[0] + lines[1])) == 1


def test_more_queries_take_the_tiles_of_the_forward_kernel():
    assert decode.few(torch.zeros(1, 8, 1, 4), 1)
    assert decode.few(torch.zeros(1, 8, decode.QUERIES, 4), 1)
    assert not decode.few(torch.zeros(1, 8, decode.QUERIES + 1, 4), 8)
    assert not decode.few(torch.zeros(1, 65, 1, 4), 1)
    assert not decode.few(torch.zeros(1, 8, 1, 4), 8, 9)  # one of nine rows: its bits are theirs


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_what_the_seed_says(isa, dtype):
    q, k, v = draw((2, 4, 2, 3, 1100, 32, 1100), dtype)
    v = torch.eye(1100, dtype=dtype).expand(2, 2, -1, -1)  # out is the weights
    given = {"mask": masks.causal(), "query_offset": 1097}
    torch.manual_seed(5)
    out, lse = attend(q, k, v, dropout=0.25, **given)
    seed = int(torch.manual_seed(5) and torch.randint(0, 2**62, (1,)))
    keep = torch.empty(2, 4, 3, 1100, dtype=torch.uint8)
    for b in range(2):
        for h in range(4):
            native.kernels().dropout(seed, b, h, 0, 3, 1100, 0.25, keep[b, h].data_ptr())
    _, expected_lse, weights = formula(q, k, v, **given)
    assert relative_error(out, weights * keep / 0.75) <= 100 * torch.finfo(lse.dtype).eps + 2 * rounding(dtype)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(lse, attend(q, k, v, **given)[1])
