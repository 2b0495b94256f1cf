"""The masks of sparse attention: global tokens, strides, neighborhoods on a grid, blocks, the edges of a graph.

Enters: positions, sizes, bool tensors, an edge index.
Leaves: masks, exported by `masks`.
Floor 0: pure, imports torch and numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from regard.mask_algebra import Mask
from regard.mask_arguments import INTS, as_tensor, at_least, described, not_bool
from regard.mask_sparse import Blocks, Edges, GlobalTokens, Neighborhood, Strided


def global_tokens(positions: Tensor | Sequence[int] | np.ndarray) -> Mask:
    """A few tokens see every key, and every query sees them.

    query ∈ positions or key ∈ positions.

    Args:
        positions: ints `(n,)`, or `(batch, n)` where batch rows differ (repeat a position to fill a short row).

    Returns:
        Mask: positional; calls with seq_len_q ≠ seq_len_kv need a `query_offset`.

    Raises:
        TypeError, ValueError: where positions are not ints of one or two axes.

    Example:
        >>> print(global_tokens([0, 2]).draw(4))
        ████
        █·█·
        ████
        █·█·

    Source: Beltagy et al. 2020, section 3.1 ("global attention", symmetric).
    """
    given = as_tensor("masks.global_tokens", positions)
    if given.numel() == 0 and given.ndim in (1, 2):
        given = given.to(torch.int64)  # an empty list has no dtype of its own
    if given.dtype not in INTS or given.ndim not in (1, 2):
        raise ValueError(
            f"masks.global_tokens: positions must be ints (n,) or (batch, n); got {described(given)}. "
            "Give positions in the sequence."
        )
    given = given.to(torch.int64)
    return GlobalTokens(given if given.ndim == 2 else given[None])


def strided(stride: int) -> Mask:
    """A query sees every stride-th key, counted from its own position in both directions.

    (query − key) mod stride = 0.

    Args:
        stride: at least 1.

    Returns:
        Mask: positional; calls with seq_len_q ≠ seq_len_kv need a `query_offset`.

    Raises:
        TypeError, ValueError: where stride is no int of at least 1.

    Example:
        >>> print(strided(3).draw(4))
        █··█
        ·█··
        ··█·
        █··█

    Source: Child et al. 2019, section 4.3, A^(2) of the strided pattern (there under `causal()`).
    """
    return Strided(at_least("masks.strided", "stride", stride, 1, "Use 1 to see every key."))


def neighborhood(grid: int | Sequence[int], window: int | Sequence[int], dilation: int | Sequence[int] = 1) -> Mask:
    """Tokens laid out row by row on a grid; each sees those around it, the window clipped at the edges.

    On every axis: query − key = dilation · t with |t| ≤ window // 2.

    An odd window is thus centred and holds `window` tokens on each axis, as NATTEN's does for tokens far from the
    edges; an even one holds window + 1. At an edge NATTEN shifts the window inwards; here it is cut off. With a
    dilation, tokens see their own dilation group alone, those whose coordinates agree modulo dilation, as there.

    Positions before the grid, such as a class token's at −1, see nothing and are seen by none: join
    `global_tokens([-1])`, and give `query_offset=-1, key_offset=-1`.

    Args:
        grid: tokens along each axis, one to three of them, the last axis running fastest.
        window: tokens seen along each axis, or one number for all axes; at least 1.
        dilation: steps between tokens seen, likewise. Default 1.

    Returns:
        Mask: positional; calls with seq_len_q ≠ seq_len_kv need a `query_offset`.

    Raises:
        TypeError, ValueError: where there are no axes or more than three, where they differ in number, or a number is
            below 1.

    Example:
        >>> print(neighborhood((2, 3), 3).draw(6))
        ██·██·
        ██████
        ·██·██
        ██·██·
        ██████
        ·██·██
        >>> print(neighborhood(6, window=3, dilation=2).draw(6))
        █·█···
        ·█·█··
        █·█·█·
        ·█·█·█
        ··█·█·
        ···█·█

    Source: Hassani et al. 2023, equations 1 and 2; dilation: Hassani & Shi 2022, equation 2.
    """
    sizes = _per_axis("grid", grid, None)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(
            f"masks.neighborhood: grid must have one, two or three axes; got {len(sizes)}. Give tokens along each axis."
        )
    return Neighborhood(sizes, _per_axis("window", window, len(sizes)), _per_axis("dilation", dilation, len(sizes)))


def blocks(allowed: Tensor | np.ndarray, size: int) -> Mask:
    """The sequence cut into blocks, and which blocks of queries see which blocks of keys.

    allowed[..., query // size, key // size].

    Args:
        allowed: bool `(query blocks, key blocks)`, or with axes num_heads, or batch and num_heads, before them, each
            full or 1. It must cover every position.
        size: positions of a block, at least 1.

    Returns:
        Mask: positional; calls with seq_len_q ≠ seq_len_kv need a `query_offset`.

    Raises:
        TypeError, ValueError: where allowed is no bool tensor of two to four axes, or size no int of at least 1.

    Example:
        >>> print(blocks(torch.tensor([[True, False], [True, True]]), size=2).draw(4))
        ██··
        ██··
        ████
        ████

    Source: Gray et al. 2017 (block-sparse kernels); Zaheer et al. 2020, appendix D.
    """
    given = as_tensor("masks.blocks", allowed)
    if given.dtype != torch.bool:
        raise TypeError(not_bool("masks.blocks: allowed", given))
    if not 2 <= given.ndim <= 4:
        raise ValueError(
            "masks.blocks: allowed must have two to four axes ([[batch,] num_heads,] query blocks, key blocks); "
            f"got {described(given)}. Reshape it."
        )
    size = at_least("masks.blocks", "size", size, 1, "Give the positions of a block.")
    return Blocks(given[(None,) * (4 - given.ndim)], size)


def edges(index: Tensor | np.ndarray) -> Mask:
    """A query sees the keys that a graph joins it to.

    (query, key) is a column of index. No loops are added: join `sliding_window(0, 0)` for them.

    Args:
        index: ints `(2, num_edges)`, positions of queries in the first row and of keys in the second; in any order,
            repeats count once. Edges to positions outside of a call are left out of it.

    Returns:
        Mask: positional; calls with seq_len_q ≠ seq_len_kv need a `query_offset`.

    Raises:
        TypeError, ValueError: where index is no int tensor `(2, num_edges)`.

    Example:
        >>> print(edges(torch.tensor([[0, 1, 2, 2], [1, 0, 0, 2]])).draw(3))
        ·█·
        █··
        █·█

    Source: Veličković et al. 2018, section 2.1 ("masked attention").
    """
    given = as_tensor("masks.edges", index)
    if given.dtype not in INTS or given.ndim != 2 or given.shape[0] != 2:
        raise ValueError(
            f"masks.edges: index must be ints (2, num_edges); got {described(given)}. "
            "Give positions of queries in its first row, of keys in its second."
        )
    given = given.to(torch.int64)
    given = given[:, given[1].argsort(stable=True)]
    return Edges(given[:, given[0].argsort(stable=True)].contiguous())


def _per_axis(name: str, value: int | Sequence[int], axes: int | None) -> tuple[int, ...]:
    fix = "Give one int, or one for each axis of the grid."
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if axes is not None and len(values) == 1:
        values *= axes
    if axes is not None and len(values) != axes:
        raise ValueError(
            f"masks.neighborhood: {name} must have one number, or one for each of the grid's {axes} axes; "
            f"got {len(values)}. {fix}"
        )
    return tuple(at_least("masks.neighborhood", name, one, 1, fix) for one in values)
