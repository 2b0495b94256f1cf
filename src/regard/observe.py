"""Watching the attention calls of a model, and changing what they give.

Enters: a callback, and a model whose modules have names.
Leaves: a `Call` for every attention call that a layer makes while `observe` lasts: those of `regard.nn`, and those of
transformers' models.
Floor 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from regard.mask_algebra import Mask


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call of a layer, as `observe` reports it.

    q `(batch, num_heads, seq_len_q, head_dim)` is rotated; k and v `(batch, num_kv_heads, seq_len_kv, ...)` are not
    repeated; all tensors are detached. out `(batch, num_heads, seq_len_q, head_dim_v)`; lse float32 `(batch, num_heads,
    seq_len_q)`. `bias` broadcasts to `(batch, num_heads, seq_len_q, seq_len_kv)`; `diagonal` `(1, num_heads, n)`, of
    n = seq_len_q + seq_len_kv - 1, holds at j - i + seq_len_q - 1 the bias of query i and key j. `name`, and what is
    read from it, needs `prepare(model)` or `observe(callback, model)`. A module that serves several layers (ALBERT's)
    has one name and one layer index for all of them.
    """

    module: nn.Module
    name: str | None
    layer_index: int | None
    is_cross: bool
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | None
    bias: Tensor | None
    diagonal: Tensor | None
    sinks: Tensor | None
    scale: float
    softcap: float | None
    query_offset: int | Tensor
    key_offset: int | Tensor
    out: Tensor
    lse: Tensor

    def detached(self) -> Call:
        """The same without its part in a graph of autograd."""
        names = ("q", "k", "v", "bias", "diagonal", "sinks", "out", "lse")
        held = {name: own for name in names if (own := getattr(self, name)) is not None and own.requires_grad}
        return replace(self, **{name: own.detach() for name, own in held.items()}) if held else self


_observers: ContextVar[tuple[Callable[[Call], None], ...]] = ContextVar("regard_observers", default=())
_changes: ContextVar[tuple[Callable[[Call], Tensor], ...]] = ContextVar("regard_changes", default=())
_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@contextmanager
def observe(callback: Callable[[Call], None], model: nn.Module | None = None) -> Iterator[None]:
    """Call `callback(Call)` after every attention call of a layer in this context; the forward keeps its bits.

    Args:
        callback: receives one `Call` at a time.
        model: names the calls' modules; not needed after `prepare(model)`.

    Example:
        >>> import torch, regard.huggingface
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
        ... )
        >>> model = regard.huggingface.prepare(LlamaModel(config).eval())
        >>> seen = []
        >>> with regard.huggingface.observe(lambda call: seen.append((call.layer_index, tuple(call.q.shape)))):
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        >>> seen
        [(0, (1, 2, 3, 4)), (1, (1, 2, 3, 4))]
    """
    if model is not None:
        learn_names(model)
    token = _observers.set((*_observers.get(), callback))
    try:
        yield
    finally:
        _observers.reset(token)


@contextmanager
def intervene(change: Callable[[Call], Tensor], model: nn.Module | None = None) -> Iterator[None]:
    """Put what `change(Call)` returns in the place of every routed attention call's output, in this context.

    The output is that of the heads before the output projection. The call's tensors are not detached, so that gradients
    flow through what `change` returns; observers see the changed output.

    Args:
        change: receives one `Call` at a time, returns `(batch, num_heads, seq_len_q, head_dim_v)`; `call.out` where
            nothing changes, which keeps the bits.
        model: names the calls' modules; not needed after `prepare(model)`.

    Example:
        >>> import torch, regard.huggingface
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
        ... )
        >>> model = regard.huggingface.prepare(BertModel(config).eval())
        >>> with torch.no_grad(), regard.huggingface.intervene(lambda call: call.out * 0):
        ...     _ = model(torch.tensor([[1, 2, 3]]))
    """
    if model is not None:
        learn_names(model)
    token = _changes.set((*_changes.get(), change))
    try:
        yield
    finally:
        _changes.reset(token)


def changes() -> tuple[Callable[[Call], Tensor], ...]:
    """What the open contexts of `intervene` do, the outermost first."""
    return _changes.get()


def observers() -> tuple[Callable[[Call], None], ...]:
    """The callbacks of the contexts that are open."""
    return _observers.get()


def learn_names(model: nn.Module) -> None:
    """Remember the name of every module of a model, for the calls it will make."""
    for name, module in model.named_modules():
        _names[module] = name


def name_of(module: nn.Module) -> str | None:
    """The module's dotted name in the last model that was learned; None for a stranger."""
    return _names.get(module)


def layer_index(module: nn.Module) -> int | None:
    """The module's `layer_idx`, else the last number in its name, else None."""
    for attribute in ("layer_idx", "layer_index", "layer_id"):
        if isinstance(index := getattr(module, attribute, None), int) and not isinstance(index, bool):
            return index
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", f".{name_of(module) or ''}.")
    return int(numbers[-1]) if numbers else None


def is_cross(module: nn.Module) -> bool:
    """Whether the keys come from another sequence, as the module's flag, class or name says."""
    if getattr(module, "is_cross_attention", False):
        return True
    said = f"{type(module).__name__}.{name_of(module) or ''}".lower()
    return (
        re.search(r"cross_?att|encoder_attn|encdecattention|encoder_decoder_att|cross_?attn|multihead_attn$", said)
        is not None
    )
