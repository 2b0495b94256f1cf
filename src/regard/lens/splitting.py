"""How a tokenizer cut a text: its tokens with their words.

Enters: a transformers tokenizer with a text, or with token ids alone (what a model wrote).
Leaves: token ids and a `Side`.
Fast tokenizers answer by offsets; slow ones and bare ids by the marks in their pieces (## Ġ ▁ </w>).
Floor 5: imports no tokenizer library; the tokenizer is handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from regard.lens.tokens import Side, is_wordlike, join_pieces

APOSTROPHES = ("'", "’")
BLANKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
SAME_CHAR = "·"  # a further token of a character that is several tokens
REPLACEMENT = "\ufffd"
ENDINGS = frozenset({"s", "t", "re", "ve", "ll", "d", "m"})


def read_text(tokenizer: Any, text: str, name: str = "text", *, special_tokens: bool = True) -> tuple[list[int], Side]:
    """Split a text as the model reads it.

    Args:
        tokenizer: a transformers tokenizer, fast or slow.
        text: the text.
        name: the side's name ("text", "source", "target").
        special_tokens: add the model's own markers.

    Returns:
        The token ids, and the side.
    """
    wanted = {"add_special_tokens": special_tokens, "truncation": False, "padding": False, "verbose": False}
    if not getattr(tokenizer, "is_fast", False):
        ids = list(tokenizer(text, **wanted)["input_ids"])
        return ids, read_ids(tokenizer, ids, name)
    encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, **wanted)
    ids, spans = list(encoding["input_ids"]), encoding["offset_mapping"]
    special = [bool(flag) for flag in encoding["special_tokens_mask"]]
    kept = [_covered(text, span, piece) for span, piece in zip(spans, encoding.tokens(), strict=True)]
    side = join_pieces(name, _by_offsets(text, spans, kept, encoding.word_ids(), special, encoding.tokens()))
    words = [
        word
        if word.special or word.text in BLANKS.values()
        else replace(word, text=text[kept[first][0] : kept[last - 1][1]])
        for word in side.words
        for first, last in [word.tokens]
    ]
    return ids, Side(name, side.tokens, tuple(words))


def read_ids(tokenizer: Any, ids: Sequence[int], name: str = "text") -> Side:
    """Split token ids without their text, by the marks that tokenizers leave in their pieces.

    Args:
        tokenizer: a transformers tokenizer, fast or slow.
        ids: the token ids, as a model reads or writes them.
        name: the side's name.

    Returns:
        The side.
    """
    ids = [int(number) for number in ids]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    markers = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    special = [number in markers and number != tokenizer.unk_token_id for number in ids]
    names = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    side = join_pieces(name, _by_marks(names, special, tokenizer))
    words = [
        replace(word, text=tokenizer.convert_tokens_to_string(names[slice(*word.tokens)]).strip())
        if REPLACEMENT in word.text or (word.text[:1] == BLANKS[" "] and len(word.text) > 1)
        else word
        for word in side.words
    ]
    return Side(name, side.tokens, tuple(words))


def _by_offsets(
    text: str,
    spans: Sequence[tuple[int, int]],
    kept: Sequence[tuple[int, int]],
    word_ids: Sequence[int | None],
    special: Sequence[bool],
    names: Sequence[str],
) -> list[tuple[str, bool, int]]:
    """Pieces of a text from a fast tokenizer's offsets and pre-tokens; `kept` are the offsets without blanks."""
    plain = [at for at in range(len(kept)) if not special[at]]
    # A tokenizer without pre-tokens gives the whole text one number: then blanks and letter classes decide.
    informative = len({word_ids[at] for at in plain}) > 1 or len(text.split()) < 2
    pieces: list[tuple[str, bool, int]] = []
    number, before = -1, None
    for at, (start, stop) in enumerate(kept):
        if special[at]:
            number, before = number + 1, None
            pieces.append((names[at], True, number))
            continue
        after_blank = bool(pieces) and pieces[-1][0] == BLANKS[" "]
        joined = before is not None and _joins(text, kept, word_ids, before, at, informative, after_blank)
        number += 0 if joined else 1
        same_char = before is not None and kept[before] == kept[at] and stop > start  # bytes of one character
        shown = text[start:stop] or _blank(text[slice(*spans[at])])
        pieces.append((SAME_CHAR if same_char else shown, False, number))
        before = at
    return _mend_contractions(pieces, [start - stop for (_, stop), (start, _) in pairwise(kept)])


def _joins(
    text: str,
    kept: Sequence[tuple[int, int]],
    word_ids: Sequence[int | None],
    before: int,
    at: int,
    informative: bool,
    after_blank: bool,
) -> bool:
    """Whether token `at` goes on with the word of token `before`."""
    (start_before, stop_before), (start, stop) = kept[before], kept[at]
    if informative and word_ids[before] != word_ids[at]:
        return False
    if start == stop or start_before == stop_before:  # a blank on its own, or the blank that a word begins with
        return after_blank and start == stop_before < stop
    if start > stop_before:
        return False
    if start < stop_before:  # bytes of one character, or pieces of a normalised one
        return True
    return informative or (is_wordlike(text[stop_before - 1]) and is_wordlike(text[start]))


