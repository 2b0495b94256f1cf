"""Tokens and the words they make: what a reader sees of a model's input.

Enters: the pieces a tokenizer cut a text into, each with its word (`regard.lens.splitting` makes them).
Leaves: a `Side`: tokens and words; where a phrase stands; word rows (means) and columns (sums) of a weight matrix.
Floor 5: imports torch alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Token:
    """One token: its text, whether the model's own marker, and the word it belongs to."""

    text: str
    special: bool
    word: int


@dataclass(frozen=True)
class Word:
    """One word: its text and the half-open range of tokens that make it."""

    text: str
    tokens: tuple[int, int]
    special: bool

    @property
    def mark(self) -> bool:
        """True for punctuation, brackets and blanks: words without a letter or digit."""
        return not self.special and not any(is_wordlike(char) for char in self.text)


@dataclass(frozen=True)
class Side:
    """One text of an attention: the queries' or the keys'.

    Example:
        >>> side = join_pieces("text", [("un", False, 0), ("told", False, 0), ("[SEP]", True, 1)])
        >>> [word.text for word in side.words]
        ['untold', '[SEP]']
    """

    name: str
    tokens: tuple[Token, ...]
    words: tuple[Word, ...]

    def find(self, phrase: str) -> list[tuple[int, int]]:
        """Where a word stands: token ranges of the words, runs of words, or single tokens that read `phrase`.

        Args:
            phrase: what to look for; case and surrounding blanks do not count.

        Returns:
            Half-open token ranges in reading order; empty where the text does not hold it.
        """
        wanted = _fold(phrase)
        if not wanted:
            return []
        plain = [word.tokens for word in self.words if _fold(word.text) == wanted]
        if plain:
            return plain
        runs: list[tuple[int, int]] = []
        for first in range(len(self.words)):
            glued = ""
            for last in range(first, len(self.words)):
                glued += _fold(self.words[last].text)
                if len(glued) >= len(wanted.replace(" ", "")):
                    if glued == wanted.replace(" ", ""):
                        runs.append((self.words[first].tokens[0], self.words[last].tokens[1]))
                    break
        if runs:
            return runs
        return [(at, at + 1) for at, token in enumerate(self.tokens) if _fold(token.text) == wanted]

    def merge_rows(self, weights: Tensor) -> Tensor:
        """Word rows of a weight matrix: each the mean over its word's tokens.

        Args:
            weights: (..., num_tokens, n).

        Returns:
            (..., num_words, n).
        """
        lengths = torch.tensor([word.tokens[1] - word.tokens[0] for word in self.words], dtype=weights.dtype)
        return self._sum(weights.transpose(-1, -2)).transpose(-1, -2) / lengths[:, None]

    def merge_columns(self, weights: Tensor) -> Tensor:
        """Word columns of a weight matrix: each the sum over its word's tokens.

        Args:
            weights: (..., n, num_tokens).

        Returns:
            (..., n, num_words).
        """
        return self._sum(weights)

    def _sum(self, weights: Tensor) -> Tensor:
        index = torch.tensor([token.word for token in self.tokens], dtype=torch.int64)
        total = weights.new_zeros((*weights.shape[:-1], len(self.words)))
        return total.index_add_(-1, index, weights)


def join_pieces(name: str, pieces: Sequence[tuple[str, bool, int]]) -> Side:
    """Build a side from (text, special, word number) triples; equal neighbouring numbers make one word.

    Contractions that a tokenizer cut ("didn", "'", "t") come back together when their numbers are equal.
    """
    tokens: list[Token] = []
    words: list[Word] = []
    previous: int | None = None
    for at, (text, special, number) in enumerate(pieces):
        if previous is not None and number == previous and words and not special and not words[-1].special:
            last = words[-1]
            words[-1] = Word(last.text + text, (last.tokens[0], at + 1), False)
        else:
            words.append(Word(text, (at, at + 1), special))
        previous = number
        tokens.append(Token(text, special, len(words) - 1))
    return Side(name, tuple(tokens), tuple(words))


def is_wordlike(char: str) -> bool:
    """True for letters, digits, the underscore, and marks that belong to a letter."""
    return char.isalnum() or char == "_" or unicodedata.category(char).startswith("M")


def _fold(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip().casefold()
