"""Recording: what a model's attention was equals what transformers' own eager attention says, is kept once, and comes
back from disk the same or not at all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import regard
from regard import masks
from regard.lens import Recording, record
from regard.lens.layers import Keys, Layer, Step
from regard.lens.stored_mask import NOTE
from tiny_folders import SENTENCE, make


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A function from a kind to (model, tokenizer), opened once."""
    root, held = tmp_path_factory.mktemp("tiny"), {}

    def open_one(kind):
        if kind not in held:
            folder = make(root / kind, kind)
            auto = {
                "t5": transformers.AutoModelForSeq2SeqLM,
                "whisper": transformers.AutoModelForSpeechSeq2Seq,
                "llama": transformers.AutoModelForCausalLM,
            }.get(kind, transformers.AutoModel)
            model = auto.from_pretrained(folder, attn_implementation="eager")
            held[kind] = (model, transformers.AutoTokenizer.from_pretrained(folder))
        return held[kind]

    return open_one


def inputs_of(kind, model, tokenizer):
    if kind == "whisper":
        torch.manual_seed(3)
        features = torch.randn(1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": features, "decoder_input_ids": torch.tensor([[1, 2, 30, 31, 32]])}
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    return {"input_ids": ids, **({"decoder_input_ids": torch.tensor([[0, 9, 10, 11, 12]])} if kind == "t5" else {})}


def eager_attentions(model, inputs):
    """(kind, layers) pairs of eager attention weights."""
    with torch.no_grad():
        out = model(**inputs, output_attentions=True, use_cache=False)
    if "decoder_input_ids" in inputs:
        return [
            ("encoder", out.encoder_attentions),
            ("decoder", out.decoder_attentions),
            ("cross", out.cross_attentions),
        ]
    return [("self", out.attentions)]


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "whisper"])
def test_recorded_weights_are_those_of_eager_attention(tiny, kind):
    model, tokenizer = tiny(kind)
    inputs = inputs_of(kind, model, tokenizer)
    with record(model) as recording, torch.no_grad():
        model(**inputs, use_cache=False)
    for name, layers in eager_attentions(model, inputs):
        assert layers
        for number, expected in enumerate(layers):
            got = recording.weights(number, kind=name)
            torch.testing.assert_close(got, expected[0], atol=2e-5, rtol=1e-4)
            tile = recording.weights(number, 2, slice(1, 4), slice(0, 3), kind=name)
            assert torch.equal(tile, got[2, 1:4, 0:3])
    kinds = {layer.kind for layer in recording.layers}
    assert kinds == {"bert": {"encoder"}, "llama": {"decoder"}}.get(kind, {"encoder", "decoder", "cross"})


def test_the_four_stages_lead_to_the_weight(tiny):
    model, tokenizer = tiny("t5")
    with record(model) as recording, torch.no_grad():
        model(**inputs_of("t5", model, tokenizer))
    layer = recording.layer(1, "decoder")
    step = layer.steps[0]
    scaled, capped, biased, weights = (
        recording.weights(1, 3, kind="decoder", stage=stage) for stage in ("scaled", "capped", "biased", "weights")
    )
    torch.testing.assert_close(scaled, step.scale * step.q[0, 3] @ step.k[0, 3].T)
    assert torch.equal(scaled, capped)
    assert torch.isinf(biased).triu(1).sum() == 10
    assert not torch.equal(biased.tril(), capped.tril())  # T5 adds a position bias
    torch.testing.assert_close(weights, biased.softmax(-1))


def test_the_position_bias_of_t5_is_kept_by_diagonals(tiny):
    model, tokenizer = tiny("t5")
    with record(model) as recording, torch.no_grad():
        model(**inputs_of("t5", model, tokenizer))
    step = recording.layer(1, "encoder").steps[0]
    assert step.bias is not None
    assert step.bias.bias is None
    assert step.bias.diagonal.shape == (1, 4, 2 * step.seq_len_q - 1)
    first = recording.layer(0, "encoder").steps[0].bias.diagonal
    assert first.data_ptr() == step.bias.diagonal.data_ptr()  # one for all layers


