"""Taking parts of a model's attention away: an edge, a head, or keys everywhere.

Enters: cuts, one set for each batch row, and the routed calls of a model that runs.
Leaves: each call's output without them, before the output projection. Only what a cut touches is computed anew, one row
of scores for an edge; all else keeps its bits. O(n) memory.
Floor 5: stands on regard.huggingface.intervene and regard.op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard import masks, op
from regard.lens.numbering import Numbering, Place

SIDES = {"encoder": "source", "cross": "source", "decoder": "target"}  # where a kind's keys come from
ABLATIONS = ("zero", "mean")


@dataclass(frozen=True)
class Edge:
    """What one query of one head takes from one key.

    Args:
        layer: layer number, or the attention module's name.
        head: query head.
        query: position that looks.
        key: position that is looked at.
        kind: "self" (the one self-attention there is), "encoder", "decoder" or "cross".
    """

    layer: int | str
    head: int
    query: int
    key: int
    kind: str = "self"


@dataclass(frozen=True)
class Head:
    """All that one head gives, at every position.

    Args:
        layer: layer number, or the attention module's name.
        head: query head.
        kind: "self", "encoder", "decoder" or "cross".
    """

    layer: int | str
    head: int
    kind: str = "self"


@dataclass(frozen=True)
class Span:
    """A run of tokens as keys, in every head of every layer: nobody reads them by attention, they themselves included.

    Args:
        start: first position.
        stop: one past the last; default one token.
        side: "text", or of an encoder-decoder "source" or "target".
    """

    start: int
    stop: int | None = None
    side: str = "text"

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + 1 if self.stop is None else self.stop


Cut = Edge | Head | Span


def terms(call: Any) -> dict[str, Any]:
    """What the operator is told of one call, but for its tensors q, k, v and its sinks."""
    return {
        "mask": call.mask,
        "bias": call.bias,
        "diagonal": call.diagonal,
        "scale": call.scale,
        "softcap": call.softcap,
        "query_offset": call.query_offset,
        "key_offset": call.key_offset,
    }


def tile(call: Any, rows: range, stage: str = "weights") -> Tensor:
    """Rows of one call's weights, or of its scores, (batch, num_heads, len(rows), seq_len_kv)."""
    q, k, lse = call.q.detach(), call.k.detach(), call.lse.detach()
    return op.tile(q, k, lse, **terms(call), rows=rows, cols=range(k.shape[2]), stage=stage)


class Surgery:
    """Applies cuts to the calls of one run, each batch row its own.

    out_i = Σ_j w_ij v_j becomes, without the cut keys C,
    zero: Σ_{j ∉ C} w_ij v_j; zero and renormalised: the same over 1 − Σ_{j ∈ C} w_ij;
    mean: Σ_{j ∉ C} w_ij v_j + Σ_{j ∈ C} w_ij v̄, with v̄ the mean of this text's values.
    A head gives 0, or its mean output over this text's queries.

    Args:
        numbering: of the model.
        cuts: for each batch row what is cut; kinds and sides are those of the model ("self" is resolved).
        paired: whether the model has an encoder and a decoder.
        ablation: "zero" or "mean".
        renormalise: whether the weights that are left add up to one again.
    """

    def __init__(
        self, numbering: Numbering, cuts: Sequence[Sequence[Cut]], paired: bool, ablation: str, renormalise: bool
    ) -> None:
        self.numbering, self.cuts, self.paired = numbering, cuts, paired
        self.ablation, self.renormalise = ablation, renormalise

    @contextmanager
    def active(self) -> Iterator[None]:
        """One run of the model under the knife."""
        from regard import huggingface

        self.numbering.next_pass()
        with huggingface.intervene(self.change):
            yield

    def change(self, call: Any) -> Tensor:
        """The output of one call without what is cut."""
        place = self.numbering.place(call)
        if place is None:
            return call.out
        check_rows(call, len(self.cuts))
        side = SIDES[place.kind] if self.paired else "text"
        keep = torch.ones(len(self.cuts), call.k.shape[2], dtype=torch.bool)
        rows: dict[int, dict[tuple[int, int], list[int]]] = {}  # query -> (batch row, head) -> keys
        heads: list[tuple[int, int]] = []
        for row, cuts in enumerate(self.cuts):
            for cut in cuts:
                if isinstance(cut, Span):
                    if cut.side == side:
                        keep[row, cut.start : cut.end] = False
                elif cut.kind == place.kind and cut.layer in (place.number, place.module):
                    if isinstance(cut, Head):
                        heads.append((row, cut.head))
                    else:
                        rows.setdefault(cut.query, {}).setdefault((row, cut.head), []).append(cut.key)
        out = call.out
        if not keep.all():
            out = torch.where(keep.all(1)[:, None, None, None], out, self._without_keys(call, keep))
        elif rows or heads:
            out = out.clone()
        for query, edges in rows.items():
            self._cut_row(call, out, query, edges, keep)
        for row, head in heads:
            out[row, head] = 0 if self.ablation == "zero" else call.out[row, head].mean(0)
        return out

    def _without_keys(self, call: Any, keep: Tensor) -> Tensor:
        """The call again, without some keys of each batch row, or with the mean value in their place."""
        named = terms(call)
        if self.ablation == "mean":
            v = torch.where(keep[:, None, :, None], call.v, call.v.mean(2, keepdim=True))
            return op.attend(call.q, call.k, v, **named, sinks=call.sinks, dropout=0.0)[0]
        padding = masks.padding(keep)
        named["mask"] = padding if call.mask is None else call.mask & padding
        sinks = call.sinks if self.renormalise else None
        out, lse = op.attend(call.q, call.k, call.v, **named, sinks=sinks, dropout=0.0)
        if not self.renormalise:  # what is left keeps the share that it had
            share = torch.where(lse == -torch.inf, 0.0, (lse - call.lse).exp())
            out = out * share[..., None].to(out.dtype)
        return out

    def _cut_row(
        self, call: Any, out: Tensor, query: int, edges: dict[tuple[int, int], list[int]], keep: Tensor
    ) -> None:
        """Compute one query's output anew, for the heads that lose an edge there."""
        scores = tile(call, range(query, query + 1), "biased")[:, :, 0]
        group = call.q.shape[1] // call.k.shape[1]
        for (row, head), keys in edges.items():
            own, v = scores[row, head].clone(), call.v[row, head // group].to(scores.dtype)
            lost = ~keep[row]
            lost[keys] = True
            lse = call.lse[row, head, query]
            if self.ablation == "mean":
                v = torch.where(lost[:, None], v.mean(0), v)
            else:
                own[lost] = -torch.inf
                if self.renormalise:
                    lse = own.logsumexp(0)
                    lse = lse if call.sinks is None else torch.logaddexp(lse, call.sinks[head].to(lse.dtype))
            weights = torch.where(own == -torch.inf, 0.0, (own - lse).exp())
            out[row, head, query] = (weights @ v).to(out.dtype)


def check_rows(call: Any, rows: int) -> None:
    """Refuse a model that folds its inputs into other batch rows (windows of an image, frames of a video)."""
    if call.q.shape[0] != rows:
        raise ValueError(
            f"effects: model must keep one batch row for each input; got {call.q.shape[0]} rows in "
            f"{type(call.module).__name__} for {rows} inputs. Choose a model that attends over the whole input."
        )


def matches(cut: Edge | Head, place: Place) -> bool:
    """Whether a cut with a resolved kind belongs to this place."""
    return cut.kind == place.kind and cut.layer in (place.number, place.module)
