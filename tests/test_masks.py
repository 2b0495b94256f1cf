"""Masks: the exact ranges, the hull, the program and the picture all agree with the rule evaluated pair by pair."""

from __future__ import annotations

import copy
import gc
import pickle
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mask_cases import BATCH, HEADS, Case, cases, painted, spelt_out
from regard import masks
from regard.masks import Mask
from regard.positions import Frame


@given(cases())
@settings(max_examples=400)
def test_intervals_equal_the_rule_pair_by_pair(case: Case) -> None:
    intervals = case.mask.intervals(case.frame)
    assume(intervals is not None)
    assert intervals is not None
    dense = spelt_out(case.mask, case.frame)
    assert torch.equal(painted(intervals, case.frame)[:, None].expand_as(dense), dense)


@given(cases())
@settings(max_examples=400)
def test_hull_holds_every_visible_pair(case: Case) -> None:
    hull = case.mask.hull(case.frame)
    if hull is not None:
        dense = spelt_out(case.mask, case.frame)
        assert not (dense & ~painted(hull, case.frame)[:, None]).any()


@given(cases())
def test_a_program_decodes_into_the_mask_that_wrote_it(case: Case) -> None:
    program = case.mask.encode()
    again = masks.decode(*program)
    assert repr(again) == repr(case.mask)
    assert torch.equal(spelt_out(again, case.frame), spelt_out(case.mask, case.frame))
    assert again.needs_query_positions() == case.mask.needs_query_positions()
    assert again.depends_on_head() == case.mask.depends_on_head()
    ops, ints, tensors = program
    assert isinstance(ops, str)
    assert all(isinstance(number, int) for number in ints)
    assert all(isinstance(tensor, Tensor) for tensor in tensors)


@given(cases(), st.data())
def test_rows_taken_alone_see_what_they_saw_in_the_whole(case: Case, data: st.DataObject) -> None:
    frame = case.frame
    start = data.draw(st.integers(0, frame.seq_len_q))
    rows = range(start, data.draw(st.integers(start, frame.seq_len_q)))
    part = replace(frame, seq_len_q=len(rows), query_offset=frame.query_offset + rows.start)
    seen = spelt_out(case.mask, frame)[:, :, rows.start : rows.stop]
    assert torch.equal(spelt_out(case.mask.take_rows(rows), part), seen)


@given(cases())
def test_density_is_the_share_of_visible_pairs(case: Case) -> None:
    frame = case.frame
    dense = spelt_out(case.mask, frame)
    got = case.mask.density(
        frame.seq_len_q,
        frame.seq_len_kv,
        query_offset=frame.query_offset,
        key_offset=frame.key_offset,
        batch=BATCH,
        num_heads=HEADS,
    )
    assert got == pytest.approx(float(dense.double().mean()) if dense.numel() else 0.0)


@given(cases())
def test_a_mask_that_says_it_does_not_depend_on_the_head_does_not(case: Case) -> None:
    if not case.mask.depends_on_head():
        dense = spelt_out(case.mask, case.frame)
        assert torch.equal(dense, dense[:, :1].expand_as(dense))


@given(cases())
def test_a_mask_that_needs_no_query_positions_does_not_change_with_them(case: Case) -> None:
    if not case.mask.needs_query_positions():
        moved = replace(case.frame, query_offset=case.frame.query_offset + 3)
        assert torch.equal(spelt_out(case.mask, case.frame), spelt_out(case.mask, moved))


def test_more_than_sixteen_ranges_a_row_are_kept_as_a_hull_alone() -> None:
    for runs, kept in ((16, True), (17, False)):
        keep = torch.zeros(1, 40, dtype=torch.bool)
        keep[0, 1 : 2 * runs : 2] = True
        frame = Frame(1, 1, 2, 40)
        for mask in (
            masks.padding(keep),
            masks.from_tensor(keep[0]),
            masks.documents(torch.ones(2, dtype=torch.int64), keep[0].long()),
        ):
            assert (mask.intervals(frame) is not None) == kept
            hull = mask.hull(frame)
            assert hull is not None
            assert hull[0, 0, 0, 0] == 1
            assert hull.shape[2] == (16 if kept else 1)
            assert hull[0, 0, -1, 1] == 2 * runs


def test_heads_that_differ_have_a_hull_over_all_of_them() -> None:
    mask = masks.from_tensor(torch.eye(4, dtype=torch.bool)[None, :, None, :].expand(1, 4, 3, 4))
    frame = Frame(1, 4, 3, 4)
    assert mask.intervals(frame) is None
    assert mask.hull(frame).tolist() == [[[[0, 4]]] * 3]  # type: ignore[union-attr]