def test_layers_that_share_one_module_are_told_apart():
    config = transformers.AlbertConfig(
        vocab_size=20,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = transformers.AlbertModel(config).eval()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": torch.arange(5, 12)[None]}
    with record(model) as recording, torch.no_grad():
        model(**inputs)
    assert [layer.number for layer in recording.layers] == [0, 1, 2]
    assert len({layer.module for layer in recording.layers}) == 1
    for number, expected in enumerate(eager_attentions(model, inputs)[0][1]):
        torch.testing.assert_close(recording.weights(number), expected[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="must name one module; got 3"):
        recording.weights(recording.layers[0].module)


def test_a_recording_made_in_inference_mode_is_usable_outside(tiny, tmp_path):
    model, tokenizer = tiny("llama")
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    with record(model) as recording:
        with torch.inference_mode():
            cache = model(ids[:, :4], use_cache=True).past_key_values
        with torch.no_grad():
            model(ids[:, 4:], past_key_values=cache)
    with record(model) as whole, torch.no_grad():
        model(ids)
    torch.testing.assert_close(recording.weights(1), whole.weights(1))
    torch.testing.assert_close(recording.statistics(1)["received"], whole.statistics(1)["received"])
    assert not recording.layer(1).steps[0].q.is_inference()
    recording.save(tmp_path / "kept")


def test_the_forward_keeps_its_bits_and_the_model_its_choice(tiny):
    model, tokenizer = tiny("llama")
    inputs = inputs_of("llama", model, tokenizer)
    model.set_attn_implementation("regard")
    with torch.no_grad():
        alone = model(**inputs).logits
        with record(model):
            watched = model(**inputs).logits
    assert torch.equal(alone, watched)
    model.set_attn_implementation("eager")
    with pytest.raises(IndexError), record(model):
        model(input_ids=torch.tensor([[10**6]]))
    assert model.config._attn_implementation == "eager"
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_family_with_attention_classes_of_its_own_gets_them_back():
    config = transformers.FalconConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, new_decoder_architecture=False
    )
    model = transformers.FalconForCausalLM(config).eval()
    inputs = {"input_ids": torch.arange(3, 10)[None], "use_cache": False}
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        before = model(**inputs).logits
        with record(model) as recording:
            watched = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, before)
    torch.testing.assert_close(watched, before, atol=1e-4, rtol=1e-4)
    assert [type(module) for module in model.modules()] == classes
    assert len(recording.layers) == 2
    torch.testing.assert_close(recording.weights(0, 0).sum(-1), torch.ones(7))


def generated(model, tokenizer, **options):
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    model.generation_config.eos_token_id = None
    with record(model) as recording:
        out = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
    return recording, out


def test_generation_steps_join_to_the_whole_text(tiny):
    model, tokenizer = tiny("llama")
    recording, out = generated(model, tokenizer)
    read = out[:, :-1]
    assert torch.equal(recording.token_ids["text"][0], read)
    layer = recording.layer(1)
    assert [step.seq_len_q for step in layer.steps] == [read.shape[1] - 5, 1, 1, 1, 1, 1]
    assert layer.steps[0].keys is layer.steps[-1].keys
    assert layer.steps[0].keys.rows.shape[2] == read.shape[1]  # every key once, not once a step
    for number, expected in enumerate(eager_attentions(model, {"input_ids": read})[0][1]):
        got = recording.weights(number)
        torch.testing.assert_close(got, expected[0], atol=2e-5, rtol=1e-4)
        assert torch.equal(recording.weights(number, rows=slice(8, 13), cols=slice(2, 9)), got[:, 8:13, 2:9])
        received = recording.statistics(number)["received"]
        torch.testing.assert_close(received[0], expected[0].sum(1), atol=1e-4, rtol=1e-4)
    last = recording.weights(0, 1, step=3)
    torch.testing.assert_close(last[0], recording.weights(0, 1)[-3, : last.shape[1]])


