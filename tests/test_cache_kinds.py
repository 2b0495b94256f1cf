"""KVCache beyond one growing buffer: kept first tokens, pages, rows of their own length, codes, beams.

The oracle is attention over the tokens that should be there, each row by itself.
"""

import gc
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import regard
from agreement import assert_close, tolerance
from regard import KVCache, biases, masks, native
from regard.cache_pages import PagePool

KINDS = {
    "plain": {},
    "pages": {"page_size": 64},
    "codes": {"dtype": torch.int8},
    "pages of codes": {"page_size": 64, "dtype": torch.int8},
}


def draw(batch: int, new: int, dtype: torch.dtype = torch.float32, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, 4, new, dim).to(dtype)
    return q, torch.randn(batch, 2, new, dim).to(dtype), torch.randn(batch, 2, new, dim).to(dtype)


def refused(error: type[Exception], message: str, call) -> None:
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        call()


# ---- kept first tokens ----


@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("left", [0, 3, 20])
def test_first_tokens_and_a_window_are_attended_to_at_their_true_positions(backend, first, left):
    cache, everything = KVCache(left=left, first=first), []
    position = 0
    for new in (1, 2, 5, 1, 1, 30, 1, 12, 1, 1, 1):
        q, k, v = draw(2, new)
        everything.append((k, v))
        mask = masks.causal() & (masks.sliding_window(left, 0) | masks.prefix(first))
        if new == 12:  # rules on position that are no range, and a bias
            mask = mask & masks.strided(3)
        given = {"mask": mask, "bias": biases.alibi() if new in (2, 12) else None, "backend": backend}
        out = regard.attention(q, k, v, cache=cache, **given)
        all_k, all_v = (torch.cat(parts, 2) for parts in zip(*everything, strict=True))
        want = regard.attention(q, all_k, all_v, **(given | {"query_offset": position, "backend": "reference"}))
        assert_close(out, want, torch.float32, 60)
        kept = [*range(min(first, position)), *range(max(position - left, min(first, position), 0), position + new)]
        assert cache.key_positions.tolist() == kept
        position += new
        assert torch.equal(cache.keys, all_k[:, :, kept])
        assert torch.equal(cache.values, all_v[:, :, kept])
    assert cache.keys.untyped_storage().nbytes() < 4 * (first + left + 60) * 2 * 2 * 16 * 4


def test_first_tokens_do_not_disturb_masks_that_go_by_index(backend):
    cache = KVCache(left=4, first=2)
    for new in (6, 6):
        q, k, v = draw(1, new)
        regard.attention(q, k, v, mask=masks.causal(), cache=cache, backend=backend)
    q, k, v = draw(1, 1)
    keep = torch.tensor([[True, False, True, True, False, True, True]])  # 2 first, 4 of the window, the new one
    out = regard.attention(q, k, v, mask=masks.padding(keep) & ~masks.prefix(1), cache=cache, backend=backend)
    seen = [2, 3, 5, 6]
    want = regard.attention(q, cache.keys[:, :, seen], cache.values[:, :, seen], backend="reference")
    assert_close(out, want, torch.float32, 7)


def test_a_placed_mask_survives_a_gradient_for_the_query(native):
    cache = KVCache(left=4, first=2)
    given = {"mask": masks.causal() & masks.sliding_window(4, 0) | masks.prefix(2), "cache": cache}
    for new in (6, 6):
        regard.attention(*draw(1, new), **given)
    twin = cache.fork()
    q, k, v = draw(1, 2)
    plain = regard.attention(q, k, v, **given)
    recorded = regard.attention(q.requires_grad_(), k, v, **(given | {"cache": twin}))
    assert torch.equal(plain, recorded)
    recorded.sum().backward()
    assert q.grad.isfinite().all()


