"""What a call would do, told before it is done.

Enters: the arguments of `attention`.
Leaves: a `Plan`: backend, instruction set, threads, tiles, flops, bytes, and why each other backend was refused.
Floor 4: beside attention, above plan and the operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard import check, lowering, native, plan
from regard.biases import Bias
from regard.cache import KVCache
from regard.call import Call, ready, refusals
from regard.mask_algebra import Mask


@dataclass(frozen=True)
class Plan:
    """How a call of `attention` will be computed; print it for a table.

    Args:
        backend: "native", "reference", "flex" or "sdpa".
        isa: instruction set of the kernels, such as "avx512"; "torch" where PyTorch computes.
        threads: threads of the CPU that it will use; 0 on another device.
        tiles: score tiles of 64 queries by 64 keys that are computed; "flex" rounds them up to 128 by 128.
        tiles_total: score tiles that there are.
        flops: floating-point operations of both products, over the tiles computed.
        bytes: q, k and v read once, out written once.
        density: share of query-key pairs that the mask lets through, 0 to 1.
        refused: each other backend, and why it was not chosen.
    """

    backend: str
    isa: str
    threads: int
    tiles: int
    tiles_total: int
    flops: int
    bytes: int
    density: float
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"backend  {self.backend} ({self.isa}, threads: {self.threads})",
            f"tiles    {self.tiles:,} of {self.tiles_total:,} ({self.density:.1%} of the pairs are visible)",
            f"flops    {self.flops:,}",
            f"bytes    {self.bytes:,}",
        ]
        return "\n".join(lines + [f"not {name}: {why}" for name, why in self.refused.items()])


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    query_offset: int | Tensor | None = None,
    key_offset: int | Tensor = 0,
    cache: KVCache | None = None,
    backend: str | None = None,
) -> Plan:
    """How `attention` would compute the same call. Nothing is computed, and a cache is left as it is.

    flops = 2 · (head_dim + head_dim_v) · pairs in the tiles computed.

    Args:
        q, k, v, mask, bias, scale, softcap, sinks, dropout, query_offset, key_offset, cache, backend: as in
            `attention`.

    Returns:
        Plan: backend, instruction set, threads, tiles, flops, bytes, density, refused.

    Raises:
        ValueError, TypeError: as `attention` does.

    Example:
        >>> import regard
        >>> q = k = v = torch.zeros(1, 1, 256, 64)
        >>> plan = regard.explain(q, k, v, mask=regard.masks.causal())
        >>> plan.backend, plan.tiles, plan.tiles_total
        ('native', 10, 16)

    Source: Williams et al. 2009 (roofline: flops over bytes).
    """
    call = ready(
        "explain", q, k, v, mask, bias, scale, softcap, sinks, dropout, query_offset, key_offset, cache, backend,
        append=False,
    )  # fmt: skip
    frame, head_dim, head_dim_v = call.frame(), call.q.shape[3], call.v.shape[3]
    mask = call.mask if call.mask is None or call.q.is_cpu else lowering.on_device(call.mask, torch.device("cpu"))
    found = plan.summary(frame, mask, call.k.shape[1], head_dim, head_dim_v, call.q.dtype)
    pairs = frame.batch * frame.num_heads * frame.seq_len_q * frame.seq_len_kv
    work = pairs * (head_dim + head_dim_v)
    threads = native.threads(work) if call.native else torch.get_num_threads() if call.q.is_cpu else 0
    skips = call.native or (call.backend == "flex" and not call.q.is_cpu)
    return Plan(
        call.backend,
        native.isa() if call.native else "torch",
        threads,
        int(found["tiles" if skips else "tiles_total"]),
        int(found["tiles_total"]),
        int(found["flops"]) if skips else 2 * work,
        int(found["bytes"]),
        float(found["density"]),
        _refused(call, named=backend is not None),
    )


def _refused(call: Call, *, named: bool) -> dict[str, str]:
    """Why each backend but the chosen one was not: what it cannot do, or why the other goes before it."""
    unable = {name: found.why for name, found in refusals(call).items()}
    if named:
        others = dict.fromkeys(check.BACKENDS, f"{call.backend!r} was asked for by name")
    elif call.q.is_cpu:
        others = {
            "reference": "it holds the whole score matrix in float64, and serves as the oracle of tests",
            "flex": "on the CPU it runs uncompiled, on the whole score matrix",
            "sdpa": "it computes what the mask excludes, which 'native' skips",
        }
    else:
        others = {
            "flex": "'sdpa' needs no mask of its own here",
            "sdpa": "it would hold a dense mask, and compute what it excludes",
        }
    return {name: unable.get(name) or others[name] for name in check.BACKENDS if name != call.backend}
