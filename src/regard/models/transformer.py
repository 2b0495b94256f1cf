"""The one Transformer of every model here: positions, blocks, masks.

Enters: embeddings `(batch, seq_len, dim)` of whatever domain, and the mask of that domain.
Leaves: `(batch, seq_len, dim)`.
Floor 5: an assembly of `regard.nn`; all it adds is what the words of a configuration stand for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from regard.biases import Bias
from regard.cache import KVCache
from regard.mask_algebra import Mask
from regard.nn import (
    Alibi,
    Block,
    Decoder,
    Encoder,
    Learned,
    MultiHeadAttention,
    RelativePosition,
    Rotary,
    Sinusoidal,
    SwiGLU,
)
from regard.nn.attention import Memory
from regard.nn.positions import Offset, Positions

ACTIVATIONS = {
    "gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, "tanh"), "relu": nn.ReLU, "silu": nn.SiLU, "swiglu": None,
}  # fmt: skip
NORMS: Mapping[str, Any] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
POSITIONS = ("none", "sinusoidal", "sinusoidal_halves", "learned", "rotary", "relative", "alibi")


class Shape(TypedDict, total=False):
    """The arguments of `Transformer`, which every model hands on to it."""

    dim: int
    num_heads: int
    num_layers: int
    num_kv_heads: int | None
    head_dim: int | None
    hidden: int | None
    activation: str
    norm: str
    norm_eps: float
    norm_first: bool
    bias: bool
    positions: str
    max_length: int
    position_options: dict[str, Any]
    dropout: float
    attention_dropout: float
    score: str
    scale: float | None


class Transformer(nn.Module):
    """Blocks of attention and feed-forward networks over embeddings of any kind.

    Args:
        dim: numbers in one embedding. Default 256.
        num_heads: query heads. Default 4.
        num_layers: blocks. Default 4.
        num_kv_heads: key/value heads. Default num_heads.
        head_dim: numbers in one head. Default dim // num_heads.
        hidden: numbers inside the feed-forward networks. Default 4 · dim.
        activation: "gelu", "gelu_tanh", "relu", "silu", or "swiglu" for the gated network. Default "gelu".
        norm: "layer" or "rms". Default "layer".
        norm_eps: added to variances. Default 1e-5.
        norm_first: norms before attention and network, and one at the end; else after each sum. Default True.
        bias: whether projections add one. Default True.
        positions: "learned", "sinusoidal", "sinusoidal_halves" (all sines first), "rotary", "relative", "alibi" or
            "none". Default "learned".
        max_length: how many positions "learned" knows. Default 512.
        position_options: further arguments of `Rotary` or `RelativePosition`. Default {}.
        dropout: in embeddings, after attention, inside and after networks, in training. Default 0.
        attention_dropout: of weights, in training. Default 0.
        score: how attention scores: "softmax", "additive" or "linear". Default "softmax".
        scale: of scores. Default 1/√head_dim.
        cross: whether blocks also attend to a memory. Default False.

    Raises:
        ValueError: for a word that is not among those above, or sizes that do not fit.

    Example:
        >>> from regard import masks
        >>> model = Transformer(dim=32, num_layers=2, positions="rotary")
        >>> model(torch.randn(2, 7, 32), mask=masks.causal()).shape
        torch.Size([2, 7, 32])

    Source: Vaswani et al. 2017.
    """

    def __init__(
        self,
        *,
        dim: int = 256,
        num_heads: int = 4,
        num_layers: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        hidden: int | None = None,
        activation: str = "gelu",
        norm: str = "layer",
        norm_eps: float = 1e-5,
        norm_first: bool = True,
        bias: bool = True,
        positions: str = "learned",
        max_length: int = 512,
        position_options: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        score: str = "softmax",
        scale: float | None = None,
        cross: bool = False,
    ) -> None:
        super().__init__()
        for name, word, known in (("activation", activation, ACTIVATIONS), ("norm", norm, NORMS)):
            _known(name, word, known)
        self.dim, self.num_heads, self.num_layers = dim, num_heads, num_layers
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        attention = partial(
            MultiHeadAttention, dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias,
            dropout=attention_dropout, score=score, scale=scale,
        )  # fmt: skip
        make_norm = partial(NORMS[norm], eps=norm_eps)
        blocks = [
            Block(
                dim, attention(), _feed_forward(dim, hidden or 4 * dim, activation, bias, dropout),
                cross=attention() if cross else None, norm=make_norm, norm_first=norm_first, dropout=dropout,
            )
            for _ in range(num_layers)
        ]  # fmt: skip
        self.positions = _positions(
            positions, dim, num_heads, blocks[0].attention.head_dim, max_length, position_options or {}
        )
        self.stack = (Decoder if cross else Encoder)(blocks, make_norm(dim) if norm_first else None)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | Sequence[Memory] | None = None,
        *,
        mask: Mask | Tensor | None = None,
        memory_mask: Mask | Tensor | None = None,
        bias: Bias | Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
        offset: Offset = 0,
        embedded: bool = False,
    ) -> Tensor:
        """All blocks over embeddings.

        Args:
            x: `(batch, seq_len, dim)`.
            memory: `(batch, seq_len_kv, dim)`, or projected for each block. Default None.
            mask: of self-attention. Default None.
            memory_mask: of cross-attention. Default None.
            bias: of self-attention. Default None.
            caches: one for each block; x then follows what they hold. Default None.
            offset: position of the first token, or all positions `(batch, seq_len)`. Default 0.
            embedded: whether x has its positions and dropout already. Default False.

        Returns:
            `(batch, seq_len, dim)`.
        """
        if not embedded:
            x = self.drop(self.positions.add(x, offset))
        terms = {"mask": mask, "bias": bias, "positions": self.positions, "caches": caches}
        if isinstance(self.stack, Decoder):
            if memory is None:
                raise ValueError("Transformer: memory must be given where cross=True; got None. Pass the encoder's.")
            return self.stack(x, memory, memory_mask=memory_mask, **terms)
        return self.stack(x, **terms)

    @property
    def checkpoint(self) -> bool:
        """Whether training computes each block's inside twice instead of keeping it; see `regard.nn.Encoder`."""
        return self.stack.checkpoint

    @checkpoint.setter
    def checkpoint(self, wanted: bool) -> None:
        self.stack.checkpoint = wanted

    def caches(self, *, left: int | None = None, max_length: int = 131_072) -> list[KVCache]:
        """An empty cache for each block."""
        return [KVCache(left=left, max_length=max_length) for _ in range(self.num_layers)]


