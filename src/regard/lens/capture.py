"""Watching models that transformers does not route: whatever calls PyTorch's scaled_dot_product_attention.

Enters: any torch module (timm's vision transformers, torch.nn.MultiheadAttention, your own).
Leaves: each of its calls computed by regard, reported to `regard.huggingface.observe` and changed by `intervene`, under
the name of the module that was running.
Floor 5: stands on regard.huggingface.routing, and on accelerate's reading of PyTorch's shapes and masks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from regard.accelerate import layout, mask_and_bias
from regard.huggingface.routing import regard_attention
from regard.masks import causal
from regard.observe import learn_names


@contextmanager
def captured(model: nn.Module) -> Iterator[None]:
    """Send the attention of a torch module's own code to regard, for a while.

    Calls from Python to scaled_dot_product_attention and to torch.nn.MultiheadAttention are taken, its averaged weights
    included; torch's fused encoder layer is off meanwhile, as it is under any function mode. Compiled programs are not.

    Args:
        model: the module; its submodules' names are those of the calls.
    """
    learn_names(model)
    running: list[nn.Module] = []

    def enter(module: nn.Module, _inputs: Any) -> None:
        running.append(module)

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        running.pop()

    handles: list[Any] = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with _Capture(running):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Capture(TorchFunctionMode):
    """Takes the two functions that compute attention."""

    def __init__(self, running: list[nn.Module]) -> None:
        super().__init__()
        self.running = running

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.running and func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if self.running and func is functional.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        return func(*args, **kwargs)

    def _multi_head(
        self, *args: Any, need_weights: bool = True, average_attn_weights: bool = True, **named: Any
    ) -> Any:
        """torch.nn.MultiheadAttention's function: without weights it calls scaled_dot_product_attention."""
        from regard.huggingface import observe
        from regard.lens.cuts import tile

        seen: list[Any] = []
        with self._inside(), observe(seen.append):
            out, _ = functional.multi_head_attention_forward(*args, need_weights=False, **named)
        if not need_weights:
            return out, None
        weights = tile(seen[-1], range(seen[-1].q.shape[2]))
        weights = weights.mean(1) if average_attn_weights else weights
        query = args[0] if args else named["query"]
        return out, (weights if query.dim() == 3 else weights[0]).to(out.dtype)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """While that function's own code runs, which under a mode would come back here: its call alone is taken."""
        original, thread = functional.scaled_dot_product_attention, threading.get_ident()

        def attend(*args: Any, **kwargs: Any) -> Tensor:
            return (self._attend if threading.get_ident() == thread else original)(*args, **kwargs)

        functional.scaled_dot_product_attention = attend
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = original

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        found = layout(query, key, value, attn_mask, enable_gqa)
        module = self.running[-1]
        if found is None or (is_causal and attn_mask is not None):
            raise ValueError(
                f"record: {type(module).__name__} must call scaled_dot_product_attention with q, k and v of one batch "
                f"and fitting heads; got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}. Give them "
                "the same leading axes, and a mask or is_causal."
            )
        q, k, v, given, lead = found
        mask, bias = mask_and_bias(given) if given is not None else (causal() if is_causal else None, None)
        out, _ = regard_attention(
            module, q, k, v, None, scaling=scale, dropout=dropout_p if module.training else 0.0, is_causal=False,
            position_bias=bias, own_mask=mask,
        )  # fmt: skip
        out = out.transpose(1, 2)
        return out if lead is None else out.reshape(*lead, *out.shape[-2:])
