"""Does it matter? What a model answers when a part of its attention is cut.

Enters: a transformers model, one input, cuts (`Edge`, `Head`, `Span`).
Leaves: `Effects`: for each cut the weight that was cut, the change of the answer, and what random cuts of the same mass
change.
Floor 6: stands on the cuts, the outcomes and the recorder's routing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard import op
from regard.lens.cuts import ABLATIONS, Cut, Edge, Head, Span, Surgery, check_rows, matches, terms, tile
from regard.lens.numbering import Numbering, Place
from regard.lens.outcomes import distance, divergence, question
from regard.lens.recorder import routed

TOKENS_AT_ONCE = 2048  # tokens of all batch rows of one forward pass together
MOST_CUTS = 4096
MOST_CONTROLS = 1000


@dataclass(frozen=True)
class Change:
    """One token or class whose probability changed."""

    id: int
    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Band:
    """What random cuts of about the same mass do: quantiles of their effects.

    Args:
        low: the 5 % quantile.
        median: the middle.
        high: the 95 % quantile.
        mass: mean mass of the random cuts.
        count: how many there were.
    """

    low: float
    median: float
    high: float
    mass: float
    count: int


@dataclass(frozen=True)
class Effect:
    """What one cut changed.

    Args:
        cuts: what was cut together.
        weight: mean weight of what was cut: of an edge its weight; of a head 1; of a span the share of all weight that
            its keys receive, over layers, heads and queries.
        mass: sum of the weights that were cut.
        size: KL divergence in nats of the probabilities after from those before; for embeddings 1 − cosine.
        before: probability of the target; None for embeddings.
        after: the same after the cut.
        changed: tokens or classes whose probability changed most.
        control: what random cuts do; None where none were asked for or there is nothing else to cut.
    """

    cuts: tuple[Cut, ...]
    weight: float
    mass: float
    size: float
    before: float | None
    after: float | None
    changed: tuple[Change, ...]
    control: Band | None


@dataclass(frozen=True)
class Effects:
    """What `effects` measured.

    Args:
        task: "next", "masked", "class", "token class" or "embedding".
        measure: "KL divergence, nats" or "1 - cosine".
        position: which token's answer it is; None for a whole input.
        target: the token or class that is followed; None for embeddings.
        likeliest: what the model answers without a cut.
        effects: one for each cut, in order.
    """

    task: str
    measure: str
    position: int | None
    target: Change | None
    likeliest: tuple[Change, ...]
    effects: tuple[Effect, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts and lists; each cut says its "type"."""
        held = asdict(self)
        for told, effect in zip(held["effects"], self.effects, strict=True):
            told["cuts"] = [{"type": type(cut).__name__.lower(), **asdict(cut)} for cut in effect.cuts]
        return held


