"""The masks of transformers become regard's by their structure, and mean the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import masking_utils as hf

from regard.huggingface.routed_mask import RoutedMask, regard_mask
from regard.masks import FromFunction, Mask

BATCH = 2
LONGEST = 40  # no position in these tests lies past it

IDS = torch.arange(LONGEST).repeat(BATCH, 1) // torch.tensor([[5], [7]])
LEFT = torch.tensor([3, 0])
IMAGES = torch.where(IDS % 2 == 0, IDS, -1)
PADDING = torch.arange(LONGEST) >= LEFT[:, None]
HOLES = torch.arange(LONGEST).repeat(BATCH, 1) % 7 != 3


def same_parity(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (q + kv) % 2 == 0


KNOWN = {
    "causal": hf.causal_mask_function,
    "bidirectional": hf.bidirectional_mask_function,
    "window": hf.sliding_window_causal_mask_function(4),
    "window of one": hf.sliding_window_causal_mask_function(1),
    "two-sided window": hf.sliding_window_bidirectional_mask_function(3),
    "chunks": hf.chunked_causal_mask_function(5, LEFT),
    "images among text": hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(IMAGES)),
    "padding": hf.padding_mask_function(PADDING),
    "holes": hf.and_masks(hf.causal_mask_function, hf.padding_mask_function(HOLES)),
    "nested": hf.or_masks(
        hf.and_masks(hf.causal_mask_function, hf.padding_mask_function(PADDING)), hf.sliding_window_overlay(2)
    ),
}


def both(function: object, **sizes: object) -> tuple[RoutedMask, Tensor]:
    given = {"batch_size": BATCH, "mask_function": function, "allow_is_causal_skip": False, **sizes}
    ours, theirs = regard_mask(**given), hf.sdpa_mask(**given)
    assert isinstance(ours, RoutedMask)
    return ours, theirs.expand(BATCH, 1, theirs.shape[2], theirs.shape[3])


@pytest.mark.parametrize("name", KNOWN)
@given(data=st.data())
def test_known_functions_become_interval_masks_that_mean_the_same(name, data):
    q_length, kv_length = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    q_offset, kv_offset = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20))
    attention_mask = data.draw(st.sampled_from([None, PADDING, HOLES, PADDING[:, : kv_offset + 1]]))
    ours, theirs = both(
        KNOWN[name],
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
    )
    assert torch.equal(ours.filled(), theirs)
    assert ours.mask is None or ours.mask.intervals(ours.scene.frame()) is not None


def packed(inner: object, position_ids: Tensor) -> object:
    ids = hf.find_packed_sequence_indices(position_ids)
    return hf.packed_sequence_compatibility_function(inner, position_ids, ids)


@pytest.mark.parametrize("name", ["causal", "window", "two-sided window", "chunks", "bidirectional"])
def test_packed_documents_become_intervals(name):
    position_ids = torch.cat([torch.arange(5), torch.arange(9), torch.arange(2)]).repeat(BATCH, 1)
    ours, theirs = both(packed(KNOWN[name], position_ids), q_length=16, kv_length=16)
    assert torch.equal(ours.filled(), theirs)
    assert ours.mask.intervals(ours.scene.frame()) is not None


def test_packing_that_does_not_count_up_keeps_its_own_positions():
    position_ids = torch.tensor([[0, 1, 5, 6, 6, 3, 4, 9]]).repeat(BATCH, 1)
    one_document = hf.packed_sequence_mask_function(torch.zeros_like(position_ids))
    moved = hf.remap_positions_for_packed_sequence(hf.causal_mask_function, position_ids)
    ours, theirs = both(hf.and_masks(one_document, moved), q_length=8, kv_length=8)
    assert torch.equal(ours.filled(), theirs)
    assert not torch.equal(theirs[0, 0], torch.ones(8, 8).tril().bool())


@pytest.mark.parametrize("use_vmap", [False, True])
def test_a_function_of_the_users_is_evaluated_tile_by_tile_below_the_diagonal(use_vmap):
    function = hf.and_masks(hf.causal_mask_function, same_parity)
    ours, theirs = both(function, q_length=6, kv_length=10, q_offset=4, use_vmap=use_vmap)
    assert torch.equal(ours.filled(), theirs)
    assert ours.mask.intervals(ours.scene.frame()) is None
    assert ours.mask.hull(ours.scene.frame())[0, 0].tolist()[0] == [0, 5]
    assert any(isinstance(part, FromFunction) for part in (ours.mask.left, ours.mask.right))


def test_a_function_that_takes_one_index_at_a_time_gets_one():
    def choosy(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        assert q.dim() == kv.dim() == 0
        return torch.stack([q, kv]).sum() % 3 == 0

    ours, theirs = both(choosy, q_length=5, kv_length=7, kv_offset=2, use_vmap=True)
    assert torch.equal(ours.filled(), theirs)


def test_nothing_excluded_is_no_mask_where_that_is_allowed():
    given = {"batch_size": 1, "q_length": 3, "kv_length": 3, "mask_function": hf.bidirectional_mask_function}
    assert regard_mask(**given, allow_is_bidirectional_skip=True) is None
    assert regard_mask(**given, allow_is_bidirectional_skip=True, attention_mask=torch.ones(1, 3).bool()) is None
    routed = regard_mask(**given)
    assert routed.mask is None and routed.filled().all()


def test_a_long_causal_mask_holds_no_square():
    routed = regard_mask(batch_size=1, q_length=1 << 20, kv_length=1 << 20)
    assert routed.shape == (1, 1, 1 << 20, 1 << 20) and routed.dtype == torch.bool and not routed.is_filled()


@pytest.fixture
def routed() -> RoutedMask:
    return regard_mask(batch_size=BATCH, q_length=4, kv_length=6, q_offset=2, attention_mask=PADDING)


def test_what_changes_nothing_keeps_the_structure(routed):
    for same in (
        routed[:, :, :, :6],
        routed[:, :, :, : 2**31],
        routed.to("cpu"),
        routed.bool(),
        routed.clone(),
        routed.detach(),
        routed.expand(BATCH, 1, 4, 6),
    ):
        assert isinstance(same, RoutedMask)
        assert same.mask is routed.mask and not same.is_filled()


def test_operations_give_what_they_give_on_the_filled_mask(routed):
    filled = routed.filled().clone()
    assert isinstance(routed, Tensor) and routed.dim() == 4 and not isinstance(routed[:, 0], RoutedMask)
    assert torch.equal(routed[:, 0, 1:, :3], filled[:, 0, 1:, :3])
    assert torch.equal(~routed, ~filled)
    assert torch.equal(routed & filled[:1], filled & filled[:1])
    assert torch.equal(torch.where(routed, 0.0, -1.0), torch.where(filled, 0.0, -1.0))
    assert torch.equal(torch.zeros(BATCH, 1, 4, 6).masked_fill(routed, 2.0), filled * 2.0)
    assert torch.equal(routed.to(torch.float32), filled.float())
    assert torch.equal(routed.repeat_interleave(2, 0), filled.repeat_interleave(2, 0))
    assert isinstance(routed.current(), Mask) and routed.current() is routed.mask


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_written_into_the_mask_is_the_mask(routed, mode):
    with mode():
        routed[:, :, 0, 5] = True
        assert routed.written()
        expected = routed.filled()
        assert torch.equal(routed.current().dense(routed.scene.frame()).expand_as(expected), expected)
        assert expected[0, 0, 0, 5]


def test_what_is_written_into_a_copy_is_not_the_mask(routed):
    routed.clone()[:, :, 0, 5] = True
    assert routed.current() is routed.mask and not routed.filled()[1, 0, 0, 5]


@pytest.mark.parametrize("add", [torch.add, torch.mul, torch.sub])
def test_a_model_that_adds_the_mask_to_its_scores_is_told_so(add):
    class Config:
        model_type = "homemade"

    routed = regard_mask(batch_size=1, q_length=3, kv_length=3, config=Config)
    with pytest.raises(ValueError, match="the mask of homemade, which computes attention by itself"):
        add(torch.zeros(1, 1, 3, 3), routed)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        torch.zeros(1, 1, 3, 3) + routed
