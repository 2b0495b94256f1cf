"""A second opinion on cuts: the same models with dense float64 attention whose weights are edited by hand.

Enters: a model of transformers, the order in which its attention modules are called, one set of cuts.
Leaves: the model's output, computed without regard. Floor: above the tests.
"""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from regard.lens import Head, Span

SIDES = {"encoder": "source", "cross": "source", "decoder": "target"}
state = {}


def dense(module, query, key, value, attention_mask=None, scaling=None, position_bias=None, **_):
    kind, number = state["order"][state["call"]]
    state["call"] += 1
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    for added in (position_bias, attention_mask):
        if added is not None:
            scores = scores + added[..., : key.shape[2]]
    weights = scores.softmax(-1)
    values = value[:, :, None].expand(*weights.shape[:3], *value.shape[2:]).clone()  # of each query its own
    lost = torch.zeros_like(weights, dtype=torch.bool)
    dropped = torch.zeros(query.shape[1], dtype=torch.bool)
    for cut in state["cuts"]:
        if isinstance(cut, Span):
            if not state["paired"] or SIDES[kind] == cut.side:
                lost[..., cut.start : cut.end] = True
        elif (cut.layer, cut.kind) == (number, kind):
            if isinstance(cut, Head):
                dropped[cut.head] = True
            else:
                lost[0, cut.head, cut.query, cut.key] = True
    if state["ablation"] == "mean":
        values = torch.where(lost[..., None], value.mean(2)[:, :, None, None], values)
    else:
        weights = weights.masked_fill(lost, 0)
        if state["renormalise"]:
            weights = weights / weights.sum(-1, keepdim=True).where(weights.sum(-1, keepdim=True) > 0, 1)
    plain = scores.softmax(-1) @ value
    out = torch.einsum("bhij,bhijd->bhid", weights, values)
    out[:, dropped] = plain[:, dropped].mean(2, keepdim=True) if state["ablation"] == "mean" else 0
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("dense_cuts", dense)
AttentionMaskInterface.register("dense_cuts", eager_mask)


@contextmanager
def as_dense(model):
    before = model.config._attn_implementation
    model.set_attn_implementation("dense_cuts")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def output(model, inputs, order, cuts=(), ablation="zero", renormalise=False):
    """The model's output under dense attention with these cuts (layers by number, kinds named)."""
    paired = bool(getattr(model.config, "is_encoder_decoder", False))
    state.update(order=order, call=0, cuts=cuts, ablation=ablation, renormalise=renormalise, paired=paired)
    with as_dense(model), torch.no_grad():
        return model(
            **inputs,
            **({} if "pixel_values" in inputs or not hasattr(model.config, "use_cache") else {"use_cache": False}),
        )