def test_a_function_under_causal_has_the_causal_hull() -> None:
    inside = masks.causal()
    joined = inside & masks.from_function(lambda b, h, p, j: (p - j) % 2 == 0)
    frame = Frame(1, 1, 6, 6)
    assert joined.intervals(frame) is None
    assert torch.equal(joined.hull(frame), inside.hull(frame))  # type: ignore[arg-type]
    assert (~joined).hull(frame) is None
    assert (joined | inside).hull(frame) is None or torch.equal((joined | inside).hull(frame), inside.hull(frame))


def test_a_mask_that_was_not_given_as_a_tensor_costs_memory_in_proportion_to_its_length() -> None:
    ids = torch.arange(1 << 16) // 100
    mask = (masks.causal() | masks.prefix(10)) & masks.documents(ids) & masks.padding([60_000])
    frame = Frame(1, 1, 1 << 16, 1 << 16)
    intervals = mask.intervals(frame)
    assert intervals is not None
    program = mask.encode()
    assert intervals.nbytes + sum(t.nbytes for t in program[2]) < 64 * (1 << 16)


def test_masks_made_of_numbers_are_equal_and_hash_alike() -> None:
    assert masks.causal() & masks.prefix(3) == masks.causal() & masks.prefix(3)
    assert masks.sliding_window(1, None) != masks.sliding_window(1, 0)
    assert len({masks.causal(), masks.causal(), ~masks.causal()}) == 2


def test_a_picture_shows_one_batch_row_and_head() -> None:
    mask = masks.from_tensor(torch.eye(2, dtype=torch.bool)[:, None, None, :].expand(2, 1, 2, 2))
    assert mask.draw(2, batch=0) == "█·\n█·"
    assert mask.draw(2, batch=1) == "·█\n·█"
    by_head = masks.from_function(lambda b, h, p, j: h == j)
    assert by_head.draw(1, 3, head=2) == "··█"


def test_lengths_and_ids_may_be_lists_arrays_or_tensors() -> None:
    frame = Frame(2, 1, 4, 4)
    for given_as in (list, np.array, torch.tensor):
        assert spelt_out(masks.padding(given_as([1, 3])), frame).sum() == 16
        assert spelt_out(masks.documents(given_as([0, 0, 1, 1])), frame).sum() == 16
        assert spelt_out(masks.prefix(given_as([1, 3])), frame).sum() == 16


# ---- Bad input ----


