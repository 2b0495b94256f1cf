"""The attention mechanism as a library: exact on the CPU at hand, visible at any length.

Enters: q, k, v, or a whole model.
Leaves: `attention` and what it did; masks, biases, a cache; on first use `nn`, `models`, `huggingface` and `lens`.
Floor: the front door; imports torch and numpy alone.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from regard import biases, masks
from regard.accelerate import accelerate
from regard.additive import additive_attention
from regard.attention import AttentionStats as AttentionStats
from regard.attention import attention, attention_weights, attention_with_stats, merge_attention
from regard.cache import KVCache
from regard.explain import Plan as Plan
from regard.explain import explain
from regard.linear import linear_attention

__version__ = "0.1.0"
__all__ = [
    "attention",
    "attention_with_stats",
    "attention_weights",
    "merge_attention",
    "linear_attention",
    "additive_attention",
    "explain",
    "accelerate",
    "KVCache",
    "masks",
    "biases",
    "nn",  # pyright: ignore[reportUnsupportedDunderAll]
    "models",  # pyright: ignore[reportUnsupportedDunderAll]
    "huggingface",  # pyright: ignore[reportUnsupportedDunderAll]
    "lens",  # pyright: ignore[reportUnsupportedDunderAll]
]
_ROOMS = ("huggingface", "lens", "models", "nn")  # loaded on first use, with the libraries they need


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return import_module(f"regard.{name}")
    raise AttributeError(f"module 'regard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
