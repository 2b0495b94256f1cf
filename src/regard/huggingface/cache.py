"""transformers' cache on KVCache: what `model.generate(past_key_values=...)` takes.

Enters: the keys and values of each layer's new tokens.
Leaves: all that are held, in views or as `HeldRows`, which the attention implementation "regard" reads where they lie.
Floor 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers import cache_utils as hf

from regard.cache import KVCache
from regard.held import HeldRows


class CacheLayer(hf.CacheLayerMixin):
    """One layer of `Cache`: a KVCache under the names that transformers calls."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, **named: Any) -> None:
        self.cache = KVCache(**named)
        self.is_sliding = self.cache.left is not None

    @property
    def is_initialized(self) -> bool:
        """Whether anything was appended yet."""
        return self.cache.batch is not None

    @property
    def keys(self) -> Tensor | None:
        """What is held; a copy where there are pages or codes."""
        return self.cache.keys if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """Likewise."""
        return self.cache.values if self.is_initialized else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first append says what comes."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Take in the keys and values of new tokens, and return all that are held."""
        self.cache.take_in(key_states.detach(), value_states.detach())
        held = self.cache.held()
        return (held.keys, held.values) if held.plain else HeldRows.pair(held)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys of the next call, and the position of the first of them."""
        kept = self.cache.kept
        return kept + query_length, self.get_seq_length() - kept

    def get_seq_length(self) -> int:
        """Tokens taken in so far."""
        return int(self.cache.position)

    def get_max_length(self) -> int:
        """Most keys held; -1: it grows with the sequence."""
        return -1 if self.cache.left is None else self.cache.left + 1

    def reset(self) -> None:
        """Let go of every token."""
        self.cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Let go of the last -tokens_to_remove tokens."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"regard.huggingface.Cache.crop: tokens_to_remove must be at most 0, minus the number; got "
                f"{tokens_to_remove}. Pass {-tokens_to_remove} to remove so many."
            )
        self.cache.crop(max(self.get_seq_length() + tokens_to_remove, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row b what row beam_idx[b] was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times, one after the other."""
        if self.cache.batch is not None:
            self.cache.reorder(torch.arange(self.cache.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`."""
        if self.cache.batch is not None:
            self.cache.reorder(indices.cpu())


class Cache(hf.Cache):
    """The cache of a transformers model, kept by `regard.KVCache`: one a layer.

    Buffers double instead of being copied at each token; with `page_size` beams and copies of a prompt share pages;
    with `dtype=torch.int8` it takes about a quarter (float32) or a half (bfloat16) of the memory. Layers with a sliding
    window hold the window alone, without pages. Layers of other kinds (linear attention) are kept as transformers does.
    Pages and codes are read in place by models that were loaded with `attn_implementation="regard"`; any other gets
    them written out at each step.

    Args:
        config: the model's config, which says what kind each layer is.
        max_length, page_size, max_pages, dtype: as in `regard.KVCache`, for each layer.

    Example:
        >>> import torch, regard.huggingface
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> model.set_attn_implementation("regard")
        >>> cache = regard.huggingface.Cache(model.config, page_size=64)
        >>> out = model.generate(torch.tensor([[1, 2]]), past_key_values=cache, max_new_tokens=3, do_sample=False)
        >>> cache.get_seq_length()  # the last token written has not been read
        4
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        max_length: int = 131_072,
        page_size: int | None = None,
        max_pages: int = 65_536,
        dtype: torch.dtype | None = None,
    ) -> None:
        named: dict[str, Any] = {"max_length": max_length, "max_pages": max_pages, "dtype": dtype}
        layers = []
        for layer in hf.DynamicCache(config=config).layers:
            if type(layer) is hf.DynamicSlidingWindowLayer:
                layers.append(CacheLayer(left=layer.sliding_window - 1, **named))
            elif type(layer) is hf.DynamicLayer:
                layers.append(CacheLayer(page_size=page_size, **named))
            else:
                layers.append(layer)
        super().__init__(layers=layers)
