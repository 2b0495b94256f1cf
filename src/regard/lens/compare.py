"""Two texts, or two models on one text: the words that both have, and one head's weights between them in each.

Enters: the look that is shown, and another text, perhaps with another model.
Leaves: JSON: aligned words, the weights of each look between them, and what either has alone.
Words are aligned in order, the longest common runs first.
Floor 6: stands on looks and on word weights."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from regard.lens.links import word_weights
from regard.lens.look import Look, look
from regard.lens.models import Loaded

MOST = 256  # aligned words


class Comparing:
    """Answers POST /api/compare of the live page.

    {"text": the other text, "attention": 0, "layer": 5, "head": 11} ->
    {"text", "model", "words": [...], "first": [[...]], "second": [[...]], "only_first": [...], "only_second": [...]}

    Args:
        other: the model of the other side. Default: the one that is shown.
    """

    def __init__(self, other: Loaded | None = None) -> None:
        self.other = other
        self._held: tuple[str, Look] | None = None

    def __call__(self, shown: Look, asked: dict[str, Any]) -> dict[str, Any]:
        """Answer one question.

        Raises:
            ValueError: no text, no such head in either model, or texts that do not align.
        """
        text = asked.get("other", shown.text)
        if not isinstance(text, str):
            raise ValueError("compare: other must be a text; got something else. Send a sentence.")
        loaded = self.other or shown.loaded
        if loaded.model is None:
            raise ValueError("compare: model must be loaded; got a recording, which holds none. Run regard look TEXT.")
        if self._held is None or self._held[0] != text or self._held[1].loaded is not loaded:
            self._held = (text, look(loaded, text))
        return compared(shown, self._held[1], *(asked.get(name, 0) for name in ("attention", "layer", "head")))


def compared(first: Look, second: Look, attention: int, layer: int, head: int) -> dict[str, Any]:
    """One head of two looks between the words that both have.

    Args:
        first: a look.
        second: another, of the same kind of attention.
        attention: which attention of both.
        layer: layer number.
        head: query head.

    Raises:
        ValueError: an attention, layer or head that one of them lacks; fewer than two words in common, or too many.
    """
    for one in (first, second):
        _check(one, attention, layer, head)
    sides = [(own.query_side, own.key_side) for own in (first.attentions[attention], second.attentions[attention])]
    if any(query != key for query, key in sides):
        raise ValueError("compare: attention must go from a text to itself; got cross-attention. Choose another.")
    words = [[word.text for word in one.sides[own[0]].words] for one, own in zip((first, second), sides, strict=True)]
    pairs = aligned(*words)
    if len(pairs) < 2:
        raise ValueError(
            f"compare: texts must have two words in common, in order; got {len(pairs)}. Change a word or two of the "
            "first."
        )
    if len(pairs) > MOST:
        raise ValueError(f"compare: texts must have at most {MOST} words in common; got {len(pairs)}. Shorten them.")
    kept = [torch.tensor(own) for own in zip(*pairs, strict=True)]
    weights: list[Tensor] = [
        word_weights(one, attention, layer, head)[own][:, own]
        for one, own in zip((first, second), kept, strict=True)
    ]  # fmt: skip
    alone = [[word for at, word in enumerate(own) if at not in set(held.tolist())]
             for own, held in zip(words, kept, strict=True)]  # fmt: skip
    return {
        "text": second.text,
        "model": second.loaded.name,
        "words": [words[0][at] for at, _ in pairs],
        "first": weights[0].tolist(),
        "second": weights[1].tolist(),
        "only_first": alone[0],
        "only_second": alone[1],
    }


def aligned(first: list[str], second: list[str]) -> list[tuple[int, int]]:
    """Places of equal words in two texts, both in reading order.

    Example:
        >>> aligned("the cat sat down".split(), "the dog sat down".split())
        [(0, 0), (2, 2), (3, 3)]
    """
    fold = [[word.casefold() for word in words] for words in (first, second)]
    blocks = SequenceMatcher(None, *fold, autojunk=False).get_matching_blocks()
    return [(block.a + at, block.b + at) for block in blocks for at in range(block.size)]


def _check(one: Look, attention: Any, layer: Any, head: Any) -> None:
    held = one.attentions
    for name, value, there in (
        ("attention", attention, range(len(held))),
        ("layer", layer, held[attention].numbers if isinstance(attention, int) and 0 <= attention < len(held) else []),
        ("head", head, range(held[attention].num_heads) if isinstance(attention, int) and 0 <= attention < len(held)
         else []),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value not in there:
            raise ValueError(
                f"compare: {name} must be one that {one.loaded.name} has; got {str(value)[:20]}. Choose another."
            )