# ---- rows of their own length, in every kind of store ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_their_own_length_attend_as_if_alone(backend, kind, dtype):
    batch = 3
    cache, alone = KVCache(**KINDS[kind]), [KVCache(dtype=KINDS[kind].get("dtype")) for _ in range(batch)]
    for new, counts in ((70, [70, 1, 33]), (1, [1, 1, 1]), (5, [0, 5, 2]), (1, None), (100, [100, 64, 3]), (1, None)):
        q, k, v = draw(batch, new, dtype)
        own = [new] * batch if counts is None else counts
        whole = cache if counts is None else cache.taking(torch.tensor(counts))
        given = {"mask": masks.causal() & masks.sliding_window(90, 0), "bias": biases.alibi(), "backend": backend}
        out = regard.attention(q, k, v, cache=whole, **given)
        for b, count in enumerate(own):
            if count:
                part = [t[b : b + 1, :, :count] for t in (q, k, v)]
                want = regard.attention(*part, cache=alone[b], **given)
                assert_close(out[b : b + 1, :, :count], want, dtype, 300)
        assert cache.lengths.tolist() == [c.position for c in alone]
    assert len(cache) == max(c.position for c in alone)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_mask_a_row_sees_its_own_tokens_and_no_more(backend, kind):
    cache = KVCache(**KINDS[kind])
    q, k, v = draw(2, 9)
    k[1, :, 4:], v[1, :, 4:] = math.nan, math.nan
    counts = torch.tensor([9, 4])
    out = regard.attention(q[:, :, :9], k, v, cache=cache.taking(counts), backend=backend)
    want = regard.attention(q[1:, :, :4], k[1:, :, :4], v[1:, :, :4], backend="reference")
    allowed = 0.1 if "codes" in kind else tolerance(torch.float32, 9)
    assert (out[1:, :, :4] - want).abs().max() <= allowed


@given(
    st.lists(
        st.tuples(st.integers(0, 90), st.sampled_from(["append", "fork", "crop", "reorder", "reset"])), max_size=14
    )
)
def test_pages_hold_what_a_plain_cache_holds_and_none_is_lost(steps):
    torch.manual_seed(0)
    paged, plain = KVCache(page_size=64), KVCache()
    kept = []
    for number, what in steps:
        if what == "append":
            batch = plain.batch or 2
            _, k, v = draw(batch, number)
            assert all(torch.equal(a, b) for a, b in zip(paged.append(k, v), plain.append(k, v), strict=True))
        elif what == "fork":
            kept.append((paged.fork(), plain.fork()))
        elif what == "crop":
            paged.crop(number), plain.crop(number)
        elif what == "reorder" and plain.batch:
            rows = torch.randint(0, plain.batch, (number % 5 + 1,))
            paged.reorder(rows), plain.reorder(rows)
        elif what == "reset":
            paged.reset(), plain.reset()
        for one, other in [(paged, plain), *kept]:
            assert (one.position, len(one), one.batch) == (other.position, len(other), other.batch)
            if one.batch:
                assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    pool = paged._pool
    paged.reset()
    for one, _ in kept:
        one.reset()
    assert pool.used == 0 and pool.left == pool.max_pages


def test_rows_share_the_pages_of_a_prompt_until_they_write():
    prompt = KVCache(page_size=64)
    _, k, v = draw(1, 200)
    prompt.append(k, v)
    assert prompt.pages_used == 4
    answers = prompt.fork([0] * 8)
    assert answers.pages_used == 4 and answers.batch == 8
    _, k, v = draw(8, 1)
    answers.append(k, v)  # the last page, part full, is copied for each
    assert answers.pages_used == 12
    assert torch.equal(prompt.keys, answers.keys[3:4, :, :200])
    prompt.reset()
    assert answers.pages_used == 11  # three whole pages and eight last ones
    answers.reorder([2, 2])
    assert answers.pages_used == 4
    del answers
    gc.collect()
    assert prompt.pages_used == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pages_give_the_bits_of_a_plain_cache(native, dtype):
    paged, plain = KVCache(page_size=128), KVCache()
    for new in (300, 1, 1, 7, 1):
        q, k, v = draw(2, new, dtype)
        outs = [regard.attention(q, k, v, mask=masks.causal(), cache=cache) for cache in (paged, plain)]
        assert torch.equal(*outs)
    stats = [
        regard.attention_with_stats(*draw(2, 1, dtype), cache=cache, received=True, top_k=2) for cache in (paged, plain)
    ]
    assert all(t.shape == u.shape for t, u in zip(stats[0][:5], stats[1][:5], strict=True))


