"""See what a model attends to: record it, ask for any exact weight, open it as a page.

Enters: a transformers model that runs inside `record`, or whose attention is cut by `effects`.
Leaves: a `Recording`, of which `regard look` makes pages; what a cut changes.
Floor 6: every room loads when its name is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.lens.cuts import Edge, Head, Span
    from regard.lens.effect import effects
    from regard.lens.recorder import record
    from regard.lens.recording import Recording
    from regard.lens.trusting import trust

__all__ = ["Recording", "record", "effects", "trust", "Edge", "Head", "Span"]
_ROOMS = {
    "Recording": "recording",
    "record": "recorder",
    "effects": "effect",
    "trust": "trusting",
    "Edge": "cuts",
    "Head": "cuts",
    "Span": "cuts",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