def test_encoder_decoders_are_recorded_while_they_write(tiny):
    model, tokenizer = tiny("t5")
    recording, out = generated(model, tokenizer)
    ids = recording.token_ids
    assert torch.equal(ids["target"][0], out[:, :-1])
    inputs = {"input_ids": ids["source"][0], "decoder_input_ids": ids["target"][0]}
    for kind, layers in eager_attentions(model, inputs):
        for number, expected in enumerate(layers):
            got = recording.weights(number, kind=kind)
            torch.testing.assert_close(got, expected[0], atol=2e-5, rtol=1e-4)
    assert len(recording.layer(0, "cross").steps) == 6
    assert recording.layer(0, "cross").steps[0].keys.rows.shape[2] == ids["source"][0].shape[1]


def test_a_sliding_cache_that_drops_keys_keeps_each_key_once():
    config = transformers.MistralConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, sliding_window=5, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    ids = torch.arange(3, 10)[None]
    with record(model) as recording:
        out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    layer = recording.layer(1)
    assert layer.steps[0].keys.rows.shape[2] == out.shape[1] - 1
    assert max(step.seq_len_kv for step in layer.steps[1:]) <= 5 + 1
    expected = eager_attentions(model, {"input_ids": out[:, :-1]})[0][1]
    for number in range(2):
        torch.testing.assert_close(recording.weights(number), expected[number][0], atol=2e-5, rtol=1e-4)


def test_a_cache_that_is_filled_in_place_keeps_what_each_step_saw(tiny):
    model, tokenizer = tiny("llama")
    recording, out = generated(model, tokenizer, cache_implementation="static")
    expected = eager_attentions(model, {"input_ids": out[:, :-1]})[0][1]
    first = recording.layer(0).steps[0].seq_len_q
    for at, step in enumerate(recording.layer(1).steps):
        row = recording.weights(1, step=at)
        seen = first + at
        torch.testing.assert_close(row[:, -1, :seen], expected[1][0, :, first - 1 + at, :seen], atol=2e-5, rtol=1e-4)
        assert not row[:, -1, seen:].any()
        assert step.keys.rows.shape[2] <= step.seq_len_kv + len(recording.layer(1).steps)


