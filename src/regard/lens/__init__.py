"""See what a model attends to: record it, ask for any exact weight, open it as a page.

Enters: a transformers model that runs inside `record`.
Leaves: a `Recording`; `regard look` makes pages of one.
Floor 6: every room loads when its name is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.lens.recorder import record
    from regard.lens.recording import Recording

__all__ = ["Recording", "record"]
_ROOMS = {"Recording": "recording", "record": "recorder"}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
