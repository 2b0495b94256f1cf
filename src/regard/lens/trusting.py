"""How far can a weight be trusted? Attributions of one answer, put to the test by deletion.

Enters: a model and one text, or a file of sentences.
Leaves: for each attribution its scores, and the areas under its deletion and insertion curves beside random and uniform
orders; a table over many sentences.
Floor 6: stands on attributions and the effects' bench."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.lens.attributions import attributions, read_maps
from regard.lens.cuts import Cut, Span
from regard.lens.effect import Bench
from regard.lens.models import Loaded

MOST_TOKENS = 256
DELETION = "true deletion"
LIKELIEST = 5


@dataclass(frozen=True)
class Attribution:
    """One way to score the tokens.

    Args:
        name: which.
        scores: one for each candidate token; None for random orders, of which there are several.
        deletion: area under p(target) while tokens are removed, best first; lower is better.
        insertion: area under p(target) while tokens are put back, best first; higher is better.
        deletion_range, insertion_range: least and greatest area of several orders; of one order twice the area.
    """

    name: str
    scores: tuple[float, ...] | None
    deletion: float
    insertion: float
    deletion_range: tuple[float, float]
    insertion_range: tuple[float, float]


@dataclass(frozen=True)
class Trust:
    """What `trust` measured.

    Args:
        target: the token or class that is explained.
        probability: of it, with all tokens.
        without_any: of it, with all candidates removed.
        candidates: positions of the tokens that may be removed: all but the model's own markers.
        projected: whether value norms are after the output projection.
        attributions: six, then random and uniform.
        task: what is predicted: "next", "masked", "class" or "token class".
        position: where, counted in the input; None for a class of the whole input.
        likeliest: the first answers with all tokens, as (token or class, probability).
    """

    target: int
    probability: float
    without_any: float
    candidates: tuple[int, ...]
    projected: bool
    attributions: tuple[Attribution, ...]
    task: str
    position: int | None
    likeliest: tuple[tuple[int, float], ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts and lists."""
        return asdict(self)


