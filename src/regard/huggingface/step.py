"""The short way of a decoding step: one new token, a mask that nobody wrote into, nothing to differentiate or watch.

Enters: query, key, value of one layer, and the `RoutedMask` that all layers of the step share.
Leaves: out as the layer wants it, by the kernel that `attention` would ask and so with its bits; or None: go the long
way. What the mask says is worked out once a step instead of once a layer.
Floor 5.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from regard import decode, op
from regard.held import Held, HeldRows
from regard.huggingface.routed_mask import RoutedMask
from regard.native import DTYPES
from regard.plan import Panel, panels

_panels: WeakKeyDictionary[object, Panel] = WeakKeyDictionary()


def step(
    query: Tensor, key: Tensor, value: Tensor, mask: RoutedMask, scale: float, softcap: float | None
) -> Tensor | None:
    """Attention of at most `decode.QUERIES` queries, (batch, seq_len_q, num_heads, head_dim_v); None: not for this way.

    Args:
        query: (batch, num_heads, seq_len_q, head_dim).
        key: (batch, num_kv_heads, seq_len_kv, head_dim), or a cache's `HeldRows`.
        value: likewise, head_dim_v.
        mask: made for these queries and keys.
        scale: of the scores.
        softcap: their bound, or None.
    """
    batch, num_heads, seq_len_q, head_dim = query.shape
    scene = mask.scene
    if (
        seq_len_q > decode.QUERIES
        or query.dtype not in DTYPES
        or mask.written()
        or key.shape != (batch, key.shape[1], scene.seq_len_kv, head_dim)
        or value.shape[:3] != key.shape[:3]
        or scene.seq_len_q != seq_len_q
        or scene.batch != batch
        or num_heads % key.shape[1]
        or key.dtype != query.dtype
        or value.dtype != query.dtype
        or not (query.is_cpu and key.is_cpu and value.is_cpu)
        or not decode.few(query, key.shape[1])
    ):
        return None
    if isinstance(key, HeldRows) and isinstance(value, HeldRows) and key.held is value.held:
        held = key.held
        plain = op._plain([query])
    else:
        held = Held(key, value, key.shape[2])
        plain = op._plain([query, key, value])
    if not plain:
        return None
    panel = _panels.get(mask.shared)
    if panel is None:
        if mask.mask is not None:
            mask.mask.validate("attention", scene.frame())
        (panel,) = panels(mask.mask, scene.frame(num_heads))
        _panels[mask.shared] = panel
    out = query.new_empty(batch, seq_len_q, num_heads, value.shape[3])
    lse = query.new_empty(
        batch, num_heads, seq_len_q, dtype=torch.float64 if query.dtype is torch.float64 else torch.float32
    )
    decode.ask(
        query, held, out.transpose(1, 2), lse, panel, bias=None, diagonal=None, sinks=None, scale=scale,
        softcap=softcap or 0.0,
    )  # fmt: skip
    return out
