"""What a model answers: the probabilities of a token or a class, or an embedding; and how far two answers are apart.

Enters: a model, its inputs, the position and target that are asked for.
Leaves: a `Question` that turns outputs into `(batch, n)` log-probabilities or unit embeddings.
Floor 5."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEXT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
MASKED = ("ForMaskedLM", "ForPreTraining")
TASKS = ("next", "masked", "class", "token class", "embedding")


@dataclass(frozen=True)
class Question:
    """What is asked of a model about one input.

    Args:
        task: "next" (the next token, of a decoder or of an encoder-decoder's next step), "masked", "class", "token
            class", or "embedding" (mean of the last hidden states; of an image the first token's).
        position: where the answer stands, of a tensor that `options` may have shortened; None for classes and
            embeddings of a whole input.
        token: the same position counted in the input; None likewise.
        options: what the model is called with besides the inputs.
    """

    task: str
    position: int | None
    token: int | None
    options: Mapping[str, Any]

    def answer(self, output: Any, kept: Tensor | None = None) -> Tensor:
        """Log-probabilities (batch, n) in float64, or for embeddings unit vectors (batch, hidden_size).

        Args:
            output: what the model returned.
            kept: (batch, length), 0 at padding; for the mean of a text's hidden states.
        """
        if self.task == "embedding":
            hidden = output.last_hidden_state.double()
            if self.position is not None:
                pooled = hidden[:, self.position]
            elif kept is None or kept.shape != hidden.shape[:2]:
                pooled = hidden.mean(1)
            else:
                weight = kept.to(hidden.dtype)[..., None]
                pooled = (hidden * weight).sum(1) / weight.sum(1)
            return torch.nn.functional.normalize(pooled, dim=-1)
        logits = output.prediction_logits if "prediction_logits" in output else output.logits
        if self.position is not None:
            logits = logits[:, self.position]
        return logits.double().log_softmax(-1)


def question(
    model: Any, inputs: Mapping[str, Tensor], position: int | None = None, mask_token: int | None = None
) -> Question:
    """What a model is asked: told by its class, and by where the answer stands.

    Args:
        model: a transformers model.
        inputs: what it is called with, of batch 1.
        position: which token of the input (of an encoder-decoder: of what it writes). Default the last for decoders,
            the first mask token for masked-token models.
        mask_token: the tokenizer's mask_token_id, for masked-token models.

    Raises:
        ValueError: a position out of range, missing, or one where there is none.
    """
    name, accepted = type(model).__name__, inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    side = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    length = inputs[side].shape[1] if side in inputs else None
    if position is not None and (length is None or not 0 <= position < length):
        there = "None for a model without tokens" if length is None else f"from 0 to {length - 1}"
        raise ValueError(f"effects: position must be {there}; got {position}. Pass a position of the input.")
    if name.endswith(MASKED):
        if position is None:
            found = (inputs["input_ids"][0] == mask_token).nonzero() if mask_token is not None else []
            if not len(found):
                raise ValueError(
                    f"effects: the text must hold a mask token for {name}; got none. Put one in, or pass position."
                )
            position = int(found[0])
        return Question("masked", position, position, options)
    if name.endswith(NEXT):
        if length is None:
            raise ValueError(
                f"effects: inputs must hold input_ids or decoder_input_ids for {name}; got {', '.join(inputs)}. "
                "Pass what the decoder reads."
            )
        position = length - 1 if position is None else position
        if "logits_to_keep" in accepted and position == length - 1:
            return Question("next", -1, position, {**options, "logits_to_keep": 1})
        return Question("next", position, position, options)
    if name.endswith("ForTokenClassification"):
        if position is None:
            raise ValueError(f"effects: position must be given for {name}, which answers at every token; got None.")
        return Question("token class", position, position, options)
    if name.endswith("Classification"):
        if position is not None:
            raise ValueError(
                f"effects: position must be None for {name}, which answers for the whole input; got {position}. "
                "Leave it out."
            )
        return Question("class", None, None, options)
    if "For" in name.removeprefix("For"):
        raise ValueError(
            f"effects: model must predict a token or a class, or be one without a head; got {name}. "
            "Load it with AutoModel to see its embedding change."
        )
    if position is None and "pixel_values" in inputs:
        return Question("embedding", 0, 0, options)
    return Question("embedding", position, position, options)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) = Σ p ln(p / q) in nats, of log-probabilities (n,) and (batch, n); never below 0."""
    terms = before.exp() * (before - after)
    return torch.where(before == -torch.inf, 0.0, terms).sum(-1).clamp(min=0)


def distance(before: Tensor, after: Tensor) -> Tensor:
    """1 − cosine of unit vectors (n,) and (batch, n); never below 0."""
    return (1 - after @ before).clamp(min=0)
