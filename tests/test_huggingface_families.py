"""Every family that can be built from a config gives eager's logits under regard."""

import warnings

import pytest
import torch
import transformers
from torch import Tensor

import regard.huggingface
import tiny_models
from tiny_families import COVERED, REFUSED, WITHOUT_ATTENTION

TOLERANCE = 1e-4  # of the largest logit, as float32 models of two layers are compared
FAMILIES = {family.model_type: family for family in tiny_models.families()}
LENGTHS = (12, 7)  # longer than the sliding windows and chunks of 6
PIECES = ((0, 5), (5, 9), (9, 10), (10, 12))

# What eager itself cannot do with a cache filled in pieces, and the reason.
NO_PIECES = {
    "bert-generation": "an encoder, which needs is_decoder to cache",
    "blt": "eager fails: its config has no num_hidden_layers",
    "git": "without an image its padding mask is moved by the image's tokens",
    "recurrent_gemma": "returns no cache",
    "zamba2": "eager fails on a cache of this size",
}


def load(name: str) -> tuple[tiny_models.Family, transformers.PreTrainedModel]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FAMILIES[name], tiny_models.build(FAMILIES[name])


def prepare(model: transformers.PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="prepare: .* computes attention by itself")
        regard.huggingface.prepare(model)


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, given: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # vit_mae draws its patches
    out = tiny_models.logits_of(model(**given))
    held = given.get("attention_mask")
    if held is not None and out.dim() == 3 and out.shape[:2] == held.shape:
        return out[held.bool()]  # eager gives padding something, and something else each time
    return out


@torch.no_grad()
def logits_in_pieces(model: transformers.PreTrainedModel, given: dict[str, Tensor], cache: object = None) -> Tensor:
    outs = []
    for start, end in PIECES:
        out = model(
            input_ids=given["input_ids"][:, start:end],
            attention_mask=given["attention_mask"][:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        outs.append(out.logits)
    return torch.cat(outs, dim=1)[given["attention_mask"].bool()]


def assert_equal(got: Tensor, eager: Tensor) -> None:
    assert eager.std() > 1e-3 * eager.abs().max(), "the model answers the same everywhere: nothing is compared"
    assert (got - eager).abs().max() <= TOLERANCE * eager.abs().max()


@pytest.mark.parametrize("name", [name for names in COVERED.values() for name in names])
@pytest.mark.filterwarnings("ignore")
def test_family_gives_eagers_logits(name):
    family, model = load(name)
    batches = [tiny_models.inputs(family, model.config, LENGTHS, side) for side in ("right", "left")]
    pieces = family.kind == "causal" and name not in NO_PIECES
    eager = [logits(model, batch) for batch in batches]
    eager_pieces = logits_in_pieces(model, batches[1]) if pieces else None
    prepare(model)
    calls: list[regard.huggingface.Call] = []
    with regard.huggingface.observe(calls.append):
        for batch, expected in zip(batches, eager, strict=True):
            assert_equal(logits(model, batch), expected)
    assert calls, "no attention call reached regard"
    assert all(call.k.shape[1] == call.v.shape[1] for call in calls)
    if eager_pieces is not None:
        assert_equal(logits_in_pieces(model, batches[1]), eager_pieces)


# One family for each way a static cache meets a mask: full, sliding, sliding and full, chunked, sinks, latent keys.
@pytest.mark.parametrize("name", "llama mistral gemma2 gemma3_text llama4_text gpt_oss deepseek_v3 qwen3_next".split())
@pytest.mark.filterwarnings("ignore")
def test_static_cache_filled_in_pieces_gives_eagers_logits(name):
    family, model = load(name)
    batch = tiny_models.inputs(family, model.config, LENGTHS, "left")
    eager = logits_in_pieces(model, batch, transformers.StaticCache(config=model.config, max_cache_len=20))
    prepare(model)
    got = logits_in_pieces(model, batch, transformers.StaticCache(config=model.config, max_cache_len=20))
    assert_equal(got, eager)


@pytest.mark.parametrize("name", "llama gemma2 t5 bart".split())
@pytest.mark.filterwarnings("ignore")
def test_generated_tokens_are_eagers(name):
    family, model = load(name)
    batch = tiny_models.inputs(family, model.config, LENGTHS, "left")
    batch.pop("decoder_input_ids", None)
    asked = {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9, "decoder_start_token_id": 0}
    eager = [model.generate(**batch, **asked, num_beams=beams) for beams in (1, 3)]
    prepare(model)
    for beams, expected in zip((1, 3), eager, strict=True):
        assert torch.equal(model.generate(**batch, **asked, num_beams=beams), expected)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_model_that_computes_attention_by_itself_is_refused_by_name(name):
    family = FAMILIES[name]
    try:
        _, model = load(name)
    except Exception:
        pytest.fail(f"{name} can no longer be built")
    with pytest.raises(ValueError, match=r"got \w+, which computes attention by itself.* attn_implementation='eager'"):
        regard.huggingface.prepare(model)
    with pytest.raises(ValueError, match="which computes attention by itself"):
        getattr(transformers, family.auto).from_config(model.config, attn_implementation="regard")


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
@pytest.mark.filterwarnings("ignore")
def test_model_without_attention_is_refused_by_prepare(name):
    _, model = load(name)
    with pytest.raises(ValueError, match=f"got {type(model).__name__}, which has none"):
        regard.huggingface.prepare(model)
