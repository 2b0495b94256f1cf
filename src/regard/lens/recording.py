"""What a model's attention was: queries, keys and statistics of every layer and step, and any exact tile of weights.

Enters: steps from `regard.lens.recorder`, or a directory that `Recording.save` wrote.
Leaves: `Recording`: per layer q, k (rotated, un-repeated), lse, value norms, statistics; `weights()` computes tiles.
A layer's keys are kept once, however many steps read them. O(n) memory: no map of queries by keys is ever held.
Floor 5: stands on regard.attention_weights and the recorded masks; storage lives in `regard.lens.storage`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.lens import storage
from regard.lens.fingerprint import Weights
from regard.lens.layers import KINDS, Layer, Step


@dataclass(eq=False)
class Recording:
    """A model's attention over some texts.

    `with regard.lens.record(model) as recording: model(...)` makes one; `Recording.open` reads a saved one.

    Args:
        layers: one entry a layer and kind.
        model: "id", "class", and "weights_sha256" (None until asked for by `save`).
        tokenizer: "id" and "sha256", or None.
        texts: the texts, where they are known.
        token_ids: per side ("text", "source", "target") one int64 (batch, length) tensor a sequence.
        notes: sentences on what was kept differently, for people.
        versions: of regard, torch and transformers.
        fingerprint: the model's weights, for as long as the model lives.
    """

    layers: list[Layer] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None
    texts: list[str] = field(default_factory=list)
    token_ids: dict[str, list[Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    fingerprint: Weights | None = field(default=None, repr=False)

    def layer(self, layer: int | str | Layer, kind: str = "self") -> Layer:
        """One layer's record.

        Args:
            layer: its number, its module's name, or the record itself.
            kind: "self" (the one self-attention there is), "encoder", "decoder" or "cross".

        Raises:
            ValueError: where nothing or more than one thing answers to that; the message names what there is.
        """
        if isinstance(layer, Layer):
            return layer
        if kind not in ("self", *KINDS):
            raise ValueError(
                f'recording: kind must be "self", "encoder", "decoder" or "cross"; got {kind!r}. Choose one of them.'
            )
        kinds = KINDS[:2] if kind == "self" else (kind,)
        found = [one for one in self.layers if layer in (one.number, one.module) and one.kind in kinds]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(f"{one.module} ({one.kind})" for one in found)
            raise ValueError(
                f"recording: layer {layer!r} must name one module; got {len(found)}: {names}. "
                "Pass its kind, or the module's name as the layer."
            )
        there = self._describe(kinds)
        raise ValueError(f"recording: layer must be a recorded one, {there}; got {layer!r}. Pass one of those.")

    def weights(
        self,
        layer: int | str | Layer,
        head: int | None = None,
        rows: slice = slice(None),
        cols: slice = slice(None),
        *,
        kind: str = "self",
        step: int | None = None,
        batch: int = 0,
        stage: str = "weights",
    ) -> Tensor:
        """An exact tile of one layer's attention weights, computed anew from the recorded queries and keys.

        weight = exp(score - lse), with the recorded lse.

        Args:
            layer: layer number, module name, or one of `layers`.
            head: query head; None gives all of them.
            rows: which queries. Default all.
            cols: which keys. Default all.
            kind: "self", "encoder", "decoder" or "cross".
            step: which call of the layer, from 0. Default: all of them as one text, where they are one.
            batch: which batch row. Default 0.
            stage: "scaled", "capped", "biased" or "weights".

        Returns:
            (rows, cols) for one head, (num_heads, rows, cols) for all; float32 (float64 for float64).

        Raises:
            ValueError: a layer, head, step or batch row that was not recorded, or several texts and no step.

        Example:
            >>> import torch
            >>> from regard.lens.layers import Keys
            >>> q, k, lse = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2), 2.0).log()
            >>> keys = Keys(k, value_norms=torch.ones(1, 1, 2))
            >>> step = Step(0, q, lse, keys, ((0, 2),), 0.5, None, None, None, None, 0, 0)
            >>> Recording([Layer("attention", 0, "encoder", [step])]).weights(0, head=0)
            tensor([[0.5000, 0.5000],
                    [0.5000, 0.5000]])
        """
        record = self.layer(layer, kind)
        self._check_index("head", head, record.num_heads)
        self._check_index("batch", batch, record.steps[0].q.shape[0])
        if step is not None:
            self._check_index("step", step, len(record.steps))
            tile = self._tile(record, record.steps[step], head, rows, cols, stage)
        elif len(record.steps) == 1:
            tile = self._tile(record, record.steps[0], head, rows, cols, stage)
        else:
            tile = self._joined(record, head, rows, cols, stage)
        tile = tile[batch if tile.shape[0] > 1 else 0]
        return tile if head is None else tile[0]

    def statistics(self, layer: int | str | Layer, kind: str = "self", step: int = -1) -> dict[str, Tensor]:
        """What the kernel reported of one call.

        Args:
            layer: layer number, module name, or one of `layers`.
            kind: "self", "encoder", "decoder" or "cross".
            step: which call. Default the last.

        Returns:
            "entropy", "max_score" (batch, num_heads, seq_len_q); "top_keys", "top_weights" (..., seq_len_q, top_k);
            "received" (batch, num_heads, seq_len_kv), from all queries of this and the other steps of the same text.
        """
        record = self.layer(layer, kind)
        self._check_index("step", step, len(record.steps))
        chosen = record.steps[step]
        held = dict(chosen.statistics)
        if chosen.received is not None:
            held["received"] = chosen.received
        return held

    def blocks(
        self, layer: int | str | Layer, block: tuple[int, int], kind: str = "self", step: int = -1
    ) -> tuple[Tensor, Tensor]:
        """Mass and largest weight in each block of a layer's map, without the map.

        Args:
            layer: layer number, module name, or one of `layers`.
            block: rows and columns of one block.
            kind: "self", "encoder", "decoder" or "cross".
            step: which call. Default the last.

        Returns:
            Two tensors (batch, num_heads, row blocks, column blocks): sums, and maxima.
        """
        from regard import op

        record = self.layer(layer, kind)
        chosen = record.steps[step]
        found = op.statistics(
            chosen.q,
            chosen.k,
            chosen.lse,
            **_settings(chosen),
            top_k=0,
            received=False,
            entropy=False,
            max_score=False,
            block=block,
        )
        return found["block_mass"], found["block_max"]

    def plot(self, layer: int | str | Layer, head: int | None = None, **options: Any) -> Any:
        """Draw one head's exact weights with matplotlib; options are those of `regard.lens.plot.plot`.

        Args:
            layer: layer number, module name, or one of `layers`.
            head: query head; None draws the mean over heads.
            options: rows, cols, tokens, key_tokens, ax, kind, step, batch.

        Returns:
            matplotlib axes.
        """
        from regard.lens.plot import plot

        return plot(self, layer, head, **options)

    def save(self, directory: str | Path) -> Path:
        """Write the recording as one directory, whole or not at all.

        Args:
            directory: where to; an older recording there is replaced, anything else is left alone.

        Returns:
            The directory.

        Raises:
            ValueError: the directory holds something that is not a recording.
        """
        if self.model.get("weights_sha256") is None and self.fingerprint is not None:
            self.model["weights_sha256"] = self.fingerprint.sha256()
        return storage.save(self, Path(directory))

    @staticmethod
    def open(directory: str | Path) -> Recording:
        """Read a saved recording; its tensors stay in their files until they are looked at.

        Args:
            directory: what `save` wrote.

        Raises:
            ValueError: no recording, or a corrupt or truncated one; the message says which file.
        """
        return Recording(**storage.load(Path(directory)))

    def _describe(self, kinds: tuple[str, ...]) -> str:
        numbers: Mapping[str, list[int]] = {kind: [] for kind in KINDS}
        for one in self.layers:
            numbers[one.kind].append(one.number)
        held = {kind: sorted(set(numbers[kind])) for kind in kinds if numbers[kind]}
        if not held:
            return f"but no {' or '.join(kinds)} attention was recorded"
        return "; ".join(f"{kind} {_spans(found)}" for kind, found in held.items())

    def _check_index(self, name: str, index: int | None, length: int) -> None:
        if index is not None and not -length <= index < length:
            raise ValueError(f"recording: {name} must be from 0 to {length - 1}; got {index}. Pass one of those.")

    def _tile(self, record: Layer, step: Step, head: int | None, rows: slice, cols: slice, stage: str) -> Tensor:
        """(batch, heads, rows, cols) of one step."""
        from regard import attention_weights

        q, k, lse, bias = step.q, step.k, step.lse, step.bias  # a sink is in lse already
        picked = slice(None)
        if head is not None:
            head %= record.num_heads
            one, group = slice(head, head + 1), record.num_heads // record.num_kv_heads
            if step.mask is None or not step.mask.depends_on_head():
                q, lse, k = q[:, one], lse[:, one], k[:, head // group : head // group + 1]
                bias = None if bias is None else bias.heads(one)
            else:
                picked = one
        tile = attention_weights(
            q,
            k,
            rows=rows,
            cols=cols,
            lse=lse,
            stage=stage,
            mask=step.mask,
            bias=bias,
            scale=step.scale,
            softcap=step.softcap,
            query_offset=step.query_offset,
            key_offset=step.key_offset,
        )
        return tile[:, picked]

    def _joined(self, record: Layer, head: int | None, rows: slice, cols: slice, stage: str) -> Tensor:
        """One tile over all steps of one text: rows in the order they came, columns as the keys were kept."""
        steps = record.steps
        if len({id(step.keys) for step in steps}) > 1 or any(len(step.key_runs) != 1 for step in steps):
            raise ValueError(
                f"recording: step must be given where a layer's {len(steps)} calls are not one growing text; got None. "
                f"Pass step=0 to {len(steps) - 1}."
            )
        base = min(step.key_runs[0][0] for step in steps)
        total = max(step.key_runs[0][1] for step in steps) - base
        wanted_rows = range(sum(step.seq_len_q for step in steps))[rows]
        wanted_cols = range(total)[cols]
        if wanted_rows.step != 1 or wanted_cols.step != 1:
            raise ValueError("recording: rows and cols must be slices with step 1. Take every n-th of the answer.")
        absent = 0.0 if stage == "weights" else -torch.inf
        heads = record.num_heads if head is None else 1
        dtype = torch.float64 if steps[0].q.dtype == torch.float64 else torch.float32
        out = torch.full((steps[0].q.shape[0], heads, len(wanted_rows), len(wanted_cols)), absent, dtype=dtype)
        first = 0
        for step in steps:
            start, stop = (bound - base for bound in step.key_runs[0])
            r = range(max(wanted_rows.start, first), min(wanted_rows.stop, first + step.seq_len_q))
            c = range(max(wanted_cols.start, start), min(wanted_cols.stop, stop))
            if r and c:
                own = slice(r.start - first, r.stop - first), slice(c.start - start, c.stop - start)
                to = slice(r.start - wanted_rows.start, r.stop - wanted_rows.start)
                across = slice(c.start - wanted_cols.start, c.stop - wanted_cols.start)
                out[:, :, to, across] = self._tile(record, step, head, *own, stage)
            first += step.seq_len_q
        return out


def _settings(step: Step) -> dict[str, Any]:
    return {
        "mask": step.mask,
        "bias": None if step.bias is None else step.bias.bias,
        "diagonal": None if step.bias is None else step.bias.diagonal,
        "scale": step.scale,
        "softcap": step.softcap,
        "query_offset": step.query_offset,
        "key_offset": step.key_offset,
    }


def _spans(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> "0 to 2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in runs)