def trust(
    model: Any,
    inputs: Mapping[str, Tensor],
    *,
    position: int | None = None,
    target: int | None = None,
    tokenizer: Any = None,
    steps: int = 6,
    randoms: int = 3,
    seed: int = 0,
) -> Trust:
    """Score the tokens of a text for one answer in six ways, and test each by removing tokens in its order.

    AUC = ∫₀¹ p(target | the best-scored share f of the tokens removed as keys, or put back) df, by trapezoids. A token
    is removed from every head of every layer, weights renormalised (`Span`).

    Args:
        model: a decoder or encoder of transformers that predicts a token or a class, in eval mode.
        inputs: what it is called with, one text (batch 1).
        position, target: as in `effects`.
        tokenizer: says which tokens are markers, and the mask token.
        steps: parts into which the shares 0 to 1 are cut.
        randoms: random orders; their areas are averaged.
        seed: of the random orders.

    Returns:
        Trust: attributions "raw weight", "weight × value norm", "rollout", "flow", "gradient × attention" (see
        `regard.lens.attributions`), "true deletion" (ln p less ln p without the token), and the controls: "random", and
        "uniform", which gives all tokens the same and so removes them in reading order.

    Raises:
        ValueError: an encoder-decoder, an embedding, a text of more than 256 tokens or fewer than two candidates.

    Source: Abnar and Zuidema 2020; Kobayashi et al. 2020; Petsiuk et al. 2018, section 3.3 (deletion and insertion).
    """
    if not 2 <= steps <= 100 or not 1 <= randoms <= 100:
        raise ValueError(f"trust: steps must be 2 to 100 and randoms 1 to 100; got {steps} and {randoms}. Pass fewer.")
    bench = Bench(model, inputs, position, getattr(tokenizer, "mask_token_id", None))
    if bench.paired or bench.question.task == "embedding" or "input_ids" not in bench.inputs:
        raise ValueError(
            f"trust: model must read one text and predict a token or a class; got {type(model).__name__}. "
            "Use effects for others."
        )
    ids = bench.inputs["input_ids"][0].tolist()
    special = set(getattr(tokenizer, "all_special_ids", ()) or ())
    own = bench.question.token or 0
    candidates = [
        at for at, token in enumerate(ids) if token not in special and (at <= own or bench.question.task != "next")
    ]
    if len(candidates) < 2 or len(ids) > MOST_TOKENS:
        raise ValueError(f"trust: the text must have 2 to {MOST_TOKENS} tokens; got {len(ids)}. Pass another.")
    with bench.ready():
        bench.survey(set())
        chosen = int(bench.before.argmax()) if target is None else target
        if not 0 <= chosen < len(bench.before):
            raise ValueError(
                f"trust: target must be from 0 to {len(bench.before) - 1}; got {target}. Pass one of those."
            )
        maps = read_maps(bench, chosen)
        scored = {name: score[candidates] for name, score in attributions(maps, own).items()}
        alone = bench.answers([[Span(at, at + 1)] for at in candidates], renormalise=True)[:, chosen]
        scored[DELETION] = bench.before[chosen] - alone
        orders = {name: [score.argsort(descending=True, stable=True).tolist()] for name, score in scored.items()}
        generator = torch.Generator().manual_seed(seed)
        orders["random"] = [torch.randperm(len(candidates), generator=generator).tolist() for _ in range(randoms)]
        orders["uniform"] = [list(range(len(candidates)))]
        areas = _areas(bench, orders, candidates, chosen, steps)
        first = bench.before.topk(min(LIKELIEST, len(bench.before)))
    found = []
    for name in orders:
        scores = tuple(scored[name].tolist()) if name in scored else None
        (deletion, insertion), ranges = areas[name].mean(0).tolist(), areas[name].aminmax(dim=0)
        low, high = ranges.min.tolist(), ranges.max.tolist()
        found.append(Attribution(name, scores, deletion, insertion, (low[0], high[0]), (low[1], high[1])))
    whole, none = float(bench.before[chosen].exp()), float(areas["nothing"][0, 0])
    likeliest = tuple(zip(first.indices.tolist(), first.values.exp().tolist(), strict=True))
    return Trust(
        chosen, whole, none, tuple(candidates), maps.projected, tuple(found), bench.question.task, bench.question.token,
        likeliest,
    )  # fmt: skip


def _areas(
    bench: Bench, orders: Mapping[str, list[list[int]]], candidates: Sequence[int], target: int, steps: int
) -> dict[str, Tensor]:
    """Deletion and insertion areas of each name, (orders, 2)."""
    count = len(candidates)
    sizes = [round(count * step / steps) for step in range(1, steps)]

    def without(indices: Sequence[int]) -> list[Cut]:
        return [Span(candidates[at], candidates[at] + 1) for at in sorted(indices)]

    trials: list[list[Cut]] = [without(range(count))]
    for several in orders.values():
        for order in several:
            trials += [without(order[:size]) for size in sizes] + [without(order[size:]) for size in sizes]
    p = bench.answers(trials, renormalise=True)[:, target].exp().tolist()
    whole, none, at = float(bench.before[target].exp()), p[0], 1
    found = {"nothing": torch.tensor([[none, none]], dtype=torch.float64)}
    shares = [0.0, *(size / count for size in sizes), 1.0]
    for name, several in orders.items():
        areas = []
        for _ in several:
            removing = [whole, *p[at : at + len(sizes)], none]
            adding = [none, *p[at + len(sizes) : at + 2 * len(sizes)], whole]
            at += 2 * len(sizes)
            line = torch.tensor([removing, adding], dtype=torch.float64)
            areas.append(torch.trapezoid(line, torch.tensor(shares, dtype=torch.float64)))
        found[name] = torch.stack(areas)
    return found