def effects(
    model: Any,
    inputs: Mapping[str, Tensor],
    cuts: Sequence[Cut | Sequence[Cut]] | Cut,
    *,
    ablation: str = "zero",
    renormalise: bool = False,
    position: int | None = None,
    target: int | None = None,
    tokenizer: Any = None,
    top_k: int = 5,
    controls: int = 0,
    seed: int = 0,
) -> Effects:
    """Cut edges, heads or tokens out of a model's attention, and measure how its answer changes.

    KL = Σ_t p_t ln(p_t / q_t), p the probabilities before and q after the cut; for a model without a head 1 − cos of
    its embeddings. out_i = Σ_j w_ij v_j loses the terms of the cut keys; what else a call computes keeps its bits.

    Args:
        model: a transformers model in eval mode that `regard.huggingface.prepare` can route.
        inputs: what it is called with, one input (batch 1), without padding.
        cuts: an `Edge`, `Head` or `Span`, or a list of them; a list inside the list is cut together.
        ablation: "zero", what is cut gives nothing; "mean", an edge or span gives the mean of its text's values, a head
            its mean output.
        renormalise: whether the weights that are left add up to one again; for edges and spans, with "zero".
        position: whose answer is read, a token of the input (an encoder-decoder: of decoder_input_ids). Default the
            last; for masked-token models the first mask token.
        target: the token or class to follow. Default the likeliest before the cuts.
        tokenizer: names the tokens, and the mask token.
        top_k: how many changed tokens to name.
        controls: how many random cuts to compare each with: for an edge others of its query with the nearest weights;
            for a head other heads; for a span others as long. Default none.
        seed: of the random cuts.

    Returns:
        Effects: one `Effect` for each cut.

    Raises:
        ValueError: a layer, head, query or key that there is not, an edge that the head cannot see, a batch, a model
            in training mode or without a known answer, or settings that do not go together.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        ... )
        >>> model = transformers.LlamaForCausalLM(config).eval()
        >>> found = effects(model, {"input_ids": torch.tensor([[1, 2, 3]])}, Edge(layer=0, head=1, query=2, key=0))
        >>> found.task, len(found.effects), found.effects[0].size >= 0
        ('next', 1, True)

    Source: Michel et al. 2019, section 2.2 (heads); Geva et al. 2023, section 4 (edges: "attention knockout").
    """
    wanted = _as_list(cuts)
    _check_settings(wanted, ablation, renormalise, controls, top_k)
    bench = Bench(model, inputs, position, getattr(tokenizer, "mask_token_id", None))
    with bench.ready():
        bench.survey({cut.query for one in wanted for cut in one if isinstance(cut, Edge)})
        resolved = [[bench.resolve(cut) for cut in one] for one in wanted]
        generator = torch.Generator().manual_seed(seed)
        random = [_controls(bench, one, controls, generator) for one in resolved]
        trials = resolved + [cut for group in random for cut in group]
        answers = bench.answers(trials, ablation, renormalise)
    before, after = bench.before, answers[: len(resolved)]
    sizes = bench.sizes(answers)
    followed, bands, at = None, [], len(resolved)
    for group in random:
        own = sizes[at : at + len(group)]
        at += len(group)
        bands.append(_band(own, [bench.mass(cut) for cut in group]) if group else None)
    if bench.question.task != "embedding":
        followed = int(before.argmax()) if target is None else target
        if not 0 <= followed < len(before):
            raise ValueError(
                f"effects: target must be a token or class from 0 to {len(before) - 1}; got {target}. "
                "Pass one of those."
            )
    names = _Names(model, tokenizer, bench.question.task)
    measured = [
        Effect(
            cuts=tuple(cut),
            weight=bench.weight(cut),
            mass=bench.mass(cut),
            size=float(sizes[row]),
            before=None if followed is None else float(before[followed].exp()),
            after=None if followed is None else float(after[row, followed].exp()),
            changed=() if followed is None else names.changed(before.exp(), after[row].exp(), top_k),
            control=bands[row],
        )
        for row, cut in enumerate(resolved)
    ]
    return Effects(
        task=bench.question.task,
        measure="1 - cosine" if followed is None else "KL divergence, nats",
        position=bench.question.token,
        target=None if followed is None else names.change(followed, before.exp(), before.exp()),
        likeliest=() if followed is None else names.likeliest(before.exp(), top_k),
        effects=tuple(measured),
    )


