"""A real model end to end: SmolLM2 (135M) on regard and on PyTorch's attention, the same weights, in turns.

Enters: how many tokens to prefill and to generate, and a dtype.
Leaves: items of `results`: seconds of reading a prompt, and of writing the tokens after it with a cache.
Floor 6: above the lens's models and transformers' routing; transformers loads on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from regard.bench.cases import DTYPES
from regard.bench.timing import race

IMPLEMENTATIONS = {"regard": "regard", "torch": "sdpa"}
_AGREE = {"float32": 1e-3, "bfloat16": 0.15}  # of the largest logit
_TEXT = "The cat sat on the mat because it was tired. Nobody knew how long it had been asleep, and nobody asked. "


@dataclass(frozen=True)
class ModelCase:
    """One task of a model: "prefill" reads `tokens`; "generate" writes 64 more after them, greedily."""

    task: str
    dtype: str
    tokens: int = 4096
    new: int = 64

    @property
    def name(self) -> str:
        """What it is called.

        Example:
            >>> ModelCase("prefill", "float32").name
            'smollm2 prefill of 4096 float32'
        """
        words = f"{self.tokens}" if self.task == "prefill" else f"{self.new} after {self.tokens}"
        return f"smollm2 {self.task} of {words} {self.dtype}"


def model_cases(quick: bool = False) -> list[ModelCase]:
    """Prefill of 4,096 tokens and generation of 64, in both dtypes (quick: none)."""
    return (
        []
        if quick
        else [ModelCase(task, dtype) for dtype in ("float32", "bfloat16") for task in ("prefill", "generate")]
    )


def measure_model(case: ModelCase, *, seconds: float = 20.0) -> dict[str, Any]:
    """Time a task on each implementation; the prompt is the same, and the same tokens come out in float32.

    Returns:
        An item without its stamps: seconds, tokens, difference (of logits, over the largest), agreement (share of
        positions, or of new tokens, where both choose the same).

    Raises:
        ImportError, OSError: the model's package or transformers is not there.
    """
    from regard.lens.models import load

    loaded = load("smollm2")
    ids = loaded.tokenizer(_TEXT * (case.tokens // 16), return_tensors="pt").input_ids[:, : case.tokens]
    if ids.shape[1] != case.tokens:
        raise ValueError(f"bench: the prompt must have {case.tokens} tokens; got {ids.shape[1]}. Ask for fewer.")
    return measure_task(case, loaded.model.to(DTYPES[case.dtype]), ids, seconds=seconds)


def measure_task(case: ModelCase, model: Any, ids: Tensor, *, seconds: float) -> dict[str, Any]:
    """The same with a model at hand."""
    import regard.huggingface  # noqa: F401  (registers "regard")

    calls: dict[str, Callable[[], Tensor]] = {}
    with torch.no_grad():
        for name, implementation in IMPLEMENTATIONS.items():
            if case.task == "prefill":
                calls[name] = _prefill(model, ids, implementation)
            else:
                calls[name] = _generate(model, ids, implementation, case.new)
        found = {name: call() for name, call in calls.items()}
        mine, theirs = found["regard"], found["torch"]
        item: dict[str, Any] = {"tokens": case.tokens if case.task == "prefill" else case.new}
        if case.task == "prefill":
            item["difference"] = ((mine - theirs).abs().max() / theirs.abs().max()).item()
            if not item["difference"] <= _AGREE[case.dtype]:
                raise AssertionError(f"{case.name}: logits must agree; got a difference of {item['difference']:.1e}.")
            mine, theirs = mine.argmax(-1), theirs.argmax(-1)
        item["agreement"] = (mine == theirs).double().mean().item()
        timings = race(calls, seconds=seconds, most=20)
    return {"seconds": {name: asdict(timing) for name, timing in timings.items()}, "absent": {}, **item}


def _prefill(model: Any, ids: Tensor, implementation: str) -> Callable[[], Tensor]:
    def call() -> Tensor:
        _switch(model, implementation)
        return model(ids, use_cache=True, logits_to_keep=16).logits.float()

    return call


def _generate(model: Any, ids: Tensor, implementation: str, new: int) -> Callable[[], Tensor]:
    """Each call goes on from a cache that holds all of the prompt but its last token, and cuts it back afterwards."""
    _switch(model, implementation)
    cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    mask = torch.ones_like(ids)

    def call() -> Tensor:
        _switch(model, implementation)
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, do_sample=False, min_new_tokens=new,
            max_new_tokens=new, pad_token_id=0,
        )  # fmt: skip
        cache.crop(ids.shape[1] - 1 - cache.get_seq_length())  # of a negative number: so many are removed
        return out[:, ids.shape[1] :]

    return call


def _switch(model: Any, implementation: str) -> None:
    """A few microseconds where nothing changes; well below a thousandth of either task where something does."""
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)
