"""Models as folders: what is written is read back; what is cut, foreign or mixed up is refused in words."""

import json

import pytest
import torch

from regard.models import BERT, GPT, Classifier, RecurrentSeq2Seq, Seq2Seq, ViT

SMALL = {"dim": 16, "num_heads": 4, "num_layers": 2}
TOKENS = torch.tensor([[3, 1, 4], [1, 5, 9]])
MODELS = {
    "gpt": (lambda: GPT(30, window=3, tied=False, **SMALL), (TOKENS,)),
    "gpt with yarn": (
        lambda: GPT(
            30, position_options={"scaling": {"kind": "yarn", "factor": 2.0, "original_length": 8}}, **SMALL
        ),
        (TOKENS,),
    ),
    "bert": (lambda: BERT(30, head="classify", num_labels=4, **SMALL), (TOKENS,)),
    "seq2seq": (lambda: Seq2Seq(30, 20, positions="relative", head_bias=True, **SMALL), (TOKENS, TOKENS)),
    "recurrent": (lambda: RecurrentSeq2Seq(30, dim=8, hidden=16, cell="lstm"), (TOKENS, TOKENS)),
    "vit": (lambda: ViT(8, 4, 3, channels=1, **SMALL), (torch.linspace(-1, 1, 64).view(1, 1, 8, 8),)),
    "points": (
        lambda: Classifier("points", {"neighbors": 2}, 3, pool="mean", positions="none", **SMALL),
        (torch.linspace(-1, 1, 30).view(1, 10, 3).sin(),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_comes_back(native, name, tmp_path):
    make, inputs = MODELS[name]
    model = make().eval()
    model.save_pretrained(tmp_path / "deep" / "folder")
    again = type(model).from_pretrained(tmp_path / "deep" / "folder")
    assert not again.training and again.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    torch.testing.assert_close(again(*inputs), model(*inputs))
    again(*inputs).sum().backward()  # it can be trained on
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_half_the_bytes_come_back_as_float32(tmp_path):
    model = GPT(30, **SMALL)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    again = GPT.from_pretrained(tmp_path / "half")
    assert again.embedding.weight.dtype == torch.float32
    torch.testing.assert_close(again.embedding.weight, model.embedding.weight, atol=1e-3, rtol=1e-3)
    assert GPT.from_pretrained(tmp_path / "half", dtype=torch.float16).embedding.weight.dtype == torch.float16


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    first, second = GPT(30, **SMALL), GPT(30, **SMALL)
    first.save_pretrained(tmp_path)
    import safetensors.torch

    def full(_weights, file, **_named):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            second.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path).embedding.weight, first.embedding.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.fixture
def saved(tmp_path):
    GPT(30, **SMALL).save_pretrained(tmp_path)
    return tmp_path


def refused(folder, words, model=GPT, error=ValueError):
    with pytest.raises(error, match=f"^{model.__name__}.from_pretrained: {words}"):
        model.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    refused(saved, f".* must hold config.json and model.safetensors; got no {name}", error=FileNotFoundError)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_weights_cut_short_are_refused(saved, share):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(saved, r"model.safetensors must be a whole safetensors file; got [\d,]+ bytes")


def test_a_header_that_claims_more_than_there_is_is_refused(saved):
    (saved / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    refused(saved, "model.safetensors must be a whole safetensors file; got 10 bytes")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "config.json must be JSON; got"),
        ("[1]", "config.json must be regard's; got one of 'list'"),
        ('{"model_type": "bert"}', "config.json must be regard's; got one of 'bert'. Convert"),
        ('{"library": "regard", "format": 9, "model": "GPT"}', "config.json must be format 1 of 'GPT'; got format 9"),
        ('{"library": "regard", "format": 1, "model": "GPT"}', "config.json must name the model's arguments"),
        (" " * (1 << 20) + "{}", "config.json must be at most 1,048,576 bytes; got 1,048,578"),
    ],
)
def test_a_foreign_or_broken_config_is_refused(saved, text, words):
    (saved / "config.json").write_text(text)
    refused(saved, words)


def test_another_class_is_refused(saved):
    refused(saved, "config.json must be format 1 of 'BERT'; got format 1 of 'GPT'. Open it by its own class", BERT)


def test_files_of_two_models_are_refused(saved, tmp_path):
    GPT(31, **SMALL).save_pretrained(tmp_path / "other")
    (saved / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    refused(saved, "model.safetensors must belong to config.json; got another model's")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_layers": 10**9}, r"num_layers must be at most the \d+ tensors held; got 1000000000"),
        ({"vocab_size": 10**12}, r"embedding.weight must be \(1000000000000, 16\) as config.json says; got \(30, 16\)"),
        ({"num_layers": 1}, r"transformer.stack.blocks.1.attention.* must be absent as config.json says"),
        ({"dim": 15}, "config.json must make a model; got .*dim must be a multiple of num_heads"),
        ({"color": "red"}, "config.json must make a model; got .*color"),
        ({"vocab_size": -3}, "config.json must make a model; got"),
    ],
)
def test_a_config_that_lies_takes_no_memory(saved, arguments, words):
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    config["arguments"] |= arguments
    text = json.dumps(config)
    (saved / "config.json").write_text(text)
    save_file(weights, saved / "model.safetensors", metadata={"config": text})
    refused(saved, words)


def test_arguments_that_json_cannot_hold_are_refused():
    with pytest.raises(TypeError, match="models: arguments must be plain numbers and words"):
        GPT(30, position_options={"base": torch.tensor(2.0)}, **SMALL)
