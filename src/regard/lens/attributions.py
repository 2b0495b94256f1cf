"""What may be read off attention about an answer: one score for each token, in five ways.

Enters: a model that runs once on one text, and the position whose answer is explained.
Leaves: (n,) scores: raw weight, weight × value norm, rollout, flow, gradient × attention.
Memory is that of one map for each layer and head: texts are short.
Floor 6: stands on the cuts' tiles and a bench; scipy loads for the flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard import huggingface
from regard.lens.cuts import check_rows, tile
from regard.lens.effect import Bench

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "o", "wo")
UNIT = 1_000_000  # a capacity of 1, as the whole numbers that maximum_flow takes


@dataclass
class Maps:
    """Of each layer, from the first to the last.

    Args:
        weights: (num_heads, n, n) float64.
        norms: ‖W_O v_j‖ of each head, or ‖v_j‖, (num_heads, n).
        values: (num_heads, n, head_dim_v).
        moved: ∂y / ∂out, (num_heads, n, head_dim_v); y = ln p of the target.
        projected: whether the output projection was found, so that the norms are Kobayashi's.
    """

    weights: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    moved: list[Tensor] = field(default_factory=list)
    projected: bool = True


def read_maps(bench: Bench, target: int) -> Maps:
    """Run a bench's model once, with gradients by the heads' outputs."""
    maps, leaves = Maps(), []

    def change(call: Any) -> Tensor:
        place = bench.numbering.place(call)
        if place is None:
            return call.out
        check_rows(call, 1)
        heads, n = call.q.shape[1:3]
        values = call.v.detach()[0].repeat_interleave(heads // call.v.shape[1], 0).double()
        matrix = output_projection(bench.model, place.module, heads * values.shape[2])
        maps.weights.append(tile(call, range(n))[0].double())
        maps.values.append(values)
        if matrix is None:
            maps.projected = False
            maps.norms.append(values.norm(dim=-1))
        else:
            split = matrix.detach().double().reshape(-1, heads, values.shape[2])
            maps.norms.append(torch.einsum("ohd,hnd->hno", split, values).norm(dim=-1))
        leaf = torch.zeros_like(call.out, requires_grad=True)
        leaves.append(leaf)
        return call.out + leaf

    bench.numbering.next_pass()
    with torch.enable_grad(), huggingface.intervene(change):
        output = bench.model(**bench.inputs, **bench.question.options)
        answer = bench.question.answer(output)[0, target]
        found = torch.autograd.grad(answer, leaves)
    maps.moved = [own[0].double() for own in found]
    return maps


def output_projection(model: nn.Module, name: str, width: int) -> Tensor | None:
    """The matrix (hidden_size, width) that follows the heads of an attention module; None where none is found."""
    inside = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else None
    for owner in (inside, getattr(parent, "output", None)):
        for part in OUTPUTS:
            linear = getattr(owner, part, None)
            if isinstance(linear, nn.Linear) and linear.in_features == width:
                return linear.weight
    return None


def attributions(maps: Maps, position: int) -> dict[str, Tensor]:
    """Scores of every token for the answer at a position, (n,) each.

    raw weight: mean over layers and heads of w_{pj}.
    weight × value norm: mean over layers and heads of w_{pj} ‖W_O v_j‖ (Kobayashi et al. 2020, section 3).
    rollout: row p of Â_L … Â_1 with Â = (mean over heads of w + I) / 2 (Abnar and Zuidema 2020, equation 1).
    flow: maximum flow from p at the top to j at the bottom, capacities Â (the same, section 3).
    gradient × attention: Σ over layers, heads and queries of w_ij ∂y/∂w_ij, with ∂y/∂w_ij = v_j · ∂y/∂out_i; what
    removing j as a key everywhere does to y = ln p, to first order.
    """
    mixed = [(own.mean(0) + torch.eye(own.shape[1], dtype=own.dtype)) / 2 for own in maps.weights]
    rolled = torch.eye(len(mixed[0]), dtype=torch.float64)[position]
    for layer in reversed(mixed):
        rolled = rolled @ layer
    pairs = zip(maps.weights, maps.values, maps.moved, strict=True)
    return {
        "raw weight": torch.stack([own[:, position].mean(0) for own in maps.weights]).mean(0),
        "weight × value norm": torch.stack(
            [(own[:, position] * norm).mean(0) for own, norm in zip(maps.weights, maps.norms, strict=True)]
        ).mean(0),
        "rollout": rolled,
        "flow": flow(mixed, position),
        "gradient × attention": torch.stack(
            [torch.einsum("hij,hjd,hid->j", own, values, moved) for own, values, moved in pairs]
        ).sum(0),
    }


def flow(mixed: list[Tensor], position: int) -> Tensor:
    """Maximum flow from a position at the top to each token at the bottom, capacities (n, n) from the first layer up.

    Source: Abnar and Zuidema 2020, section 3.
    """
    maximum_flow, csr = _scipy()
    n, layers = len(mixed[0]), len(mixed)
    rows, cols, capacities = [], [], []
    for number, layer in enumerate(mixed):
        kept = (layer * UNIT).round().to(torch.int32)
        i, j = kept.nonzero(as_tuple=True)
        rows.append((number + 1) * n + i)
        cols.append(number * n + j)
        capacities.append(kept[i, j])
    nodes = (layers + 1) * n
    ends = (torch.cat(rows).numpy(), torch.cat(cols).numpy())
    graph = csr((torch.cat(capacities).numpy(), ends), shape=(nodes, nodes))
    found = [maximum_flow(graph, layers * n + position, j).flow_value for j in range(n)]
    return torch.tensor(found, dtype=torch.float64) / UNIT


def _scipy() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import maximum_flow
    except ImportError:
        raise ValueError("trust: the flow must have scipy; got none. Run: pip install 'regard[corpus]'.") from None
    return maximum_flow, csr_matrix
