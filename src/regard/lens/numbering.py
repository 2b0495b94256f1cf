"""Which attention a call belongs to: encoder, decoder or cross, and the number of its layer.

Enters: a model, and its routed calls one after another.
Leaves: a `Place` for each call.
Floor 5."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

from torch import nn


class Place(NamedTuple):
    """Where a call happened.

    Args:
        module: the attention module's name.
        number: layer number, from 0, within its kind.
        kind: "encoder", "decoder" (self-attention) or "cross".
        again: how often the module had been called before in this run (ALBERT's one module serves all layers).
    """

    module: str
    number: int
    kind: str
    again: int


class Numbering:
    """Numbers the calls of one model; `next_pass` says that a run through it begins anew."""

    def __init__(self, model: Any) -> None:
        self.names: dict[int, str] = {}
        for name, module in model.named_modules():
            self.names.setdefault(id(module), name)
        paired = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.encoder = model.get_encoder() if paired else None
        self.encoder_prefix = self.names.get(id(self.encoder), "") + "." if paired else ""
        self.calls_in_pass: Counter[int] = Counter()  # of a module
        self.order_in_pass: Counter[str] = Counter()  # of a kind

    def next_pass(self) -> None:
        """Count from the start: the model is called again."""
        self.calls_in_pass.clear()
        self.order_in_pass.clear()

    def place(self, call: Any) -> Place | None:
        """Where this call happened; None for a module of another model. Counts the call."""
        name = self.names.get(id(call.module))
        if name is None:
            return None
        kind = self._kind(call, name)
        again = self.calls_in_pass[id(call.module)]
        return Place(name, self._number(call.module, name, kind, again), kind, again)

    def _kind(self, call: Any, name: str) -> str:
        if call.is_cross:
            return "cross"
        if self.encoder is not None:
            return "encoder" if name.startswith(self.encoder_prefix) else "decoder"
        program = "" if call.mask is None else call.mask.encode()[0]
        causal = bool(getattr(call.module, "is_causal", False)) or "causal" in program.split()
        return "decoder" if causal else "encoder"

    def _number(self, module: nn.Module, name: str, kind: str, again: int) -> int:
        """The module's own layer index, else the one number in its name, else its turn in the pass."""
        turn = self.order_in_pass[kind]
        self.order_in_pass[kind] += 1
        self.calls_in_pass[id(module)] += 1
        index = getattr(module, "layer_idx", None)
        in_name = re.findall(r"(?<=\.)\d+(?=\.)", f".{name}.")
        if isinstance(index, int) and not again:
            return index
        return int(in_name[0]) if len(in_name) == 1 and not again else turn
