"""Which models can be routed to regard, and the families that keep a table of attention classes of their own.

Enters: a model class or a model of transformers.
Leaves: nothing where its attention reaches the AttentionInterface, or was taught to here; else a ValueError that names
it. Families with a table get one more entry, "regard": their own class with one step replaced, softmax(q kᵀ) v.
Floor 5.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from regard import masks
from regard.huggingface.arguments import EAGER
from regard.huggingface.routed_mask import RoutedMask
from regard.huggingface.routing import regard_attention
from regard.observe import learn_names

_ROUTED = "ALL_ATTENTION_FUNCTIONS.get_interface("


class _SdpaToRegard(TorchFunctionMode):
    """Sends the scaled_dot_product_attention of one module to regard."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _attend(self.module, *args, **kwargs)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **named: Any,
) -> Tensor:
    out, _ = regard_attention(
        module, query, key, value, attn_mask, scaling=scale, dropout=dropout_p, is_causal=is_causal, **named
    )
    return out.transpose(1, 2)


def _through_sdpa(original: type[nn.Module]) -> type[nn.Module]:
    """The family's SDPA class, with that call sent to regard."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _SdpaToRegard(self):
            return original.forward(self, *args, **kwargs)

    return type(f"Regard{original.__name__}", (original,), {"forward": forward})


def _through_attn(original: type[nn.Module], terms: Callable[[Any], dict[str, Any]]) -> type[nn.Module]:
    """The family's class with `_attn(query, key, value, attention_mask)` sent to regard."""

    def _attn(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
        named = terms(self)
        if "own_mask" in named and not (isinstance(attention_mask, RoutedMask) and attention_mask.is_causal()):
            # No mask that knows the positions: the family's own code puts query i at i + seq_len_kv − seq_len_q.
            named["own_offset"] = key.shape[2] - query.shape[2]
        query, key = query.to(value.dtype), key.to(value.dtype)
        return _attend(self, query, key, value, attention_mask, dropout_p=self.attn_dropout.p, **named), None

    return type(f"Regard{original.__name__}", (original,), {"_attn": _attn})


def _falcon(original: type[nn.Module]) -> type[nn.Module]:
    routed: Any = _through_sdpa(original)

    def adapt(self: Any) -> None:
        self.config = copy.copy(self.config)
        self.config._attn_implementation_internal = "sdpa"  # the branch of its forward that `forward` sends on
        self.grouped = self.new_decoder_architecture
        self.new_decoder_architecture = False  # which would ask for keys repeated to num_heads

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, *args, **kwargs)
        adapt(self)

    def _split_heads(self: Any, fused_qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.grouped:
            # Only classes that have the method come by here.
            return original._split_heads(self, fused_qkv)  # type: ignore[attr-defined]
        batch, length, _ = fused_qkv.shape
        group = self.num_heads // self.num_kv_heads
        qkv = fused_qkv.view(batch, length, self.num_kv_heads, group + 2, self.head_dim)
        return qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]

    return type(routed.__name__, (routed,), {"__init__": build, "_split_heads": _split_heads, "adapt": adapt})


def _gpt_neo(original: type[nn.Module]) -> type[nn.Module]:
    def terms(self: Any) -> dict[str, Any]:
        window = int(self.bias[0, 0].sum(-1).max()) if self.attention_type == "local" else None
        return {"scale": 1.0, "own_mask": masks.causal() if window is None else masks.sliding_window(window - 1, 0)}

    return _through_attn(original, terms)


def _bark(original: type[nn.Module]) -> type[nn.Module]:
    def terms(self: Any) -> dict[str, Any]:
        return {"own_mask": masks.causal()} if self.is_causal else {}

    return _through_attn(original, terms)


def _gptj(original: type[nn.Module]) -> type[nn.Module]:
    return _through_attn(original, lambda self: {"scale": 1.0 / self.scale_attn})


def _heads(module: Any, states: Tensor) -> Tensor:
    return states.view(states.shape[0], -1, module.num_attention_heads, module.attention_head_size).transpose(1, 2)


def _git(original: type[nn.Module]) -> type[nn.Module]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        q, k, v = (_heads(self, project(hidden_states)) for project in (self.query, self.key, self.value))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        out, _ = regard_attention(
            self, q, k, v, attention_mask, scaling=None, dropout=self.dropout.p, is_causal=False, **kwargs
        )
        return out.flatten(2), None

    return type(f"Regard{original.__name__}", (original,), {"forward": forward})


def _superglue(original: type[nn.Module]) -> type[nn.Module]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor | None, ...]:
        crossing = encoder_hidden_states is not None
        source, mask = (encoder_hidden_states, encoder_attention_mask) if crossing else (hidden_states, attention_mask)
        q, k, v = (
            _heads(self, self.query(hidden_states)),
            _heads(self, self.key(source)),
            _heads(self, self.value(source)),
        )
        out, _ = regard_attention(
            self, q, k, v, mask, dropout=self.dropout.p, is_causal=False, output_attentions=output_attentions
        )
        return (out.flatten(2), None) if self.is_decoder else (out.flatten(2),)

    return type(f"Regard{original.__name__}", (original,), {"forward": forward})


