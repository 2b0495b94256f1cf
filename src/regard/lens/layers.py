"""What one attention module did: its steps, and the keys that they share.

Enters: tensors, from `regard.lens.growing` or from disk.
Leaves: `Layer`, `Step`, `Keys`: plain holders, O(n) memory, that know their own sizes.
Floor 5: imports torch, and the masks and biases of regard."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.biases import Bias
from regard.masks import Mask
from regard.positions import Frame

KINDS = ("encoder", "decoder", "cross")
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class RecordedBias(Bias):
    """The bias of one recorded call, as `regard.attention_weights` takes it: as it was, whatever the positions."""

    bias: Tensor | None
    diagonal: Tensor | None

    def needs_query_positions(self) -> bool:
        """False: the numbers belong to this call's queries and keys."""
        return False

    def validate(self, caller: str, frame: Frame) -> None:
        """Nothing to check: the numbers were added once already."""

    def resolve(self, frame: Frame, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor | None]:  # noqa: ARG002
        """The recorded tensors: dense (B|1, H|1, Sq|1, Skv|1) and diagonal (B|1, H|1, Sq + Skv - 1), or None."""
        dense, diagonal = (None if own is None else own.to(device=device, dtype=dtype) for own in self._pair)
        return dense, diagonal

    def tensors(self) -> list[Tensor]:
        """Those of the two that there are."""
        return [own for own in self._pair if own is not None]

    @property
    def _pair(self) -> tuple[Tensor | None, Tensor | None]:
        return self.bias, self.diagonal

    def heads(self, heads: slice) -> RecordedBias:
        """The same for some heads alone."""
        return RecordedBias(*(own if own is None or own.shape[1] == 1 else own[:, heads] for own in self._pair))


@dataclass(eq=False)
class Keys:
    """The keys of one text, each row once, however many steps read it.

    Args:
        rows: (batch, num_kv_heads, rows, head_dim), rotated.
        value_norms: length of every value row, (batch, num_kv_heads, rows).
        received: weight that every key received from all its queries, (batch, num_heads, rows); None if not asked for.
    """

    rows: Tensor
    value_norms: Tensor
    received: Tensor | None = None


@dataclass(eq=False)
class Step:
    """One call of one layer: a prefill, or one step of generation.

    Args:
        sequence: which text of the recording it belongs to, from 0.
        q: queries (batch, num_heads, seq_len_q, head_dim), rotated.
        lse: log of the softmax's denominator (batch, num_heads, seq_len_q), a sink included.
        keys: the keys of its text.
        key_runs: which rows of them it read, as half-open runs, in order.
        statistics: "entropy", "max_score" (batch, num_heads, seq_len_q); "top_keys", "top_weights" (..., top_k).
    """

    sequence: int
    q: Tensor
    lse: Tensor
    keys: Keys
    key_runs: Runs
    scale: float
    softcap: float | None
    mask: Mask | None
    bias: RecordedBias | None
    sinks: Tensor | None
    query_offset: int | Tensor
    key_offset: int | Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def seq_len_q(self) -> int:
        """Queries of this step."""
        return self.q.shape[2]

    @property
    def seq_len_kv(self) -> int:
        """Keys that this step read."""
        return sum(stop - start for start, stop in self.key_runs)

    @property
    def k(self) -> Tensor:
        """The keys it read, (batch, num_kv_heads, seq_len_kv, head_dim); a view where it can be."""
        return take_runs(self.keys.rows, self.key_runs)

    @property
    def value_norms(self) -> Tensor:
        """Lengths of the values it read, (batch, num_kv_heads, seq_len_kv)."""
        return take_runs(self.keys.value_norms, self.key_runs)

    @property
    def received(self) -> Tensor | None:
        """What its keys received from all queries of its text, (batch, num_heads, seq_len_kv)."""
        return None if self.keys.received is None else take_runs(self.keys.received, self.key_runs)


@dataclass(eq=False)
class Layer:
    """All that one attention module did.

    Args:
        module: its name in the model ("model.layers.3.self_attn").
        number: its layer index, from 0. A module that stands for several layers (ALBERT) makes one `Layer` each.
        kind: "encoder", "decoder" (self-attention) or "cross".
        steps: its calls, in order.
    """

    module: str
    number: int
    kind: str
    steps: list[Step]

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.steps[0].q.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.steps[0].keys.rows.shape[1]

    @property
    def head_dim(self) -> int:
        """Numbers in one query or key."""
        return self.steps[0].keys.rows.shape[3]


def rows_of_bias(step: Step, rows: range) -> dict[str, Tensor | None]:
    """A step's dense bias and its diagonals for some of its queries alone."""
    bias, diagonal = (None, None) if step.bias is None else (step.bias.bias, step.bias.diagonal)
    return cut_bias(bias, diagonal, rows, step.seq_len_q, step.seq_len_kv)


def cut_bias(
    bias: Tensor | None, diagonal: Tensor | None, rows: range, seq_len_q: int, seq_len_kv: int
) -> dict[str, Tensor | None]:
    """A dense bias (B|1, H|1, Sq|1, Skv|1) and diagonals (B|1, H|1, Sq + Skv - 1) for some queries alone."""
    if bias is not None and bias.shape[2] > 1:
        bias = bias[:, :, rows.start : rows.stop]
    if diagonal is not None:
        first = seq_len_q - rows.stop
        diagonal = diagonal[..., first : first + len(rows) + seq_len_kv - 1]
    return {"bias": bias, "diagonal": diagonal}


def take_runs(rows: Tensor, runs: Runs) -> Tensor:
    """The rows (third axis) that lie in half-open runs, in order; a view where there is one run."""
    parts = [rows[:, :, start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
