"""Conversion to and from transformers: tiny random models, logits within 1e-4, both ways, and what cannot be."""

import pytest
import torch
import transformers as hf

from regard.models import BERT, GPT, Seq2Seq, ViT, from_huggingface, to_huggingface

TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])
BODY = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
QUIET = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 4.0, "beta_slow": 1.0,
    },
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip


def shaken(model):
    """Numbers far from their start, so that no weight is 0, no norm is 1, and no two are alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:  # Marian's sines
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def llama(rope="default", **named):
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **{
                **BODY,
                **QUIET,
                "num_key_value_heads": 2,
                "max_position_embeddings": 16,
                "rope_parameters": ROPES[rope],
            },
            **named,
        )
    )


def gpt2(**named):
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=4, n_positions=64, **QUIET))


def bert(kind, **named):
    config = hf.BertConfig(**BODY, max_position_embeddings=32, num_labels=3)
    if kind is hf.BertForQuestionAnswering:
        config.num_labels = 2
    return kind(config)


def vit():
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


def marian(**named):
    config = {
        "vocab_size": 30, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "max_position_embeddings": 64,
        "pad_token_id": 29, "eos_token_id": 0, "decoder_start_token_id": 29, "activation_function": "swish",
        "scale_embedding": True, "forced_eos_token_id": None,
    }  # fmt: skip
    model = hf.MarianMTModel(hf.MarianConfig(**{**config, **named}))
    model.final_logits_bias.normal_()
    return model


LANGUAGE = {
    "gpt2": gpt2,
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "llama of wider heads": lambda: llama(head_dim=8),
    **{f"llama {rope}": (lambda rope=rope: llama(rope)) for rope in ROPES},
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_gives_the_same_logits_both_ways(native, name):
    theirs = shaken(LANGUAGE[name]())
    tokens = torch.randint(30, (2, 40 if "llama " in name else 9))  # longer than the model was made for, to scale
    with torch.no_grad():
        expected = theirs(tokens).logits
        ours = from_huggingface(theirs)
        assert isinstance(ours, GPT)
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=0)
        back = to_huggingface(ours)
        assert type(back) is type(theirs)
        torch.testing.assert_close(back(tokens).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "kind",
    [
        hf.BertForMaskedLM, hf.BertForSequenceClassification, hf.BertForTokenClassification,
        hf.BertForQuestionAnswering,
    ],
)  # fmt: skip
def test_a_bert_gives_the_same_logits_both_ways(native, kind):
    theirs = shaken(bert(kind))
    types = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    lengths = torch.tensor([6, 4])
    keep = torch.arange(6) < lengths[:, None]

    def logits(model):
        out = model(TOKENS, attention_mask=keep.long(), token_type_ids=types)
        found = torch.stack((out.start_logits, out.end_logits), -1) if hasattr(out, "start_logits") else out.logits
        return found if found.ndim == 2 else torch.where(keep[..., None], found, 0.0)

    with torch.no_grad():
        ours = from_huggingface(theirs)
        assert isinstance(ours, BERT)
        own = ours(TOKENS, lengths, types)
        own = own if own.ndim == 2 else torch.where(keep[..., None], own, 0.0)
        torch.testing.assert_close(own, logits(theirs), atol=1e-4, rtol=0)
        back = to_huggingface(ours)
        assert type(back) is kind
        torch.testing.assert_close(logits(back), logits(theirs), atol=1e-4, rtol=0)


def test_a_vit_gives_the_same_logits_both_ways(native):
    theirs, images = shaken(vit()), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = theirs(images).logits
        ours = from_huggingface(theirs)
        assert isinstance(ours, ViT)
        torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(to_huggingface(ours)(images).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_marian_gives_the_same_logits_and_translations_both_ways(native, scaled):
    theirs = shaken(marian(scale_embedding=scaled))
    lengths, target = torch.tensor([6, 4]), torch.randint(1, 29, (2, 5))
    keep = torch.arange(6) < lengths[:, None]
    with torch.no_grad():
        ours = from_huggingface(theirs)
        assert isinstance(ours, Seq2Seq)
        back = to_huggingface(ours)
        expected = theirs(TOKENS, attention_mask=keep.long(), decoder_input_ids=ours.shifted(target)).logits
        torch.testing.assert_close(ours(TOKENS, target, lengths), expected, atol=1e-4, rtol=0)
        again = back(TOKENS, attention_mask=keep.long(), decoder_input_ids=ours.shifted(target)).logits
        torch.testing.assert_close(again, expected, atol=1e-4, rtol=0)
        written = theirs.generate(
            input_ids=TOKENS, attention_mask=keep.long(), max_new_tokens=7, num_beams=1, do_sample=False
        )[:, 1:]
        own = ours.generate(TOKENS, lengths, max_new_tokens=7)
        for row, length, other in zip(own.tokens, own.lengths, written, strict=True):
            assert torch.equal(row[:length], other[:length])


def test_the_gradient_is_the_same_too(native):
    theirs = shaken(gpt2())
    ours = from_huggingface(theirs)
    theirs(TOKENS, labels=TOKENS).loss.backward()
    ours.loss(TOKENS).backward()
    torch.testing.assert_close(ours.embedding.weight.grad, theirs.transformer.wte.weight.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        ours.transformer.stack.blocks[0].attention.in_proj_weight.grad.T,
        theirs.transformer.h[0].attn.c_attn.weight.grad,
        atol=1e-5,
        rtol=1e-4,
    )


def test_what_has_no_counterpart_is_refused():
    with pytest.raises(ValueError, match="models.from_huggingface: model must be one of .*; got Linear"):
        from_huggingface(torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="models.to_huggingface: model must be a GPT, BERT, ViT or Seq2Seq; got Linear"
    ):
        to_huggingface(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="positions must be 'learned' for GPT2LMHeadModel; got 'alibi'"):
        to_huggingface(GPT(30, dim=16, positions="alibi", num_layers=1))
    with pytest.raises(ValueError, match="norm_first must be False for MarianMTModel; got True"):
        to_huggingface(Seq2Seq(30, dim=16, num_layers=1, positions="sinusoidal_halves", head_bias=True))
    odd = gpt2()
    odd.config.scale_attn_weights = False
    with pytest.raises(ValueError, match="scale_attn_weights of a GPT-2 must be True; got False"):
        from_huggingface(odd)
