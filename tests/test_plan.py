"""What the kernel is told to skip: panels of ranges or bits, and the tile counts that `explain` reports."""

import numpy as np
import pytest
import torch

from regard import masks, plan
from regard.positions import Frame

SCATTERED = torch.rand(2, 3, 200, 300, generator=torch.Generator().manual_seed(1)) > 0.9
RULES = {
    "none": None,
    "causal": masks.causal(),
    "window or prefix": masks.sliding_window(10, 5) | masks.prefix(70),
    "padding": masks.padding(torch.tensor([300, 7])),
    "documents": masks.documents(torch.arange(400) // 37),
    "scattered": masks.from_tensor(SCATTERED),
    "function": masks.from_function(lambda b, h, p, j: (p * 7 + j * 3 + h + b) % 5 == 0),
    "causal function": masks.causal() & masks.from_function(lambda b, h, p, j: (p + j) % 2 == 0),
    "nothing": masks.causal() & ~masks.causal(),
}


def frame() -> Frame:
    return Frame(2, 3, 200, 300, query_offset=50)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("most", [None, 33])
def test_panels_together_hold_the_whole_mask(rule, most):
    mask = RULES[rule]
    parts = []
    for panel in plan.panels(mask, frame(), most=most):
        columns = panel.columns(300)
        seen = torch.zeros(2, 3, len(panel.rows), 300, dtype=torch.bool)
        inside = panel.visible(columns)
        seen[..., columns.start : columns.stop] = True if inside is None else inside
        parts.append(seen)
        assert most is None or rule in ("scattered", "function", "causal function") or len(panel.rows) <= most
    expected = (
        torch.ones(2, 3, 200, 300, dtype=torch.bool) if mask is None else mask.dense(frame()).expand(2, 3, 200, 300)
    )
    assert torch.equal(torch.cat(parts, 2), expected)


@pytest.mark.parametrize("rule", RULES)
def test_tile_counts_are_those_of_the_dense_mask(rule):
    mask = RULES[rule]
    found = plan.summary(frame(), mask, 1, 64, 32, torch.bfloat16)
    dense = torch.ones(2, 3, 200, 300, dtype=torch.bool) if mask is None else mask.dense(frame()).expand(2, 3, 200, 300)
    padded = np.pad(dense.numpy(), ((0, 0), (0, 0), (0, 56), (0, 20)))
    tiles = padded.reshape(2, 3, 4, 64, 5, 64).any((3, 5)).sum()
    assert found["tiles"] == tiles
    assert found["tiles_total"] == 2 * 3 * 4 * 5
    assert found["density"] == pytest.approx(dense.double().mean().item())
    assert found["flops"] == 2 * tiles * 64 * 64 * 96
    assert found["bytes"] == 2 * (2 * 3 * 200 * 96 + 2 * 1 * 300 * 96)


def test_a_window_is_planned_at_a_cost_that_does_not_grow_with_the_square():
    frame = Frame(1, 1, 100_000, 100_000)
    (panel,) = plan.panels(masks.sliding_window(511, 0), frame)
    assert panel.bits is None and panel.ranges is not None and panel.ranges.shape == (1, 100_000, 1, 2)
    assert plan.summary(frame, masks.sliding_window(511, 0), 1, 64, 64, torch.float32)["tiles"] < 100_000 / 64 * 11


def test_masks_made_of_numbers_alone_are_planned_once():
    before = plan._kept_ranges.cache_info().hits
    for _ in range(3):
        list(plan.panels(masks.causal() & masks.sliding_window(77, 0), Frame(1, 1, 123, 123)))
    assert plan._kept_ranges.cache_info().hits >= before + 2


def test_strides_and_grids_are_written_down_once():
    mask = masks.strided(5) & ~masks.neighborhood((40, 40), 9)
    before = plan._kept_words.cache_info().hits
    first, again = (next(iter(plan.panels(mask, Frame(1, 1, 1600, 1600)))) for _ in range(2))
    assert plan._kept_words.cache_info().hits == before + 1
    assert torch.equal(first.bits, again.bits)


def test_words_that_a_function_or_a_tensor_decides_are_written_anew():
    wanted = True
    function = masks.from_function(lambda b, h, p, j: ((p - j) % 2 == 0) == wanted)
    allowed = torch.eye(64, dtype=torch.bool)
    frame = Frame(1, 1, 64, 64)
    for mask in (function, masks.strided(3) & masks.from_tensor(allowed)):
        wanted, allowed[:] = True, torch.eye(64, dtype=torch.bool)
        next(iter(plan.panels(mask, frame)))
        wanted, allowed[:] = False, True
        (panel,) = plan.panels(mask, frame)
        assert torch.equal(panel.visible(range(64)).expand(1, 1, 64, 64), mask.dense(frame).expand(1, 1, 64, 64))


def test_a_function_is_asked_only_where_its_partner_leaves_something():
    asked = []

    def function(batch, head, p, j):
        asked.append((p.min().item(), p.max().item(), j.min().item(), j.max().item()))
        return p >= j

    mask = masks.sliding_window(100, 0) & masks.from_function(function)
    list(plan.panels(mask, Frame(1, 1, 4096, 4096), most=128))
    assert max(high for _, _, _, high in asked) == 4095
    assert all(last - first < 128 + 100 + 64 for _, _, first, last in asked)


def test_panels_of_bits_stay_within_their_bound(monkeypatch):
    monkeypatch.setattr(plan, "_PANEL_BYTES", 64 * 1000)
    mask = masks.from_function(lambda b, h, p, j: (p + j) % 3 == 0)
    panels = list(plan.panels(mask, Frame(1, 1, 1000, 6400)))
    assert len(panels) > 1
    assert all(panel.bits.numel() * 8 <= 64 * 1000 for panel in panels)
    assert [row for panel in panels for row in panel.rows] == list(range(1000))
