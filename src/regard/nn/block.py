"""Blocks and stacks: attention, then a feed-forward network, each added to what it was given; many of them in a row.

Enters: x `(batch, seq_len, dim)`, masks, positions, caches; for a decoder a memory.
Leaves: `(batch, seq_len, dim)`.
Floor 5. Norms and feed-forwards are torch's own modules; only SwiGLU is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from regard.biases import Bias
from regard.cache import KVCache
from regard.mask_algebra import Mask
from regard.nn.attention import Memory, MultiHeadAttention
from regard.nn.positions import Positions

Norm = Callable[[int], nn.Module]


class SwiGLU(nn.Module):
    """A gated feed-forward network.

    out = W_down (silu(W_gate x) ⊙ W_up x)

    Args:
        dim: numbers in one embedding.
        hidden: numbers in between.
        bias: whether the three add one. Default False.

    Example:
        >>> SwiGLU(8, 20)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])

    Source: Shazeer 2020, equation 6.
    """

    def __init__(self, dim: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden, bias=bias)  # gate and up in one product
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` → `(..., dim)`."""
        gate, up = linear(x, self.up.weight, self.up.bias).chunk(2, -1)
        return self.down(silu(gate) * up)


class Block(nn.Module):
    """Self-attention, cross-attention where there is one, and a feed-forward network, each around a residual.

    norm first: x + f(norm(x)); norm last: norm(x + f(x)).

    Args:
        dim: numbers in one embedding.
        attention: the self-attention.
        feed_forward: `(..., dim)` → `(..., dim)`.
        cross: attention onto a memory. Default None.
        norm: makes a norm for dim. Default torch.nn.LayerNorm.
        norm_first: whether norms come before what they belong to, as in GPT-2, or after the sum, as in 2017. Default
            True.
        dropout: probability that a number of f is dropped in training. Default 0.

    Example:
        >>> feed_forward = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> block = Block(64, MultiHeadAttention(64, 8), feed_forward)
        >>> block(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])

    Source: Vaswani et al. 2017, figure 1; Xiong et al. 2020 (norm first).
    """

    def __init__(
        self,
        dim: int,
        attention: MultiHeadAttention,
        feed_forward: nn.Module,
        *,
        cross: MultiHeadAttention | None = None,
        norm: Norm = nn.LayerNorm,
        norm_first: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention, self.attention_norm = attention, norm(dim)
        self.cross = cross
        self.cross_norm = None if cross is None else norm(dim)
        self.feed_forward, self.feed_forward_norm = feed_forward, norm(dim)
        self.norm_first = norm_first
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(
        self,
        x: Tensor,
        memory: Memory | None = None,
        *,
        mask: Mask | Tensor | None = None,
        memory_mask: Mask | Tensor | None = None,
        bias: Bias | Tensor | None = None,
        positions: Positions | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: `(batch, seq_len, dim)`.
            memory: what cross-attention reads, where the block has one. Default None.
            mask, bias, positions, cache: of the self-attention, as in `MultiHeadAttention`.
            memory_mask: of the cross-attention. Default None.

        Returns:
            `(batch, seq_len, dim)`.
        """
        own = {"mask": mask, "bias": bias, "positions": positions, "cache": cache}
        x = self._around(x, self.attention_norm, lambda y: self.attention(y, **own))
        if self.cross is not None and self.cross_norm is not None:
            if memory is None:
                raise ValueError("Block: memory must be given to a block with cross-attention; got None. Pass it.")
            cross = self.cross
            # a query sees the whole memory: where it stands itself does not matter
            x = self._around(x, self.cross_norm, lambda y: cross(y, memory, mask=memory_mask))
        return self._around(x, self.feed_forward_norm, self.feed_forward)

    def _around(self, x: Tensor, norm: nn.Module, function: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            return x + self.drop(function(norm(x)))
        return norm(x + self.drop(function(x)))


class Encoder(nn.Module):
    """Blocks in a row, and a last norm.

    Args:
        blocks: the blocks.
        norm: the last norm, for blocks with their norms first. Default None.

    Attributes:
        checkpoint: whether training forgets what lies inside a block and computes it again for the gradient: memory of
            one block instead of all, for one more forward pass. Default False.

    Example:
        >>> blocks = [Block(32, MultiHeadAttention(32, 4), nn.Linear(32, 32)) for _ in range(2)]
        >>> Encoder(blocks, nn.LayerNorm(32))(torch.randn(1, 6, 32)).shape
        torch.Size([1, 6, 32])

    Source: Vaswani et al. 2017, section 3.1; Chen et al. 2016 (checkpoints).
    """

    def __init__(self, blocks: Sequence[Block], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.checkpoint = False

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask | Tensor | None = None,
        bias: Bias | Tensor | None = None,
        positions: Positions | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """Through all blocks, with one mask, bias and positions; a cache for each block."""
        return self._through(x, [None] * len(self.blocks), None, mask, bias, positions, caches)

    def _through(
        self, x: Tensor, memories: Sequence[Memory | None], memory_mask: Mask | Tensor | None,
        mask: Mask | Tensor | None, bias: Bias | Tensor | None, positions: Positions | None,
        caches: Sequence[KVCache] | None,
    ) -> Tensor:  # fmt: skip
        own = {"mask": mask, "memory_mask": memory_mask, "bias": bias, "positions": positions}
        held = [None] * len(self.blocks) if caches is None else caches
        for block, memory, cache in zip(self.blocks, memories, held, strict=True):
            if self.checkpoint and self.training and torch.is_grad_enabled() and cache is None:
                x = checkpoint(block, x, memory, **own, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x = block(x, memory, **own, cache=cache)
        return x if self.norm is None else self.norm(x)


class Decoder(Encoder):
    """An encoder whose blocks also attend to a memory.

    Example:
        >>> attentions = MultiHeadAttention(32, 4), MultiHeadAttention(32, 4)
        >>> decoder = Decoder([Block(32, attentions[0], nn.Linear(32, 32), cross=attentions[1])])
        >>> decoder(torch.randn(1, 6, 32), torch.randn(1, 9, 32)).shape
        torch.Size([1, 6, 32])

    Source: Vaswani et al. 2017, section 3.1.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        memory: Tensor | Sequence[Memory],
        *,
        mask: Mask | Tensor | None = None,
        memory_mask: Mask | Tensor | None = None,
        bias: Bias | Tensor | None = None,
        positions: Positions | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """Through all blocks; memory is one tensor for all, or what `project_memory` made of it for each."""
        memories = [memory] * len(self.blocks) if isinstance(memory, Tensor) else memory
        return self._through(x, memories, memory_mask, mask, bias, positions, caches)

    def project_memory(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of a memory for each block, to be used at every step of decoding."""
        return [block.cross.project_memory(memory) for block in self.blocks]  # pyright: ignore