def _by_marks(names: Sequence[str], special: Sequence[bool], tokenizer: Any) -> list[tuple[str, bool, int]]:
    """Pieces from their own marks, where the text is not at hand."""
    vocabulary = tokenizer.get_vocab()
    scheme = _scheme(vocabulary)
    as_text: Callable[[str], str] = lambda piece: tokenizer.convert_tokens_to_string([piece])  # noqa: E731
    pieces: list[tuple[str, bool, int]] = []
    number, fresh = -1, True
    for piece, is_special in zip(names, special, strict=True):
        if is_special:
            number, fresh = number + 1, True
            pieces.append((piece, True, number))
            continue
        shown, begins, ends = _unmark(piece, scheme, as_text)
        previous = pieces[-1][0] if pieces else ""
        after_line = previous in (BLANKS["\n"], BLANKS["\t"])
        class_change = (
            scheme != "whole"
            and bool(previous)
            and bool(shown)
            and previous != BLANKS[" "]
            and (is_wordlike(previous[-1]) != is_wordlike(shown[0]))
        )
        if begins or fresh or class_change or after_line or shown in BLANKS.values():
            number += 1
        pieces.append((shown, False, number))
        fresh = ends
    # Without offsets 'quotes' and contractions look alike: only English endings are joined ("didn", "'", "t").
    shown = [piece[0] for piece in pieces]
    joins = {
        gap
        for at, text in enumerate(shown)
        if text in APOSTROPHES and at + 1 < len(shown) and shown[at + 1] in ENDINGS
        for gap in (at - 1, at)
    }
    whole = {at - 1 for at, text in enumerate(shown) if text[:1] in APOSTROPHES and text[1:] in ENDINGS}
    return _mend_contractions(pieces, [0 if at in joins | whole else 1 for at in range(max(len(pieces) - 1, 0))])


def _scheme(vocabulary: dict[str, int]) -> str:
    """How a vocabulary marks its words: "##", "▁", "Ġ", "</w>", or "whole" where every piece is a word."""
    counts = {"##": 0, "▁": 0, "Ġ": 0, "</w>": 0}
    for piece in vocabulary:
        for mark in counts:
            counts[mark] += piece.endswith(mark) if mark == "</w>" else piece.startswith(mark)
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] else "whole"


def _unmark(piece: str, scheme: str, as_text: Callable[[str], str]) -> tuple[str, bool, bool]:
    """A piece's text, whether it begins a word, and whether it ends one."""
    if scheme == "##":
        return (piece[2:], False, False) if piece.startswith("##") else (piece, True, False)
    if scheme == "</w>":
        ends = piece.endswith("</w>")
        return (piece[: -len("</w>")] if ends else piece), False, ends
    if scheme == "Ġ":
        text = as_text(piece)
        return text.strip() or _blank(text), text[:1].isspace(), False
    if scheme == "▁":
        text = piece.replace("▁", " ")
        return text.strip() or _blank(text), text[:1].isspace(), False
    return piece, True, True


def _mend_contractions(pieces: list[tuple[str, bool, int]], gaps: Sequence[int]) -> list[tuple[str, bool, int]]:
    """Give letters, apostrophe, letters without a blank between one word number."""
    numbers = [number for _, _, number in pieces]
    shift: dict[int, int] = {}
    for at in range(1, len(pieces)):
        text, special, number = pieces[at]
        before, before_special, before_number = pieces[at - 1]
        if special or before_special or number == before_number or gaps[at - 1] > 0 or not text or not before:
            continue
        follows = pieces[at + 1][0] if at + 1 < len(pieces) and gaps[at] <= 0 and not pieces[at + 1][1] else ""
        opens = text[0] in APOSTROPHES and before[-1].isalpha() and (text[1:] or follows)[:1].isalpha()
        earlier = pieces[at - 2][0] if at >= 2 and gaps[at - 2] <= 0 and not pieces[at - 2][1] else ""
        closes = before in APOSTROPHES and earlier[-1:].isalpha() and text[0].isalpha()
        if opens or closes:
            shift[number] = shift.get(before_number, before_number)
    return [
        (text, special, shift.get(number, number)) for (text, special, _), number in zip(pieces, numbers, strict=True)
    ]


def _blank(text: str) -> str:
    """A visible sign for a token that shows no letter."""
    return BLANKS.get(text[:1], BLANKS[" "])


def _covered(text: str, span: tuple[int, int], piece: str) -> tuple[int, int]:
    """The range of the text that a piece shows: its offsets without the blanks at both ends."""
    start, stop = span
    if text[start:stop].strip() and not piece.strip("▁Ġ"):
        return start, start  # only a mark for a blank, whatever its offsets say
    while start < stop and text[start].isspace():
        start += 1
    while stop > start and text[stop - 1].isspace():
        stop -= 1
    return start, stop
