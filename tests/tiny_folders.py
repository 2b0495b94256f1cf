"""Tiny random models as transformers folders, each with a tokenizer made on the spot.

Enters: a folder, a kind: "bert", "llama", "t5", "whisper".
Leaves: config.json, model.safetensors and a tokenizer there (and a feature extractor), for `from_pretrained`.
The four tokenizers mark their words in the four usual ways: ##, Ġ, ▁ and Ġ with Whisper's own markers.
"""

from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCE = "The cat sat on the mat because it was tired"
TEXTS = [SENTENCE, "A dog and a cat", "it was the mat", "unbelievable, didn't it?"] * 8


def make(folder: Path, kind: str) -> Path:
    """Write one tiny model; its folder."""
    torch.manual_seed(7)
    {"bert": _bert, "llama": _llama, "t5": _t5, "whisper": _whisper}[kind](folder)
    return folder


def _bert(folder: Path) -> None:
    words = sorted(
        {word for text in TEXTS for word in text.lower().replace(",", "").replace("?", "").split()} - {"tired"}
    )
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *words,
        "ti",
        "##red",
        "'",
        "t",
        "didn",
        ",",
        "?",
        "un",
        "##believ",
        "##able",
    ]
    names = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(names, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", names["[SEP]"]), ("[CLS]", names["[CLS]"]))
    config = transformers.BertConfig(
        vocab_size=len(names), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=24,
    )  # fmt: skip
    _sharp(transformers.BertModel(config)).save_pretrained(folder)
    marks = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, **marks).save_pretrained(
        folder
    )


def _llama(folder: Path) -> None:
    tokenizer = _byte_level(["<s>", "</s>"])
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    _sharp(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
    marks = {"bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)


def _t5(folder: Path) -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    marks = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=marks, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = transformers.T5Config(
        vocab_size=tokenizer.get_vocab_size(), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    _sharp(transformers.T5ForConditionalGeneration(config)).save_pretrained(folder)
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)


def _whisper(folder: Path) -> None:
    tokenizer = _byte_level(["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"])
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        vocab_size=tokenizer.get_vocab_size(), d_model=32, encoder_layers=2, decoder_layers=3,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=16,
        max_source_positions=100,
        max_target_positions=32, suppress_tokens=None, begin_suppress_tokens=None, **ends,
    )  # fmt: skip
    model = _sharp(transformers.WhisperForConditionalGeneration(config))
    model.generation_config = transformers.GenerationConfig(no_timestamps_token_id=2, begin_suppress_tokens=[0], **ends)
    model.save_pretrained(folder)
    marks = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<|startoftranscript|>", "<|notimestamps|>"], **marks
    ).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2).save_pretrained(folder)


def _byte_level(marks: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"'t| ?\w+| ?[^\s\w]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=marks, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _sharp(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Random weights large enough that heads differ from the mean."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    return model.eval()