class Bench:
    """One model with one input, asked again and again under other cuts.

    Args:
        model, inputs, position: as in `effects`.
        mask_token: id of the mask token, for masked-token models.
    """

    before: Tensor
    """Answer without a cut: log-probabilities (n,), or a unit vector."""

    def __init__(
        self, model: Any, inputs: Mapping[str, Tensor], position: int | None = None, mask_token: int | None = None
    ) -> None:
        if getattr(model, "training", False):
            raise ValueError("effects: model must be in eval mode; got one in training mode. Call model.eval() first.")
        self.inputs = {name: own for name, own in inputs.items() if isinstance(own, Tensor)}
        batches = {own.shape[0] for own in self.inputs.values() if own.dim()}
        if batches != {1}:
            found = ", ".join(map(str, sorted(batches))) or "none"
            raise ValueError(f"effects: inputs must be one input, batch 1; got batch {found}. Pass one text at a time.")
        self.model, self.question = model, question(model, self.inputs, position, mask_token)
        self.paired = bool(getattr(model.config, "is_encoder_decoder", False))
        self.numbering = Numbering(model)
        self.places: dict[Place, tuple[int, int, int]] = {}  # -> num_heads, seq_len_q, seq_len_kv
        self.rows: dict[tuple[Place, int], Tensor] = {}  # weights (num_heads, seq_len_kv) of a query
        self.received: dict[Place, Tensor] = {}  # weight that each key gets from all queries (num_heads, seq_len_kv)

    @property
    def seq_len(self) -> int:
        """Tokens that one batch row costs: the longest of what the attentions read."""
        return max(max(q, kv) for _, q, kv in self.places.values())

    def ready(self) -> Any:
        """The context in which the model is routed through regard."""
        return _ready(self.model)

    def survey(self, queries: set[int]) -> None:
        """Run the model once as it is: its answer, the sizes of its attentions, and the weights of some queries."""

        def look(call: Any) -> None:
            place = self.numbering.place(call)
            if place is None:
                return
            check_rows(call, 1)
            sizes = (call.q.shape[1], call.q.shape[2], call.k.shape[2])
            self.places[place] = sizes
            for query in queries:
                if 0 <= query < sizes[1]:
                    self.rows[place, query] = tile(call, range(query, query + 1))[0, :, 0]
            found = op.statistics(call.q, call.k, call.lse, **terms(call), received=True)
            self.received[place] = found["received"][0]

        from regard import huggingface

        self.numbering.next_pass()
        with huggingface.observe(look):
            self.before = self._answer(self.inputs)[0]
        if not self.places:
            raise ValueError(
                f"effects: model must attend; got {type(self.model).__name__} without an attention call. "
                "Choose another model."
            )

    def resolve(self, cut: Cut) -> Cut:
        """A cut with its kind or side named; refuses what this input does not have."""
        if isinstance(cut, Span):
            return self._resolve_span(cut)
        kinds = {place.kind for place in self.places}
        if cut.kind == "self" and len(kinds & {"encoder", "decoder"}) == 1:
            cut = replace(cut, kind=(kinds & {"encoder", "decoder"}).pop())
        if cut.kind not in kinds:
            there = " or ".join(f'"{kind}"' for kind in sorted(kinds))
            raise ValueError(f"effects: kind must be {there} for this model; got {cut.kind!r}. Pass one of those.")
        found = [place for place in self.places if matches(cut, place)]
        if not found:
            numbers = sorted(place.number for place in self.places if place.kind == cut.kind)
            raise ValueError(
                f"effects: layer must be from {numbers[0]} to {numbers[-1]}; got {cut.layer!r}. Pass one of those."
            )
        if len(found) > 1:
            names = ", ".join(place.module for place in found)
            raise ValueError(f"effects: layer {cut.layer!r} must name one module; got {names}. Pass its name.")
        heads, seq_len_q, seq_len_kv = self.places[found[0]]
        limits = {"head": heads} if isinstance(cut, Head) else {"head": heads, "query": seq_len_q, "key": seq_len_kv}
        for name, limit in limits.items():
            if not 0 <= getattr(cut, name) < limit:
                raise ValueError(
                    f"effects: {name} must be from 0 to {limit - 1}; got {getattr(cut, name)}. Pass one of those."
                )
        if isinstance(cut, Edge) and float(self.rows[found[0], cut.query][cut.head, cut.key]) == 0:
            raise ValueError(
                f"effects: the query must see the key; got query {cut.query} and key {cut.key} with weight 0 in layer "
                f"{cut.layer} head {cut.head}. Choose a key that it may attend to."
            )
        return cut

    def _resolve_span(self, cut: Span) -> Span:
        kinds = {"text": ("encoder", "decoder"), "source": ("encoder", "cross"), "target": ("decoder",)}
        allowed = ("source", "target") if self.paired else ("text",)
        if cut.side not in allowed:
            there = " or ".join(f'"{side}"' for side in allowed)
            raise ValueError(f"effects: side must be {there} for this model; got {cut.side!r}. Pass one of those.")
        length = max((kv for place, (_, _, kv) in self.places.items() if place.kind in kinds[cut.side]), default=0)
        if not 0 <= cut.start < cut.end <= length:
            raise ValueError(
                f"effects: a span must lie within 0 to {length} and hold a token; got {cut.start} to {cut.end}. "
                "Pass a start below its stop."
            )
        return replace(cut, stop=cut.end)

    def answers(self, trials: Sequence[Sequence[Cut]], ablation: str = "zero", renormalise: bool = False) -> Tensor:
        """Answers under each set of resolved cuts, (trials, n)."""
        at_once = max(1, TOKENS_AT_ONCE // self.seq_len)
        found = []
        for first in range(0, len(trials), at_once):
            group = trials[first : first + at_once]
            surgery = Surgery(self.numbering, group, self.paired, ablation, renormalise)
            with surgery.active():
                batch = {name: own.expand(len(group), *own.shape[1:]) for name, own in self.inputs.items()}
                found.append(self._answer(batch))
        return torch.cat(found) if found else self.before[None][:0]

    def sizes(self, answers: Tensor) -> Tensor:
        """How far each answer lies from that without a cut: KL divergence in nats, or 1 − cosine."""
        return (distance if self.question.task == "embedding" else divergence)(self.before, answers)

    def weight(self, cuts: Sequence[Cut]) -> float:
        """Mean weight of what is cut."""
        counts = [1.0 if isinstance(cut, Edge) else self._rows_of(cut) for cut in cuts]
        return self.mass(cuts) / max(sum(counts), 1.0)

    def mass(self, cuts: Sequence[Cut]) -> float:
        """Sum of the weights of what is cut; of a head one for each query."""
        return float(sum(self._mass(cut) for cut in cuts))

    def _places_of(self, cut: Cut) -> list[Place]:
        if isinstance(cut, Span):
            kinds = {"text": ("encoder", "decoder"), "source": ("encoder", "cross"), "target": ("decoder",)}[cut.side]
            return [place for place in self.places if place.kind in kinds]
        return [place for place in self.places if matches(cut, place)]

    def _rows_of(self, cut: Cut) -> float:
        heads = [(1 if isinstance(cut, Head) else self.places[p][0]) * self.places[p][1] for p in self._places_of(cut)]
        return float(sum(heads))

    def _mass(self, cut: Cut) -> float:
        places = self._places_of(cut)
        if isinstance(cut, Edge):
            return float(self.rows[places[0], cut.query][cut.head, cut.key])
        if isinstance(cut, Head):
            return float(self.places[places[0]][1])
        return sum(float(self.received[place][:, cut.start : cut.end].double().sum()) for place in places)

    def _answer(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return self.question.answer(self.model(**batch, **self.question.options), batch.get("attention_mask"))


def _ready(model: Any) -> Any:
    from contextlib import ExitStack

    stack = ExitStack()
    stack.enter_context(routed(model))
    return stack


def _controls(bench: Bench, cuts: list[Cut], count: int, generator: torch.Generator) -> list[list[Cut]]:
    """Random cuts to compare with: each cut of the set is replaced by another like it."""
    if not count:
        return []
    drawn = [list(_others(bench, cut, cuts, count, generator)) for cut in cuts]
    return [list(one) for one in zip(*drawn, strict=True)] if all(drawn) else []


def _others(bench: Bench, cut: Cut, taken: Sequence[Cut], count: int, generator: torch.Generator) -> Iterator[Cut]:
    """`count` random cuts like this one, none of those taken; fewer kinds than asked for repeat."""
    if isinstance(cut, Edge):
        pool: list[Cut] = []
        held = []
        wanted = bench.mass([cut])
        for place, (_, seq_len_q, _) in bench.places.items():
            if place.kind != cut.kind or cut.query >= seq_len_q:
                continue
            row = bench.rows[place, cut.query]
            near, where = (row - wanted).abs().flatten().topk(min(4 * count + len(taken), row.numel()), largest=False)
            for gap, at in zip(near.tolist(), where.tolist(), strict=True):
                head, key = divmod(at, row.shape[1])
                other = Edge(place.module, head, cut.query, key, cut.kind)
                if row[head, key] > 0 and not any(_same(bench, other, one) for one in taken):
                    held.append((gap, other))
        held.sort(key=lambda pair: (pair[0], str(pair[1])))
        pool = [other for _, other in held[: 4 * count]]
    elif isinstance(cut, Head):
        heads = {place: sizes[0] for place, sizes in bench.places.items() if place.kind == cut.kind}
        every = [Head(place.module, head, cut.kind) for place, own in heads.items() for head in range(own)]
        pool = [one for one in every if not any(_same(bench, one, held) for held in taken)]
    else:
        length = max(bench.places[place][2] for place in bench._places_of(cut))
        size = cut.end - cut.start
        starts = range(length - size + 1)
        apart = [s for s in starts if not any(isinstance(t, Span) and s < t.end and t.start < s + size for t in taken)]
        pool = [Span(start, start + size, cut.side) for start in apart]
    if not pool:
        return
    order = torch.randperm(len(pool), generator=generator).tolist()
    for number in range(count):
        yield pool[order[number % len(order)]]


def _same(bench: Bench, one: Cut, other: Cut) -> bool:
    """Whether two edges or heads are one, whether their layer is named or numbered."""
    if type(one) is not type(other) or isinstance(one, Span) or isinstance(other, Span):
        return one == other
    if bench._places_of(one) != bench._places_of(other):
        return False
    return replace(one, layer=0) == replace(other, layer=0)


def _band(sizes: Tensor, masses: list[float]) -> Band:
    low, median, high = torch.quantile(sizes.double(), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return Band(low, median, high, sum(masses) / len(masses), len(masses))


class _Names:
    """Names of tokens and classes."""

    def __init__(self, model: Any, tokenizer: Any, task: str) -> None:
        self.labels = getattr(model.config, "id2label", None) if "class" in task else None
        self.tokenizer = None if self.labels else tokenizer

    def change(self, token: int, before: Tensor, after: Tensor) -> Change:
        text = str(token)
        if self.labels:
            text = str(self.labels.get(token, token))
        elif self.tokenizer is not None:
            text = self.tokenizer.decode([token])
        return Change(token, text, float(before[token]), float(after[token]))

    def changed(self, before: Tensor, after: Tensor, count: int) -> tuple[Change, ...]:
        most = (after - before).abs().topk(min(count, len(before))).indices.tolist()
        return tuple(self.change(token, before, after) for token in most)

    def likeliest(self, before: Tensor, count: int) -> tuple[Change, ...]:
        return tuple(
            self.change(token, before, before) for token in before.topk(min(count, len(before))).indices.tolist()
        )


def _as_list(cuts: Any) -> list[list[Cut]]:
    if isinstance(cuts, (Edge, Head, Span)):
        cuts = [cuts]
    found = [[one] if isinstance(one, (Edge, Head, Span)) else list(one) for one in cuts]
    if not found or not all(found) or not all(isinstance(cut, (Edge, Head, Span)) for one in found for cut in one):
        raise ValueError("effects: cuts must be Edge, Head or Span, at least one; got something else. Pass one.")
    if len(found) > MOST_CUTS:
        raise ValueError(f"effects: cuts must be at most {MOST_CUTS}; got {len(found)}. Ask in several calls.")
    return found


def _check_settings(cuts: list[list[Cut]], ablation: str, renormalise: bool, controls: int, top_k: int) -> None:
    if ablation not in ABLATIONS:
        raise ValueError(f'effects: ablation must be "zero" or "mean"; got {ablation!r}. Choose one of them.')
    if renormalise and (ablation == "mean" or any(isinstance(cut, Head) for one in cuts for cut in one)):
        raise ValueError(
            "effects: renormalise must be False with heads and with mean ablation, where no weight is left over; got "
            "True. Leave it out."
        )
    if not 0 <= controls <= MOST_CONTROLS:
        raise ValueError(f"effects: controls must be from 0 to {MOST_CONTROLS}; got {controls}. Pass fewer.")
    if not 0 <= top_k <= 1000:
        raise ValueError(f"effects: top_k must be from 0 to 1000; got {top_k}. Pass fewer.")
