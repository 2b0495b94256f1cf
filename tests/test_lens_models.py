"""Opening models: the right class, the right limit, and one clear sentence for what cannot or must not be opened."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers

from regard.lens.models import load
from tiny_folders import make


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, held = tmp_path_factory.mktemp("tiny"), {}

    def one(kind):
        if kind not in held:
            held[kind] = make(root / kind, kind)
        return held[kind]

    return one


@pytest.mark.parametrize(
    ("kind", "shape", "built", "longest"),
    [
        ("bert", "encoder", "BertModel", 24),
        ("llama", "decoder", "LlamaForCausalLM", 128),
        ("t5", "encoder-decoder", "T5ForConditionalGeneration", None),
        ("whisper", "speech", "WhisperForConditionalGeneration", 32),
    ],
)
def test_a_folder_opens_as_what_it_holds(folders, kind, shape, built, longest):
    said = []
    loaded = load(str(folders(kind)), lambda message, share: said.append((message, share)))
    assert (loaded.id, loaded.name, loaded.shape, loaded.longest) == (kind, kind, shape, longest)
    assert type(loaded.model).__name__ == built
    assert not loaded.model.training
    assert (loaded.features is not None) == (kind == "whisper")
    assert said[-1] == (f"{kind} is ready", 1.0)
    assert all(not parameter.is_meta for parameter in loaded.model.parameters())


def test_roberta_counts_its_positions_from_after_the_padding(folders, tmp_path):
    folder = shutil.copytree(folders("bert"), tmp_path / "roberta")
    config = transformers.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    transformers.RobertaModel(config).save_pretrained(folder)
    loaded = load(str(folder))
    assert loaded.longest == 18
    with torch.no_grad():
        loaded.model(torch.full((1, 18), 5))


def changed(folder, path, how):
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    weights = path / "model.safetensors"
    if how == "no config":
        (path / "config.json").unlink()
    elif how == "broken config":
        (path / "config.json").write_text("{")
    elif how == "a list as config":
        (path / "config.json").write_text("[1]")
    elif how == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / name).unlink()
    elif how == "pickle":
        weights.rename(path / "pytorch_model.bin")
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "remote code":
        config |= {
            "model_type": "stranger",
            "auto_map": {"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config"},
        }
        (path / "modeling.py").write_text("raise SystemExit('ran')")
    elif how == "unknown type":
        config["model_type"] = "stranger"
    elif how == "broken tokenizer":
        (path / "tokenizer.json").write_text("{}")
    if how in ("remote code", "unknown type"):
        (path / "config.json").write_text(json.dumps(config))
    return path


REFUSED = {
    "no config": r"model must be a directory with a config.json; got .* without one. Save the model there",
    "broken config": r"config.json must be JSON; got one in .* that cannot be read \(.+\). Save the model again.",
    "a list as config": r"config.json must be JSON; got one in .* \(it is not an object\)",
    "no tokenizer": r"model must have a tokenizer beside it; got none in .*. Save it there with",
    "pickle": r"model must hold safetensors; got pickled weights in .*, which can run code when read. Convert them",
    "no weights": r"model must hold model.safetensors; got no weights in .*. Save the model there",
    "truncated weights": r"model.safetensors must be whole; got one in .* that cannot be read \(.+\). Copy it again.",
    "empty weights": r"model.safetensors must be whole; got one in .* that cannot be read \(.+\). Copy it again.",
    "remote code": r"got .*, which asks to run code of its own. regard never runs code that lies beside a model",
    "unknown type": r"model must be one that transformers knows; got model_type 'stranger' in .*. Update transformers",
    "broken tokenizer": r"model must open with transformers; got case, which does not \(.+\). Save it again",
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_must_not_be_opened_is_refused_in_one_sentence(folders, tmp_path, how):
    path = changed(folders("bert"), tmp_path / "case", how)
    with pytest.raises(ValueError, match=REFUSED[how]) as refused:
        load(str(path))
    assert str(refused.value).startswith("look: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/place", "~/nowhere-at-all"])
def test_a_path_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match=r"model must be a directory that exists; got .*. Check the path."):
        load(name)
    with pytest.raises(ValueError, match="model must be a name or a path; got nothing. Leave --model out"):
        load(" ")


def test_files_that_are_no_models_are_refused(tmp_path):
    (tmp_path / "model.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a directory, a .gguf file or a hub id; got the file"):
        load(str(tmp_path / "model.txt"))
    with pytest.raises(ValueError, match=r"model must be a GGUF file that exists; got .*none.gguf"):
        load(str(tmp_path / "none.gguf"))
    (tmp_path / "fake.gguf").write_text("GIF89a")
    with pytest.raises(ValueError, match=r"model must be a GGUF file; got .*fake.gguf, which is not one"):
        load(str(tmp_path / "fake.gguf"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ValueError, match=r"model must open with transformers; got cut, which does not"):
        load(str(tmp_path / "cut.gguf"))


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"a hub id that can be reached; got nobody/nothing. Check the spelling"):
        load("nobody/nothing")
    with pytest.raises(ValueError, match=r"a hub id that can be reached; got my model!. Check"):
        load("my model!")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["config.json", "pytorch_model.bin", "tokenizer.json"],
            "got pickled weights in some/model, which can run code",
        ),
        (["config.json", "tokenizer.json"], "got no weights in some/model"),
        (["config.json", "model.safetensors", "onnx/tokenizer.json"], "tokenizer beside it; got none in some/model"),
    ],
)
def test_a_hub_page_is_judged_before_anything_is_downloaded(monkeypatch, files, message):
    listed = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_args, **_named: listed)
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", lambda *_: pytest.fail("it was downloaded"))
    with pytest.raises(ValueError, match=message):
        load("some/model")


def test_a_gguf_file_opens(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs tool: gguf (pip install 'regard[models]')")
    pytest.importorskip("accelerate", reason="needs tool: accelerate (pip install 'regard[models]')")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    width, heads, vocabulary = 32, 4, ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "▁", "▁c", "at", "▁cat"]
    writer.add_context_length(32)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary)
    writer.add_token_scores([-float(at) for at in range(len(vocabulary))])
    writer.add_token_types([2, 3, 3] + [1] * (len(vocabulary) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    torch.manual_seed(0)
    sizes = {"attn_q": (width, width), "attn_k": (width // 2, width), "attn_v": (width // 2, width),
             "attn_output": (width, width), "ffn_gate": (width, width), "ffn_up": (width, width),
             "ffn_down": (width, width), "attn_norm": (width,), "ffn_norm": (width,)}  # fmt: skip
    tensors = {f"blk.0.{name}.weight": torch.randn(size) for name, size in sizes.items()}
    tensors |= {"token_embd.weight": torch.randn(len(vocabulary), width), "output_norm.weight": torch.ones(width)}
    tensors |= {"output.weight": torch.randn(len(vocabulary), width)}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load(str(path))
    assert (loaded.id, loaded.shape, loaded.longest) == ("tiny", "decoder", 32)
    assert loaded.tokenizer("cat").input_ids
