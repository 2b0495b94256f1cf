"""Multi-head attention: queries, keys and values by one projection, attention of each head, and a projection back.

Enters: x `(batch, seq_len_q, dim)`; for cross-attention a memory `(batch, seq_len_kv, kv_dim)`; a mask, a bias,
positions, a cache: each an object, or None.
Leaves: `(batch, seq_len_q, dim)`. Parameters are named and laid out as torch.nn.MultiheadAttention's.
Floor 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from regard import check
from regard.biases import Bias
from regard.cache import KVCache
from regard.mask_algebra import Mask
from regard.nn import scores
from regard.nn.positions import Positions

Memory = Tensor | tuple[Tensor, Tensor]
SCORES = ("softmax", "additive", "linear")
_NAME = "MultiHeadAttention"


class MultiHeadAttention(nn.Module):
    """Attention over several heads, on regard's kernels.

    out = [head_1 … head_H] W_Oᵀ + b_O, head_h = attention(x W_Qᵀ, m W_Kᵀ, m W_Vᵀ)_h; m is x itself, or the memory.

    State dicts are torch.nn.MultiheadAttention's, both ways; for its signature too, see `MultiheadAttention`.

    Args:
        dim: numbers in one embedding.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of num_heads. Default num_heads.
        head_dim: numbers in one head. Default dim // num_heads.
        kv_dim: numbers in one embedding of the memory. Default dim.
        bias: whether the projections add one. Default True.
        dropout: probability that a weight is dropped in training. Default 0.
        score: "softmax"; "additive", softmax of weightᵀ tanh(q + k) with a learned weight a head; or "linear",
            φ(q)ᵀ φ(k) with φ = elu + 1, without a softmax. The last two take a mask alone. Default "softmax".
        scale: factor of q kᵀ. Default 1/√head_dim.
        softcap: bound of the scores. Default None.
        sinks: whether each head learns a number that joins the softmax's denominator. Default False.

    Raises:
        ValueError: where sizes do not divide each other, or there is no such score.

    Example:
        >>> from regard import masks
        >>> layer = MultiHeadAttention(64, 8, num_kv_heads=2)
        >>> x = torch.randn(3, 10, 64)
        >>> layer(x, mask=masks.causal() & masks.padding([10, 7, 4])).shape
        torch.Size([3, 10, 64])

    Source: Vaswani et al. 2017, section 3.2.2; Ainslie et al. 2023 (grouped); Bahdanau et al. 2015, appendix A.1.2
    (additive); Katharopoulos et al. 2020, equation 9 (linear); Xiao et al. 2024 (sinks).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kv_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        score: str = "softmax",
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = check.count(_NAME, "dim", dim, 1), check.count(_NAME, "num_heads", num_heads, 1)
        self.num_kv_heads = num_heads if num_kv_heads is None else check.count(_NAME, "num_kv_heads", num_kv_heads, 1)
        if num_heads % self.num_kv_heads:
            raise ValueError(
                f"{_NAME}: num_heads must be a multiple of num_kv_heads; got {num_heads} and {self.num_kv_heads}. "
                "Change the number of k/v heads."
            )
        if head_dim is None and dim % num_heads:
            raise ValueError(
                f"{_NAME}: dim must be a multiple of num_heads; got {dim} and {num_heads}. Change either, or pass "
                "head_dim."
            )
        if score not in SCORES:
            raise ValueError(f"{_NAME}: score must be one of {', '.join(SCORES)}; got {score!r}. Choose one.")
        self.head_dim = dim // num_heads if head_dim is None else check.count(_NAME, "head_dim", head_dim, 1)
        self.kv_dim = dim if kv_dim is None else check.count(_NAME, "kv_dim", kv_dim, 1)
        self.dropout, self.score, self.scale, self.softcap = check.dropout(_NAME, dropout), score, scale, softcap
        self._make_parameters(bias, self.kv_dim)
        self.reset_parameters()
        if sinks:
            self.sinks = nn.Parameter(torch.zeros(num_heads))
        else:
            self.register_parameter("sinks", None)
        if score == "additive":
            self.score_weight = nn.Parameter(torch.randn(num_heads, self.head_dim) * self.head_dim**-0.5)

    def forward(
        self,
        x: Tensor,
        memory: Memory | None = None,
        *,
        mask: Mask | Tensor | None = None,
        bias: Bias | Tensor | None = None,
        positions: Positions | None = None,
        cache: KVCache | None = None,
        query_offset: int | Tensor | None = None,
        key_offset: int | Tensor = 0,
    ) -> Tensor:
        """Attend from x to itself, or to a memory.

        Args:
            x: `(batch, seq_len_q, dim)`.
            memory: `(batch, seq_len_kv, kv_dim)`, or what `project_memory` made of it. Default None: x.
            mask, bias, query_offset, key_offset: as in `regard.attention`.
            positions: rotates q and k, or adds to the scores. Default None.
            cache: of keys and values so far; x is then what follows them. Default None.

        Returns:
            `(batch, seq_len_q, dim)`.
        """
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(
                f"{_NAME}: x must be (batch, seq_len, dim = {self.dim}); got {tuple(x.shape)}. Reshape it, or make the "
                "layer for its dim."
            )
        q, k, v = self._project(x, memory)
        if positions is not None:
            if cache is not None and memory is None:
                at = after = cache.position
            else:
                at, after = 0 if query_offset is None else query_offset, key_offset
            q, k = positions.rotate(q, at), positions.rotate(k, after)
            bias = _one_bias(bias, positions.bias())
        return self._attend(q, k, v, mask, bias, cache, query_offset, key_offset, is_cross=memory is not None)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a memory, each `(batch, num_kv_heads, seq_len_kv, head_dim)`, to be used many times."""
        _, (weight, bias) = self._query_and_rest()
        k, v = self._heads(linear(memory, weight, bias)).split(self.num_kv_heads, 1)
        return k, v

    def extra_repr(self) -> str:
        """Sizes, for print."""
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"dim={self.dim}, {heads}, score={self.score!r}"

    # ---- projections: x -> (batch, heads, seq_len, head_dim), strided views of one product ----

    def _make_parameters(self, bias: bool, kv_dim: int) -> None:
        queries, others = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if kv_dim == self.dim:
            self.in_proj_weight = nn.Parameter(torch.empty(queries + 2 * others, self.dim))
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(queries, self.dim))
            self.k_proj_weight = nn.Parameter(torch.empty(others, kv_dim))
            self.v_proj_weight = nn.Parameter(torch.empty(others, kv_dim))
            self.register_parameter("in_proj_weight", None)
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(queries + 2 * others))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = nn.Linear(queries, self.dim, bias=bias)

    def reset_parameters(self) -> None:
        """Glorot's uniform weights, no biases: torch.nn.MultiheadAttention's start, number by number."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def _project(self, x: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor, Tensor]:
        if memory is None and self.in_proj_weight is not None:
            packed = self._heads(linear(x, self.in_proj_weight, self.in_proj_bias))
            q, k, v = packed.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 1)
            return q, k, v
        (weight, bias), _ = self._query_and_rest()
        k, v = memory if isinstance(memory, tuple) else self.project_memory(x if memory is None else memory)
        return self._heads(linear(x, weight, bias)), k, v

    def _query_and_rest(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Weight and bias of the queries, and those of keys and values together."""
        sizes = (self.num_heads * self.head_dim, 2 * self.num_kv_heads * self.head_dim)
        own, rest = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        if self.in_proj_weight is not None:  # split, whose gradient is one cat
            query, others = self.in_proj_weight.split(sizes)
        else:
            query, others = self.q_proj_weight, torch.cat((self.k_proj_weight, self.v_proj_weight))
        return (query, own), (others, rest)

    def _heads(self, packed: Tensor) -> Tensor:
        return packed.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    # ---- attention of the heads ----

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, bias: Bias | Tensor | None,
        cache: KVCache | None, query_offset: int | Tensor | None, key_offset: int | Tensor, *, is_cross: bool,
    ) -> Tensor:  # fmt: skip
        if isinstance(bias, Tensor):
            bias = bias.to(q.dtype)  # autocast narrows q alone
        terms = scores.Terms(
            mask, bias, self.scale, self.softcap, None if self.sinks is None else self.sinks.to(q.dtype),
            self.dropout if self.training else 0.0, cache, query_offset, key_offset,
        )  # fmt: skip
        if self.score == "softmax":
            out = scores.softmax(self, q, k, v, terms, is_cross=is_cross)
        elif self.score == "additive":
            out = scores.additive(q, k, v, self.score_weight.to(q.dtype), terms)
        else:
            out = scores.linear(q, k, v, terms)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def _one_bias(given: Bias | Tensor | None, own: Bias | None) -> Bias | Tensor | None:
    if given is not None and own is not None:
        raise ValueError(
            f"{_NAME}: bias must be None where the positions add to the scores; got {type(given).__name__}. Use "
            "rotary or added positions, or add both into one tensor."
        )
    return given if own is None else own
