"""Attributions and their test by deletion: each equals its definition, computed another way."""

import itertools
import re

import networkx
import pytest
import torch
import transformers
from typer.testing import CliRunner

import dense_cuts
from regard import cli
from regard.lens import Span, trust
from regard.lens.attributions import attributions, flow, read_maps
from regard.lens.effect import Bench
from regard.lens.models import load
from regard.lens.trusting import trust_corpus, trust_markdown
from tiny_folders import make

ORDER = [("decoder", 0), ("decoder", 1)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return made.double().eval()


IDS = torch.tensor([[5, 9, 33, 12, 40, 7]])


def probability(model, cuts, target):
    out = dense_cuts.output(model, {"input_ids": IDS}, ORDER, cuts, "zero", True)
    return float(out.logits[0, -1].softmax(-1)[target])


def test_attributions_equal_their_definitions_though_no_parameter_wants_a_gradient(model):
    model.requires_grad_(False)
    bench = Bench(model, {"input_ids": IDS})
    with bench.ready():
        bench.survey(set())
        target = int(bench.before.argmax())
        maps = read_maps(bench, target)
    found = attributions(maps, 5)
    model.set_attn_implementation("eager")
    out = model(IDS, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    weights = [w[0].double() for w in out.attentions]
    torch.testing.assert_close(
        found["raw weight"], torch.stack([w[:, 5] for w in weights]).mean((0, 1)), rtol=1e-5, atol=1e-6
    )
    norms = []
    for layer, hidden, w in zip(model.model.layers, out.hidden_states, weights, strict=False):
        values = layer.self_attn.v_proj(layer.input_layernorm(hidden))[0].unflatten(-1, (2, 8)).repeat_interleave(2, 1)
        for head in range(4):
            moved = values[:, head] @ layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8].T
            norms.append(w[head, 5] * moved.norm(dim=-1))
    assert maps.projected
    torch.testing.assert_close(found["weight × value norm"], torch.stack(norms).mean(0).detach(), rtol=1e-5, atol=1e-6)
    mixed = [(w.mean(0) + torch.eye(6)) / 2 for w in weights]
    torch.testing.assert_close(found["rollout"], (mixed[1] @ mixed[0])[5], rtol=1e-5, atol=1e-6)
    graph = networkx.DiGraph()
    for number, layer in enumerate(mixed):
        for i in range(6):
            for j in range(6):
                graph.add_edge((number + 1, i), (number, j), capacity=float(layer[i, j]))
    expected = [networkx.maximum_flow_value(graph, (2, 5), (0, j)) for j in range(6)]
    torch.testing.assert_close(found["flow"], torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_gradient_times_attention_is_the_slope_of_scaling_a_value_everywhere(model):
    bench = Bench(model, {"input_ids": IDS})
    with bench.ready():
        bench.survey(set())
        target = int(bench.before.argmax())
        found = attributions(read_maps(bench, target), 5)["gradient × attention"]
    import regard.huggingface
    from regard import op
    from regard.lens.cuts import terms

    def value(token, size):
        def change(call):
            v = call.v.clone()
            v[:, :, token] *= size
            return op.attend(call.q, call.k, v, **terms(call), sinks=None, dropout=0.0)[0]

        with bench.ready(), torch.no_grad(), regard.huggingface.intervene(change):
            return float(model(IDS, use_cache=False).logits[0, -1].log_softmax(-1)[target])

    for token in (0, 2, 5):
        slope = (value(token, 1 + 1e-3) - value(token, 1 - 1e-3)) / 2e-3  # Llama's norms: float32
        assert float(found[token]) == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_areas_are_those_of_removing_tokens_in_order(model):
    told = trust(model, {"input_ids": IDS}, steps=3, randoms=2)
    by_name = {one.name: one for one in told.attributions}
    assert list(by_name) == [
        "raw weight", "weight × value norm", "rollout", "flow", "gradient × attention", "true deletion", "random",
        "uniform",
    ]  # fmt: skip
    whole = probability(model, [], told.target)
    assert told.probability == pytest.approx(whole, abs=1e-6)
    deletion = by_name["true deletion"]
    for token, score in zip(told.candidates, deletion.scores, strict=True):
        alone = probability(model, [Span(token, token + 1)], told.target)
        assert score == pytest.approx(float(torch.tensor(whole / alone).log()), abs=1e-5)  # Llama's norms: float32
    for one in told.attributions:
        if one.name == "random":
            continue
        scores = torch.tensor(one.scores) if one.scores else torch.zeros(6)
        order = scores.argsort(descending=True, stable=True).tolist()
        removing = [probability(model, [Span(t, t + 1) for t in order[:size]], told.target) for size in (0, 2, 4, 6)]
        adding = [probability(model, [Span(t, t + 1) for t in order[size:]], told.target) for size in (0, 2, 4, 6)]
        for area, line in ((one.deletion, removing), (one.insertion, adding)):
            assert area == pytest.approx(sum((a + b) / 6 for a, b in itertools.pairwise(line)), abs=1e-9), one.name
    assert by_name["random"].scores is None
    assert trust(model, {"input_ids": IDS}, steps=3, randoms=2) == told


def test_the_flow_through_one_layer_is_its_weight():
    layer = torch.tensor([[1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
    assert flow([layer], 1).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"steps": 1}, "trust: steps must be 2 to 100 and randoms 1 to 100; got 1 and 3."),
        ({"randoms": 0}, "trust: steps must be 2 to 100 and randoms 1 to 100; got 6 and 0."),
        ({"target": 64}, "trust: target must be from 0 to 63; got 64."),
        ({"inputs": {"input_ids": IDS[:, :1]}}, "trust: the text must have 2 to 256 tokens; got 1."),
        ({"inputs": {"input_ids": torch.ones(1, 300, dtype=torch.int64)}}, "trust: the text must have 2 to 256 tokens"),
    ],
)
def test_what_cannot_be_trusted_is_refused(model, named, message):
    inputs = named.pop("inputs", {"input_ids": IDS})
    with pytest.raises(ValueError, match=re.escape(message)):
        trust(model, inputs, **named)


def test_an_embedding_is_refused():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(
        ValueError, match="trust: model must read one text and predict a token or a class; got BertModel."
    ):
        trust(transformers.BertModel(config).eval(), {"input_ids": IDS})


def test_a_table_over_sentences_is_written_by_one_command(tmp_path):
    folder = make(tmp_path / "llama", "llama")
    (tmp_path / "lines.txt").write_text("The cat sat on the mat\nA dog and a cat\nit was the mat\n")
    out = tmp_path / "trust.md"
    command = ["trust", str(folder), str(tmp_path / "lines.txt"), "--out", str(out), "--sentences", "2"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    text = out.read_text()
    assert text.count("\n| ") == 10
    assert "regard trust" in text and "2 sentences of lines.txt" in text
    told = trust_corpus(load(str(folder)), tmp_path / "lines.txt", 2)
    assert trust_markdown(told, "x").split("Made by")[0] == text.split("Made by")[0]
    refused = CliRunner().invoke(cli.app, [*command[:-1], "9"])
    assert refused.exit_code == 1
    assert "trust: CORPUS must hold 9 sentences; got 3." in refused.output.replace("\n", " ")
    refused = CliRunner().invoke(cli.app, [*command[:3], "--out", "table.txt"])
    assert "trust: --out must be a .md file; got table.txt." in refused.output.replace("\n", " ")
