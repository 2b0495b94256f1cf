"""Writing one token after another: the likeliest each time, or one drawn at random.

Enters: a `Decoding`, which knows a model and what it has read so far, and the first tokens of each row.
Leaves: the tokens that followed, until each row has said its end or the limit is reached.
Floor 5. Rows that have ended leave the batch, so that a long sentence does not make short ones wait.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from regard import check


class Decoding(Protocol):
    """A model in the middle of a text: what `generate` and `beam_search` ask of it."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read tokens int64 `(batch, new)`; logits of the token that follows, `(batch, vocab_size)`."""
        ...

    def select(self, rows: Tensor) -> None:
        """Go on with these batch rows, int64 `(new batch,)`, in this order, repeats allowed."""
        ...


class Generated(NamedTuple):
    """What `generate` wrote."""

    tokens: Tensor
    """int64 `(batch, longest)`, the new tokens; `end` (0 where there is none) past the end of a row."""
    lengths: Tensor
    """int64 `(batch,)`, how many are new, the end included."""
    log_probs: Tensor
    """float32 `(batch,)`, sum of the log-probabilities that the model gave them, at temperature 1."""


@torch.no_grad()
def generate(
    decoding: Decoding,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    end: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    """Write on, token by token.

    next ~ softmax(logits / temperature) among the top_k likeliest and the fewest that hold top_p of the probability;
    the likeliest where temperature is 0.

    Args:
        decoding: a model's, as `GPT.decoding` and `Seq2Seq.decoding` make them.
        tokens: int64 `(batch, new)`, what the model reads first.
        max_new_tokens: most tokens to write in each row.
        end: the token that ends a row. Default None: all rows reach the limit.
        temperature: of the draw. Default 0: no draw.
        top_k: how many tokens to draw from. Default None: all.
        top_p: the probability that the likeliest tokens drawn from hold, above 0 and at most 1. Default None: 1.
        generator: source of the draws. Default torch's own.

    Returns:
        Generated: tokens, lengths, log_probs.

    Raises:
        ValueError: where a number lies outside what is said above.

    Example:
        >>> class Counting:
        ...     def step(self, tokens):
        ...         return torch.nn.functional.one_hot((tokens[:, -1] + 1) % 10, 10).float()
        ...
        ...     def select(self, rows): ...
        >>> generate(Counting(), torch.tensor([[1, 2], [6, 7]]), max_new_tokens=4, end=9).tokens
        tensor([[3, 4, 5, 6],
                [8, 9, 9, 9]])

    Source: Holtzman et al. 2020, section 3.1 (top_p); Fan et al. 2018, section 5.4 (top_k).
    """
    check_numbers("generate", tokens, max_new_tokens, temperature, top_k, top_p)
    batch = tokens.shape[0]
    written = tokens.new_full((batch, max_new_tokens), 0 if end is None else end)
    lengths, log_probs = tokens.new_zeros(batch), torch.zeros(batch, device=tokens.device)
    rows = torch.arange(batch, device=tokens.device)  # which rows the decoding still holds
    for at in range(max_new_tokens):
        logits = decoding.step(tokens).float()
        chosen = pick(logits, temperature, top_k, top_p, generator)
        written[rows, at] = chosen
        lengths[rows] = at + 1
        log_probs[rows] += logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        if end is not None:
            going = (chosen != end).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(rows):
                decoding.select(going)
                rows, chosen = rows[going], chosen[going]
        tokens = chosen[:, None]
    longest = int(lengths.max()) if batch else 0
    return Generated(written[:, :longest], lengths, log_probs)


def pick(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a row of logits `(batch, vocab_size)`: int64 `(batch,)`; arguments as in `generate`."""
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[:, -1:], -math.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1.0:
        sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)
        before = sorted_probs.cumsum(-1) - sorted_probs  # a token stays if those above it do not hold top_p yet
        probs = torch.zeros_like(probs).scatter(-1, order, sorted_probs.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def check_numbers(
    caller: str, tokens: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Refuse what `generate` cannot follow."""
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] < 1:
        raise ValueError(
            f"{caller}: tokens must be int64 (batch, seq_len), at least one a row; got {tokens.dtype} "
            f"{tuple(tokens.shape)}. Begin each row with a token."
        )
    check.count(caller, "max_new_tokens", max_new_tokens, 1)
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"{caller}: temperature must be at least 0 and finite; got {temperature}. Use 0 for no draw.")
    if top_k is not None:
        check.count(caller, "top_k", top_k, 1)
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"{caller}: top_p must be above 0 and at most 1; got {top_p}. Leave it out for all tokens.")
