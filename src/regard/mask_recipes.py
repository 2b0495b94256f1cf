"""The masks of well-known papers, joined from the others.

Enters: what the papers call them: window, stride, global positions, random blocks.
Leaves: masks, exported by `masks`.
Floor 0: pure, imports torch and numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from regard.mask_algebra import Mask
from regard.mask_arguments import as_tensor, at_least
from regard.mask_rules import Causal, SlidingWindow
from regard.mask_shapes import blocks, global_tokens, strided
from regard.mask_sparse import Chunk, ChunkEnds


def longformer(window: int, global_positions: Tensor | Sequence[int] | np.ndarray = (), *, dilation: int = 1) -> Mask:
    """Longformer: a window around each token, and a few tokens that see all and are seen by all.

    |query − key| ≤ dilation · (window // 2) in steps of dilation, or either is a global position.

    Args:
        window: the paper's w, tokens seen around each, half of them on each side; at least 1.
        global_positions: ints `(n,)` or `(batch, n)`. Default none.
        dilation: gap between the tokens of the window, plus one. Default 1.

    Returns:
        Mask: positional. Join `padding` for batches of unequal lengths, `causal()` for a decoder.

    Raises:
        TypeError, ValueError: where a number is below 1, or positions are no ints.

    Example:
        >>> print(longformer(2, [0]).draw(6))
        ██████
        ███···
        ████··
        █·███·
        █··███
        █···██

    Source: Beltagy et al. 2020, section 3.1 and figure 2.
    """
    window = at_least("masks.longformer", "window", window, 1, "Give the tokens seen around each.")
    dilation = at_least("masks.longformer", "dilation", dilation, 1, "Use 1 for a window without gaps.")
    reach = window // 2 * dilation
    local: Mask = SlidingWindow(reach, reach)
    if dilation > 1:
        local = local & strided(dilation)
    return local | global_tokens(global_positions)


def bigbird(
    window: int,
    global_positions: Tensor | Sequence[int] | np.ndarray,
    *,
    seq_len: int,
    random_blocks: int = 3,
    block_size: int = 64,
    num_heads: int = 1,
    seed: int = 0,
) -> Mask:
    """BigBird: blocks of tokens see their neighbors, global tokens, and some blocks drawn at random.

    |query block − key block| ≤ window // 2, or a random block of that query block, or either is a global position.

    Args:
        window: key blocks around each query block, its own among them; the paper's w = 3.
        global_positions: ints `(n,)` or `(batch, n)`; the paper's ITC takes the first and last block: `[*range(64),
            *range(seq_len - 64, seq_len)]`.
        seq_len: positions of the sequence.
        random_blocks: key blocks drawn for each query block, outside its window; the paper's r. Default 3, all that
            there are where they are fewer.
        block_size: positions of a block. Default 64.
        num_heads: 1: all heads share the draw. Else each head has its own. Default 1.
        seed: of the draw: the same seed, the same mask. Default 0.

    Returns:
        Mask: positional.

    Raises:
        TypeError, ValueError: where a number is too small, or positions are no ints.

    Example:
        >>> print(bigbird(3, [0], seq_len=12, random_blocks=1, block_size=2).draw(12))
        ████████████
        ████······██
        ████████····
        ████████····
        █·██████··██
        █·██████··██
        █···████████
        █···████████
        █···████████
        █···████████
        █·██····████
        █·██····████

    Source: Zaheer et al. 2020, section 2 and appendix D.
    """
    fixes = {
        "window": (window, 1, "Count the blocks around each block, its own among them."),
        "seq_len": (seq_len, 1, "Give the positions of the sequence."),
        "random_blocks": (random_blocks, 0, "Use 0 for none."),
        "block_size": (block_size, 1, "Give the positions of a block."),
        "num_heads": (num_heads, 1, "Use 1 where all heads share a draw."),
    }
    for name, (value, least, fix) in fixes.items():
        at_least("masks.bigbird", name, value, least, fix)
    block = torch.arange(-(-seq_len // block_size))
    near = (block[:, None] - block).abs() <= window // 2
    draw = torch.rand(num_heads, *near.shape, generator=torch.Generator().manual_seed(seed))
    drawn = draw.masked_fill(near, -1.0).topk(min(random_blocks, len(block)), dim=-1).indices
    allowed = torch.zeros(draw.shape, dtype=torch.bool).scatter_(-1, drawn, value=True)
    allowed &= draw.masked_fill(near, -1.0) >= 0  # where fewer are left than were asked for
    return blocks(allowed | near, block_size) | global_tokens(as_tensor("masks.bigbird", global_positions))


def sparse_transformer(stride: int, kind: str = "strided", *, summary: int = 1) -> Mask:
    """Sparse Transformer: what its two factorised heads see, together, in one causal mask.

    strided: query − stride ≤ key ≤ query, or (query − key) mod stride = 0 and key ≤ query.
    fixed: key ≤ query, and key // stride = query // stride or key mod stride ≥ stride − summary.

    Args:
        stride: the paper's l, near √seq_len; at least 1.
        kind: "strided" (images, sound) or "fixed" (text). Default "strided".
        summary: the paper's c, positions at the end of each chunk that all later ones see; fixed alone. Default 1.

    Returns:
        Mask: positional.

    Raises:
        TypeError, ValueError: where a number is below 1, summary above stride, or kind is neither.

    Example:
        >>> print(sparse_transformer(3).draw(8))
        █·······
        ██······
        ███·····
        ████····
        ·████···
        ··████··
        █··████·
        ·█··████
        >>> print(sparse_transformer(3, "fixed").draw(8))
        █·······
        ██······
        ███·····
        ··██····
        ··███···
        ··████··
        ··█··██·
        ··█··███

    Source: Child et al. 2019, sections 4.3 and 5.1 ("merged head").
    """
    stride = at_least("masks.sparse_transformer", "stride", stride, 1, "Give the paper's l.")
    summary = at_least("masks.sparse_transformer", "summary", summary, 1, "Give the paper's c.")
    if summary > stride:
        raise ValueError(
            f"masks.sparse_transformer: summary must be at most stride = {stride}; got {summary}. Give the paper's c."
        )
    if kind == "strided":
        return SlidingWindow(stride, 0) | (Causal() & strided(stride))
    if kind == "fixed":
        return Causal() & (Chunk(stride) | ChunkEnds(stride, summary))
    raise ValueError(
        f'masks.sparse_transformer: kind must be "strided" or "fixed"; got {kind!r}. Choose one of the two.'
    )