# module under transformers.models: (its table, the entry to start from, what makes the routed class of it)
_TABLES: dict[str, tuple[str, str, Callable[[type[nn.Module]], type[nn.Module]]]] = {
    "bark.modeling_bark": ("BARK_ATTENTION_CLASSES", "eager", _bark),
    "data2vec.modeling_data2vec_vision": ("DATA2VEC_VISION_SELF_ATTENTION_CLASSES", "sdpa", _through_sdpa),
    "deepseek_ocr2.modeling_deepseek_ocr2": ("DEEPSEEK_OCR2_SAM_VISION_ATTENTION_CLASSES", "sdpa", _through_sdpa),
    "falcon.modeling_falcon": ("FALCON_ATTENTION_CLASSES", "sdpa", _falcon),
    "git.modeling_git": ("GIT_SELF_ATTENTION_CLASSES", "eager", _git),
    "gpt_neo.modeling_gpt_neo": ("GPT_NEO_ATTENTION_CLASSES", "eager", _gpt_neo),
    "gptj.modeling_gptj": ("GPTJ_ATTENTION_CLASSES", "eager", _gptj),
    "sam.modeling_sam": ("SAM_VISION_ATTENTION_CLASSES", "sdpa", _through_sdpa),
    "sam_hq.modeling_sam_hq": ("SAM_HQ_VISION_ATTENTION_CLASSES", "sdpa", _through_sdpa),
    "superglue.modeling_superglue": ("SUPERGLUE_SELF_ATTENTION_CLASSES", "eager", _superglue),
    "unlimited_ocr.modeling_unlimited_ocr": ("UNLIMITED_OCR_SAM_VISION_ATTENTION_CLASSES", "sdpa", _through_sdpa),
}


def _table(module_name: str) -> dict[str, type[nn.Module]] | None:
    """The table of a module of transformers with its entry "regard", added on the first call; None without a table."""
    entry = _TABLES.get(module_name.removeprefix("transformers.models."))
    if entry is None:
        return None
    table = getattr(sys.modules[module_name], entry[0])
    if "regard" not in table:
        table["regard"] = entry[2](table[entry[1]])
    return table


# Files that mention the interface for one class, while another adds the mask to its scores by itself.
_UNROUTED = {"transformers.models.bigbird_pegasus.modeling_bigbird_pegasus": " in its encoder"}


def admit(cls: type[PreTrainedModel]) -> None:
    """Raise a ValueError where the attention of a model class cannot be routed to regard.

    transformers itself accepts any registered name for any class, and a class that computes attention by itself then
    runs with masks made for another.
    """
    where = _UNROUTED.get(cls.__module__)
    if where is not None or not (_table(cls.__module__) is not None or cls._can_set_attn_implementation()):
        raise ValueError(
            f"regard.huggingface: attn_implementation='regard' must be asked of a model that routes attention through "
            f"transformers' AttentionInterface; got {cls.__name__}, which computes attention by itself{where or ''}. "
            f"{EAGER}"
        )


@functools.cache
def _way(cls: type[nn.Module]) -> str:
    """How a module class attends: "routed", "itself", or "" where it does not."""
    if _table(cls.__module__) is not None and issubclass(cls, tuple((_table(cls.__module__) or {}).values())):
        return "routed"
    if issubclass(cls, PreTrainedModel):
        return ""
    own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]
    try:
        source = "\n".join(inspect.getsource(base) for base in own)
    except (OSError, TypeError):  # written at a prompt
        return ""
    if _ROUTED in source:
        return "routed"
    return (
        "itself" if "attention" in cls.__name__.lower() and re.search(r"softmax\(|scaled_dot_product", source) else ""
    )


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Switch a loaded model to regard, or say why it cannot be.

    Args:
        model: any model of transformers, loaded with any attn_implementation.

    Returns:
        The same model. Its modules' names are known to `observe` from here on.

    Raises:
        ValueError: a part of the model computes attention by itself; the message names its class.

    Example:
        >>> import regard.huggingface
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
        ... )
        >>> regard.huggingface.prepare(BertModel(config)).config._attn_implementation
        'regard'
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"prepare: model must be a PreTrainedModel of transformers; got {type(model).__name__}. "
            "Pass the model itself."
        )
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for part in parts:
        admit(type(part))
    ways = {type(module): _way(type(module)) for module in model.modules()}
    if "routed" not in ways.values():
        raise ValueError(
            f"prepare: model must have an attention layer that goes through transformers' AttentionInterface; got "
            f"{type(model).__name__}, which has none. Nothing of it can be computed by regard."
        )
    if left := sorted(cls.__name__ for cls, way in ways.items() if way == "itself"):
        warnings.warn(
            f"prepare: {', '.join(left)} of {type(model).__name__} computes attention by itself; it runs as in eager "
            "mode, and nobody observes it.",
            stacklevel=2,
        )
    for module in list(model.modules()):
        _swap(module)
    for config in {id(part.config): part.config for part in parts}.values():
        config._attn_implementation = "regard"  # its sub-configs too
    learn_names(model)
    return model


def _swap(module: nn.Module) -> None:
    """Give an attention module of a family with a table its class "regard"; weights and buffers stay."""
    table = _table(type(module).__module__)
    if table is None or isinstance(module, table["regard"]) or type(module) not in table.values():
        return
    module.__class__ = table["regard"]
    if isinstance(adapt := getattr(module, "adapt", None), Callable):
        adapt()


def guard() -> None:
    """Let transformers ask `admit` before it builds or switches a model with "regard"."""
    original = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(original)
    def checked(self: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention == "regard":
            admit(type(self))
        return original(self, requested_attention, is_init_check)

    # Replacing another package's method is what this function is for.
    PreTrainedModel.get_correct_attn_implementation = checked  # type: ignore[method-assign]
