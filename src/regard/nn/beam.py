"""Beam search: several texts grown side by side, and the likeliest kept.

Enters: a `Decoding` and the first tokens of each row.
Leaves: the best texts of each row, best first, with their scores.
Floor 5.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from regard import check
from regard.nn.generate import Decoding, check_numbers


class Beams(NamedTuple):
    """What `beam_search` found, the best of each row first."""

    tokens: Tensor
    """int64 `(batch, num_beams, longest)`, the new tokens; `end` past the end of a text."""
    lengths: Tensor
    """int64 `(batch, num_beams)`, how many are new, the end included."""
    scores: Tensor
    """float32 `(batch, num_beams)`, log-probability / length^length_penalty."""


@torch.no_grad()
def beam_search(
    decoding: Decoding,
    tokens: Tensor,
    *,
    num_beams: int,
    max_new_tokens: int,
    end: int,
    length_penalty: float = 1.0,
) -> Beams:
    """Grow the num_beams likeliest texts of each row until no other can win.

    score = log p(text) / length^length_penalty, with length the number of new tokens, the end included.

    Args:
        decoding: a model's, for `batch` rows; it is told to hold num_beams of each.
        tokens: int64 `(batch, new)`, what the model reads first.
        num_beams: texts kept side by side, at least 1 and at most half the vocabulary.
        max_new_tokens: most tokens of a text; what has not ended by then counts as it is.
        end: the token that ends a text.
        length_penalty: above 0 favours long texts, 0 is plain probability. Default 1: mean log-probability.

    Returns:
        Beams: tokens, lengths, scores, num_beams of each row.

    Raises:
        ValueError: where a number lies outside what is said above.

    Example:
        >>> class Coin:  # ends with probability 0.4, and else goes on with one of two tokens, 0.3 each
        ...     def step(self, tokens):
        ...         return torch.tensor([0.4, 0.3, 0.3, 1e-9]).log().expand(len(tokens), 4)
        ...
        ...     def select(self, rows): ...
        >>> beam_search(Coin(), torch.tensor([[1]]), num_beams=2, max_new_tokens=3, end=0, length_penalty=0.0).tokens
        tensor([[[0, 0],
                 [1, 0]]])

    Source: Sutskever et al. 2014, section 3.2; Wu et al. 2016, section 7, for stopping and length.
    """
    check_numbers("beam_search", tokens, max_new_tokens, 0.0, None, None)
    num_beams = check.count("beam_search", "num_beams", num_beams, 1)
    batch, device = tokens.shape[0], tokens.device
    done = _Finished(batch, num_beams, max_new_tokens, end, length_penalty, device)
    written = tokens.new_zeros(batch, num_beams, 0)
    running = torch.full((batch, num_beams), -math.inf, device=device)
    running[:, 0] = 0.0  # all beams of a row begin alike: only one may speak
    rows = torch.arange(batch, device=device)  # which rows the decoding still holds
    logits = decoding.step(tokens)
    if 2 * num_beams > logits.shape[-1]:
        raise ValueError(
            f"beam_search: num_beams must be at most half the vocabulary, {logits.shape[-1] // 2}; got {num_beams}. "
            "Use fewer beams."
        )
    decoding.select(rows.repeat_interleave(num_beams))
    logits = logits.repeat_interleave(num_beams, 0)
    for length in range(1, max_new_tokens + 1):
        held, vocab = len(rows), logits.shape[-1]
        log_probs = running[..., None] + logits.float().log_softmax(-1).view(held, num_beams, vocab)
        scores, flat = log_probs.flatten(1).topk(2 * num_beams)  # so many, for num_beams of them may be ends
        beam, token = flat // vocab, flat % vocab
        texts = torch.cat((written.gather(1, beam[..., None].expand(-1, -1, length - 1)), token[..., None]), -1)
        ended = token == end
        last = length == max_new_tokens
        # an end counts only if it is among the num_beams likeliest: else beams that go on are better
        counts = (ended | last) & (torch.arange(2 * num_beams, device=device) < num_beams)
        done.add(rows, texts, scores.masked_fill(~counts, -math.inf), length)
        if last:
            break
        running, own = scores.masked_fill(ended, -math.inf).topk(num_beams)
        written = texts.gather(1, own[..., None].expand(-1, -1, length))
        source = beam.gather(1, own)
        going = (~done.settled(rows, running[:, 0], length)).nonzero()[:, 0]
        if len(going) == 0:
            break
        rows, running, written = rows[going], running[going], written[going]
        decoding.select((going[:, None] * num_beams + source[going]).flatten())
        logits = decoding.step(written[..., -1].reshape(-1, 1))
    return done.best()


class _Finished:
    """The best texts of each row so far."""

    def __init__(
        self, batch: int, num_beams: int, longest: int, end: int, length_penalty: float, device: torch.device
    ) -> None:
        self.num_beams, self.longest, self.end, self.length_penalty = num_beams, longest, end, length_penalty
        self.tokens = torch.full((batch, num_beams, longest), end, device=device)
        self.lengths = torch.zeros(batch, num_beams, dtype=torch.int64, device=device)
        self.scores = torch.full((batch, num_beams), -math.inf, device=device)

    def add(self, rows: Tensor, texts: Tensor, log_probs: Tensor, length: int) -> None:
        """Texts `(len(rows), n, length)` that ended; −inf marks those that did not."""
        new = texts.new_full((*texts.shape[:2], self.longest), self.end)
        new[..., :length] = texts
        scores = torch.cat((self.scores[rows], log_probs / length**self.length_penalty), 1)
        self.scores[rows], own = scores.topk(self.num_beams)
        tokens = torch.cat((self.tokens[rows], new), 1)
        self.tokens[rows] = tokens.gather(1, own[..., None].expand(-1, -1, self.longest))
        lengths = torch.cat((self.lengths[rows], new.new_full(new.shape[:2], length)), 1)
        self.lengths[rows] = lengths.gather(1, own)

    def settled(self, rows: Tensor, best_running: Tensor, length: int) -> Tensor:
        """Whether nothing that is still running can be among a row's best: log-probabilities only fall."""
        most = self.longest if self.length_penalty > 0 else length + 1
        return self.scores[rows, -1] >= best_running / most**self.length_penalty

    def best(self) -> Beams:
        longest = int(self.lengths.max()) if self.lengths.numel() else 0
        return Beams(self.tokens[..., :longest], self.lengths, self.scores)
