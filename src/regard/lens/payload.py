"""What the page is given.

Enters: a `Look`, and what to show first.
Leaves: the page's JSON ("regard-page/1"), and the blobs of numbers that it asks for by key.
Blobs are exact float32, but for the small head pictures (8 bits a cell).
Floor 6: stands on Recording.weights and Recording.blocks; the format is shared with web/."""

from __future__ import annotations

import base64
import gzip
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regard import op
from regard.lens.layers import Layer, rows_of_bias
from regard.lens.links import Found, strongest
from regard.lens.look import Attention, Look
from regard.lens.measures import measures, names
from regard.lens.tokens import Side

if TYPE_CHECKING:
    from regard.lens.head_labels import HeadLabels

FORMAT = "regard-page/1"
THUMB = 24  # cells on a side of a head's small picture
SAMPLED = 8  # rows of each band that a long text's small pictures look at
MANY = 4096  # tokens beyond which a text travels packed
LARGEST_PAGE = 48_000_000  # bytes of numbers that a saved page carries
NUMBERS = ("weights", "q", "k", "norms", "lse")
KEY = re.compile(
    r"(weights|thumbs|measures|q|k|norms|lse|scores|values|received)/(\d{1,4})(?:/(\d{1,6}))?(?:/(\d{1,6})/(\d{1,9}))?"
)


@dataclass(frozen=True)
class Selection:
    """What the page shows first: an attention, layer and head, and perhaps a word and what it looks at."""

    attention: int
    layer: int
    head: int
    word: int | None = None
    target: int | None = None


@dataclass(frozen=True)
class Blob:
    """Numbers for the page: float32 or uint8, little-endian, row by row."""

    numbers: Tensor

    @property
    def shape(self) -> list[int]:
        """Sizes."""
        return list(self.numbers.shape)

    @property
    def dtype(self) -> str:
        """ "f32" or "u8"."""
        return "u8" if self.numbers.dtype == torch.uint8 else "f32"

    def bytes(self) -> bytes:
        """The numbers as they travel."""
        return self.numbers.contiguous().numpy().astype("<f4" if self.dtype == "f32" else "u1", copy=False).tobytes()


