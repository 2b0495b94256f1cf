"""Cuts: what a model answers without an edge, a head or a span equals dense float64 attention edited by hand."""

import json
import re

import pytest
import torch
import transformers

import dense_cuts
import regard.huggingface
from regard.lens import Edge, Head, Span, effects
from regard.lens.cuts import Surgery
from regard.lens.effect import Bench
from regard.lens.numbering import Place
from regard.lens.recorder import routed

LENGTH = 7


def sharp(model):
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5 * 2)
    return model.double().eval()


def build(kind):
    """(model, inputs, order of its attention calls)"""
    torch.manual_seed(11)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    ids = {"input_ids": torch.randint(5, 60, (1, LENGTH))}
    both = [("encoder", 0), ("encoder", 1)]
    if kind == "llama":
        config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **size)
        return sharp(transformers.LlamaForCausalLM(config)), ids, [("decoder", 0), ("decoder", 1)]
    if kind == "bert":
        ids["input_ids"][0, 3] = 4
        return sharp(transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **size))), ids, both
    if kind == "class":
        config = transformers.BertConfig(vocab_size=64, num_labels=3, **size)
        return sharp(transformers.BertForSequenceClassification(config)), ids, both
    if kind == "embedding":
        return sharp(transformers.BertModel(transformers.BertConfig(vocab_size=64, **size))), ids, both
    if kind == "vit":
        config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **size)
        pixels = {"pixel_values": torch.randn(1, 3, 16, 16, dtype=torch.float64)}
        return sharp(transformers.ViTForImageClassification(config)), pixels, both
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_heads=4)
    ids["decoder_input_ids"] = torch.randint(5, 60, (1, 5))
    pairs = [("decoder", 0), ("cross", 0), ("decoder", 1), ("cross", 1)]
    return sharp(transformers.T5ForConditionalGeneration(config)), ids, both + pairs


@pytest.fixture(scope="module", params=["llama", "bert", "class", "embedding", "vit", "t5"])
def case(request):
    return request.param, *build(request.param)


def self_kind(kind):
    return "decoder" if kind == "llama" else "encoder"


def some_cuts(kind):
    own, side = self_kind(kind), "source" if kind == "t5" else "text"
    cuts = [
        [Edge(0, 1, 4, 2, own)],
        [Edge(1, 3, 4, 4, own), Edge(1, 3, 4, 0, own), Edge(0, 0, 3, 1, own)],
        [Head(1, 2, own)],
        [Span(2, 4, side)],
        [Span(0, None, side), Edge(1, 0, 3, 2, own), Head(0, 3, own)],
    ]
    if kind == "t5":
        cuts += [
            [Edge(1, 2, 4, 6, "cross")],
            [Head(0, 1, "cross")],
            [Span(1, 3, "target")],
            [Edge(1, 0, 4, 1, "decoder")],
        ]
    return cuts


def probabilities(kind, output):
    if kind == "embedding":
        return torch.nn.functional.normalize(output.last_hidden_state.mean(1), dim=-1)[0]
    logits = output.logits[0]
    return (logits if kind in ("class", "vit") else logits[3 if kind == "bert" else -1]).softmax(-1)


@pytest.mark.parametrize(("ablation", "renormalise"), [("zero", False), ("zero", True), ("mean", False)])
def test_cuts_equal_dense_attention_edited_by_hand(case, ablation, renormalise):
    kind, model, inputs, order = case
    cuts = [one for one in some_cuts(kind) if not renormalise or not any(isinstance(c, Head) for c in one)]
    tokenizer = type("Tokenizer", (), {"mask_token_id": 4, "decode": lambda self, ids: f"<{ids[0]}>"})()
    found = effects(model, inputs, cuts, ablation=ablation, renormalise=renormalise, tokenizer=tokenizer, top_k=3)
    before = probabilities(kind, dense_cuts.output(model, inputs, order))
    for one, effect in zip(cuts, found.effects, strict=True):
        after = probabilities(kind, dense_cuts.output(model, inputs, order, one, ablation, renormalise))
        if kind == "embedding":
            assert effect.size == pytest.approx(1 - float(before @ after), abs=1e-9)
            assert effect.before is None and effect.changed == ()
            continue
        assert effect.size == pytest.approx(float((before * (before / after).log()).sum()), abs=1e-9, rel=1e-7)
        target = int(before.argmax())
        assert found.target.id == target
        assert effect.before == pytest.approx(float(before[target]), abs=1e-10)
        assert effect.after == pytest.approx(float(after[target]), abs=1e-10)
        moved = (after - before).abs()
        assert [change.id for change in effect.changed] == moved.topk(3).indices.tolist()
        assert max(e.size for e in found.effects) > 1e-4
    assert found.task == {"llama": "next", "t5": "next", "bert": "masked", "vit": "class"}.get(kind, kind)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_weights_and_masses_are_those_of_eager_attention(kind):
    model, inputs, _ = build(kind)
    side = "source" if kind == "t5" else "text"
    cuts = [Edge(1, 2, 4, 3, self_kind(kind)), Head(0, 1, self_kind(kind)), Span(1, 3, side)]
    tokenizer = type("Tokenizer", (), {"mask_token_id": 4, "decode": lambda self, ids: ""})()
    edge, head, span = effects(model, inputs, cuts, tokenizer=tokenizer).effects
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    weights = list(out.encoder_attentions if kind == "t5" else out.attentions)
    assert edge.weight == edge.mass == pytest.approx(float(weights[1][0, 2, 4, 3]), abs=1e-6)  # eager: float32
    assert (head.weight, head.mass) == (1, LENGTH)
    if kind == "t5":
        weights += list(out.cross_attentions)
    assert span.mass == pytest.approx(sum(float(w[..., 1:3].sum()) for w in weights), abs=1e-5)
    assert span.weight == pytest.approx(span.mass / sum(w.shape[1] * w.shape[2] for w in weights), abs=1e-5)


