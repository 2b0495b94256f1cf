"""What the live page may ask of the model: what a cut changes, and which attribution to trust.

Enters: a `Look`, and JSON from the page. Every number in it is checked and bounded.
Leaves: JSON. The contract, for POST /api/effects (all but "cuts" may be left out):

    {"text": "the text that is shown", "ablation": "zero" | "mean", "renormalise": false, "position": 8, "target": 253,
     "controls": 20, "seed": 0, "cuts": [[CUT, ...], ...]}            cuts of one inner list are cut together
    CUT: {"type": "edge", "attention": 0, "layer": 5, "head": 11, "query": 8, "key": 2}
         {"type": "head", "attention": 0, "layer": 5, "head": 11}
         {"type": "span", "side": 0, "start": 2, "stop": 4}           attention and side as numbered in the page's JSON

    -> {"task": "next" | "masked" | "class" | "token class" | "embedding",
        "measure": "KL divergence, nats" | "1 - cosine", "position": 8 | null, "target": CHANGE | null,
        "likeliest": [CHANGE, ...],
        "effects": [{"cuts": [CUT, ...], "weight": 0.68, "mass": 0.68, "size": 0.0074, "before": 0.10 | null,
                     "after": 0.11 | null, "changed": [CHANGE, ...],
                     "control": null | {"low": .., "median": .., "high": .., "mass": .., "count": 20}}, ...]}
    CHANGE: {"id": 253, "text": " a", "before": 0.10, "after": 0.11}

POST /api/trust {"text": .., "position": 8, "target": 253} (nothing is needed; decoders and masked-token models)

    -> {"target": 253, "target_text": " a", "probability": 0.11, "without_any": 0.004, "projected": true,
        "candidates": [0, 1, ...], "attributions": [{"name": "raw weight", "scores": [..] | null, "deletion": 0.107,
        "insertion": 0.108, "deletion_range": [low, high], "insertion_range": [..]}, ...],
        "task": "next", "position": 8 | null, "likeliest": [{"id": 253, "text": " a", "before": 0.11}, ...]}
    scores go with the candidates, tokens; "random" (8 orders, whose ranges are given) and "uniform" are controls

A refusal is {"error": "a sentence"}: 400 no JSON object, 409 another text is shown, 413 too long, 415 no JSON, 422 what
cannot be cut. Sizes are to be shown beside the band of the control, never alone.
Floor 6: stands on effects and looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from regard.lens.cuts import Cut, Edge, Head, Span
from regard.lens.effect import effects
from regard.lens.look import Look
from regard.lens.trusting import trust

MOST_CUTS = 64
MOST_CONTROLS = 100
RANDOMS = 8


def inputs_of(look: Look) -> dict[str, Tensor]:
    """What the model of a look was called with.

    Raises:
        ValueError: a speech model, whose sound is not kept.
    """
    ids = look.recording.token_ids
    names = {"text": "input_ids", "source": "input_ids", "target": "decoder_input_ids"}
    held = {names[side]: found[0] for side, found in ids.items() if found}
    if look.loaded.shape == "speech" or "input_ids" not in held:
        raise ValueError(f"effects: model must read tokens; got {look.loaded.name}, whose input is not kept. Use text.")
    return held


def ask_effects(look: Look, asked: dict[str, Any]) -> dict[str, Any]:
    """Answer POST /api/effects.

    Raises:
        ValueError: JSON that does not follow the contract, or a cut that there is not.
    """
    groups = asked.get("cuts")
    if not isinstance(groups, list) or not 0 < len(groups) <= MOST_CUTS:
        raise ValueError(f"effects: cuts must be a list of 1 to {MOST_CUTS} lists; got something else. Send fewer.")
    if not all(isinstance(group, list) and 0 < len(group) <= MOST_CUTS for group in groups):
        raise ValueError(f"effects: each of the cuts must be a list of 1 to {MOST_CUTS}; got something else.")
    cuts = [[_cut(look, told) for told in group] for group in groups]
    ablation = asked.get("ablation", "zero")
    renormalise = asked.get("renormalise", False)
    if not isinstance(ablation, str) or not isinstance(renormalise, bool):
        raise ValueError('effects: ablation must be "zero" or "mean", and renormalise true or false.')
    found = effects(
        look.loaded.model,
        inputs_of(look),
        cuts,
        ablation=ablation,
        renormalise=renormalise,
        position=_number(asked, "position", None),
        target=_number(asked, "target", None),
        tokenizer=look.loaded.tokenizer,
        controls=min(_number(asked, "controls", 0) or 0, MOST_CONTROLS),
        seed=_number(asked, "seed", 0) or 0,
    )
    told = found.to_json()
    for given, effect in zip(groups, told["effects"], strict=True):
        effect["cuts"] = given  # as the page numbers attentions and sides
    return told


def _cut(look: Look, told: Any) -> Cut:
    if not isinstance(told, dict):
        raise ValueError('effects: a cut must be an object with a "type"; got something else.')
    kind = told.get("type")
    if kind == "span":
        side = _index(told, "side", len(look.sides))
        return Span(_index(told, "start"), _index(told, "stop"), look.sides[side].name)
    if kind not in ("edge", "head"):
        raise ValueError(f'effects: the type of a cut must be "edge", "head" or "span"; got {str(kind)[:40]!r}.')
    attention = look.attentions[_index(told, "attention", len(look.attentions))]
    number = _index(told, "layer")
    record = next((one for one in attention.layers if one.number == number), None)
    if record is None:
        there = f"{attention.numbers[0]} to {attention.numbers[-1]}"
        raise ValueError(f"effects: layer must be from {there}; got {number}. Choose one of those.")
    if kind == "head":
        return Head(number, _index(told, "head"), attention.kind)
    return Edge(number, _index(told, "head"), _index(told, "query"), _index(told, "key"), attention.kind)


def _index(told: dict[str, Any], name: str, length: int | None = None) -> int:
    number = _number(told, name, None)
    if number is None or (length is not None and number >= length):
        there = "a whole number" if length is None else f"from 0 to {length - 1}"
        raise ValueError(f"effects: {name} must be {there}; got {str(told.get(name))[:40]}.")
    return number


def _number(told: dict[str, Any], name: str, default: int | None) -> int | None:
    number = told.get(name, default)
    if number is None:
        return default
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**31:
        raise ValueError(f"effects: {name} must be a whole number of 0 or more; got {str(number)[:40]}.")
    return number


def ask_trust(look: Look, asked: dict[str, Any]) -> dict[str, Any]:
    """Answer POST /api/trust.

    Raises:
        ValueError: JSON that does not follow the contract, or a model that predicts no token or class.
    """
    told = trust(
        look.loaded.model,
        inputs_of(look),
        position=_number(asked, "position", None),
        target=_number(asked, "target", None),
        tokenizer=look.loaded.tokenizer,
        randoms=RANDOMS,
    ).to_json()
    classes = None if told["task"] in ("next", "masked") else look.loaded.model.config.id2label

    def named(number: int) -> str:
        return look.loaded.tokenizer.decode([number]) if classes is None else classes.get(number, str(number))

    likeliest = [{"id": number, "text": named(number), "before": before} for number, before in told["likeliest"]]
    return {**told, "target_text": named(told["target"]), "likeliest": likeliest}


ASKS: dict[str, Callable[[Look, Any], dict[str, Any]]] = {"effects": ask_effects, "trust": ask_trust}
"""What `regard.lens.server.application` is given as `asks`."""
