"""Sparse masks: words, ranges and the rule pair by pair agree; attention under each equals the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import regard
from agreement import assert_close, qkv
from mask_cases import BATCH, HEADS, Case, bools, cases, frames, painted, spelt_out, unpacked
from regard import bits, masks, plan, ranges
from regard.masks import Mask
from regard.positions import Frame

GRAPH = torch.randint(0, 90, (2, 400), generator=torch.Generator().manual_seed(3))
ALLOWED = torch.rand(2, 4, 12, 12, generator=torch.Generator().manual_seed(4)) > 0.6
RULES: dict[str, Mask] = {
    "global tokens": masks.global_tokens([3, 40, 41, 89]),
    "global tokens by batch row": masks.global_tokens(torch.tensor([[3, 4], [50, 50]])),
    "many global tokens": masks.global_tokens(list(range(0, 90, 4))),
    "strided": masks.strided(3),
    "far strided": masks.strided(20),
    "line": masks.neighborhood(90, 9, 2),
    "plane": masks.neighborhood((9, 10), 5),
    "dilated plane": masks.neighborhood((9, 10), (3, 5), (3, 2)),
    "space": masks.neighborhood((5, 3, 6), (3, 3, 5)),
    "blocks": masks.blocks(ALLOWED[0, 0], 8),
    "blocks by head": masks.blocks(ALLOWED, 8),
    "edges": masks.edges(GRAPH),
    "few edges": masks.edges(GRAPH[:, :60]),
    "longformer": masks.longformer(10, [0, 1], dilation=2),
    "bigbird": masks.bigbird(3, [0], seq_len=90, random_blocks=2, block_size=8, num_heads=4),
    "sparse transformer": masks.sparse_transformer(9),
    "fixed sparse transformer": masks.sparse_transformer(9, "fixed", summary=2),
    "joined": (masks.causal() & ~masks.strided(4)) | masks.edges(GRAPH) & masks.blocks(ALLOWED, 8),
}


# ---- Words, ranges and pairs ----


@given(cases(depth=3))
@settings(max_examples=300)
def test_words_equal_the_rule_pair_by_pair(case: Case) -> None:
    assert torch.equal(unpacked(case.mask.words(case.frame), case.frame), spelt_out(case.mask, case.frame))


@given(cases(depth=2, scale=16))
@settings(max_examples=150)
def test_words_and_ranges_equal_the_rule_over_many_words(case: Case) -> None:
    dense = spelt_out(case.mask, case.frame)
    assert torch.equal(unpacked(case.mask.words(case.frame), case.frame), dense)
    intervals = case.mask.intervals(case.frame)
    if intervals is not None:
        assert torch.equal(painted(intervals, case.frame)[:, None].expand_as(dense), dense)
    hull = case.mask.hull(case.frame)
    if hull is not None:
        assert not (dense & ~painted(hull, case.frame)[:, None]).any()


@given(cases(depth=2, scale=16), st.data())
@settings(max_examples=60)
def test_words_of_some_rows_are_those_of_the_whole(case: Case, data: st.DataObject) -> None:
    frame = case.frame
    start = data.draw(st.integers(0, frame.seq_len_q))
    rows = range(start, data.draw(st.integers(start, frame.seq_len_q)))
    dense = spelt_out(case.mask, frame)[:, :, rows.start : rows.stop]
    part = replace(frame, seq_len_q=len(rows), query_offset=0)
    assert torch.equal(unpacked(case.mask.words(frame, rows), part), dense)


@given(frames(scale=16), st.data())
@settings(max_examples=60)
def test_bits_and_ranges_turn_into_one_another(frame: Frame, data: st.DataObject) -> None:
    length = frame.seq_len_kv
    dense = bools(data.draw, 2, 3, length).numpy()
    exact = ranges.runs(dense)[0]
    words = bits.of_bools(dense)
    if exact is not None:
        assert (bits.of_ranges(exact, length) == words).all()
    assert (bits.complement(words.copy(), length) == bits.of_bools(~dense)).all()
    assert bits.total(words) == dense.sum()
    start = data.draw(st.integers(-150, 150))
    outside = torch.nn.functional.pad(torch.from_numpy(dense), (150, 450))
    assert (bits.part(words, start, 300) == bits.of_bools(outside[..., 150 + start : 450 + start].numpy())).all()


ATOMS = [name for name, mask in RULES.items() if not mask._parts() and not mask.depends_on_head()]


@pytest.mark.parametrize("rule", ATOMS)
def test_the_hull_touches_a_visible_key_at_both_ends_of_a_row(rule: str) -> None:
    frame = Frame(2, 4, 90, 90)
    hull = RULES[rule].hull(frame)
    assert hull is not None
    dense = spelt_out(RULES[rule], frame)[:, 0]
    for b in range(2):
        for i in range(90):
            seen = dense[b, i].nonzero()[:, 0].tolist()
            own = [pair for pair in hull[b % len(hull), i].tolist() if pair[0] < pair[1]]
            assert (own[0][0], own[-1][1]) == (seen[0], seen[-1] + 1) if seen else not own


# ---- What the rules mean, spelt out a second time ----


def by_hand(rule: Callable[[int, int], bool], queries: range, keys: range) -> Tensor:
    return torch.tensor([[rule(p, j) for j in keys] for p in queries])


def drawn(mask: Mask, queries: range, keys: range) -> Tensor:
    frame = Frame(1, 1, len(queries), len(keys), queries.start, keys.start)
    return mask.dense(frame)[0, 0].expand(len(queries), len(keys))


HAND: dict[str, tuple[Mask, Callable[[int, int], bool]]] = {
    "global tokens": (masks.global_tokens([5, 7]), lambda p, j: p in (5, 7) or j in (5, 7)),
    "strided": (masks.strided(4), lambda p, j: (p - j) % 4 == 0),
    "plane": (
        masks.neighborhood((4, 6), (3, 5), (1, 2)),
        lambda p, j: (
            abs(p // 6 - j // 6) <= 1 and abs(p % 6 - j % 6) <= 4 and (p - j) % 2 == 0 if max(p, j) < 24 else False
        ),
    ),
    "space": (
        masks.neighborhood((2, 3, 4), (3, 1, 3)),
        lambda p, j: (
            max(p, j) < 24 and abs(p // 12 - j // 12) <= 1 and p // 4 % 3 == j // 4 % 3 and abs(p % 4 - j % 4) <= 1
        ),
    ),
    "even window": (masks.neighborhood(30, 4), lambda p, j: abs(p - j) <= 2),
    "blocks": (masks.blocks(ALLOWED[1, 2], 3), lambda p, j: bool(ALLOWED[1, 2, p // 3, j // 3])),
    "edges": (masks.edges(GRAPH), lambda p, j: [p, j] in GRAPH.T.tolist()),
    "longformer": (masks.longformer(6, [5]), lambda p, j: abs(p - j) <= 3 or 5 in (p, j)),
    "dilated longformer": (masks.longformer(6, dilation=3), lambda p, j: abs(p - j) <= 9 and (p - j) % 3 == 0),
    "sparse transformer": (
        masks.sparse_transformer(4), lambda p, j: p - 4 <= j <= p or (j <= p and (p - j) % 4 == 0),
    ),
    "fixed sparse transformer": (
        masks.sparse_transformer(5, "fixed", summary=2), lambda p, j: j <= p and (p // 5 == j // 5 or j % 5 in (3, 4)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", HAND)
def test_a_rule_means_what_its_paper_says(rule: str) -> None:
    mask, meaning = HAND[rule]
    for queries, keys in ((range(25), range(25)), (range(6, 13), range(2, 20)), (range(20, 21), range(21))):
        assert torch.equal(drawn(mask, queries, keys), by_hand(meaning, queries, keys))


def test_a_class_token_before_the_grid_is_joined_as_a_global_token() -> None:
    mask = masks.neighborhood((3, 3), 3) | masks.global_tokens([-1])
    frame = Frame(1, 1, 10, 10, -1, -1)
    mask.validate("attention", frame)
    dense = spelt_out(mask, frame)[0, 0]
    assert dense[0].all() and dense[:, 0].all()
    assert torch.equal(dense[1:, 1:], drawn(masks.neighborhood((3, 3), 3), range(9), range(9)))


def test_bigbird_draws_as_many_blocks_as_asked_and_never_near_ones() -> None:
    mask = masks.bigbird(3, [], seq_len=640, random_blocks=4, block_size=16, num_heads=3, seed=5)
    dense = spelt_out(mask, Frame(1, 3, 640, 640))[0]
    tiles = dense.reshape(3, 40, 16, 40, 16).transpose(2, 3)
    assert torch.equal(tiles.any((-1, -2)), tiles.all((-1, -2)))
    block = torch.arange(40)
    near = (block[:, None] - block).abs() <= 1
    assert (tiles[..., 0, 0] & ~near).sum(-1).eq(4).all()
    assert (tiles[..., 0, 0] | ~near).all()
    assert not torch.equal(tiles[0], tiles[1])
    again = masks.bigbird(3, [], seq_len=640, random_blocks=4, block_size=16, num_heads=3, seed=5)
    assert torch.equal(again.encode()[2][0], mask.encode()[2][0])
    few = masks.bigbird(3, [], seq_len=64, random_blocks=9, block_size=16)
    assert spelt_out(few, Frame(1, 1, 64, 64)).all()


def test_edges_may_come_in_any_order_and_twice() -> None:
    shuffled = torch.cat([GRAPH, GRAPH[:, :50]], 1)[:, torch.randperm(450)]
    for kind in (torch.int64, torch.int32):
        assert torch.equal(
            spelt_out(masks.edges(shuffled.to(kind)), Frame(1, 1, 90, 90)),
            spelt_out(RULES["edges"], Frame(1, 1, 90, 90)),
        )


# ---- Attention ----


def grown(backend: str, rule: str, frame: Frame) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    q, k, v = qkv(2, 4, 2, frame.seq_len_q, frame.seq_len_kv, 8, 6, torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = regard.attention(
        q, k, v, mask=RULES[rule], query_offset=frame.query_offset, key_offset=frame.key_offset, backend=backend
    )
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return (out.detach(), *torch.autograd.grad((out * weight).sum(), leaves))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("where", ["whole", "offsets", "offsets by batch row"])
def test_attention_and_its_gradients_equal_the_reference(native: str, rule: str, where: str) -> None:
    frame = {
        "whole": Frame(2, 4, 90, 90),
        "offsets": Frame(2, 4, 20, 67, 55, 9),
        "offsets by batch row": Frame(2, 4, 20, 67, torch.tensor([55, 2]), torch.tensor([0, 23])),
    }[where]
    for got, want in zip(grown(native, rule, frame), grown("reference", rule, frame), strict=True):
        assert_close(got, want, torch.float64, 90, largest=16.0)


@pytest.mark.parametrize("rule", RULES)
def test_a_program_under_compile_and_the_statistics_keep_the_mask(native: str, rule: str) -> None:
    q, k, v = qkv(2, 4, 2, 90, 90, 8, 6)
    mask = masks.decode(*RULES[rule].encode())
    found = regard.attention_with_stats(q, k, v, mask=mask, received=True)
    want = regard.attention_weights(q, k, mask=RULES[rule], backend="reference")
    assert_close(found.received, want.sum(2), torch.float32, 90, largest=90.0)
    tile = regard.attention_weights(q, k, mask=mask, rows=slice(7, 50), cols=slice(3, 88))
    assert_close(tile, want[:, :, 7:50, 3:88], torch.float32, 90)


def test_sparse_masks_made_outside_compile_without_a_break(native: str) -> None:
    q, k, v = qkv(2, 4, 2, 90, 90, 8, 6)
    mask = RULES["plane"] | RULES["blocks by head"] & RULES["edges"]
    run = torch.compile(lambda q, k, v: regard.attention(q, k, v, mask=mask), fullgraph=True, backend="eager")
    assert torch.equal(run(q, k, v), regard.attention(q, k, v, mask=mask))


def test_panels_of_a_long_graph_cost_what_its_edges_cost() -> None:
    # A call that asked for every pair would need 10¹⁰ of them.
    length = 100_000
    index = torch.stack([torch.arange(length).repeat_interleave(20), torch.randint(0, length, (20 * length,))])
    mask = masks.edges(index) & masks.causal()
    panel = next(iter(plan.panels(mask, Frame(1, 1, length, length), range(50_000, 50_256))))
    assert panel.bits is not None
    kept = index[:, (index[0] >= 50_000) & (index[0] < 50_256) & (index[1] <= index[0])].unique(dim=1)
    assert bits.total(panel.bits.numpy().view("uint64")) == kept.shape[1]


def test_a_function_is_asked_only_where_its_partner_leaves_something() -> None:
    asked = 0

    def function(batch: Tensor, head: Tensor, p: Tensor, j: Tensor) -> Tensor:
        nonlocal asked
        asked += p.numel() * j.numel()
        return (p + j) % 2 == 0

    frame = Frame(1, 1, 4096, 4096)
    mask = masks.sliding_window(63, 0) & masks.from_function(function)
    words = mask.words(frame)
    assert asked < 4096 * 320
    assert bits.total(words.numpy().view("uint64")) == 32 * 4096 - sum(range(1, 32)) * 2 - 32 + 32


# ---- Bad input ----

MANY = "Give one int, or one for each axis of the grid."
REFUSED: dict[str, tuple[type[Exception], Callable[[], object], str]] = {
    "global positions": (
        ValueError, lambda: masks.global_tokens(torch.zeros(3)),
        "masks.global_tokens: positions must be ints (n,) or (batch, n); got torch.float32 (3,). "
        "Give positions in the sequence.",
    ),
    "stride": (
        ValueError, lambda: masks.strided(0),
        "masks.strided: stride must be at least 1; got 0. Use 1 to see every key.",
    ),
    "no stride": (
        TypeError, lambda: masks.strided(2.0),  # type: ignore[arg-type]
        "masks.strided: stride must be an int; got float. Use 1 to see every key.",
    ),
    "four axes": (
        ValueError, lambda: masks.neighborhood((2, 2, 2, 2), 3),
        "masks.neighborhood: grid must have one, two or three axes; got 4. Give tokens along each axis.",
    ),
    "window of other axes": (
        ValueError, lambda: masks.neighborhood((2, 2, 2), (3, 3)),
        f"masks.neighborhood: window must have one number, or one for each of the grid's 3 axes; got 2. {MANY}",
    ),
    "no window": (
        ValueError, lambda: masks.neighborhood(4, 0), f"masks.neighborhood: window must be at least 1; got 0. {MANY}",
    ),
    "no dilation": (
        TypeError, lambda: masks.neighborhood(4, 3, "1"),  # type: ignore[arg-type]
        f"masks.neighborhood: dilation must be an int; got str. {MANY}",
    ),
    "float blocks": (
        TypeError, lambda: masks.blocks(torch.ones(2, 2), 2),
        "masks.blocks: allowed must be bool, True = may attend; got torch.float32. Pass it as bias=.",
    ),
    "flat blocks": (
        ValueError, lambda: masks.blocks(torch.ones(2) > 0, 2),
        "masks.blocks: allowed must have two to four axes ([[batch,] num_heads,] query blocks, key blocks); "
        "got torch.bool (2,). Reshape it.",
    ),
    "block size": (
        ValueError, lambda: masks.blocks(ALLOWED, 0),
        "masks.blocks: size must be at least 1; got 0. Give the positions of a block.",
    ),
    "edges": (
        ValueError, lambda: masks.edges(torch.zeros(3, 2, dtype=torch.int64)),
        "masks.edges: index must be ints (2, num_edges); got torch.int64 (3, 2). "
        "Give positions of queries in its first row, of keys in its second.",
    ),
    "longformer": (
        ValueError, lambda: masks.longformer(0, [0]),
        "masks.longformer: window must be at least 1; got 0. Give the tokens seen around each.",
    ),
    "bigbird": (
        ValueError, lambda: masks.bigbird(3, [0], seq_len=64, random_blocks=-1),
        "masks.bigbird: random_blocks must be at least 0; got -1. Use 0 for none.",
    ),
    "kind": (
        ValueError, lambda: masks.sparse_transformer(4, "dense"),
        "masks.sparse_transformer: kind must be \"strided\" or \"fixed\"; got 'dense'. Choose one of the two.",
    ),
    "summary": (
        ValueError, lambda: masks.sparse_transformer(4, "fixed", summary=5),
        "masks.sparse_transformer: summary must be at most stride = 4; got 5. Give the paper's c.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_in_one_sentence_with_the_fix(what: str) -> None:
    error, call, message = REFUSED[what]
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        call()


WRONG = {
    "grid": (
        masks.neighborhood((2, 3), 3),
        "neighborhood's grid must cover every position; got 6 places and query positions 3 to 8. "
        "Give the grid of all tokens; those before it stand at negative positions.",
    ),
    "query blocks": (
        masks.blocks(torch.ones(2, 5) > 0, 4),
        "blocks' allowed must cover every position; got 8 query places and query positions 3 to 8. "
        "Allow or forbid every query block.",
    ),
    "key blocks": (
        masks.blocks(torch.ones(5, 2) > 0, 3),
        "blocks' allowed must cover every position; got 6 key places and key positions 0 to 6. "
        "Allow or forbid every key block.",
    ),
    "blocks of another batch": (
        masks.blocks(torch.ones(3, 1, 9, 9) > 0, 1), "blocks' allowed must have batch = 2 or 1 on its axis; "
        "got (3, 1, 9, 9). Give (batch, num_heads, query blocks, key blocks).",
    ),
    "blocks of other heads": (
        masks.blocks(torch.ones(3, 9, 9) > 0, 1), "blocks' allowed must have num_heads = 2 or 1 on its axis; "
        "got (1, 3, 9, 9). Give (batch, num_heads, query blocks, key blocks).",
    ),
    "global positions": (
        masks.global_tokens(torch.zeros(3, 1, dtype=torch.int64)),
        "global_tokens' positions must have one row per batch row (2) or one in all; got 3. "
        "Give each batch row its own.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_masks_that_do_not_fit_the_call_are_refused_inside_a_joined_mask_too(kind: str) -> None:
    mask, message = WRONG[kind]
    for joined in (mask, ~mask, masks.causal() & mask):
        with pytest.raises(ValueError, match="^attention: " + re.escape(message) + "$"):
            joined.validate("attention", Frame(BATCH, HEADS, 6, 7, query_offset=3))


@pytest.mark.parametrize("rule", list(RULES))
def test_sparse_masks_with_unequal_lengths_and_no_offset_are_refused(rule: str) -> None:
    q, k, v = qkv(2, 4, 2, 5, 7, 8, 6)
    with pytest.raises(ValueError, match="^attention: query_offset must be given"):
        regard.attention(q, k, v, mask=RULES[rule])