def start(module: nn.Module, num_layers: int) -> None:
    """Normal weights of deviation 0.02, the ones that write into the residual stream smaller by √(2 · num_layers).

    Source: Radford et al. 2019, section 2.3.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            continue
        into_stream = name.endswith(("out_proj.weight", "feed_forward.3.weight", "down.weight"))
        nn.init.normal_(parameter, std=0.02 / (2 * num_layers) ** 0.5 if into_stream else 0.02)


def _feed_forward(dim: int, hidden: int, activation: str, bias: bool, dropout: float) -> nn.Module:
    if activation == "swiglu":
        return SwiGLU(dim, hidden, bias=bias)
    inside = nn.Dropout(dropout) if dropout else nn.Identity()
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=bias), ACTIVATIONS[activation](), inside, nn.Linear(hidden, dim, bias=bias)
    )


def _positions(
    kind: str, dim: int, num_heads: int, head_dim: int, max_length: int, options: Mapping[str, Any]
) -> Positions:
    _known("positions", kind, POSITIONS)
    if options and kind not in ("rotary", "relative"):
        raise ValueError(
            f"Transformer: position_options must be empty for positions {kind!r}; got {dict(options)}. Leave them out."
        )
    if kind == "rotary":
        return Rotary(head_dim, **options)
    if kind == "relative":
        return RelativePosition(num_heads, **options)
    if kind == "learned":
        return Learned(max_length, dim)
    if kind.startswith("sinusoidal"):
        return Sinusoidal(dim, halves=kind == "sinusoidal_halves")
    return Alibi() if kind == "alibi" else Positions()


def _known(name: str, word: str, known: Any) -> None:
    if word not in known:
        raise ValueError(f"Transformer: {name} must be one of {', '.join(known)}; got {word!r}. Choose one.")


def count_parameters(module: nn.Module) -> int:
    """Numbers that training changes.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits for a loss: half types lose too much in its sum."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def check_tokens(caller: str, name: str, tokens: Tensor, vocab_size: int) -> None:
    """Refuse what is no batch of token numbers of the vocabulary."""
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{caller}: {name} must be int64 (batch, seq_len); got {tokens.dtype} {tuple(tokens.shape)}. Pass ids."
        )
    if tokens.numel() and not torch.compiler.is_compiling():
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= vocab_size:
            raise ValueError(
                f"{caller}: {name} must be from 0 to vocab_size - 1 = {vocab_size - 1}; got {least} to {most}. "
                "Use the tokenizer that the model was made for."
            )