def first_selection(
    look: Look, layer: int | None, head: int | None, found: list[Found] | None, index: int | None = None
) -> Selection:
    """What to open on: the best found head, else the strongest link of what was asked for.

    Args:
        look: the recording.
        layer: the layer asked for, or None.
        head: the head asked for, or None.
        found: what `links.find` found, or None.
        index: which attention. Default the front one.

    Raises:
        ValueError: a layer or head that the model does not have.
    """
    index = look.front if index is None else index
    attention = look.attentions[index]
    if layer is not None and layer not in attention.numbers:
        raise ValueError(
            f"look: --layer must be from {attention.numbers[0]} to {attention.numbers[-1]} for {look.loaded.name}; "
            f"got {layer}. Choose one of those."
        )
    if head is not None and not 0 <= head < attention.num_heads:
        raise ValueError(
            f"look: --head must be from 0 to {attention.num_heads - 1} for {look.loaded.name}; got {head}. "
            "Choose one of those."
        )
    if found:
        fitting = [f for f in found if (layer is None or f.layer == layer) and (head is None or f.head == head)]
        return Selection(index, fitting[0].layer, fitting[0].head, fitting[0].query, fitting[0].key)
    if look.long(index):  # reading every weight would take long: open on the middle layer, nothing chosen
        middle = attention.numbers[len(attention.numbers) // 2]
        return Selection(index, middle if layer is None else layer, head or 0)
    # A neighbour is the easiest thing to look at: open on a link that reaches further, where there is one.
    links = strongest(look, index, 1, layer, head, apart_by=2)[0] or strongest(look, index, 1, layer, head)[0]
    if not links:
        return Selection(index, attention.numbers[-1] if layer is None else layer, head or 0)
    return Selection(index, links[0].layer, links[0].head, links[0].query, links[0].key)


def payload(
    look: Look,
    selection: Selection,
    found: list[Found] | None = None,
    live: bool = False,
    labels: HeadLabels | None = None,
) -> dict[str, Any]:
    """The page's JSON, without its blobs.

    Args:
        look: the recording.
        selection: what to open on.
        found: what `links.find` found.
        live: whether a server answers.
        labels: scores and labels of the heads of the front attention, over a corpus.
    """
    from regard.lens.fingerprint import versions
    from regard.lens.probes import twins

    runs = live and look.loaded.model is not None
    front = look.attentions[selection.attention]
    return {
        "format": FORMAT,
        "version": versions()["regard"],
        "model": {
            "id": look.loaded.id,
            "name": look.loaded.name,
            "num_layers": len(front.layers),
            "num_heads": front.num_heads,
            "num_kv_heads": front.layers[0].num_kv_heads,
        },
        "live": live,
        "runs": runs,
        "twins": [[one.text, other.text] for one, other in twins()] if runs and len(look.sides) == 1 else [],
        "text": look.text,
        "notes": list(look.notes),
        "head_scores": None if labels is None else labels.scores,
        "head_labels": None if labels is None else labels.labels,
        "window": list(look.window),
        "sides": [_side(side) for side in look.sides],
        "attentions": [_attention(look, index) for index in range(len(look.attentions))],
        "selection": {
            "attention": selection.attention,
            "layer": selection.layer,
            "head": selection.head,
            "word": selection.word,
            "target": selection.target,
        },
        "found": None
        if found is None
        else [{"layer": one.layer, "head": one.head, "weight": one.weight} for one in found],
    }


def blob(look: Look, key: str) -> Blob | None:
    """The numbers behind a key of the page; None where the recording has no such thing.

    Keys: weights, q, k, norms, lse, received by attention and layer; thumbs and measures by attention; scores and
    values by attention, layer, head and row; below the values stands what the head gives to that row.
    """
    match = KEY.fullmatch(key)
    if match is None or int(match[2]) >= len(look.attentions):
        return None
    name, attention = match[1], look.attentions[int(match[2])]
    parts = [None if part is None else int(part) for part in match.groups()[2:]]
    if name == "measures":
        return Blob(measures(look, int(match[2]))) if parts == [None, None, None] else None
    if name == "thumbs":
        return Blob(_thumbs(look, attention)) if parts == [None, None, None] else None
    layer = next((one for one in attention.layers if one.number == parts[0]), None)
    if layer is None or (parts[1] is None) != (name not in ("scores", "values")):
        return None
    step = layer.steps[0]
    if look.long(int(match[2])) and name in ("weights", "q", "k"):
        return None
    if name == "received":
        return None if step.received is None else Blob(step.received[0].float())
    if name in ("scores", "values"):
        head, row = parts[1:]
        if head is None or row is None or head >= layer.num_heads or row >= step.seq_len_q:
            return None
        if name == "values":
            found = None if look.long(int(match[2])) else look.values.row(attention.kind, layer.number, head, row)
            return None if found is None else Blob(found.float())
        rows = slice(row, row + 1)
        stages = ("scaled", "capped", "biased", "weights")
        tiles = [look.recording.weights(layer, head, rows, step=0, stage=stage)[0] for stage in stages]
        return Blob(torch.stack(tiles).float())
    if name == "weights":
        return Blob(look.recording.weights(layer, step=0).float())
    return Blob({"q": step.q, "k": step.k, "norms": step.value_norms, "lse": step.lse}[name][0].float())


def saved(page: dict[str, Any], look: Look, progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """The page's JSON with its blobs, for a page without a server.

    Args:
        page: what `payload` gave.
        look: the recording.
        progress: called with the share that is done.

    Returns:
        The same with "blobs", and a note on the layers that were left out for their size.
    """
    selection = page["selection"]
    wanted = [(index, layer.number) for index, one in enumerate(look.attentions) for layer in one.layers]
    wanted.sort(key=lambda at: (at[0] != selection["attention"], abs(at[1] - selection["layer"]), at))
    blobs, spent, left_out = {}, 0, []
    for index in range(len(look.attentions)):
        for name in ("thumbs", "measures"):
            blobs[f"{name}/{index}"] = _packed(blob(look, f"{name}/{index}"))
    for index in range(len(look.attentions)):
        if look.long(index):
            blobs |= {key: _packed(one) for key, one in looked_at(look, index, page["selection"]).items()}
    wanted = [at for at in wanted if not look.long(at[0])]
    for done, (index, number) in enumerate(wanted):
        attention = look.attentions[index]
        rows, cols = len(look.sides[attention.query_side].tokens), len(look.sides[attention.key_side].tokens)
        spent += 4 * attention.num_heads * rows * cols
        if spent > LARGEST_PAGE and done:
            left_out.append((attention.label, number))
            continue
        for name in NUMBERS:
            blobs[f"{name}/{index}/{number}"] = _packed(blob(look, f"{name}/{index}/{number}"))
        if progress:
            progress((done + 1) / len(wanted))
    attention = look.attentions[selection["attention"]]
    if selection["word"] is not None:
        for token in range(*look.sides[attention.query_side].words[selection["word"]].tokens):
            key = f"values/{selection['attention']}/{selection['layer']}/{selection['head']}/{token}"
            if (found := blob(look, key)) is not None:
                blobs[key] = _packed(found)
    notes = list(page["notes"])
    for label in dict.fromkeys(label for label, _ in left_out):
        numbers = ", ".join(str(number) for own, number in sorted(left_out) if own == label)
        notes.append(
            f"To keep this file small it does not hold {label} of layers {numbers}: run regard look to see them."
        )
    return {**page, "live": False, "notes": notes, "blobs": blobs}


def looked_at(look: Look, index: int, selection: dict[str, Any]) -> dict[str, Blob]:
    """Of a long text the numbers that its first view shows: the chosen head's map, coarsely, and the chosen row."""
    from regard.lens.maps import CELLS, Maps, level_of

    attention, at = look.attentions[index], f"{index}/{selection['layer']}/{selection['head']}"
    if index != selection["attention"]:
        return {}
    queries, keys = look.sides[attention.query_side], look.sides[attention.key_side]
    top = level_of(max(len(queries.tokens), len(keys.tokens)), CELLS)
    wanted = [f"tile/{at}/max/{top}/0/0"]
    if top:  # and half as coarse, which is what a screen shows of the whole
        down, across = (range(-(-len(side.tokens) // (CELLS << (top - 1)))) for side in (queries, keys))
        wanted += [f"tile/{at}/max/{top - 1}/{row}/{col}" for row in down for col in across]
    if selection["word"] is not None:
        first, stop = queries.words[selection["word"]].tokens
        wanted.append(f"row/{at}/{first}/{stop}")
    maps, found = Maps(look), {}
    try:
        for key in wanted:
            one = maps.answer(key)
            while one is not None and one.share < 1:
                time.sleep(0.05)
                one = maps.answer(key)
            assert one is not None
            found[key] = Blob(one.numbers)
    finally:
        maps.close()
    return found


def _packed(one: Blob | None) -> dict[str, Any]:
    assert one is not None
    data = gzip.compress(one.bytes(), 6, mtime=0)
    return {"shape": one.shape, "dtype": one.dtype, "data": base64.b64encode(data).decode("ascii")}


def unpacked(one: dict[str, Any]) -> Blob:
    """A blob as it was before it was packed into a saved page.

    Raises:
        ValueError: bytes that do not fit the shape.
    """
    kind = np.dtype("u1" if one["dtype"] == "u8" else "<f4")
    data = gzip.decompress(base64.b64decode(one["data"]))
    return Blob(torch.from_numpy(np.frombuffer(data, kind).reshape(one["shape"]).copy()))


def _thumbs(look: Look, attention: Attention) -> Tensor:
    """(layers, num_heads, rows, cols): the largest weight of each cell, in 255ths."""
    step = attention.layers[0].steps[0]
    if look.long(look.attentions.index(attention)):
        return torch.stack([_sampled(layer) for layer in attention.layers])
    block = (-(-step.seq_len_q // THUMB), -(-step.seq_len_kv // THUMB))
    largest = [look.recording.blocks(layer, block, step=0)[1][0] for layer in attention.layers]
    return (torch.stack(largest).float().clamp(0, 1) * 255).round().to(torch.uint8)


def _sampled(layer: Layer) -> Tensor:
    """(num_heads, rows, cols) in 255ths: the largest weights of a few rows of each band, on a scale of square roots."""
    step = layer.steps[0]
    band, out = -(-step.seq_len_q // THUMB), []
    for first in range(0, step.seq_len_q, band):
        middle = min(first + band // 2, step.seq_len_q - 1)
        rows = range(middle, min(middle + SAMPLED, step.seq_len_q))
        terms = {"mask": None if step.mask is None else step.mask.take_rows(rows), **rows_of_bias(step, rows)}
        found = op.statistics(
            step.q[:, :, rows.start : rows.stop],
            step.k,
            step.lse[:, :, rows.start : rows.stop].contiguous(),
            scale=step.scale,
            softcap=step.softcap,
            query_offset=step.query_offset + rows.start,
            key_offset=step.key_offset,
            block=(SAMPLED, -(-step.seq_len_kv // THUMB)),
            **terms,
        )
        out.append(found["block_max"][0, :, 0])
    return (torch.stack(out, 1).float().clamp(0, 1).sqrt() * 255).round().to(torch.uint8)


def _side(side: Side) -> dict[str, Any]:
    if len(side.tokens) > MANY:
        return _packed_side(side)
    return {
        "name": side.name,
        "tokens": [
            {"text": one.text, "special": one.special, "word": None if one.special else one.word} for one in side.tokens
        ],
        "words": [{"text": one.text, "tokens": list(one.tokens), "special": one.special} for one in side.words],
    }


def _packed_side(side: Side) -> dict[str, Any]:
    """A long text in few bytes: each spelling once, tokens and words as numbers of spellings."""
    if all(token.text == str(at) for at, token in enumerate(side.tokens)):
        return {"name": side.name, "count": len(side.tokens)}  # named by place
    spelt: dict[str, int] = {}
    number = lambda text: spelt.setdefault(text, len(spelt))  # noqa: E731
    tokens = [number(token.text) for token in side.tokens]
    words = [number(word.text) for word in side.words]
    starts = [word.tokens[0] for word in side.words]
    packed = {name: _integers(held) for name, held in (("tokens", tokens), ("words", words), ("starts", starts))}
    special = [at for at, word in enumerate(side.words) if word.special]
    return {"name": side.name, "packed": {"texts": list(spelt), **packed, "special": special}}


def _integers(numbers: list[int]) -> str:
    return base64.b64encode(torch.tensor(numbers, dtype=torch.int32).numpy().astype("<i4").tobytes()).decode("ascii")


def _attention(look: Look, index: int) -> dict[str, Any]:
    attention = look.attentions[index]
    first = attention.layers[0]
    step = first.steps[0]
    return {
        "kind": attention.kind,
        "label": attention.label,
        "causal": attention.causal,
        "query_side": attention.query_side,
        "key_side": attention.key_side,
        "num_heads": attention.num_heads,
        "num_kv_heads": first.num_kv_heads,
        "layers": attention.numbers,
        "scale": step.scale,
        "softcap": step.softcap,
        "has_bias": any(one.steps[0].bias is not None for one in attention.layers),
        "has_sink": any(one.steps[0].sinks is not None for one in attention.layers),
        "head_dim": first.head_dim,
        "has_received": step.received is not None,
        "long": look.long(index),
        "measures": list(names(look, index)),
        "values": [] if look.long(index) else [n for n in attention.numbers if (attention.kind, n) in look.values.held],
    }
