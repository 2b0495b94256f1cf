"""Which words a model links.

Enters: a `Look`.
Leaves: the strongest links from word to word, what went to sinks and separators, and the heads that link two words.
A word's row is the mean over its tokens, its column the sum. Rows come a few at a time: O(n) memory.
Floor 6: stands on Recording.weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.lens.look import Attention, Look
from regard.lens.tokens import Side

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Link:
    """One word's attention to another in one head; words are numbers into their sides."""

    layer: int
    head: int
    query: int
    key: int
    weight: float


@dataclass(frozen=True)
class Sink:
    """A word that takes attention as a resting place: its share of all attention, over heads and words."""

    word: int
    share: float
    role: str


@dataclass(frozen=True)
class Found:
    """How strongly one head links two words, and which place the second takes among what the first sees."""

    layer: int
    head: int
    weight: float
    rank: int
    of: int
    query: int
    key: int


def strongest(
    look: Look,
    index: int,
    count: int = 12,
    layer: int | None = None,
    head: int | None = None,
    apart_by: int = 1,
    *,
    marks_apart: bool = True,
) -> tuple[list[Link], list[Sink]]:
    """The strongest links between words, one head for each pair, and the sinks set apart from them.

    Set apart are the model's own markers, punctuation, the first word of a text read from left to right, and, within
    one text, a word's attention to itself.

    Args:
        look: the recording.
        index: which of its attentions.
        count: how many links.
        layer: only this layer. Default all.
        head: only this head. Default all.
        apart_by: within one text, how many words the two must stand apart at least. Default 1, any two.
        marks_apart: leave out what punctuation looks at, unless nothing else is left. Default True.

    Returns:
        Links and sinks, strongest first.
    """
    attention = look.attentions[index]
    queries, keys = look.sides[attention.query_side], look.sides[attention.key_side]
    roles = _roles(attention, keys)
    apart = torch.tensor([bool(role) for role in roles])
    asks = torch.tensor([not word.special and not (marks_apart and word.mark) for word in queries.words])
    best: dict[tuple[int, int], Link] = {}
    given = torch.zeros(len(keys.words), dtype=torch.float64)
    rows_seen = 0
    for number, first, weights in _word_rows(look, attention, layer):
        if head is not None:
            weights = weights[head : head + 1]
        given += weights.double().sum((0, 1))
        rows_seen += weights.shape[0] * weights.shape[1]
        kept = weights.clone()
        kept[..., apart] = 0
        kept[:, ~asks[first : first + kept.shape[1]]] = 0
        if attention.query_side == attention.key_side:
            distance = torch.arange(kept.shape[2])[None] - torch.arange(first, first + kept.shape[1])[:, None]
            kept[:, distance.abs() < apart_by] = 0
        top, which = kept.max(0)
        values, places = top.flatten().topk(min(count, top.numel()))
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            row, key = divmod(place, top.shape[1])
            pair = (first + row, key)
            if value > 0 and (pair not in best or value > best[pair].weight):
                best[pair] = Link(number, int(which[row, key]) if head is None else head, *pair, value)
    if not best and marks_apart and any(word.mark for word in queries.words):
        return strongest(look, index, count, layer, head, apart_by, marks_apart=False)
    links = sorted(best.values(), key=lambda link: (-link.weight, link.query, link.key))[:count]
    shares = given / max(rows_seen, 1)
    merged: dict[tuple[str, str], tuple[int, float]] = {}
    for word, role in enumerate(roles):
        if role:
            name = (keys.words[word].text, role)
            held = merged.get(name, (word, 0.0))
            merged[name] = (held[0], held[1] + float(shares[word]))
    sinks = [Sink(word, share, role) for (_, role), (word, share) in merged.items()]
    return links, sorted(sinks, key=lambda sink: -sink.share)


