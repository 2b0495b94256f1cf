"""`regard prune`: a model without its heads of least importance, for good.

Enters: an opened decoder, and a corpus that tells which heads matter.
Leaves: a checkpoint that transformers opens, with fewer rows in the projections of queries, keys and values and fewer
columns in the output's; prune.json and prune.html beside it, with the loss against heads kept and a random order.

The scheme: transformers keeps one head count for all layers, so every layer loses the same number; and query heads
that share a key/value head go together. In each layer the groups of largest Σ E|∂L/∂gate| stay (Michel et al. 2019).
Floor 6: stands on the gates and the corpus."""

from __future__ import annotations

import copy
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.lens.corpus import windows as corpus_windows
from regard.lens.cuts import Head, Surgery
from regard.lens.gates import Loss, gradients, removed
from regard.lens.models import Loaded
from regard.lens.numbering import Numbering, Place
from regard.lens.pruning_report import prune_html
from regard.lens.recorder import routed

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
RANDOM_ORDERS = 3
TIMINGS = 5
TOLERANCE = 1e-4  # of the largest logit


def prune_model(
    loaded: Loaded,
    corpus: str | Path,
    out: str | Path,
    *,
    keep: float = 0.8,
    window: int = 64,
    windows: int = 8,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Remove heads from a model, check that it computes what the gated model does, and save it.

    Args:
        loaded: a decoder with q_proj, k_proj, v_proj, o_proj and head_dim in its config (Llama's kin).
        corpus: a UTF-8 file, one text a line.
        out: the directory to make.
        keep: share of the heads to keep, above 0 and below 1; rounded to whole groups, the same in every layer.
        window: tokens read together.
        windows: how many; every other one chooses the heads, the rest measures.
        seed: of the random orders.
        progress: called with what happens and the share that is done.

    Returns:
        What prune.json holds.

    Raises:
        ValueError: a model of another family, a share that removes nothing, a corpus that is too short, or a directory
            that is not empty.
    """
    report = progress or (lambda _message, _share: None)
    target = Path(out)
    counts = _check(loaded, target, keep, window, windows)
    heads, groups, kept = counts
    loss, numbering = Loss(loaded.model, loaded.tokenizer), Numbering(loaded.model)
    texts = []
    for one in corpus_windows(corpus, loaded.tokenizer, window, markers=False):
        if len(one.ids) >= min(window, 16):
            texts.append(list(one.ids))
        if len(texts) == windows:
            break
    if len(texts) < 2:
        raise ValueError(f"prune: CORPUS must hold two texts of 16 tokens; got {len(texts)}. Pass a longer one.")
    chosen, held_out = texts[::2], texts[1::2]
    with routed(loaded.model):
        importance: dict[Place, Tensor] = {}
        for number, ids in enumerate(chosen):
            report("which heads matter", number / len(chosen))
            for place, own in gradients(loss, numbering, ids, number).items():
                importance[place] = importance.get(place, torch.zeros(heads, dtype=torch.float64)) + own / len(chosen)
        stay = {place: _best_groups(own, groups, kept) for place, own in importance.items()}
        curve = _curve(loss, numbering, importance, held_out, seed, report)
        lost = [
            Head(place.module, head, place.kind)
            for place in importance
            for head in range(heads)
            if head // (heads // groups) not in stay[place]
        ]
        order = torch.Generator().manual_seed(seed)
        random_stay = {p: sorted(torch.randperm(groups, generator=order)[:kept].tolist()) for p in importance}
        random_lost = [
            Head(place.module, head, place.kind)
            for place in importance
            for head in range(heads)
            if head // (heads // groups) not in random_stay[place]
        ]
        results = [removed(loss, numbering, ids, [lost, random_lost], seed=n) for n, ids in enumerate(held_out)]
        with torch.no_grad(), Surgery(numbering, [lost], False, "zero", False).active():
            gated = loaded.model(input_ids=torch.tensor([held_out[0]])).logits
    report("removing", 0.9)
    smaller = smaller_model(loaded.model, stay, groups)
    ids = torch.tensor([held_out[0]])
    with torch.no_grad():
        difference = float((smaller(input_ids=ids).logits - gated).abs().max() / gated.abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"prune: the smaller model must equal the gated one; got {difference:.1e} apart. Report this."
        )
    speed = _speed(loaded.model, smaller, ids, report)
    mean = [sum(column) / len(results) for column in zip(*([whole, *others] for whole, others in results), strict=True)]
    told = {
        "format": "regard-prune/1",
        "model": loaded.id,
        "name": loaded.name,
        "asked": keep,
        "kept_share": kept / groups,
        "heads_per_layer": [heads, kept * (heads // groups)],
        "kv_heads_per_layer": [groups, kept],
        "parameters": [count(loaded.model), count(smaller)],
        "loss": {"whole": mean[0], "pruned": mean[1], "random": mean[2]},
        "difference": difference,
        "speed": speed,
        "kept_groups": {place.module: own for place, own in stay.items()},
        "curve": curve,
        "texts": [len(chosen), len(held_out)],
        "window": window,
        "seed": seed,
    }
    told["summary"] = (
        f"{loaded.name}: {heads} -> {told['heads_per_layer'][1]} heads in each layer, "
        f"{told['parameters'][0]:,} -> {told['parameters'][1]:,} parameters; loss on held-out text {mean[0]:.3f} -> "
        f"{mean[1]:.3f} (random groups: {mean[2]:.3f}); forward {speed['whole_ms']:.0f} -> "
        f"{speed['pruned_ms']:.0f} ms. "
        f"Logits equal the gated model's within {difference:.0e} of the largest."
    )
    _save(smaller, loaded, target, told, ids)
    return told


def smaller_model(model: Any, stay: dict[Place, list[int]], groups: int) -> Any:
    """A new model of the same class with only the key/value groups that stay, weights cut, config following.

    Args:
        model: with q_proj, k_proj, v_proj, o_proj in every attention module.
        stay: for each attention module the groups to keep, as many in each.
        groups: key/value heads now.
    """
    config = copy.deepcopy(model.config)
    width = config.head_dim
    per_group = config.num_attention_heads // groups
    kept = len(next(iter(stay.values())))
    config.num_attention_heads, config.num_key_value_heads = kept * per_group, kept
    state = dict(model.state_dict())
    for place, own in stay.items():
        for name in PROJECTIONS:
            size = width if name in ("k_proj", "v_proj") else width * per_group
            rows = torch.cat([torch.arange(group * size, (group + 1) * size) for group in own])
            weight = f"{place.module}.{name}.weight"
            state[weight] = state[weight][:, rows] if name == "o_proj" else state[weight][rows]
            bias = f"{place.module}.{name}.bias"
            if bias in state and name != "o_proj":
                state[bias] = state[bias][rows]
    config._attn_implementation = "sdpa"
    smaller = type(model)(config).to(model.dtype)
    smaller.load_state_dict(state)
    return smaller.eval()


def count(model: nn.Module) -> int:
    """Parameters of a model, shared ones once."""
    return sum(own.numel() for own in model.parameters())


def _best_groups(importance: Tensor, groups: int, kept: int) -> list[int]:
    return sorted(importance.reshape(groups, -1).sum(1).topk(kept).indices.tolist())


def _curve(
    loss: Loss,
    numbering: Numbering,
    importance: dict[Place, Tensor],
    texts: Sequence[list[int]],
    seed: int,
    report: Callable[[str, float], None],
) -> dict[str, Any]:
    """Loss against the share of single heads kept: least important first, and in random orders (by gates)."""
    every = [
        (float(own[head]), Head(p.module, head, p.kind)) for p, own in importance.items() for head in range(len(own))
    ]
    ranked = [head for _, head in sorted(every, key=lambda one: -one[0])]
    generator = torch.Generator().manual_seed(seed + 1)
    orders = [ranked] + [
        [ranked[i] for i in torch.randperm(len(ranked), generator=generator)] for _ in range(RANDOM_ORDERS)
    ]
    sets = [order[round(share * len(order)) :] for order in orders for share in SHARES]
    whole, losses = 0.0, torch.zeros(len(sets), dtype=torch.float64)
    for number, ids in enumerate(texts):
        own, found = removed(
            loss, numbering, ids, sets, seed=number,
            progress=lambda share, number=number: report("loss against heads kept", (number + share) / len(texts)),
        )  # fmt: skip
        whole += own / len(texts)
        losses += torch.tensor(found, dtype=torch.float64) / len(texts)
    table = losses.reshape(len(orders), len(SHARES)).tolist()
    return {"shares": list(SHARES), "whole": whole, "importance": table[0], "random": table[1:], "heads": len(ranked)}


def _speed(whole: Any, smaller: Any, ids: Tensor, report: Callable[[str, float], None]) -> dict[str, Any]:
    """Medians of a forward pass of both models, in turns, milliseconds."""
    report("measuring speed", 0.95)
    found: dict[str, list[float]] = {"whole_ms": [], "pruned_ms": []}
    with torch.no_grad():
        for turn in range(TIMINGS + 1):
            for name, model in (("whole_ms", whole), ("pruned_ms", smaller)):
                start = time.perf_counter()
                model(input_ids=ids, use_cache=False)
                if turn:
                    found[name].append(1000 * (time.perf_counter() - start))
    return {**{name: statistics.median(own) for name, own in found.items()}, "tokens": ids.shape[1], "runs": TIMINGS}


def _save(smaller: Any, loaded: Loaded, target: Path, told: dict[str, Any], ids: Tensor) -> None:
    """Write the directory whole or not at all, and open the model from it once."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        smaller.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        again = type(smaller).from_pretrained(partial, local_files_only=True, dtype=smaller.dtype).eval()
        with torch.no_grad():
            if not torch.equal(again(input_ids=ids).logits, smaller(input_ids=ids).logits):
                raise RuntimeError("prune: the saved model must give the same bits; got others. Report this.")
        (partial / "prune.json").write_text(json.dumps(told, indent=1), "utf-8")
        (partial / "prune.html").write_text(prune_html(told), "utf-8")
        if target.is_dir():
            target.rmdir()
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(loaded: Loaded, target: Path, keep: float, window: int, windows: int) -> tuple[int, int, int]:
    """Query heads, key/value heads, and key/value heads to keep, of each layer."""
    if not 0 < keep < 1:
        raise ValueError(f"prune: --keep must be above 0 and below 1; got {keep:g}. Pass 0.8 to keep four fifths.")
    if not 16 <= window <= 512:
        raise ValueError(f"prune: --window must be from 16 to 512; got {window}. Pass one of those.")
    if windows < 2:
        raise ValueError(f"prune: --windows must be at least 2; got {windows}. Half of them choose, half measure.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"prune: --out must be a directory that is not there yet, or empty; got {target}. Name another."
        )
    config, name = loaded.model.config, type(loaded.model).__name__
    heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None)
    owners = [
        module for module in loaded.model.modules()
        if all(isinstance(getattr(module, part, None), nn.Linear) for part in PROJECTIONS)
    ]  # fmt: skip
    if loaded.shape != "decoder" or not owners or not isinstance(width, int) or not heads or not groups:
        raise ValueError(
            f"prune: model must be a decoder with q_proj, k_proj, v_proj, o_proj and head_dim in its config; got "
            f"{name}, whose config cannot say that a layer has fewer heads. Use regard heads to see which matter."
        )
    sizes = {(m.q_proj.out_features, m.k_proj.out_features, m.o_proj.in_features) for m in owners}
    if sizes != {(heads * width, groups * width, heads * width)}:
        raise ValueError(f"prune: model must have the same heads in every layer; got {name} with {sorted(sizes)}.")
    kept = max(1, round(keep * groups))
    if kept == groups:
        raise ValueError(
            f"prune: --keep must remove one of the {groups} key/value groups of each layer; got {keep:g}, which keeps "
            f"all. Pass at most {(groups - 0.51) / groups:.2f}."
        )
    return heads, groups, kept
