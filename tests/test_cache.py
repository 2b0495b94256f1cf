"""KVCache: what it holds, where that stands, how it grows, and what it refuses."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import regard
from agreement import qkv
from regard import KVCache, masks


def tokens(count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values that tell the position of their token."""
    position = torch.arange(start, start + count, dtype=torch.float32)[None, None, :, None]
    return position.expand(2, 3, count, 4).clone(), -position.expand(2, 3, count, 5).clone()


@given(st.lists(st.integers(0, 9), max_size=40), st.none() | st.integers(0, 6))
def test_the_held_tokens_are_the_last_ones_and_stand_at_their_positions(steps, left):
    cache, position = KVCache(left=left), 0
    for count in steps:
        keys, values = cache.append(*tokens(count, position))
        first = 0 if left is None else max(0, position - left)  # the first new query still sees so far back
        position += count
        want = torch.arange(first, position, dtype=torch.float32)
        assert cache.position == position
        assert cache.key_offset == first
        assert len(cache) == len(want)
        assert torch.equal(keys[1, 2, :, 3], want)
        assert torch.equal(values[0, 1, :, 4], -want)
        assert keys.data_ptr() == cache.keys.data_ptr()


def test_buffers_double_so_that_appending_costs_the_same_however_much_is_held():
    cache, moves, last = KVCache(), 0, None
    for position in range(5000):
        cache.append(*tokens(1, position))
        where = cache.keys.data_ptr()
        moves += where != last
        last = where
    assert moves <= 8  # 64, 130, 262, ...


def test_a_sliding_window_keeps_memory_bounded():
    cache = KVCache(left=100)
    for position in range(3000):
        cache.append(*tokens(1, position))
    assert len(cache) == 101
    assert cache.keys.untyped_storage().nbytes() < 4 * 101 * 2 * 3 * 4 * 4


def test_a_cache_filled_under_inference_mode_can_be_filled_further_outside():
    cache = KVCache()
    with torch.inference_mode():
        cache.append(*tokens(3))
    keys, _ = cache.append(*tokens(2, 3))
    with torch.inference_mode():
        keys, _ = cache.append(*tokens(2, 5))
    assert torch.equal(keys[0, 0, :, 0], torch.arange(7.0))


def test_reset_lets_go_of_every_token():
    cache = KVCache()
    cache.append(*tokens(3))
    cache.reset()
    assert (len(cache), cache.position, cache.key_offset) == (0, 0, 0)
    cache.append(*tokens(2))
    assert torch.equal(cache.keys[0, 0, :, 0], torch.arange(2.0))


def test_a_cache_says_what_it_holds():
    cache = KVCache(left=2)
    assert repr(cache) == "KVCache(0 keys, room for 0)"
    for position in range(5):
        cache.append(*tokens(1, position))
    assert repr(cache) == "KVCache(3 keys at positions 2 to 4, room for 64)"


def test_a_call_that_fails_appends_nothing(backend):
    q, k, v = qkv(seq_len_q=3, seq_len_kv=3)
    cache = KVCache()
    with pytest.raises(ValueError, match="broadcastable"):
        regard.attention(q, k, v, mask=torch.ones(9, 9) > 0, cache=cache, backend=backend)
    with pytest.raises(ValueError, match="query_offset must be given where a positional mask"):
        regard.attention(q[:, :, :1], k, v, mask=masks.causal(), cache=cache, backend=backend)
    assert len(cache) == 0


# ---- Bad input ----


def refused(error: type[Exception], message: str, call) -> None:
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        call()


def test_more_keys_than_the_stated_bound_are_refused_and_nothing_changes():
    cache = KVCache(max_length=5)
    cache.append(*tokens(4))
    message = (
        "KVCache.append: the keys held must be at most max_length = 5; got 4 and 2 new ones. "
        "Make the cache with a larger max_length, or with left= for a sliding window."
    )
    refused(ValueError, message, lambda: cache.append(*tokens(2)))
    assert len(cache) == 4
    cache.append(*tokens(1))


def test_sizes_that_are_no_whole_numbers_are_refused():
    message = "KVCache: left must be an int of at least 0; got -1. Give a whole number."
    refused(ValueError, message, lambda: KVCache(left=-1))
    message = "KVCache: max_length must be an int of at least 1; got 0. Give a whole number."
    refused(ValueError, message, lambda: KVCache(max_length=0))


def test_tokens_unlike_those_held_are_refused():
    cache = KVCache()
    cache.append(*tokens(2))
    k, v = tokens(1)
    message = (
        "KVCache.append: k must be (2, 3, 'new', 4) like what is held; got (1, 3, 1, 4). "
        "Use a cache per layer and batch."
    )
    refused(ValueError, message, lambda: cache.append(k[:1], v[:1]))
    message = "KVCache.append: v must be torch.float32 like what is held; got torch.float64. Convert it."
    refused(TypeError, message, lambda: cache.append(k, v.double()))


def test_tokens_to_be_differentiated_are_refused():
    k, v = tokens(1)
    message = "KVCache.append: k and v must not require a gradient; got tensors that do. Decode under torch.no_grad()."
    refused(ValueError, message, lambda: KVCache().append(k.requires_grad_(), v))
    with torch.no_grad():
        KVCache().append(k, v)


def test_nothing_held_is_nothing_to_show():
    message = "KVCache: keys and values must have been appended; got none yet. Call append first."
    refused(ValueError, message, lambda: KVCache().keys)


def test_offsets_beside_a_cache_are_refused():
    q, k, v = qkv(seq_len_q=3, seq_len_kv=3)
    message = (
        "attention: query_offset and key_offset must be left out with a cache; got 2 and 0. The cache supplies both."
    )
    refused(ValueError, message, lambda: regard.attention(q, k, v, cache=KVCache(), query_offset=2))
    message = "attention: cache must be a KVCache; got dict. Make one with regard.KVCache()."
    refused(TypeError, message, lambda: regard.attention(q, k, v, cache={}))


def test_weights_with_a_cache_are_refused_with_the_fix():
    q, k, _ = qkv(seq_len_q=3, seq_len_kv=3)
    message = (
        "attention_weights: cache must be None, for looking appends nothing; got KVCache(0 keys, room for 0). "
        "Pass k=cache.keys, key_offset=cache.key_offset and the query_offset of the queries."
    )
    refused(ValueError, message, lambda: regard.attention_weights(q, k, cache=KVCache()))
