"""One layer's record while it grows.

Enters: the calls of one attention module, in order, each with all the keys its cache holds by then.
Leaves: a `Layer` whose steps share their keys: a row that a later call brings again is kept once.
Works for caches that grow, that slide (old keys dropped), and that are filled in place.
Floor 5: imports torch alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.lens.layers import Keys, Layer, RecordedBias, Runs, Step


class GrowingLayer:
    """Collects the calls of one layer.

    Args:
        dtype: what q and k are kept in; None keeps them as they are.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.steps: list[Step] = []
        self.grown: _GrowingKeys | None = None
        self.all_keys: list[_GrowingKeys] = []

    def add(
        self, sequence: int, call: Any, bias: Tensor | None, diagonal: Tensor | None, statistics: dict[str, Tensor]
    ) -> None:
        """Keep one call (a `regard.huggingface.Call`).

        Args:
            sequence: which text it belongs to.
            call: the call; its tensors are copied.
            bias: its dense bias, already copied.
            diagonal: its bias by diagonals, already copied.
            statistics: what `regard.op.statistics` said of it.
        """
        k = call.k if self.dtype is None else call.k.to(self.dtype)
        norms = torch.linalg.vector_norm(call.v, dim=-1, dtype=torch.float32)
        before = self.steps[-1] if self.steps else None
        if before is not None and (before.sequence != sequence or before.keys.rows.shape[:2] != k.shape[:2]):
            before = None
        if before is None or self.grown is None:
            self.grown = _GrowingKeys()
            self.all_keys.append(self.grown)
            runs = self.grown.append(k, norms, torch.zeros(0, dtype=torch.int64))
        else:
            dropped = max(int(call.key_offset) - int(before.key_offset), 0)
            runs = self.grown.append(k, norms, _again(before, k, dropped))
        received = statistics.pop("received", None)
        if received is not None:
            self.grown.receive(received, runs)
        self.steps.append(
            Step(
                sequence=sequence,
                q=call.q.to(self.dtype or call.q.dtype, copy=True),
                lse=call.lse.clone(),
                keys=self.grown.keys,
                key_runs=runs,
                scale=call.scale,
                softcap=call.softcap,
                mask=call.mask,
                bias=None if bias is None and diagonal is None else RecordedBias(bias, diagonal),
                sinks=None if call.sinks is None else call.sinks.clone(),
                query_offset=call.query_offset,
                key_offset=call.key_offset,
                statistics=statistics,
            )
        )

    def layer(self, module: str, number: int, kind: str) -> Layer:
        """The record, complete."""
        return Layer(module, number, kind, self.steps)


class _GrowingKeys:
    """Buffers that double, and the `Keys` that look into their filled part."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.keys = Keys(torch.empty(0), torch.empty(0))
        self.filled = 0

    def append(self, k: Tensor, norms: Tensor, known: Tensor) -> Runs:
        """Keep the rows of `k` that are new; say where all of them lie.

        Args:
            k: (batch, num_kv_heads, n, head_dim).
            norms: (batch, num_kv_heads, n).
            known: int64 (up to n,): for the first rows where each lies already, or -1.
        """
        places = torch.full((k.shape[2],), -1, dtype=torch.int64)
        places[: len(known)] = known
        fresh = (places < 0).nonzero()[:, 0]
        places[fresh] = torch.arange(self.filled, self.filled + len(fresh))
        consecutive = len(fresh) > 0 and int(fresh[-1] - fresh[0]) + 1 == len(fresh)
        index = slice(int(fresh[0]), int(fresh[-1]) + 1) if consecutive else fresh
        self._grow(len(fresh), {"rows": k, "value_norms": norms})
        self.buffers["rows"][:, :, self.filled : self.filled + len(fresh)] = k[:, :, index]
        self.buffers["value_norms"][:, :, self.filled : self.filled + len(fresh)] = norms[:, :, index]
        self.filled += len(fresh)
        self._look()
        return _runs(places)

    def receive(self, received: Tensor, runs: Runs) -> None:
        """Add the mass (batch, num_heads, n) that the keys in `runs` received from one more call."""
        if "received" not in self.buffers:
            shape = (*received.shape[:2], self.buffers["rows"].shape[2])
            self.buffers["received"] = received.new_zeros(shape)
        first = 0
        for start, stop in runs:
            self.buffers["received"][:, :, start:stop] += received[:, :, first : first + stop - start]
            first += stop - start
        self._look()

    def _grow(self, extra: int, like: dict[str, Tensor]) -> None:
        for name, tensor in {**like, **{n: t for n, t in self.buffers.items() if n not in like}}.items():
            held = self.buffers.get(name)
            room = 0 if held is None else held.shape[2]
            if held is not None and self.filled + extra <= room:
                continue
            size = self.filled + extra if held is None else max(self.filled + extra, room + room // 2)
            wider = tensor.new_zeros((*tensor.shape[:2], size, *tensor.shape[3:]))
            if held is not None:
                wider[:, :, : self.filled] = held[:, :, : self.filled]
            self.buffers[name] = wider

    def _look(self) -> None:
        seen = {name: buffer[:, :, : self.filled] for name, buffer in self.buffers.items()}
        self.keys.rows, self.keys.value_norms = seen["rows"], seen["value_norms"]
        self.keys.received = seen.get("received")


def _again(before: Step, k: Tensor, dropped: int) -> Tensor:
    """Where the first rows of `k` lie already, given the step before and how many old keys its cache dropped since."""
    places = torch.cat([torch.arange(start, stop) for start, stop in before.key_runs])[dropped:]
    shared = min(len(places), k.shape[2])
    old = before.k[:, :, dropped : dropped + shared]
    same = (old == k[:, :, :shared]).all(3).all(1).all(0)
    return torch.where(same, places[:shared], -1)


def _runs(places: Tensor) -> Runs:
    """Half-open runs of consecutive numbers."""
    if not len(places):
        return ()
    breaks = (places.diff() != 1).nonzero()[:, 0] + 1
    bounds = [0, *breaks.tolist(), len(places)]
    return tuple((int(places[a]), int(places[b - 1]) + 1) for a, b in pairwise(bounds))