def test_only_the_cut_row_changes_and_all_others_keep_their_bits():
    model, inputs, _ = build("llama")
    model = model.float()
    bench = Bench(model, inputs)
    seen = {}
    with routed(model), torch.no_grad():
        bench.survey({4})
        cut = bench.resolve(Edge(1, 2, 4, 3))
        for name, cuts in (("before", []), ("after", [cut])):
            surgery = Surgery(bench.numbering, [cuts], False, "zero", False)
            with (
                surgery.active(),
                regard.huggingface.observe(lambda call, name=name: seen.setdefault(name, []).append(call.out)),
            ):
                model(**inputs)
    same = seen["before"][1] == seen["after"][1]
    assert not same[0, 2, 4].any()
    same[0, 2, 4] = True
    assert same.all()
    assert torch.equal(seen["before"][0], seen["after"][0])


def test_a_model_comes_back_as_it_was_and_an_uncut_one_keeps_its_bits():
    model, inputs, _ = build("llama")
    with torch.no_grad():
        before = model(**inputs).logits
    effects(model, inputs, Head(0, 0))
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_a_sink_takes_part_in_what_is_left():
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64).unbind()
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64)
    out, lse = regard.attention_with_stats(q, k, v, sinks=sinks)[:2]
    named = {"mask": None, "bias": None, "diagonal": None, "softcap": None, "query_offset": 0, "key_offset": 0}
    module = torch.nn.Identity()
    call = regard.huggingface.Call(
        module=module, name="a", layer_index=0, is_cross=False, q=q, k=k, v=v, sinks=sinks, scale=8**-0.5, out=out,
        lse=lse, **named,
    )  # fmt: skip
    numbering = type("One", (), {"place": lambda self, call: Place("a", 0, "encoder", 0)})()
    scores = torch.cat([q @ k.transpose(-1, -2) * 8**-0.5, sinks[None, :, None, None].expand(1, 2, 5, 1)], -1)
    keep = torch.ones(6, dtype=torch.bool)
    keep[[1, 3]] = False
    for renormalise in (False, True):
        weights = scores.softmax(-1) * keep
        if renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        expected = weights[..., :5] @ v
        spans = Surgery(numbering, [[Span(1, 2), Span(3, 4)]], False, "zero", renormalise).change(call)
        torch.testing.assert_close(spans, expected)
        edges = [Edge(0, head, row, key, "encoder") for head in range(2) for row in range(5) for key in (1, 3)]
        torch.testing.assert_close(Surgery(numbering, [edges], False, "zero", renormalise).change(call), expected)


def test_a_query_that_loses_all_its_keys_gives_zero_and_no_nan():
    model, inputs, order = build("llama")
    for renormalise in (False, True):
        found = effects(model, inputs, [Span(0, LENGTH)], renormalise=renormalise)
        before = probabilities("llama", dense_cuts.output(model, inputs, order))
        after = probabilities("llama", dense_cuts.output(model, inputs, order, [Span(0, LENGTH)], "zero", renormalise))
        assert found.effects[0].size == pytest.approx(float((before * (before / after).log()).sum()), rel=1e-8)


def test_random_cuts_of_the_same_mass_make_a_band():
    model, inputs, _ = build("llama")
    cuts = [Edge(1, 2, 6, 3), Head(1, 2), Span(3)]
    found = effects(model, inputs, cuts, controls=8, seed=5)
    again = effects(model, inputs, cuts, controls=8, seed=5)
    assert found == again
    for effect in found.effects:
        band = effect.control
        assert band.count == 8
        assert 0 <= band.low <= band.median <= band.high
    edge, head, _ = found.effects
    assert edge.control.mass == pytest.approx(edge.mass, rel=0.75)
    assert head.control.mass == head.mass
    assert effects(model, inputs, cuts).effects[0].control is None
    assert effects(model, inputs, [Span(0, LENGTH)], controls=3).effects[0].control is None  # no other span is as long