def test_statistics_are_those_of_the_weights(tiny):
    model, tokenizer = tiny("llama")
    with record(model) as recording, torch.no_grad():
        model(**inputs_of("llama", model, tokenizer))
    weights = recording.weights(1).double()
    found = {name: tensor[0].double() for name, tensor in recording.statistics(1).items()}
    torch.testing.assert_close(found["received"], weights.sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["entropy"], torch.special.entr(weights).sum(-1), atol=1e-4, rtol=1e-4)
    biased = recording.weights(1, stage="biased").double()
    torch.testing.assert_close(found["max_score"], biased.amax(-1), atol=1e-4, rtol=1e-4)
    best, keys = weights.topk(8, -1)
    torch.testing.assert_close(found["top_weights"], best, atol=1e-5, rtol=1e-4)
    clear = (best[..., :-1] - best[..., 1:]).amin(-1) > 1e-4
    assert clear.any()
    assert torch.equal(found["top_keys"][clear].long(), keys[clear])
    mass, largest = recording.blocks(1, (4, 3))
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[2] % 3, 0, -weights.shape[1] % 4))
    tiled = padded.unflatten(2, (-1, 3)).unflatten(1, (-1, 4))
    torch.testing.assert_close(mass[0].double(), tiled.sum((2, 4)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(largest[0].double(), tiled.amax((2, 4)), atol=1e-5, rtol=1e-4)


def test_padded_batches_are_recorded_row_by_row(tiny):
    model, _ = tiny("llama")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 11, 12, 13, 14]])
    keep = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with record(model) as recording, torch.no_grad():
        model(input_ids=ids, attention_mask=keep)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=keep, output_attentions=True).attentions[0]
    torch.testing.assert_close(recording.weights(0, batch=0), expected[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(recording.weights(0, batch=1)[:, 2:], expected[1, :, 2:], atol=2e-5, rtol=1e-4)
    assert not recording.weights(0, batch=1)[:, 2:, :2].any()


def test_layers_and_statistics_can_be_chosen_and_narrowed(tiny):
    model, tokenizer = tiny("bert")
    inputs = inputs_of("bert", model, tokenizer)
    with record(model) as whole, torch.no_grad():
        model(**inputs)
    with record(model, layers=[1], dtype=torch.bfloat16, statistics=["entropy"]) as recording, torch.no_grad():
        model(**inputs)
    assert [layer.number for layer in recording.layers] == [1]
    step = recording.layer(1).steps[0]
    assert step.q.dtype == step.k.dtype == torch.bfloat16
    assert sorted(recording.statistics(1)) == ["entropy"]
    assert torch.equal(recording.statistics(1)["entropy"], whole.statistics(1)["entropy"])
    torch.testing.assert_close(recording.weights(1), whole.weights(1), atol=0.15, rtol=0)
    torch.testing.assert_close(step.value_norms, whole.layer(1).steps[0].value_norms)


def test_value_norms_are_the_lengths_of_the_values(tiny):
    model, tokenizer = tiny("bert")
    values = []
    with (
        regard.huggingface.observe(lambda call: values.append(call.v)),
        record(model) as recording,
        torch.no_grad(),
    ):
        model(**inputs_of("bert", model, tokenizer))
    torch.testing.assert_close(recording.layer(2).steps[0].value_norms, values[2].norm(dim=-1))


def test_two_texts_are_two_sequences(tiny):
    model, tokenizer = tiny("bert")
    with record(model, tokenizer=tokenizer) as recording, torch.no_grad():
        for text in ("the cat sat", "it was a dog and it was a mat"):
            model(**tokenizer(text, return_tensors="pt"))
    assert recording.texts == ["the cat sat", "it was a dog and it was a mat"]
    assert [step.sequence for step in recording.layer(0).steps] == [0, 1]
    assert recording.weights(0, step=1).shape[-1] > recording.weights(0, step=0).shape[-1]
    with pytest.raises(ValueError, match="step must be given where a layer's 2 calls"):
        recording.weights(0)


def test_recomputed_and_foreign_calls_are_not_recorded(tiny):
    model, tokenizer = tiny("bert")
    other = regard.huggingface.prepare(transformers.BertModel(model.config))
    checkpointed = transformers.BertModel(model.config).train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    inputs = inputs_of("bert", model, tokenizer)
    with record(checkpointed) as recording:
        other(**inputs)
        checkpointed(**inputs).last_hidden_state.sum().backward()
    assert [len(layer.steps) for layer in recording.layers] == [1, 1, 1]


def refusals(model, recording):
    def run(**options):
        with record(model, **options):
            model(input_ids=torch.tensor([[2, 5, 3]]))

    def idle():
        with record(model):
            pass

    return [
        (lambda: run(layers=[7]), "record: layers must be among those that ran, 0 to 2; got 7. Pass layer numbers"),
        (lambda: run(statistics=["mean"]), "record: statistics must be among received, .*; got 'mean'. Choose"),
        (idle, "record: the model must run inside the with block; got no attention call. Call the model inside it."),
        (lambda: recording.weights(9), "recording: layer must be a recorded one, encoder 0 to 2; got 9. Pass one of"),
        (lambda: recording.weights(0, kind="cross"), "but no cross attention was recorded; got 0"),
        (
            lambda: recording.weights(0, kind="both"),
            'kind must be "self", "encoder", "decoder" or "cross"; got \'both\'',
        ),
        (lambda: recording.weights(0, head=4), "recording: head must be from 0 to 3; got 4. Pass one of those."),
        (lambda: recording.weights(0, 1, step=3), "recording: step must be from 0 to 0; got 3"),
        (lambda: recording.weights(0, 1, batch=1), "recording: batch must be from 0 to 0; got 1"),
    ]


@pytest.mark.parametrize("number", range(9))
def test_what_was_not_recorded_is_refused_in_one_sentence(tiny, number):
    model, tokenizer = tiny("bert")
    with record(model) as recording, torch.no_grad():
        model(**inputs_of("bert", model, tokenizer))
    call, message = refusals(model, recording)[number]
    with pytest.raises(ValueError, match=message):
        call()


# --- on disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny, tmp_path):
    """A generated text, recorded and saved: (recording, directory)."""
    model, tokenizer = tiny("llama")
    model.generation_config.eos_token_id = None
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    with record(model, tokenizer=tokenizer) as recording:
        model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return recording, recording.save(tmp_path / "cat")


def test_a_saved_recording_comes_back_the_same(saved):
    recording, directory = saved
    opened = Recording.open(directory)
    assert opened.model == recording.model
    assert opened.tokenizer == recording.tokenizer
    assert opened.texts == recording.texts
    assert opened.texts[0].startswith(SENTENCE)
    assert torch.equal(opened.token_ids["text"][0], recording.token_ids["text"][0])
    for number in range(2):
        for stage in ("biased", "weights"):
            assert torch.equal(opened.weights(number, stage=stage), recording.weights(number, stage=stage))
        for name, tensor in recording.statistics(number).items():
            assert torch.equal(opened.statistics(number)[name], tensor)
        assert torch.equal(opened.layer(number).steps[1].value_norms, recording.layer(number).steps[1].value_norms)


def test_the_manifest_says_what_was_recorded(saved, tiny):
    _, directory = saved
    manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
    assert manifest["format"] == "regard-recording/1"
    assert manifest["model"]["class"] == "LlamaForCausalLM"
    assert len(manifest["model"]["weights_sha256"]) == 64
    assert len(manifest["tokenizer"]["sha256"]) == 64
    assert set(manifest["versions"]) == {"regard", "torch", "transformers"}
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0] or manifest["versions"]["torch"]
    assert [layer["module"] for layer in manifest["layers"]] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    listed = set(manifest["files"])
    assert {path.name for path in directory.iterdir()} == listed | {"manifest.json"}


def test_the_sum_of_the_weights_follows_the_weights(tiny, tmp_path):
    model, tokenizer = tiny("bert")
    inputs = inputs_of("bert", model, tokenizer)

    def sum_of(name):
        with record(model) as recording, torch.no_grad():
            model(**inputs)
        recording.save(tmp_path / name)
        return json.loads((tmp_path / name / "manifest.json").read_text())["model"]["weights_sha256"]

    first, again = sum_of("a"), sum_of("b")
    weight = model.encoder.layer[0].attention.self.query.weight
    with torch.no_grad():
        weight[0, 0] += 1
    changed = sum_of("c")
    with record(model) as recording, torch.no_grad():
        model(**inputs)
    with torch.no_grad():
        weight[0, 0] -= 1
    recording.save(tmp_path / "d")
    late = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert first == again != changed
    assert late["model"]["weights_sha256"] is None
    assert "weights had changed" in late["notes"][0]


def test_an_opened_recording_is_mapped_not_read(tmp_path):
    rows = 400_000
    keys = Keys(torch.ones(1, 1, rows, 64), torch.ones(1, 1, rows))
    step = Step(
        0, torch.ones(1, 1, 1, 64), torch.full((1, 1, 1), 12.9), keys, ((0, rows),), 0.1, None, None, None, None, 0, 0
    )
    Recording([Layer("attention", 0, "encoder", [step])]).save(tmp_path / "large")
    program = (
        "import sys, torch\nfrom regard.lens import Recording\n"
        "status = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])\n"
        "import safetensors.torch, regard.lens.recording\nbefore = status()\n"
        f"opened = Recording.open({str(tmp_path / 'large')!r})\n"
        "keys = opened.layer(0).steps[0].k\nprint(keys.shape[2], float(keys[0, 0, -1, 0]), status() - before)\n"
    )
    length, value, grown = run_python(program).split()
    assert (int(length), float(value)) == (rows, 1.0)
    assert int(grown) < 30_000  # kB; the keys alone are 100,000


def run_python(program):
    source = str(Path(regard.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{program}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_saving_replaces_a_recording_and_nothing_else(saved, tmp_path):
    recording, directory = saved
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    recording.save(directory)
    assert {path.name for path in directory.iterdir()} == set(before)
    Recording.open(directory)
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "dear.txt").write_text("dear")
    with pytest.raises(
        ValueError, match=r"must be new, empty or an older recording; got .*letters, which holds others"
    ):
        recording.save(letters)
    with pytest.raises(ValueError, match=r"must be a directory; got the file .*dear.txt. Choose another place."):
        recording.save(letters / "dear.txt")
    with pytest.raises(ValueError, match=r"must lie in one that exists; got .*nowhere"):
        recording.save(tmp_path / "nowhere" / "cat")
    assert (letters / "dear.txt").read_text() == "dear"
    assert {path.name for path in tmp_path.iterdir()} == {"cat", "letters"}


def test_a_save_that_fails_leaves_what_was_there(saved, tmp_path, monkeypatch):
    recording, directory = saved
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fail(*_args, **_named):
        raise OSError("no space left on device")

    monkeypatch.setattr("regard.lens.storage.json.dump", fail)
    for place in (directory, tmp_path / "new"):
        with pytest.raises(OSError, match="no space"):
            recording.save(place)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["cat"]


def damage(directory, how):
    layer = directory / "layer-0000.safetensors"
    manifest = directory / "manifest.json"
    entry = json.loads(manifest.read_text("utf-8"))
    if how == "truncated layer":
        layer.write_bytes(layer.read_bytes()[:-7])
    elif how == "empty layer":
        layer.write_bytes(b"")
    elif how == "changed header":
        data = bytearray(layer.read_bytes())
        data[40] ^= 1
        layer.write_bytes(data)
    elif how == "endless header":
        data = bytearray(layer.read_bytes())
        data[:8] = (2**60).to_bytes(8, "little")
        layer.write_bytes(data)
    elif how == "missing layer":
        layer.unlink()
    elif how == "truncated manifest":
        manifest.write_text(manifest.read_text()[:200])
    elif how == "binary manifest":
        manifest.write_bytes(b"\xff\xfe\x00")
    elif how == "manifest without layers":
        del entry["layers"]
    elif how == "manifest of a list":
        entry = [entry]
    elif how == "keys past the end":
        entry["layers"][0]["steps"][0]["key_runs"] = [[0, 10**9]]
    elif how == "a broken mask":
        entry["layers"][0]["steps"][0]["mask"]["program"] = "and and"
    elif how == "a file elsewhere":
        entry["files"] = {"../cat/manifest.json": {"bytes": 3, "header_sha256": ""}, **entry["files"]}
    elif how == "numbers that are words":
        entry["layers"][0]["steps"][0]["scale"] = "much"
    if how.startswith(("manifest", "keys", "a ", "numbers")):
        manifest.write_text(json.dumps(entry))


DAMAGES = {
    "truncated layer": r"layer-0000.safetensors has \d+ bytes instead of \d+",
    "empty layer": "layer-0000.safetensors has 0 bytes",
    "changed header": "layer-0000.safetensors has another header",
    "endless header": "layer-0000.safetensors has no header",
    "missing layer": "layer-0000.safetensors is missing",
    "truncated manifest": "damaged",
    "binary manifest": "damaged",
    "manifest without layers": "no 'layers'",
    "manifest of a list": "manifest.json is not a recording's",
    "keys past the end": "step 0 reads keys that are not there",
    "a broken mask": "and and",
    "a file elsewhere": "is no file of a recording",
    "numbers that are words": "could not convert string to float",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_recording_is_refused_in_one_sentence(saved, how):
    _, directory = saved
    damage(directory, how)
    with pytest.raises(ValueError, match=DAMAGES[how]) as refused:
        Recording.open(directory)
    message = str(refused.value)
    assert message.startswith("recording: directory must be whole; got ")
    assert message.endswith("Record it again.")
    assert "\n" not in message


def test_places_without_a_recording_and_newer_ones_are_refused(saved, tmp_path):
    _, directory = saved
    with pytest.raises(ValueError, match=r"must hold a manifest.json; got .*nowhere without one. Pass what"):
        Recording.open(tmp_path / "nowhere")
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace("regard-recording/1", "regard-recording/2"))
    with pytest.raises(ValueError, match="format must be regard-recording/1; got regard-recording/2 .* Update regard"):
        Recording.open(directory)


def masked_recording(mask, seq_len_q=150, seq_len_kv=200, query_offset=50):
    torch.manual_seed(1)
    q, k = torch.randn(2, 4, seq_len_q, 8), torch.randn(2, 2, seq_len_kv, 8)
    _, lse, *_ = regard.attention_with_stats(q, k, k, mask=mask, query_offset=query_offset)
    keys = Keys(k, k.norm(dim=-1))
    step = Step(0, q, lse, keys, ((0, seq_len_kv),), 8**-0.5, None, mask, None, None, query_offset, 0)
    return Recording([Layer("attention", 0, "decoder", [step])])


def parity(batch, head, p, j):
    return (j <= p) & ((j + head + batch) % 3 > 0)


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal() & masks.sliding_window(30, 0),
        masks.causal() & ~masks.padding(torch.tensor([3, 20])),
        masks.from_tensor(torch.rand(2, 1, 150, 200) > 0.4),
        masks.from_function(parity),
        masks.causal() & masks.from_function(lambda b, h, p, j: j % 2 == 0),
        masks.from_function(lambda b, h, p, j: j <= p),
    ],
    ids=["window", "padding", "tensor", "function", "joined function", "causal function"],
)
def test_masks_come_back_from_disk(mask, tmp_path):
    recording = masked_recording(mask)
    opened = Recording.open(recording.save(tmp_path / "masked"))
    for batch in range(2):
        assert torch.equal(opened.weights(0, batch=batch), recording.weights(0, batch=batch))
        scores = (one.weights(0, 3, slice(100, 140), slice(90, 180), batch=batch, stage="biased")
                  for one in (opened, recording))  # fmt: skip
        assert torch.equal(*scores)
    function = "function" in mask.encode()[0]
    assert (NOTE in opened.notes) == function