def find(look: Look, index: int, first: str, second: str) -> list[Found]:
    """The heads in which the first word attends most to the second, best first.

    Where a word stands several times, each head's best pair of places counts.

    Args:
        look: the recording.
        index: which of its attentions.
        first: the word that asks.
        second: the word that is looked at.

    Raises:
        ValueError: a word that is not in its text, or one that comes too late to be seen.
    """
    attention = look.attentions[index]
    queries, keys = look.sides[attention.query_side], look.sides[attention.key_side]
    asking, answering = _places(queries, first), _places(keys, second)
    if attention.causal and all(key[0] >= query[1] for query in asking for key in answering):
        raise ValueError(
            f"look: --find: the second word must come before the first in a model that reads from left to right; "
            f'got "{first}" and "{second}". Turn them round.'
        )
    visible = torch.tensor([not word.special and not word.mark for word in keys.words])
    best: dict[tuple[int, int], Found] = {}
    for layer in attention.layers:
        for start, stop in asking:
            tile = look.recording.weights(layer, rows=slice(start, stop), step=0).float()
            row = tile.mean(1)
            words = keys.merge_columns(row)
            seen = visible & torch.tensor([not attention.causal or word.tokens[0] < stop for word in keys.words])
            for key_start, key_stop in answering:
                mass = row[:, key_start:key_stop].sum(1)
                inside = torch.tensor([word.tokens[0] < key_stop and key_start < word.tokens[1] for word in keys.words])
                others = words[:, seen & ~inside]
                ranks = (others > mass[:, None]).sum(1) + 1
                for head in range(attention.num_heads):
                    found = Found(
                        layer.number,
                        head,
                        float(mass[head]),
                        int(ranks[head]),
                        others.shape[1] + 1,
                        queries.tokens[start].word,
                        keys.tokens[key_start].word,
                    )
                    held = best.get((layer.number, head))
                    if held is None or found.weight > held.weight:
                        best[layer.number, head] = found
    return sorted(best.values(), key=lambda found: (-found.weight, found.layer, found.head))


def word_weights(look: Look, index: int, layer: int, head: int) -> Tensor:
    """One head's weights from word to word, (query words, key words)."""
    attention = look.attentions[index]
    rows = [weights[head] for _, _, weights in _word_rows(look, attention, layer)]
    return torch.cat(rows)


def word_row(look: Look, index: int, layer: int, head: int, word: int) -> Tensor:
    """What one word looks at in one head, (key words,)."""
    attention = look.attentions[index]
    record = next(one for one in attention.layers if one.number == layer)
    tile = look.recording.weights(
        record, head, slice(*look.sides[attention.query_side].words[word].tokens), step=0
    ).float()
    return look.sides[attention.key_side].merge_columns(tile.mean(0, keepdim=True))[0]


def _word_rows(look: Look, attention: Attention, only: int | None) -> Iterator[tuple[int, int, Tensor]]:
    """(layer number, first word, weights (num_heads, some query words, key words)), layer by layer."""
    queries, keys = look.sides[attention.query_side], look.sides[attention.key_side]
    for layer in attention.layers:
        if only is not None and layer.number != only:
            continue
        first = 0
        while first < len(queries.words):
            last = first + 1
            start = queries.words[first].tokens[0]
            while last < len(queries.words) and queries.words[last].tokens[1] - start <= ROWS_AT_ONCE:
                last += 1
            stop = queries.words[last - 1].tokens[1]
            tile = look.recording.weights(layer, rows=slice(start, stop), step=0).float()
            part = Side(
                queries.name,
                tuple(type(t)(t.text, t.special, t.word - first) for t in queries.tokens[start:stop]),
                tuple(
                    type(w)(w.text, (w.tokens[0] - start, w.tokens[1] - start), w.special)
                    for w in queries.words[first:last]
                ),
            )
            yield layer.number, first, part.merge_rows(keys.merge_columns(tile))
            first = last


def _roles(attention: Attention, keys: Side) -> list[str]:
    """What sets a key word apart: "marker", "punctuation", "first word", or "" where nothing does."""
    roles = []
    for number, word in enumerate(keys.words):
        if word.special:
            roles.append("marker")
        elif word.mark:
            roles.append("punctuation")
        else:
            roles.append("first word" if attention.causal and number == 0 else "")
    return roles


def _places(side: Side, word: str) -> list[tuple[int, int]]:
    found = side.find(word)
    if found:
        return found
    words = list(dict.fromkeys(own.text for own in side.words if not own.special))
    shown = ", ".join(words[:12]) + (", ..." if len(words) > 12 else "")
    where = "text" if side.name == "text" else f"{side.name} text"
    raise ValueError(f'look: --find: both words must be in the {where}; got "{word}". Choose from: {shown}.')
