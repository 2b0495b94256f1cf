"""What each head does in this text, as a few plain numbers.

Enters: a look and one of its attentions.
Leaves: per layer and head, means over queries: entropy in nats, distance in tokens, and the weight on the token before,
the token after, the first token and the token itself.
Weights come a band of rows at a time; of a long text some rows of each band stand for it.
Floor 6: stands on Recording.weights."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lens.layers import Layer
from regard.lens.look import Look

ROWS_AT_ONCE = 256
BANDS, SAMPLED = 24, 8  # a long text's rows: so many of each band
SELF = ("entropy", "distance", "previous", "next", "first", "same")
CROSS = ("entropy", "first")


def names(look: Look, index: int) -> tuple[str, ...]:
    """Which measures an attention has: those of neighbours need queries and keys of one text."""
    attention = look.attentions[index]
    return SELF if attention.query_side == attention.key_side else CROSS


def measures(look: Look, index: int) -> Tensor:
    """Every measure of every head.

    entropy = mean_i −Σ_j w_ij ln w_ij; distance = mean_i Σ_j w_ij |i − j|; previous = mean_{i>0} w_{i,i−1};
    next = mean_{i<n−1} w_{i,i+1}; first = mean_{i>0} w_{i,0}; same = mean_i w_{i,i}.

    Args:
        look: the recording.
        index: which of its attentions.

    Returns:
        float32 (measures, layers, num_heads), in the order of `names`.
    """
    attention, wanted = look.attentions[index], names(look, index)
    found = [_of_layer(look, layer, wanted, look.long(index)) for layer in attention.layers]
    return torch.stack(found, 1).float()


def _of_layer(look: Look, layer: Layer, wanted: tuple[str, ...], long: bool) -> Tensor:
    """(measures, num_heads) in float64."""
    queries, keys = layer.steps[0].seq_len_q, layer.steps[0].seq_len_kv
    band = -(-queries // BANDS)
    bands = [range(first, min(queries, first + (SAMPLED if long else ROWS_AT_ONCE)))
             for first in range(0, queries, band if long else ROWS_AT_ONCE)]  # fmt: skip
    sums = torch.zeros(len(wanted), layer.num_heads, dtype=torch.float64)
    counts = torch.zeros(len(wanted), 1, dtype=torch.float64)
    for rows in bands:
        weights = look.recording.weights(layer, rows=slice(rows.start, rows.stop), step=0).double()
        at = torch.arange(rows.start, rows.stop)
        for number, name in enumerate(wanted):
            value, counted = _of_rows(name, weights, at, keys)
            sums[number] += value
            counts[number] += counted
    return sums / counts.clamp(min=1)


def _of_rows(name: str, weights: Tensor, at: Tensor, keys: int) -> tuple[Tensor, int]:
    """The sum of one measure over some rows (num_heads,), and how many rows count."""
    if name == "entropy":
        return -torch.special.xlogy(weights, weights).sum((1, 2)), len(at)
    if name == "distance":
        return (weights * (at[:, None] - torch.arange(keys)).abs()).sum((1, 2)), len(at)
    column = {"previous": at - 1, "next": at + 1, "same": at, "first": torch.zeros_like(at)}[name]
    counts = (column >= 0) & (column < keys) & ((at > 0) if name == "first" else True)
    chosen = counts.nonzero()[:, 0]
    return weights[:, chosen, column[chosen]].sum(1), len(chosen)
