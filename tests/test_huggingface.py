"""Models of transformers under regard: how they get there, what is observed, and that they train as before."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from torch import Tensor, nn

import regard.huggingface
import tiny_models
from regard.huggingface.masks import Scene
from regard.huggingface.routed_mask import regard_mask
from test_huggingface_families import FAMILIES, LENGTHS, assert_equal, load, logits, prepare


def test_import_alone_registers_both_implementations():
    code = (
        "import regard.huggingface, transformers; "
        "print('regard' in transformers.AttentionInterface(), 'regard' in transformers.AttentionMaskInterface())"
    )
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=paths)
    assert done.stdout.split() == ["True", "True"]


def test_from_config_with_the_name_is_all_it_takes():
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="regard").eval()
    ids, seen = torch.tensor([[1, 2, 3, 4]]), []
    with torch.no_grad(), regard.huggingface.observe(seen.append):
        first = model(ids).logits
    assert len(seen) == 1
    with torch.no_grad():
        assert not torch.equal(first[:, :3], model(torch.tensor([[2, 2, 3, 4]])).logits[:, :3])
        assert torch.equal(first[:, :3], model(torch.tensor([[1, 2, 3, 8]])).logits[:, :3]), "a word saw its future"


# --- refusals ---


def test_asking_a_model_for_weights_is_refused():
    _, model = load("llama")
    prepare(model)
    with pytest.raises(ValueError, match=r"output_attentions must be False.*regard\.lens\.record"):
        model.model.layers[0].self_attn(
            torch.zeros(1, 2, 32), (torch.ones(1, 2, 8),) * 2, regard_mask(1, 2, 2), output_attentions=True
        )


def test_prepare_wants_a_model_of_transformers():
    with pytest.raises(TypeError, match="model must be a PreTrainedModel of transformers; got Linear"):
        regard.huggingface.prepare(nn.Linear(1, 1))


def test_prepare_warns_of_a_part_that_stays_in_eager_mode():
    _, model = load("longt5")
    with pytest.warns(
        UserWarning, match="LongT5LocalAttention of LongT5ForConditionalGeneration computes attention by"
    ):
        regard.huggingface.prepare(model)


def test_model_of_ones_own_that_uses_the_interface_can_be_prepared():
    class OwnAttention(transformers.models.llama.modeling_llama.LlamaAttention):
        """A subclass outside transformers."""

    family, model = load("llama")
    batch = tiny_models.inputs(family, model.config, LENGTHS)
    expected = logits(model, batch)
    for layer in model.model.layers:
        layer.self_attn.__class__ = OwnAttention
    prepare(model)
    assert_equal(logits(model, batch), expected)


def test_refused_model_is_left_as_it_was():
    _, model = load("bloom")
    with pytest.raises(ValueError, match="got BloomForCausalLM"):
        regard.huggingface.prepare(model)
    assert model.config._attn_implementation == "eager"


# --- observing ---


@torch.no_grad()
def calls_of(model: transformers.PreTrainedModel, given: dict[str, Tensor]) -> list[regard.huggingface.Call]:
    seen: list[regard.huggingface.Call] = []
    with regard.huggingface.observe(seen.append):
        model(**given)
    return seen


def test_observed_forward_keeps_its_bits():
    family, model = load("gemma2")
    prepare(model)
    batch = tiny_models.inputs(family, model.config, LENGTHS)
    alone = logits(model, batch)
    with regard.huggingface.observe(lambda call: None), regard.huggingface.observe(lambda call: None):
        assert torch.equal(logits(model, batch), alone)


def test_call_holds_what_gives_the_weights():
    family, model = load("llama")
    prepare(model)
    batch = tiny_models.inputs(family, model.config, LENGTHS, "left")
    seen = calls_of(model, batch)
    assert [call.layer_index for call in seen] == [0, 1]
    assert [call.name for call in seen] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for call in seen:
        assert call.k.shape == call.v.shape == (2, 2, 12, 8) and call.q.shape == (2, 4, 12, 8)
        assert not call.is_cross and not call.q.requires_grad and call.query_offset == call.key_offset == 0
        scores = call.q @ call.k.repeat_interleave(2, 1).mT * call.scale
        keep = torch.ones(12, 12).bool().tril() & batch["attention_mask"].bool()[:, None, None]
        weights = (scores - call.lse[..., None]).exp().masked_fill(~keep, 0.0)
        torch.testing.assert_close(weights @ call.v.repeat_interleave(2, 1), call.out, atol=1e-5, rtol=1e-5)
        scene = Scene(2, 12, 12, call.query_offset, call.key_offset, call.q.device)
        assert torch.equal(call.mask.dense(scene.frame()).expand_as(keep), keep)


def test_offsets_follow_a_cache_that_drops_old_keys():
    _, model = load("mistral")
    prepare(model)
    ids, cache, offsets = torch.arange(5, 17)[None], None, []
    for start, end in ((0, 5), (5, 9), (9, 10), (10, 11)):
        with torch.no_grad():
            seen = []
            with regard.huggingface.observe(seen.append):
                cache = model(ids[:, start:end], past_key_values=cache, use_cache=True).past_key_values
        offsets.append((seen[0].query_offset, seen[0].key_offset, seen[0].k.shape[2]))
    assert offsets == [(0, 0, 5), (5, 0, 9), (9, 4, 6), (10, 5, 6)]


@pytest.mark.parametrize("name", "t5 bart whisper marian".split())
def test_cross_attention_is_told_from_self_attention(name):
    family, model = load(name)
    prepare(model)
    seen = calls_of(model, tiny_models.inputs(family, model.config, LENGTHS))
    crossing = [call for call in seen if call.is_cross]
    assert [call.layer_index for call in crossing] == [0, 1] and len(seen) == 6
    assert all("decoder" in call.name for call in crossing)
    if name == "t5":
        own = [call for call in seen if not call.is_cross]
        assert all(call.diagonal is not None and call.bias is None for call in own)


def test_observing_a_model_that_was_not_prepared_can_name_its_modules():
    model = load("vit")[1]
    prepared = transformers.ViTModel._from_config(model.config, attn_implementation="regard").eval()
    pixels = {"pixel_values": torch.zeros(1, 3, 16, 16)}
    seen: list[regard.huggingface.Call] = []
    with torch.no_grad(), regard.huggingface.observe(seen.append):
        prepared(**pixels)
    with torch.no_grad(), regard.huggingface.observe(seen.append, prepared):
        prepared(**pixels)
    assert [call.name is None for call in seen] == [True, True, False, False]
    assert [call.layer_index for call in seen[2:]] == [0, 1]


def test_callback_that_raises_stops_observing():
    family, model = load("llama")
    prepare(model)
    batch = tiny_models.inputs(family, model.config, LENGTHS)

    def fail(call: regard.huggingface.Call) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), regard.huggingface.observe(fail):
        logits(model, batch)
    logits(model, batch)


# --- families with a table, training, types ---


@pytest.mark.parametrize("name", "falcon gptj gpt_neo git data2vec-vision sam_vision_model sam_hq_vision_model".split())
def test_family_with_a_table_is_the_same_loaded_or_prepared(name):
    family, eager = load(name)
    batch = tiny_models.inputs(family, eager.config, LENGTHS)
    expected = logits(eager, batch)
    loaded = getattr(transformers, family.auto).from_config(eager.config, attn_implementation="regard").eval()
    loaded.load_state_dict(eager.state_dict())
    prepare(eager)
    assert_equal(logits(loaded, batch), expected)
    assert torch.equal(logits(loaded, batch), logits(eager, batch))


@pytest.mark.parametrize("multi_query", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_falcon_never_repeats_its_keys(multi_query, grouped):
    changes = {"new_decoder_architecture": grouped, "multi_query": multi_query, "num_kv_heads": 2 if grouped else 4}
    eager = tiny_models.build(FAMILIES["falcon"], **changes)
    batch = tiny_models.inputs(FAMILIES["falcon"], eager.config, LENGTHS, "left")
    expected = logits(eager, batch)
    prepare(eager)
    assert_equal(logits(eager, batch), expected)
    heads = {call.k.shape[1] for call in calls_of(eager, batch)}
    assert heads == {2 if grouped else 1 if multi_query else 4}


def test_falcon_with_alibi_is_what_sdpa_gives():
    # Eager adds ALiBi twice, with the mask and by itself; the models were trained with it once, as SDPA has it.
    eager = tiny_models.build(FAMILIES["falcon"], alibi=True)
    model = transformers.FalconForCausalLM._from_config(eager.config, attn_implementation="sdpa").eval()
    model.load_state_dict(eager.state_dict())
    batch = tiny_models.inputs(FAMILIES["falcon"], eager.config, LENGTHS, "left")
    expected = logits(model, batch)
    prepare(model)
    assert_equal(logits(model, batch), expected)


@pytest.mark.parametrize("name", "llama gemma2 t5 gpt_oss gpt_neo bert".split())
@pytest.mark.filterwarnings("ignore")
def test_gradients_are_eagers(name):
    grads = []
    for way in ("eager", "regard"):
        family, model = load(name)
        batch = tiny_models.inputs(family, model.config, LENGTHS)
        if way == "regard":
            prepare(model)
        out = tiny_models.logits_of(model(**batch))
        held = batch["attention_mask"].bool() if family.kind != "seq2seq" else slice(None)
        out[held].square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    floor = 1e-6 * max(grad.abs().max() for grad in grads[0].values())  # a key's bias has no gradient but rounding
    for parameter, expected in grads[0].items():
        assert (grads[1][parameter] - expected).abs().max() <= 1e-3 * expected.abs().max() + floor, parameter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore")
def test_half_types_stay_within_their_rounding(dtype):
    for name in ("llama", "t5", "gpt_oss"):
        family, model = load(name)
        batch = tiny_models.inputs(family, model.config, LENGTHS)
        exact = logits(model, batch)
        model.to(dtype)
        eager = logits(model, batch)
        prepare(model)
        got = logits(model, batch)
        assert got.dtype == dtype
        assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max() + 4 * torch.finfo(dtype).eps


def test_user_mask_with_four_dimensions_reaches_every_layer():
    family, model = load("llama")
    batch = tiny_models.inputs(family, model.config, LENGTHS)
    keep = (torch.rand(2, 1, 12, 12) > 0.4) | torch.eye(12).bool()
    given = {"input_ids": batch["input_ids"]}
    added = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    expected = logits(model, {**given, "attention_mask": added})
    prepare(model)
    assert_equal(logits(model, {**given, "attention_mask": added}), expected)
    assert_equal(logits(model, {**given, "attention_mask": keep}), expected)


def test_packed_position_ids_keep_documents_apart():
    _, model = load("llama")
    ids = torch.randint(5, 70, (1, 12))
    position_ids = torch.cat([torch.arange(5), torch.arange(7)])[None]
    expected = logits(model, {"input_ids": ids, "position_ids": position_ids})
    prepare(model)
    given = {"input_ids": ids, "position_ids": position_ids}
    assert_equal(logits(model, given), expected)
    frame = regard_mask(1, 12, 12).scene.frame()
    assert calls_of(model, given)[0].mask.intervals(frame) is not None


def test_images_see_each_other_and_text_stays_causal():
    _, model = load("paligemma")
    ids = torch.randint(5, 70, (2, 12))
    given = {"input_ids": ids, "token_type_ids": torch.tensor([[0] * 6 + [1] * 6] * 2), "labels": ids}
    model.train()
    expected = logits(model, given)
    prepare(model)
    assert_equal(logits(model, given), expected)


def test_checkpointed_training_recomputes_the_same():
    family, model = load("llama")
    prepare(model)
    batch = tiny_models.inputs(family, model.config, LENGTHS)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        model(**batch, use_cache=False).logits.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_compiled_model_gives_the_same():
    family, model = load("llama")
    batch = tiny_models.inputs(family, model.config, LENGTHS, "left")
    expected = logits(model, batch)
    prepare(model)
    seen: list[regard.huggingface.Call] = []
    with regard.huggingface.observe(seen.append):
        assert_equal(logits(torch.compile(model, backend="eager"), batch), expected)
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_inference_mode_gives_the_same(name):
    family, model = load(name)
    batch = tiny_models.inputs(family, model.config, LENGTHS)
    prepare(model)
    expected = logits(model, batch)
    with torch.inference_mode():
        assert torch.equal(logits(model, batch), expected)


def test_warnings_of_a_prepared_model_are_none():
    family, model = load("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regard.huggingface.prepare(model)
        logits(model, tiny_models.inputs(family, model.config, LENGTHS))
