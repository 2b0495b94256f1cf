"""torch.nn.MultiheadAttention, argument for argument, on regard's kernels.

Enters: query, key, value, laid out as torch has them; torch's masks, in which True means hidden.
Leaves: (out, weights or None), as torch has them.
Floor 5: the same layer as `MultiHeadAttention` behind another signature, for code that was written for torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from typing_extensions import override

from regard import check, masks
from regard.attention import attention_weights, attention_with_stats
from regard.mask_algebra import Mask
from regard.nn.attention import MultiHeadAttention
from regard.positions import Frame

_NAME = "MultiheadAttention"


class MultiheadAttention(MultiHeadAttention):
    """A drop-in for torch.nn.MultiheadAttention: its arguments, its parameters, its start from a seed, its results.

    What differs: a query that sees no key gives the output's bias where torch gives NaN; in training with dropout, the
    weights returned are those before dropout; tensors are checked, and errors are ours.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch.nn.MultiheadAttention has them.

    Example:
        >>> ours, theirs = MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4)
        >>> ours.load_state_dict(theirs.state_dict())
        <All keys matched successfully>
        >>> x = torch.randn(5, 2, 16)
        >>> all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours(x, x, x), theirs(x, x, x)))
        True

    Source: the conventions of torch.nn.MultiheadAttention, PyTorch 2.13.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.embed_dim, self.kdim, self.vdim = embed_dim, kdim or embed_dim, vdim or embed_dim
        self.add_bias_kv, self.add_zero_attn, self.batch_first = add_bias_kv, add_zero_attn, batch_first
        # torch's encoder layers ask for this before they go round forward: with False they do not
        self._qkv_same_embed_dim = False
        super().__init__(embed_dim, num_heads, bias=bias, dropout=dropout)
        self.to(device=device, dtype=dtype)

    @override
    def _make_parameters(self, bias: bool, kv_dim: int) -> None:
        # in torch's order, for its state dicts and so that a seed gives its numbers
        if self.kdim == self.vdim == self.dim:
            super()._make_parameters(bias, self.dim)
        else:
            widths = {"q_proj_weight": self.dim, "k_proj_weight": self.kdim, "v_proj_weight": self.vdim}
            for name, width in widths.items():
                self.register_parameter(name, nn.Parameter(torch.empty(self.dim, width)))
            self.register_parameter("in_proj_weight", None)
            self.register_parameter("in_proj_bias", nn.Parameter(torch.empty(3 * self.dim)) if bias else None)
            self.out_proj = nn.Linear(self.dim, self.dim, bias=bias)
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, self.dim)) if self.add_bias_kv else None)

    @override
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for own in (self.bias_k, self.bias_v):
            if isinstance(own, Tensor):
                nn.init.xavier_normal_(own)

    @override
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """torch's forward; n = seq_len_q, m = seq_len_kv.

        Args:
            query: `(n, batch, embed_dim)`, `(batch, n, embed_dim)` with batch_first, or `(n, embed_dim)`.
            key: likewise with m and kdim.
            value: likewise with m and vdim.
            key_padding_mask: `(batch, m)` or `(m,)`: bool, True = hidden; or float, added. Default None.
            need_weights: whether to return weights too. Default True.
            attn_mask: `(n, m)` or `(batch * num_heads, n, m)`: bool, True = hidden; or float, added. Default None.
            average_attn_weights: whether the weights are the mean over the heads. Default True.
            is_causal: attn_mask is the causal one; it must be given, and is not read where that is not needed.

        Returns:
            out, laid out as query; and weights `(batch, n, m)` or `(batch, num_heads, n, m)`, or None.
        """
        single = query.ndim == 2
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
            raise ValueError(
                f"{_NAME}: query, key and value must all have 3 axes, or 2 for one sentence; got {tuple(query.shape)}, "
                f"{tuple(key.shape)} and {tuple(value.shape)}. Reshape them."
            )
        if is_causal and attn_mask is None:
            raise ValueError(
                f"{_NAME}: attn_mask must be given with is_causal, which only says what it is; got None. Pass "
                "it, as in torch.nn.Transformer.generate_square_subsequent_mask(n)."
            )
        q, k, v = self._project_three(query, key, value, single)
        if is_causal and key_padding_mask is None and not need_weights:
            mask, bias, k, v = masks.causal(), None, *self._lengthened(k, v)
            if k.shape[2] > key.shape[0 if single or not self.batch_first else 1]:
                mask = mask | _after(key.shape[0 if single or not self.batch_first else 1])
        else:
            length = k.shape[2]
            k, v = self._lengthened(k, v)
            mask, bias = self._masks(q, k, length, key_padding_mask, attn_mask)
        if not need_weights:
            out = self._attend(q, k, v, mask, bias, None, 0, 0, is_cross=key is not query)
            return self._laid_out(out, single), None
        weights = self._weights(q, k, mask, bias)
        out = self._attend(q, k, v, mask, bias, None, 0, 0, is_cross=key is not query)
        weights = weights.mean(1) if average_attn_weights else weights
        return self._laid_out(out, single), weights[0] if single else weights

    def _project_three(self, query: Tensor, key: Tensor, value: Tensor, single: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the heads, by one product where two of the three are one tensor."""
        for name, t, width in (("query", query, self.dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if t.shape[-1] != width:
                raise ValueError(
                    f"{_NAME}: {name} must end in {width}; got {tuple(t.shape)}. Make the layer for its size."
                )

        def heads(packed: Tensor) -> Tensor:
            if single:
                packed = packed[None]
            elif not self.batch_first:
                packed = packed.transpose(0, 1)
            return self._heads(packed)

        if self.in_proj_weight is not None and query is key is value:
            q, k, v = heads(linear(query, self.in_proj_weight, self.in_proj_bias)).chunk(3, 1)
            return q, k, v
        if self.in_proj_weight is not None and key is value:
            (weight, bias), (rest, rest_bias) = self._query_and_rest()
            k, v = heads(linear(key, rest, rest_bias)).chunk(2, 1)
            return heads(linear(query, weight, bias)), k, v
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (heads(linear(*own)) for own in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _lengthened(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v with the learned pair and the zeros after them, where the layer was made for those."""
        for own_k, own_v in ((self.bias_k, self.bias_v), (0.0, 0.0) if self.add_zero_attn else (None, None)):
            if own_k is None or own_v is None:
                continue
            new_k, new_v = (
                self._heads(own).expand(k.shape[0], -1, -1, -1)
                if isinstance(own, Tensor)
                else k.new_zeros(k.shape[0], k.shape[1], 1, k.shape[3])
                for own in (own_k, own_v)
            )
            k, v = torch.cat((k, new_k.to(k.dtype)), 2), torch.cat((v, new_v.to(v.dtype)), 2)
        return k, v

    def _masks(
        self, q: Tensor, k: Tensor, length: int, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Mask | None, Tensor | None]:
        """torch's two masks as one of ours and one bias; keys past `length` are added ones, which all see."""
        batch, num_heads, seq_len_q, added = q.shape[0], q.shape[1], q.shape[2], k.shape[2] - length
        mask, bias = None, None
        if key_padding_mask is not None:
            shape = (batch, length)
            given = key_padding_mask.reshape(shape) if key_padding_mask.numel() == batch * length else key_padding_mask
            _check("key_padding_mask", given, [shape])
            given = nn.functional.pad(given, (0, added))
            if given.dtype == torch.bool:
                mask = masks.padding(~given)
            else:
                bias = given[:, None, None].to(q.dtype)
        if attn_mask is not None:
            _check("attn_mask", attn_mask, [(seq_len_q, length), (batch * num_heads, seq_len_q, length)])
            given = nn.functional.pad(attn_mask, (0, added))
            given = given[None, None] if given.ndim == 2 else given.unflatten(0, (batch, num_heads))
            if given.dtype == torch.bool:
                own = masks.from_tensor(~given)
                mask = own if mask is None else own & mask
            else:
                bias = given.to(q.dtype) if bias is None else bias + given.to(q.dtype)
        return mask, bias

    def _weights(self, q: Tensor, k: Tensor, mask: Mask | None, bias: Tensor | None) -> Tensor:
        """All weights `(batch, num_heads, n, m)`, differentiable as torch's are: n · m memory, for they are wanted."""
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, bias))):
            return attention_weights(q, k, mask=mask, bias=bias, query_offset=0).to(q.dtype)
        lse = attention_with_stats(q, k, k[..., :1], mask=mask, bias=bias, query_offset=0).lse
        scores = q.to(lse.dtype) @ k.to(lse.dtype).mT * self.head_dim**-0.5
        if bias is not None:
            scores = scores + bias
        weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
        if mask is not None:
            weights = torch.where(mask.dense(Frame(q.shape[0], q.shape[1], q.shape[2], k.shape[2])), weights, 0.0)
        return weights.to(q.dtype)

    def _laid_out(self, out: Tensor, single: bool) -> Tensor:
        if single:
            return out[0]
        return out if self.batch_first else out.transpose(0, 1)


def _after(length: int) -> Mask:
    """Keys at `length` and beyond."""
    return ~masks.prefix(length)


def _check(name: str, given: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if tuple(given.shape) not in shapes:
        raise ValueError(
            f"{_NAME}: {name} must be {' or '.join(map(str, shapes))}; got {tuple(given.shape)}. Reshape it."
        )
    if given.dtype != torch.bool and not given.is_floating_point():
        raise TypeError(f"{_NAME}: {name} must be bool or floating point; got {given.dtype}. Convert it with .bool().")
    check.on_cpu(_NAME, name, given)