def refused(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_a_negative_side_of_a_window_is_refused() -> None:
    message = "masks.sliding_window: left must be at least 0; got -1. Use None for an open side."
    refused(ValueError, message, lambda: masks.sliding_window(-1, 0))


def test_a_zero_one_attention_mask_is_refused_with_the_fix() -> None:
    message = (
        "masks.padding: the argument must be integer lengths (batch,) or a bool keep (batch, seq_len_kv); "
        "got torch.int64 (2, 3). Turn a 0/1 attention mask into bool with `!= 0`."
    )
    refused(ValueError, message, lambda: masks.padding(torch.ones(2, 3, dtype=torch.int64)))


def test_what_is_no_tensor_is_refused() -> None:
    message = "masks.padding: the argument must be a tensor; got str. Make it with torch.tensor(...)."
    refused(TypeError, message, lambda: masks.padding("abc"))  # type: ignore[arg-type]


def test_documents_that_are_no_integers_are_refused() -> None:
    message = (
        "masks.documents: ids must be integers (seq,) or (batch, seq); got torch.float32 (3,). Number the documents."
    )
    refused(ValueError, message, lambda: masks.documents(torch.zeros(3)))


def test_a_prefix_that_is_no_integer_is_refused() -> None:
    message = "masks.prefix: length must be an int or ints (batch,); got torch.float32 (2,). Give one per batch row."
    refused(ValueError, message, lambda: masks.prefix(torch.zeros(2)))


def test_a_float_tensor_and_a_tensor_of_five_axes_are_refused() -> None:
    message = "masks.from_tensor: the mask must be bool, True = may attend; got torch.float32. Pass it as bias=."
    refused(TypeError, message, lambda: masks.from_tensor(torch.zeros(3)))
    message = (
        "masks.from_tensor: the mask must be bool, True = may attend; got torch.int64. Turn 0/1 into bool with `!= 0`."
    )
    refused(TypeError, message, lambda: masks.from_tensor(torch.ones(3, dtype=torch.int64)))
    message = (
        "masks.from_tensor: the mask must have at most 4 axes (batch, num_heads, seq_len_q, seq_len_kv); "
        "got torch.bool (1, 1, 1, 1, 2). Reshape it."
    )
    refused(ValueError, message, lambda: masks.from_tensor(torch.ones(1, 1, 1, 1, 2, dtype=torch.bool)))


def test_a_function_that_is_none_or_returns_no_bool_is_refused() -> None:
    message = "masks.from_function: function must be callable; got int. Pass f(batch, head, p, j)."
    refused(TypeError, message, lambda: masks.from_function(3))  # type: ignore[arg-type]
    message = (
        "masks.from_function: the function must return a bool tensor; got torch.int64. "
        "Compare its index tensors, as in `lambda b, h, p, j: j <= p`."
    )
    refused(TypeError, message, lambda: masks.from_function(lambda b, h, p, j: p - j).draw(2))
    message = (
        "masks.from_function: the function's result must be broadcastable to its index tensors' joint shape "
        "(1, 1, 2, 2); got (3,). Use elementwise operations on the index tensors."
    )
    refused(ValueError, message, lambda: masks.from_function(lambda b, h, p, j: torch.ones(3) > 0).draw(2))


def test_a_mask_has_no_truth_value() -> None:
    message = "masks: a mask has no truth value. Join masks with & | ~, and test for `mask is None`."
    refused(TypeError, message, lambda: masks.causal() and masks.prefix(1))


def test_a_mask_joins_masks_alone() -> None:
    message = "masks: & must join two masks; got Tensor. Wrap a tensor with masks.from_tensor(...)."
    refused(TypeError, message, lambda: masks.causal() & torch.ones(2, dtype=torch.bool))  # type: ignore[operator]


WRONG = {
    "lengths": (
        masks.padding([1, 2, 3]),
        "padding's lengths must have one row per batch row (2) or one in all; got 3.",
    ),
    "keep": (masks.padding(torch.ones(2, 4) > 0), "padding's keep must have seq_len_kv = 5 entries a row; got 4."),
    "documents": (
        masks.documents([0] * 4),
        "documents' ids must cover every position; got 4 ids and query positions 1 to 4.",
    ),
    "pairs": (
        masks.documents([0] * 3, [0] * 5),
        "documents' query_ids must have seq_len_q = 4 entries a row; got 3.",
    ),
    "tensor": (
        masks.from_tensor(torch.ones(3, 5) > 0),
        "mask must be broadcastable to (batch, num_heads, seq_len_q, seq_len_kv) = (2, 2, 4, 5); got (1, 1, 3, 5).",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_tensors_that_do_not_fit_the_call_are_refused_inside_a_joined_mask_too(kind: str) -> None:
    mask, message = WRONG[kind]
    for joined in (mask, ~mask, masks.causal() & mask, mask | masks.causal()):
        with pytest.raises(ValueError, match="^attention: " + re.escape(message)):
            joined.validate("attention", Frame(2, 2, 4, 5, query_offset=1))


def test_a_broken_program_is_refused() -> None:
    for ops, ints, tensors in (("causal causal", [], []), ("and", [], []), ("prefix", [], []), ("nothing", [], [])):
        message = f"masks.decode: the program must be one that Mask.encode wrote; got {ops!r}. Encode the mask again."
        refused(ValueError, message, lambda o=ops, i=ints, t=tensors: masks.decode(o, i, t))


def test_a_function_that_this_process_does_not_know_is_refused() -> None:
    message = (
        "masks.decode: the function of a from_function mask must be alive in this process; got 987654321. "
        "Make the mask again and run again; a program exported to a file cannot hold a Python function."
    )
    refused(ValueError, message, lambda: masks.decode("function", [987654321], []))


def test_a_copied_or_pickled_function_mask_keeps_its_function() -> None:
    mask = masks.causal() & masks.from_function(torch_greater_equal)
    for again in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):  # noqa: S301
        assert again.encode() != mask.encode()  # a number of its own: another process may use ours for another function
        assert masks.decode(*again.encode()).draw(3) == mask.draw(3)


def torch_greater_equal(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:  # pickled by name
    return p >= j


def test_functions_of_masks_long_gone_are_let_go_of() -> None:
    def first() -> tuple[str, list[int], list[Tensor]]:
        return masks.from_function(lambda b, h, p, j: p >= j).encode()

    program = first()
    assert isinstance(masks.decode(*program), Mask)  # a backward pass may still ask for it
    for _ in range(2000):
        masks.from_function(lambda b, h, p, j: p >= j)
    gc.collect()
    with pytest.raises(ValueError, match="must be alive in this process"):
        masks.decode(*program)