def trust_corpus(
    loaded: Loaded, corpus: str | Path, sentences: int = 100, progress: Callable[[str, float], None] | None = None
) -> dict[str, Any]:
    """`trust` over the first sentences of a file, each without its last token: what comes next is explained.

    Args:
        loaded: a decoder.
        corpus: a UTF-8 file, one sentence a line.
        sentences: how many.
        progress: called with what happens and the share that is done.

    Returns:
        "rows": for each attribution the mean areas, their standard errors, and in how many sentences it beats random.

    Raises:
        ValueError: no decoder, or too few sentences.
    """
    from regard.lens.corpus import windows

    if loaded.shape != "decoder":
        raise ValueError(f"trust: MODEL must be a decoder; got {loaded.name}. Use regard.lens.trust for one text.")
    texts = [list(one.ids) for one in windows(corpus, loaded.tokenizer, 64, markers=False) if len(one.ids) >= 4]
    if len(texts) < sentences or sentences < 2:
        raise ValueError(f"trust: CORPUS must hold {max(sentences, 2)} sentences; got {len(texts)}. Ask for fewer.")
    held: list[Trust] = []
    for number, ids in enumerate(texts[:sentences]):
        if progress:
            progress(f"sentence {number + 1} of {sentences}", number / sentences)
        held.append(trust_sentence(loaded, ids, number))
    return summary(held, loaded.name, Path(corpus).name)


def trust_sentence(loaded: Loaded, ids: Sequence[int], seed: int) -> Trust:
    """`trust` for the token that follows all but the last of a sentence, in four parts and with two random orders."""
    inputs = {"input_ids": torch.tensor([list(ids)[:-1]])}
    return trust(loaded.model, inputs, tokenizer=loaded.tokenizer, steps=4, randoms=2, seed=seed)


def summary(held: Sequence[Trust], model: str, corpus: str) -> dict[str, Any]:
    """What `trust_corpus` returns, of the sentences measured."""
    rows = []
    areas = torch.tensor([[(a.deletion, a.insertion) for a in one.attributions] for one in held], dtype=torch.float64)
    names = [one.name for one in held[0].attributions]
    random = areas[:, names.index("random")]
    for number, name in enumerate(names):
        own = areas[:, number]
        error = own.std(0) / len(held) ** 0.5
        rows.append({
            "name": name, "deletion": float(own[:, 0].mean()), "deletion_error": float(error[0]),
            "insertion": float(own[:, 1].mean()), "insertion_error": float(error[1]),
            "deletion_wins": int((own[:, 0] < random[:, 0]).sum()),
            "insertion_wins": int((own[:, 1] > random[:, 1]).sum()),
        })  # fmt: skip
    return {
        "model": model,
        "corpus": corpus,
        "sentences": len(held),
        "projected": held[0].projected,
        "tokens": sum(len(one.candidates) for one in held) / len(held),
        "rows": rows,
    }


def trust_markdown(told: dict[str, Any], command: str) -> str:
    """The table of `trust_corpus` as a document."""
    norm = "after the output projection" if told["projected"] else "before the output projection"
    lines = [
        "# Which attribution to trust",
        "",
        f"{told['model']}, what comes next in {told['sentences']} sentences of {told['corpus']} "
        f"({told['tokens']:.1f} tokens each). Tokens are removed as keys from every head, those with the highest score "
        "first (deletion: lower is better), or put back (insertion: higher is better); given are mean areas under "
        "the probability of the likeliest next token, ± standard error, and the sentences in which it beats "
        f"the mean of two random orders. Value norms are {norm}. Uniform scores remove tokens in reading order.",
        "",
        "| attribution | deletion area | beats random | insertion area | beats random |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in told["rows"]:
        against = ["–", "–"] if row["name"] == "random" else [row["deletion_wins"], row["insertion_wins"]]
        lines.append(
            f"| {row['name']} | {row['deletion']:.3f} ± {row['deletion_error']:.3f} | {against[0]} | "
            f"{row['insertion']:.3f} ± {row['insertion_error']:.3f} | {against[1]} |"
        )
    return "\n".join([*lines, "", "Made by:", "", "```", command, "```", ""])
