"""Attention without a softmax: a state that takes in keys and values, and feature maps to stand in for the softmax.

Enters: q, k, v as torch tensors or DLPack arrays; a rule, its gates, the state of an earlier call.
Leaves: out and the last state, in kind; feature maps.
Floor 4: beside `attention`; the operator is in `linear_op`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard import arrays, check, linear_op

RULES = ("linear", "gated", "delta", "gated_delta")
_NAME = "linear_attention"
_CHUNK = 64
_LONGEST_CHUNK = 256


def linear_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    rule: str = "linear",
    decay: Any = None,
    beta: Any = None,
    scale: float | None = None,
    state: Any = None,
    chunk_size: int | None = None,
) -> tuple[Any, Any]:
    """Linear attention: causal, at constant memory, with a state that one call hands to the next.

    out_t = scale · q_tᵀ S_t, where S_t is, by rule,

    - linear: S_{t−1} + k_t v_tᵀ
    - gated: diag(e^decay_t) S_{t−1} + k_t v_tᵀ
    - delta: S_{t−1} + beta_t k_t (v_t − k_tᵀ S_{t−1})ᵀ
    - gated_delta: the same on diag(e^decay_t) S_{t−1}

    Nothing is normalised: a softmax's denominator is one more column of ones in v, as the example shows.

    Args:
        q: float32, bfloat16, float16 or float64 `(batch, num_heads, seq_len, head_dim)`, any strides; a torch tensor,
            or anything on the CPU that speaks DLPack.
        k: `(batch, num_kv_heads, seq_len, head_dim)`, same dtype; num_heads is a multiple of num_kv_heads, and query
            head h reads k/v head `h // (num_heads // num_kv_heads)`. The delta rules want keys of length 1 or less.
        v: `(batch, num_kv_heads, seq_len, head_dim_v)`, same dtype.
        rule: "linear", "gated", "delta" or "gated_delta". Default "linear".
        decay: for the gated rules, natural logarithms, 0 or less (−inf forgets everything): `(batch, num_kv_heads,
            seq_len, head_dim or 1)`, in q's dtype or the state's. Default None.
        beta: for the delta rules, `(batch, num_kv_heads or 1, seq_len, 1)`, likewise. Default None.
        scale: factor of out, finite. Default 1/√head_dim.
        state: `(batch, num_kv_heads, head_dim, head_dim_v)`, float32 (float64 for float64) or q's dtype: the state
            before the first step. Default None: zero.
        chunk_size: the most steps taken at once, 1 to 256; it changes speed and rounding alone. Default None: 64.

    Returns:
        out `(batch, num_heads, seq_len, head_dim_v)` in q's dtype, and the state after the last step, float32 (float64
        for float64); both in q's kind. Differentiable in q, k, v, decay, beta and state.

    Raises:
        ValueError, TypeError: where an argument breaks one of the conditions above.

    Example:
        >>> import regard
        >>> q, k, v = torch.randn(3, 1, 2, 9, 16).unbind()
        >>> out, state = linear_attention(q[:, :, :5], k[:, :, :5], v[:, :, :5])
        >>> rest, state = linear_attention(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], state=state)
        >>> torch.allclose(torch.cat((out, rest), 2), linear_attention(q, k, v)[0], atol=1e-5)
        True
        >>> ones = torch.ones(1, 2, 9, 1)
        >>> both, _ = linear_attention(elu_plus_one(q), elu_plus_one(k), torch.cat((v, ones), -1))
        >>> weighted_mean = both[..., :-1] / both[..., -1:]

    Source: ONNX `LinearAttention`, opset 27; Katharopoulos et al. 2020, equations 16 to 20 (linear); Yang et al. 2024,
    "Gated Linear Attention" (gated); Schlag et al. 2021, "Linear Transformers are secretly fast weight programmers"
    (delta); Yang et al. 2025, "Gated Delta Networks" (gated_delta).
    """
    give = None
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        (q, k, v), give = arrays.taken(_NAME, {"q": q, "k": k, "v": v})
    check.inputs(_NAME, q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{_NAME}: q and k must have one seq_len; got {q.shape[2]} and {k.shape[2]}. Each step has a query and a "
            "key: hand the earlier steps over as state."
        )
    if rule not in RULES:
        raise ValueError(f"{_NAME}: rule must be one of {', '.join(RULES)}; got {rule!r}. Leave it out for 'linear'.")
    batch, heads, seq_len, head_dim = k.shape
    scale = check.scale(_NAME, scale, head_dim)
    chunk = _CHUNK if chunk_size is None else check.count(_NAME, "chunk_size", chunk_size, 1)
    if chunk > _LONGEST_CHUNK:
        raise ValueError(
            f"{_NAME}: chunk_size must be at most {_LONGEST_CHUNK}; got {chunk}. Leave it out for {_CHUNK}."
        )
    decay, beta, state = (
        arrays.tensor(_NAME, name, given) for name, given in (("decay", decay), ("beta", beta), ("state", state))
    )
    _given("decay", decay, rule, "gated" in rule)
    _given("beta", beta, rule, "delta" in rule)
    if decay is not None:
        _fits("decay", decay, q, ((batch, heads, seq_len, head_dim), (batch, heads, seq_len, 1)))
        decay = decay.to(linear_op.wide(q.dtype))
    if beta is not None:
        _fits("beta", beta, q, ((batch, heads, seq_len, 1), (batch, 1, seq_len, 1)))
        beta = beta.to(linear_op.wide(q.dtype)).expand(batch, heads, seq_len, 1)
    if state is not None:
        _fits("state", state, q, ((batch, heads, head_dim, v.shape[3]),))
        state = state.to(linear_op.wide(q.dtype))
    out, last = linear_op.attend(q, k, v, decay, beta, state, scale, chunk)
    return (out, last) if give is None else (give(out), give(last))


def _given(name: str, value: Any, rule: str, wanted: bool) -> None:
    """A gate is there where the rule has it, and nowhere else."""
    if wanted and not isinstance(value, Tensor):
        raise TypeError(
            f"{_NAME}: {name} must be a tensor for rule {rule!r}; got {type(value).__name__}. Give one number a step, "
            "or choose another rule."
        )
    if not wanted and value is not None:
        other = {"decay": "gated", "beta": "delta"}[name]
        raise ValueError(
            f"{_NAME}: {name} must be None for rule {rule!r}; got a {type(value).__name__}. Choose rule={other!r} or "
            "'gated_delta'."
        )


def _fits(name: str, value: Any, q: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{_NAME}: {name} must be a tensor; got {type(value).__name__}. Pass torch.tensor(...).")
    if tuple(value.shape) not in shapes:
        raise ValueError(
            f"{_NAME}: {name} must be {' or '.join(map(str, dict.fromkeys(shapes)))}; got {tuple(value.shape)}. "
            "Reshape it."
        )
    wide = linear_op.wide(q.dtype)
    if value.dtype not in (q.dtype, wide):
        listed = " or ".join(dict.fromkeys((str(wide), str(q.dtype))))
        raise TypeError(f"{_NAME}: {name} must be {listed}; got {value.dtype}. Convert it with .to({wide}).")
    check.on_cpu(_NAME, name, value)


# ---- feature maps ----


def elu_plus_one(x: Tensor) -> Tensor:
    """A positive feature map for `linear_attention`: elu(x) + 1, which is x + 1 above 0 and eˣ below.

    Args:
        x: queries or keys, any shape, floating point.

    Returns:
        The features, in x's shape and dtype, above 0 but for underflow.

    Example:
        >>> elu_plus_one(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0.3679, 1.0000, 3.0000])

    Source: Katharopoulos et al. 2020, equation 7.
    """
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def random_features(dim: int, num_features: int, seed: int) -> Callable[[Tensor], Tensor]:
    """A random feature map φ whose products are the softmax's: E[φ(q) · φ(k)] = exp(q · k / √dim).

    φ(x) = exp(ω x' − |x'|² / 2) / √num_features with x' = x / dim^¼. The rows of ω are orthogonal, dim at a time, and
    as long as Gaussian ones: the more features, the closer.

    Args:
        dim: head_dim of the queries and keys, at least 1.
        num_features: how many features, at least 1.
        seed: the same seed gives the same map; queries and keys must go through one map.

    Returns:
        A function from `(..., dim)` to `(..., num_features)`, in the dtype of what it is given, all above 0 but for
        underflow.

    Raises:
        ValueError: for sizes below 1, or where the function is given another dim.

    Example:
        >>> features = random_features(8, 4096, seed=0)
        >>> q, k = torch.ones(8), torch.arange(8) / 8
        >>> wanted = torch.exp(q @ k / 8**0.5)
        >>> abs(float(features(q) @ features(k) / wanted) - 1) < 0.1
        True

    Source: Choromanski et al. 2021, lemma 1 (positive features), with their orthogonal directions (FAVOR+).
    """
    dim = check.count("random_features", "dim", dim, 1)
    num_features = check.count("random_features", "num_features", num_features, 1)
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-num_features // dim)):
        square, triangle = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        blocks.append((square * triangle.diagonal().sign()).T)  # signs: without them the directions are not uniform
    lengths = torch.randn(num_features, dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    directions = torch.cat(blocks)[:num_features] * lengths

    def features(x: Tensor) -> Tensor:
        if x.shape[-1] != dim:
            raise ValueError(
                f"random_features: x must end in dim = {dim}; got {tuple(x.shape)}. Make the map for x's head_dim."
            )
        scaled = x.to(linear_op.wide(x.dtype)) / dim**0.25
        exponents = scaled @ directions.to(scaled.dtype).T - scaled.square().sum(-1, keepdim=True) / 2
        return (exponents.exp() / math.sqrt(num_features)).to(x.dtype)

    return features