@pytest.mark.parametrize("paged", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_stay_within_the_stated_error(backend, paged, dtype):
    # |scores| are off by d = scale · ‖q‖₁ · max|k| / 254, so weights by a factor in e^±2d, and out by
    # (e^2d − 1) · max|v| + max|v| / 254; roundings of the dtype come on top.
    cache, exact = KVCache(dtype=torch.int8, page_size=paged), KVCache()
    for new in (100, 1, 40, 1):
        q, k, v = draw(2, new, dtype)
        out = regard.attention(q, k, v, mask=masks.causal(), cache=cache, backend=backend)
        want = regard.attention(q, k, v, mask=masks.causal(), cache=exact, backend="reference")
        d = q.float().abs().sum(-1).amax() / 4 * exact.keys.float().abs().amax() / 254
        largest = exact.values.float().abs().amax()
        bound = (torch.expm1(2 * d) + 1 / 254) * largest + 2 * tolerance(dtype, 200)
        error = (out.float() - want.float()).abs().max()
        assert error <= bound
        assert error <= 0.1  # what it is: far below the bound
        assert (cache.keys.float() - exact.keys.float()).abs().max() <= exact.keys.float().abs().max() / 254 + 0.01
    assert cache.keys.dtype == dtype


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_reads_every_kind_in_place_on_every_instruction_set(native, monkeypatch, isa, kind):
    from regard import native as door
    from regard.held import Held

    monkeypatch.setattr(Held, "written_out", lambda self: pytest.fail("written out"))
    with door.forced_isa(isa):
        cache, exact = KVCache(**KINDS[kind]), KVCache()
        for new in (8, 1, 8, 1):
            q, k, v = draw(2, new, dim=32)
            out = regard.attention(q, k, v, mask=masks.causal(), cache=cache)
            want = regard.attention(q, k, v, mask=masks.causal(), cache=exact)
            assert (out - want).abs().max() <= (0.1 if "codes" in kind else 1e-6)


def test_beams_are_reordered_in_every_kind():
    for named in KINDS.values():
        cache = KVCache(**named)
        _, k, v = draw(3, 70)
        before = cache.append(k, v)[0].clone()
        cache.reorder(torch.tensor([2, 0, 0, 1]))
        assert cache.batch == 4
        assert torch.equal(cache.keys, before[[2, 0, 0, 1]])
    ragged = KVCache(page_size=64)
    ragged.append(*draw(2, 9)[1:], torch.tensor([9, 3]))
    ragged.reorder([1, 1])
    assert ragged.lengths.tolist() == [3, 3] and len(ragged) == 3


def test_crop_takes_back_the_last_tokens():
    for named in (*KINDS.values(), {"left": 50}, {"left": 50, "first": 3}):
        cache = KVCache(**named)
        _, k, v = draw(1, 40)
        cache.append(k, v)
        before = cache.keys.clone()
        cache.append(*draw(1, 5)[1:])
        cache.crop(40)
        assert cache.position == 40 and torch.equal(cache.keys, before)
        cache.crop(60)  # there is no more to take back
        assert cache.position == 40
    ragged = KVCache()
    ragged.append(*draw(2, 9)[1:], torch.tensor([9, 3]))
    ragged.crop(5)
    assert ragged.lengths.tolist() == [5, 3] and len(ragged) == 5


# ---- Bad input ----


def test_kinds_that_do_not_go_together_are_refused():
    message = "KVCache: page_size must be a multiple of 64; got 100. Use 64, 128 or 256."
    refused(ValueError, message, lambda: KVCache(page_size=100))
    message = "KVCache: left must be None where there are pages; got 5. Leave out page_size, or left."
    refused(ValueError, message, lambda: KVCache(page_size=64, left=5))
    message = "KVCache: dtype must be torch.int8 or None; got torch.int16. Leave it out: tokens are kept as they come."
    refused(ValueError, message, lambda: KVCache(dtype=torch.int16))
    message = "KVCache: first must be an int of at least 0; got -1. Give a whole number."
    refused(ValueError, message, lambda: KVCache(first=-1))
    message = "KVCache: max_pages must be an int of at least 1; got 0. Give a whole number."
    refused(ValueError, message, lambda: KVCache(max_pages=0))


def test_more_pages_than_the_stated_bound_are_refused_and_nothing_changes():
    cache = KVCache(page_size=64, max_pages=3)
    cache.append(*draw(1, 100)[1:])
    fork = cache.fork()
    message = (
        "KVCache.append: the pages held must be at most max_pages = 3; got 2 and 2 new ones. "
        "Reset caches that are done, or make it with more."
    )
    refused(ValueError, message, lambda: fork.append(*draw(1, 60)[1:]))
    assert (len(fork), fork.pages_used) == (100, 2)
    fork.append(*draw(1, 1)[1:])  # its copy of the shared page is the third
    message = message.replace("got 2 and 2", "got 3 and 1")
    refused(ValueError, message, lambda: cache.append(*draw(1, 60)[1:]))
    fork.reset()
    cache.append(*draw(1, 60)[1:])
    assert len(cache) == 160


def test_rows_that_share_a_page_copy_it_within_the_bound():
    cache = KVCache(page_size=64, max_pages=2)
    cache.append(*draw(1, 10)[1:])
    cache.reorder([0, 0])
    cache.append(*draw(2, 1)[1:])  # one copies, the other then has the page for itself
    assert cache.pages_used == 2
    assert not torch.equal(cache.keys[0, :, 10], cache.keys[1, :, 10])


def test_a_page_freed_twice_raises():
    pool = PagePool(64, 4)
    page = pool.take([torch.zeros(1, 1, 1, 1)])
    pool.share(page)
    pool.release(page)
    pool.release(page)
    message = (
        "KVCache: a page must be held to be freed; got page 0, which nobody holds. Free each page once, and share it "
        "before."
    )
    refused(ValueError, message, lambda: pool.release(page))
    refused(ValueError, message.replace("freed; ", "shared; "), lambda: pool.share(page))
    refused(ValueError, message.replace("page 0", "page 99"), lambda: pool.release(99))


def test_counts_that_do_not_fit_are_refused():
    _, k, v = draw(2, 3)
    for counts in (torch.tensor([1, 4]), torch.tensor([-1, 1]), torch.tensor([1]), torch.tensor([1.0, 1.0])):
        message = (
            "KVCache: counts must be int64 (batch,) = (2,), each from 0 to the 3 new tokens; got "
            f"{counts!r}. Count each row's own tokens."
        )
        refused(ValueError, message, lambda counts=counts: KVCache().append(k, v, counts))
    message = (
        "KVCache: rows with lengths of their own must not meet left; got left=5. Use page_size, or a cache per row."
    )
    refused(ValueError, message, lambda: KVCache(left=5).append(k, v, torch.tensor([1, 1])))


def test_rows_and_lengths_that_there_are_not_are_refused():
    cache = KVCache(page_size=64)
    cache.append(*draw(2, 3)[1:])
    message = "KVCache: rows must be indices of the 2 batch rows; got [2]. Give one for each new row."
    refused(ValueError, message, lambda: cache.reorder([2]))
    gc.collect()
    assert len(cache) == 3 and cache.pages_used == 2
    message = "KVCache.crop: length must be an int of at least 0; got -1. Give a whole number."
    refused(ValueError, message, lambda: cache.crop(-1))
    window = KVCache(left=5)
    for _ in range(4):
        window.append(*draw(1, 5)[1:])
    message = (
        "KVCache.crop: length must be at least 15, as keys before position 10 were let go; got 12. "
        "Make the cache with a larger left."
    )
    refused(ValueError, message, lambda: window.crop(12))
    window.crop(16)


def test_a_gradient_through_codes_is_refused():
    q, k, v = draw(1, 1)
    message = (
        "attention: nothing must require a gradient with an int8 cache; got a tensor that does. Decode under "
        "torch.no_grad()."
    )
    cache = KVCache(dtype=torch.int8)
    refused(ValueError, message, lambda: regard.attention(q.requires_grad_(), k, v, cache=cache))
    assert len(cache) == 0
