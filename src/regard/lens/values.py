"""The values of a text that is shown, and what each head made of them.

Enters: the routed calls of one run of a model.
Leaves: `Values`: v and the heads' output of each layer, for as many layers as fit into a bound of bytes.
Floor 5: stands on the calls' numbering."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from regard.lens.numbering import Numbering

LARGEST_VALUES = 64_000_000  # bytes that the values of one text may take; layers beyond are not kept


@dataclass
class Values:
    """v (num_kv_heads, keys, head_dim_v) and out (num_heads, queries, head_dim_v), before the output projection.

    Args:
        held: by kind and layer number the two.
        spent: bytes.
    """

    held: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    spent: int = 0

    def watch(self, model: Any) -> Any:
        """A callback for `observe` that keeps the calls of one run through a model."""
        numbering = Numbering(model)

        def see(call: Any) -> None:
            place = numbering.place(call)
            if place is None or place.again or call.v.shape[0] != 1:
                return
            size = sum(one.numel() * one.element_size() for one in (call.v, call.out))
            if self.spent + size > LARGEST_VALUES:
                return
            self.spent += size
            self.held[place.kind, place.number] = (call.v[0].clone(), call.out[0].clone())

        return see

    def row(self, kind: str, number: int, head: int, query: int) -> Tensor | None:
        """(keys + 1, head_dim_v): the values that a head reads, and below them what it gives to one query.

        None where the layer is not kept.
        """
        found = self.held.get((kind, number))
        if found is None:
            return None
        v, out = found
        group = head // (out.shape[0] // v.shape[0])
        rows = v.new_empty(v.shape[1] + 1, v.shape[2])
        rows[:-1], rows[-1] = v[group], out[head, query]
        return rows
