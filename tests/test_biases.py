"""Biases: their numbers, their memory, their gradients, and what they refuse."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regard import biases
from regard.positions import Frame

CPU, F32 = torch.device("cpu"), torch.float32


def spread(diagonal: Tensor, frame: Frame) -> Tensor:
    """A diagonal bias as (batch, heads, seq_len_q, seq_len_kv)."""
    index = torch.arange(frame.seq_len_kv) - torch.arange(frame.seq_len_q)[:, None] + frame.seq_len_q - 1
    return diagonal[..., index]


def diagonal_of(bias: biases.Bias, frame: Frame, dtype: torch.dtype = F32) -> Tensor:
    dense, diagonal = bias.resolve(frame, dtype, CPU)
    assert dense is None
    assert diagonal is not None
    assert diagonal.dtype == (torch.float32 if dtype.itemsize == 2 else dtype)
    return diagonal


offsets = st.integers(-5, 5) | st.lists(st.integers(-5, 5), min_size=2, max_size=2).map(torch.tensor)
frames = st.builds(Frame, st.just(2), st.just(3), st.integers(1, 6), st.integers(1, 6), offsets, offsets)


@given(frames)
def test_alibi_is_minus_the_slope_times_the_distance(frame):
    slopes = torch.tensor([0.5, 2.0, 0.0])
    distance = (frame.query_positions()[:, :, None] - frame.key_positions()[:, None, :]).abs()
    want = -slopes[:, None, None] * distance[:, None]
    assert torch.equal(spread(diagonal_of(biases.alibi(slopes), frame), frame), want)


@given(frames)
def test_a_relative_position_bias_looks_up_the_bucket_of_key_minus_query(frame):
    table = torch.arange(12.0).reshape(3, 4)
    distance = frame.key_positions()[:, None, :] - frame.query_positions()[:, :, None]
    bias = biases.relative_position(table, lambda d: d.remainder(4))
    want = table[:, distance.remainder(4)].movedim(0, 1)
    assert torch.equal(spread(diagonal_of(bias, frame), frame), want)


def test_the_usual_slopes_are_those_of_the_paper():
    assert biases.alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert biases.alibi_slopes(16)[:3] == pytest.approx([2**-0.5, 2**-1, 2**-1.5])


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 6, 7, 12, 20, 33])
def test_slopes_for_any_number_of_heads_extend_those_of_the_power_of_two_below(num_heads):
    slopes = biases.alibi_slopes(num_heads)
    power = 2 ** int(math.log2(num_heads))
    assert len(slopes) == num_heads
    assert slopes[:power] == biases.alibi_slopes(power)
    assert slopes[power:] == biases.alibi_slopes(2 * power)[0::2][: num_heads - power]


def test_positional_biases_cost_memory_in_proportion_to_the_length():
    frame = Frame(1, 8, 10_000, 10_000)
    table = torch.randn(8, 32)
    for bias in (biases.alibi(), biases.relative_position(table, lambda d: d.clamp(-16, 15) + 16)):
        assert diagonal_of(bias, frame).shape == (1, 8, 19_999)


def test_alibi_in_a_half_type_stays_in_float32():
    frame = Frame(1, 12, 300, 300)
    exact = diagonal_of(biases.alibi(), frame, torch.float64)
    torch.testing.assert_close(diagonal_of(biases.alibi(), frame, torch.bfloat16), exact.float())


def test_slopes_table_and_dense_tensor_get_their_gradient():
    frame = Frame(2, 3, 4, 5, query_offset=1)
    slopes = torch.rand(3, dtype=torch.float64, requires_grad=True)
    table = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    whole = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    resolve = (frame, torch.float64, CPU)
    assert torch.autograd.gradcheck(lambda t: biases.alibi(t).resolve(*resolve)[1], slopes)
    bucket = lambda d: d.remainder(4)  # noqa: E731
    assert torch.autograd.gradcheck(lambda t: biases.relative_position(t, bucket).resolve(*resolve)[1], table)
    assert torch.autograd.gradcheck(lambda t: biases.dense(t).resolve(*resolve)[0], whole)


def test_a_dense_bias_is_given_its_missing_axes_and_no_copy():
    bias = torch.randn(5, 7)
    dense, diagonal = biases.dense(bias).resolve(Frame(2, 3, 5, 7), F32, CPU)
    assert diagonal is None
    assert dense is not None
    assert dense.shape == (1, 1, 5, 7)
    assert dense.data_ptr() == bias.data_ptr()


def test_dense_biases_are_not_positional_and_the_others_are():
    assert not biases.dense(torch.zeros(1)).needs_query_positions()
    assert biases.alibi().needs_query_positions()
    assert biases.relative_position(torch.zeros(1, 1), torch.zeros_like).needs_query_positions()


# ---- Bad input ----


REFUSED = {
    "a list as a dense bias": (
        TypeError,
        lambda: biases.dense([1.0]),
        "biases.dense: bias must be a tensor; got list. Make it with torch.tensor(...).",
    ),
    "a bool dense bias": (
        TypeError,
        lambda: biases.dense(torch.ones(2) > 0),
        "biases.dense: bias must be floating point; got torch.bool. Pass it as mask=.",
    ),
    "an integer dense bias": (
        TypeError,
        lambda: biases.dense(torch.ones(2, dtype=torch.int64)),
        "biases.dense: bias must be floating point; got torch.int64. Convert it with .to(q.dtype).",
    ),
    "five axes": (
        ValueError,
        lambda: biases.dense(torch.ones(1, 1, 1, 1, 2)),
        "biases.dense: bias must have at most 4 axes (batch, num_heads, seq_len_q, seq_len_kv); got (1, 1, 1, 1, 2). "
        "Reshape it.",
    ),
    "slopes in a list": (
        TypeError,
        lambda: biases.alibi([1.0]),
        "biases.alibi: slopes must be a tensor; got list. Use torch.tensor([...]).",
    ),
    "slopes of two axes": (
        ValueError,
        lambda: biases.alibi(torch.ones(2, 2)),
        "biases.alibi: slopes must be float (num_heads,); got torch.float32 (2, 2). Give one per head.",
    ),
    "a table of one axis": (
        ValueError,
        lambda: biases.relative_position(torch.ones(2), torch.abs),
        "biases.relative_position: table must be float (num_heads, num_buckets); got torch.float32 (2,). Reshape it.",
    ),
    "a bucket that is no function": (
        TypeError,
        lambda: biases.relative_position(torch.ones(2, 2), 3),
        "biases.relative_position: bucket must be callable; got int. Pass a function.",
    ),
    "a bucket that returns floats": (
        ValueError,
        lambda: diagonal_of(biases.relative_position(torch.ones(2, 2), lambda d: d / 2), Frame(1, 2, 2, 2)),
        "biases.relative_position: bucket must return an integer tensor of its argument's shape (1, 3); "
        "got torch.float32 (1, 3). Use elementwise operations.",
    ),
    "a bucket past the table": (
        ValueError,
        lambda: diagonal_of(biases.relative_position(torch.ones(2, 2), lambda d: d), Frame(1, 2, 2, 2)),
        "biases.relative_position: bucket must return numbers from 0 to 1; got -1 to 1. "
        "Clamp them, or give the table more buckets.",
    ),
    "slopes for other heads": (
        ValueError,
        lambda: biases.alibi(torch.ones(3)).validate("attention", Frame(1, 2, 2, 2)),
        "attention: alibi's slopes must be one per query head (2); got 3. Give num_heads slopes, or none for the usual "
        "ones.",
    ),
    "a table for other heads": (
        ValueError,
        lambda: biases.relative_position(torch.ones(3, 2), torch.abs).validate("attention", Frame(1, 2, 2, 2)),
        "attention: relative_position's table must have one row per query head (2) or one; got 3. "
        "Give it as (num_heads, num_buckets).",
    ),
    "a dense bias of another shape": (
        ValueError,
        lambda: biases.dense(torch.ones(3, 2)).validate("attention", Frame(1, 2, 2, 2)),
        "attention: bias must be broadcastable to (batch, num_heads, seq_len_q, seq_len_kv) = (1, 2, 2, 2); "
        "got (1, 1, 3, 2). Give each axis its full length or 1.",
    ),
    "no bias at all": (
        TypeError,
        lambda: biases.as_bias("alibi", "attention", F32),
        "attention: bias must be a bias of regard.biases or a float tensor; got str. "
        "Make one, as in regard.biases.alibi().",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_in_one_sentence_with_the_fix(what):
    error, call, message = REFUSED[what]
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        call()