def test_tiles_of_a_function_mask_that_are_whole_take_no_bits(tmp_path):
    recording = masked_recording(masks.from_function(lambda b, h, p, j: j <= p), 1024, 1024, 0)
    directory = recording.save(tmp_path / "causal")
    assert (directory / "shared.safetensors").stat().st_size < 25_000  # a dense map would take 1,048,576 bytes


def test_an_older_recording_survives_a_crash_while_the_new_one_is_written(saved, monkeypatch):
    recording, directory = saved
    original = Path.rename

    def rename(self, target):
        if Path(target) == directory:
            raise OSError("interrupted")
        return original(self, target)

    monkeypatch.setattr(
        Path, "rename", lambda self, target: rename(self, target) if "old-" not in str(self) else original(self, target)
    )
    with pytest.raises(OSError, match="interrupted"):
        recording.save(directory)
    monkeypatch.undo()
    Recording.open(directory)
    assert [path.name for path in directory.parent.iterdir()] == ["cat"]


# --- memory ---------------------------------------------------------------------------------------------------------

LONG = """
import resource, time, torch, transformers
from regard.lens import record
config = transformers.LlamaConfig(vocab_size=64, hidden_size=576, num_hidden_layers=1, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, intermediate_size=64, max_position_embeddings=32768)
model = transformers.LlamaModel(config).eval()
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 2**20
with torch.no_grad():
    with record(model):
        model(torch.zeros(1, 64, dtype=torch.long), use_cache=False)  # what is loaded and made once
    before, start = peak(), time.monotonic()
    with record(model) as recording:
        model(torch.randint(0, 64, (1, 32768)), use_cache=False)
    tile = recording.weights(0, 8, slice(32700, 32768), slice(0, 512))
layer = recording.layer(0)
assert layer.steps[0].q.shape == (1, 9, 32768, 64) and layer.steps[0].k.shape == (1, 3, 32768, 64)
assert tile.shape == (68, 512) and float(tile.min()) >= 0
assert float(layer.steps[0].received[0, 0].sum()) > 32767
print(peak() - before, time.monotonic() - start)
"""


def test_a_recording_of_32768_tokens_stays_far_below_a_dense_map(native):
    grown, seconds = map(float, run_python(LONG).split())
    print(f"grew by {grown:.2f} GiB in {seconds:.0f} s")
    assert grown < 1.5


def test_removing_a_directory_does_not_end_an_open_recording(saved):
    _, directory = saved
    opened = Recording.open(directory)
    expected = opened.weights(0, 1).clone()
    shutil.rmtree(directory)
    assert torch.equal(opened.weights(0, 1), expected)
