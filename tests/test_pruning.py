"""`regard prune`: the smaller model is the gated one, opens again, and other models are refused."""

import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

from regard import cli
from regard.lens.models import load
from regard.lens.pruning import prune_model, smaller_model
from tiny_folders import make

LINES = [
    "The cat sat on the mat because it was tired and it sat on the mat",
    "A dog and a cat sat on the mat it was",
] * 3


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(LINES) + "\n")
    return tmp_path / "corpus.txt"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(str(make(tmp_path_factory.mktemp("tiny") / "llama", "llama")))


def test_the_smaller_model_equals_the_model_with_those_heads_zeroed(loaded, corpus, tmp_path):
    out = tmp_path / "smaller"
    told = prune_model(loaded, corpus, out, keep=0.5, window=16, windows=4)
    assert told["heads_per_layer"] == [4, 2]
    assert told["kv_heads_per_layer"] == [2, 1]
    again = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert (again.config.num_attention_heads, again.config.num_key_value_heads, again.config.head_dim) == (2, 1, 8)
    attention = again.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (16, 32)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (8, 32)
    assert attention.o_proj.weight.shape == (32, 16)
    ids = loaded.tokenizer(LINES[0], return_tensors="pt").input_ids
    weights = {}
    with torch.no_grad():
        for name, (group,) in told["kept_groups"].items():
            weight = loaded.model.get_parameter(f"{name}.o_proj.weight")
            weights[name] = weight.clone()
            weight[:, (1 - group) * 16 : (2 - group) * 16] = 0
        expected = loaded.model(ids).logits
        for name, kept in weights.items():
            loaded.model.get_parameter(f"{name}.o_proj.weight").copy_(kept)
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert told["difference"] < 1e-4
    assert told["parameters"][1] == sum(p.numel() for p in again.parameters()) < told["parameters"][0]
    assert transformers.AutoTokenizer.from_pretrained(out)(LINES[0]).input_ids == ids[0].tolist()
    assert json.loads((out / "prune.json").read_text())["kept_groups"] == told["kept_groups"]
    assert (out / "prune.html").read_text().count("<polyline") == 4
    assert load(str(out)).shape == "decoder"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_saved_loss_is_that_of_the_saved_model(loaded, corpus, tmp_path):
    told = prune_model(loaded, corpus, tmp_path / "a", keep=0.5, window=16, windows=2)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    from regard.lens.corpus import windows

    held_out = [one.ids for one in windows(corpus, loaded.tokenizer, 16, markers=False) if len(one.ids) == 16][1]
    ids = torch.tensor([held_out])
    with torch.no_grad():
        assert told["loss"]["pruned"] == pytest.approx(float(again(ids, labels=ids).loss), abs=1e-4)
        assert told["loss"]["whole"] == pytest.approx(float(loaded.model(ids, labels=ids).loss), abs=1e-4)


def test_biases_are_cut_with_their_rows():
    torch.manual_seed(5)
    config = transformers.Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    for name, own in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(own)
    from regard.lens.numbering import Place

    stay = {Place(f"model.layers.{n}.self_attn", n, "decoder", 0): [own] for n, own in enumerate((1, 0))}
    smaller = smaller_model(model, stay, 2)
    ids = torch.randint(0, 40, (1, 9))
    with torch.no_grad():
        found = smaller(ids).logits
        model.model.layers[0].self_attn.o_proj.weight[:, :16] = 0
        model.model.layers[1].self_attn.o_proj.weight[:, 16:] = 0
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("llama", ["--keep", "1.5"], "prune: --keep must be above 0 and below 1; got 1.5."),
        ("llama", ["--keep", "0"], "prune: --keep must be above 0 and below 1; got 0."),
        ("llama", ["--keep", "0.9"], "prune: --keep must remove one of the 2 key/value groups of each layer; got 0.9"),
        ("llama", ["--window", "8"], "prune: --window must be from 16 to 512; got 8."),
        ("llama", ["--windows", "1"], "prune: --windows must be at least 2; got 1."),
        ("bert", ["--keep", "0.5"], "prune: model must be a decoder with q_proj, k_proj, v_proj, o_proj and head_dim"),
    ],
)
def test_what_cannot_be_pruned_is_refused(corpus, tmp_path, kind, arguments, message):
    folder = make(tmp_path / kind, kind)
    done = CliRunner().invoke(cli.app, ["prune", str(folder), str(corpus), "--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 1
    assert message in done.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_full_directory_and_a_short_corpus_are_refused(loaded, corpus, tmp_path):
    with pytest.raises(ValueError, match="prune: --out must be a directory that is not there yet, or empty"):
        prune_model(loaded, corpus, tmp_path, keep=0.5)
    (tmp_path / "short.txt").write_text("The cat\n")
    with pytest.raises(ValueError, match="prune: CORPUS must hold two texts of 16 tokens; got 0."):
        prune_model(loaded, tmp_path / "short.txt", tmp_path / "new", keep=0.5, window=16)
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(
        cli.app,
        [
            "prune",
            loaded.model.name_or_path,
            str(corpus),
            "--out",
            str(tmp_path / "empty"),
            "--keep",
            "0.5",
            "--window",
            "16",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "4 -> 2 heads in each layer" in done.output.replace("\n", " ")
