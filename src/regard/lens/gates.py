"""A gate on every head: how the loss would change, and how it does change without the head.

Enters: a model, and token ids.
Leaves: the loss; its gradient by the gates of all heads; the loss with sets of heads removed.
Floor 6: stands on regard.huggingface.intervene and the cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from regard import huggingface
from regard.lens.cuts import Head, Surgery
from regard.lens.numbering import Numbering, Place
from regard.lens.outcomes import MASKED, NEXT

MASKED_SHARE = 0.15


class Loss:
    """What a model loses on a text.

    "next": mean of −ln p(token | what precedes it). "masked": mean of −ln p(token | the rest) over 15 % of the tokens,
    masked. "embedding", for models without a word head: 1 − cosine to the embedding of the whole model; as its gradient
    is 0 where nothing is cut, the gradient is taken of the embedding's product with a random direction.

    Args:
        model: a transformers model that reads one text.
        tokenizer: of it.

    Raises:
        ValueError: a model with another task.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        name = type(model).__name__
        paired = getattr(model.config, "is_encoder_decoder", False)
        if paired or ("For" in name and not name.endswith((*NEXT, *MASKED))):
            raise ValueError(
                f"heads: model must read one text and predict its words, or embed it; got {name}. Choose another."
            )
        self.model, self.tokenizer = model, tokenizer
        self.task = "next" if name.endswith(NEXT) else "masked" if name.endswith(MASKED) else "embedding"

    def prepared(self, ids: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
        """Input ids (1, n), and labels (1, n) with −100 where nothing is asked."""
        given = torch.tensor([list(ids)])
        labels = given.clone()
        if self.task == "masked":
            special = set(self.tokenizer.all_special_ids)
            free = [at for at, token in enumerate(ids) if token not in special]
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(free), generator=generator).tolist()
            chosen = [free[at] for at in order[: max(1, round(MASKED_SHARE * len(free)))]]
            labels[:] = -100
            labels[0, chosen] = given[0, chosen]
            given[0, chosen] = self.tokenizer.mask_token_id
        elif self.task == "next":
            labels = torch.cat((given[:, 1:], torch.full((1, 1), -100)), 1)
        return given, labels

    def __call__(self, ids: Tensor, labels: Tensor, whole: Tensor | None = None) -> Tensor:
        """Loss of each batch row; for embeddings from `whole`, the unit embedding of the model as it is."""
        if self.task == "embedding":
            assert whole is not None
            return 1 - self.embedding(ids) @ whole
        output = self.model(input_ids=ids)
        logits = output.prediction_logits if "prediction_logits" in output else output.logits
        kept = labels[0] != -100  # the same in all rows
        wide = torch.promote_types(logits.dtype, torch.float32)
        chosen, asked = logits[:, kept].to(wide), labels[:, kept].expand(len(ids), -1)
        return torch.nn.functional.cross_entropy(chosen.transpose(1, 2), asked, reduction="none").mean(1)

    def embedding(self, ids: Tensor) -> Tensor:
        """Unit vectors (batch, hidden_size): means of the last hidden states."""
        hidden = self.model(input_ids=ids).last_hidden_state
        return torch.nn.functional.normalize(hidden.mean(1), dim=-1)


@contextmanager
def gated(model: Any, numbering: Numbering, gates: dict[Place, Tensor]) -> Iterator[list[Place]]:
    """Multiply every head's output by its gate, made here as 1 and kept in `gates` (num_heads,).

    Yields a list that grows by the place of each call, before observers see it.
    """
    seen: list[Place] = []

    def change(call: Any) -> Tensor:
        place = numbering.place(call)
        if place is None:
            return call.out
        seen.append(place)
        gate = gates.setdefault(place, torch.ones(call.q.shape[1], dtype=call.out.dtype, requires_grad=True))
        return call.out * gate[None, :, None, None]

    numbering.next_pass()
    with torch.enable_grad(), huggingface.intervene(change, model):
        yield seen


def gradients(
    loss: Loss, numbering: Numbering, ids: Sequence[int], seed: int, look: Callable[[Any, Place], None] | None = None
) -> dict[Place, Tensor]:
    """|dL/dgate| of every head on one text, (num_heads,) for each place.

    Args:
        loss: of the model.
        numbering: of the model.
        ids: token ids.
        seed: of the masked tokens, or of the random direction.
        look: called with every attention call of the same run and its place.

    Source: Michel et al. 2019, equation 2 (there an expectation over texts).
    """
    given, labels = loss.prepared(ids, seed)
    gates: dict[Place, Tensor] = {}
    with (
        gated(loss.model, numbering, gates) as seen,
        huggingface.observe(lambda call: look(call, seen[-1]) if look else None),
    ):
        if loss.task == "embedding":
            embedding = loss.embedding(given)
            direction = torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(seed))
            total = embedding[0] @ torch.nn.functional.normalize(direction.to(embedding.dtype), dim=0)
        else:
            total = loss(given, labels)[0]
        found = torch.autograd.grad(total, list(gates.values()), allow_unused=True)
    return {
        place: (torch.zeros_like(gate) if own is None else own).abs().detach().double()
        for (place, gate), own in zip(gates.items(), found, strict=True)
    }


def removed(
    loss: Loss,
    numbering: Numbering,
    ids: Sequence[int],
    sets: Sequence[Sequence[Head]],
    *,
    seed: int = 0,
    ablation: str = "zero",
    tokens_at_once: int = 1024,
    only: slice = slice(None),
    progress: Callable[[float], None] | None = None,
) -> tuple[float, list[float]]:
    """The loss of the model as it is, and with each set of heads removed.

    Args:
        loss, numbering: of the model.
        ids: token ids of one text.
        sets: which heads are removed together; their kinds named.
        seed: of the masked tokens.
        ablation: "zero" or "mean".
        tokens_at_once: of all rows of one forward pass together.
        only: which tokens' losses count, for next-token models.
        progress: called with the share that is done.
    """
    given, labels = loss.prepared(ids, seed)
    if only != slice(None):
        counted = torch.full_like(labels, -100)
        counted[:, only] = labels[:, only]
        labels = counted
    everything = [[], *sets]
    at_once = max(1, tokens_at_once // given.shape[1])
    found: list[float] = []
    with torch.no_grad():
        whole = loss.embedding(given)[0] if loss.task == "embedding" else None
        for first in range(0, len(everything), at_once):
            group = everything[first : first + at_once]
            with Surgery(numbering, group, False, ablation, False).active():
                found += loss(given.expand(len(group), -1), labels, whole).tolist()
            if progress:
                progress(len(found) / len(everything))
    return found[0], found[1:]