def test_a_target_and_a_position_may_be_chosen():
    model, inputs, order = build("llama")
    logits = dense_cuts.output(model, inputs, order).logits[0, 4].softmax(-1)
    found = effects(model, inputs, Head(0, 1), position=4, target=9)
    assert found.position == 4
    assert found.effects[0].before == pytest.approx(float(logits[9]), abs=1e-10)
    told = json.loads(json.dumps(found.to_json()))
    assert told["effects"][0]["cuts"] == [{"type": "head", "layer": 0, "head": 1, "kind": "decoder"}]


@pytest.mark.parametrize(
    ("kind", "cut", "named", "message"),
    [
        ("llama", Edge(0, 1, 2, 5), {}, "effects: the query must see the key; got query 2 and key 5 with weight 0"),
        ("llama", Edge(2, 1, 2, 1), {}, "effects: layer must be from 0 to 1; got 2. Pass one of those."),
        ("llama", Edge("other", 1, 2, 1), {}, "effects: layer must be from 0 to 1; got 'other'."),
        ("llama", Edge(0, 4, 2, 1), {}, "effects: head must be from 0 to 3; got 4. Pass one of those."),
        ("llama", Edge(0, 1, 7, 1), {}, "effects: query must be from 0 to 6; got 7. Pass one of those."),
        ("llama", Edge(0, 1, 2, -1), {}, "effects: key must be from 0 to 6; got -1. Pass one of those."),
        ("llama", Head(0, -1), {}, "effects: head must be from 0 to 3; got -1."),
        ("llama", Head(0, 1, "cross"), {}, 'effects: kind must be "decoder" for this model; got \'cross\'.'),
        ("t5", Head(0, 1), {}, 'effects: kind must be "cross" or "decoder" or "encoder" for this model; got \'self\''),
        ("llama", Span(3, 3), {}, "effects: a span must lie within 0 to 7 and hold a token; got 3 to 3."),
        ("llama", Span(5, 8), {}, "effects: a span must lie within 0 to 7 and hold a token; got 5 to 8."),
        ("llama", Span(0, 1, "source"), {}, 'effects: side must be "text" for this model; got \'source\'.'),
        ("t5", Span(0, 1), {}, 'effects: side must be "source" or "target" for this model; got \'text\'.'),
        ("llama", [], {}, "effects: cuts must be Edge, Head or Span, at least one"),
        ("llama", [[Head(0, 0)], []], {}, "effects: cuts must be Edge, Head or Span, at least one"),
        ("llama", Head(0, 0), {"ablation": "noise"}, 'effects: ablation must be "zero" or "mean"; got \'noise\'.'),
        ("llama", Head(0, 0), {"renormalise": True}, "effects: renormalise must be False with heads"),
        ("llama", Span(1), {"renormalise": True, "ablation": "mean"}, "effects: renormalise must be False with heads"),
        ("llama", Head(0, 0), {"controls": 1001}, "effects: controls must be from 0 to 1000; got 1001."),
        ("llama", Head(0, 0), {"top_k": -1}, "effects: top_k must be from 0 to 1000; got -1."),
        ("llama", Head(0, 0), {"position": 7}, "effects: position must be from 0 to 6; got 7."),
        ("llama", Head(0, 0), {"target": 64}, "effects: target must be a token or class from 0 to 63; got 64."),
        ("bert", Head(0, 0), {}, "effects: the text must hold a mask token for BertForMaskedLM; got none."),
        ("class", Head(0, 0), {"position": 1}, "effects: position must be None for BertForSequenceClassification"),
        ("vit", Head(0, 0), {"position": 1}, "effects: position must be None for a model without tokens; got 1."),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(kind, cut, named, message):
    model, inputs, _ = build(kind)
    with pytest.raises(ValueError, match=re.escape(message)):
        effects(model, inputs, cut, **named)


def test_models_and_inputs_that_cannot_be_asked_are_refused():
    model, inputs, _ = build("llama")
    with pytest.raises(ValueError, match="effects: inputs must be one input, batch 1; got batch 2."):
        effects(model, {"input_ids": torch.ones(2, 3, dtype=torch.int64)}, Head(0, 0))
    with pytest.raises(ValueError, match="effects: inputs must be one input, batch 1; got batch none."):
        effects(model, {}, Head(0, 0))
    with pytest.raises(ValueError, match="effects: model must be in eval mode; got one in training mode."):
        effects(model.train(), inputs, Head(0, 0))
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=64, **size)
    with pytest.raises(ValueError, match="effects: model must predict a token or a class, or be one without a head"):
        effects(transformers.BertForQuestionAnswering(config).eval(), inputs, Head(0, 0))
    with pytest.raises(ValueError, match="effects: position must be given for BertForTokenClassification"):
        effects(transformers.BertForTokenClassification(config).eval(), inputs, Head(0, 0))
    swin = transformers.SwinModel(
        transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4)
    ).eval()
    with pytest.raises(ValueError, match="(effects: model must keep one batch row|AttentionInterface)"):
        effects(swin, {"pixel_values": torch.randn(1, 3, 16, 16)}, Head(0, 0))
