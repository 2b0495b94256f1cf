"""Tiny random models of every family of transformers that can be built from a config alone.

Enters: a model type such as "llama", or nothing for all of them.
Leaves: a model of two layers with at most 64 channels, float32, eval mode, and inputs that fit it.
`python tests/tiny_models.py` prints one JSON line per family: its kind and class, or why it is left out.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import regard.huggingface
from tiny_overrides import OVERRIDES

VOCABULARY = 99
PIXELS = 16
MELS = 16
LARGEST = 200_000_000

# One small number for every name under which configs keep a size; a config takes those it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys("vocab_size text_vocab_size".split(), VOCABULARY),
    **dict.fromkeys("hidden_size d_model n_embd dim embed_dim".split(), 32),
    **dict.fromkeys("word_embed_proj_dim encoder_hidden_size decoder_hidden_size".split(), 32),
    **dict.fromkeys(
        "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim mlp_dim ffn_hidden_size".split(), 48
    ),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size".split(), 32),
    **dict.fromkeys("num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers depth".split(), 2),
    **dict.fromkeys("num_decoder_layers num_encoder_layers".split(), 2),
    **dict.fromkeys("num_attention_heads num_heads n_head n_heads encoder_attention_heads".split(), 4),
    **dict.fromkeys("decoder_attention_heads".split(), 4),
    **dict.fromkeys("num_key_value_heads num_kv_heads".split(), 2),
    **dict.fromkeys("head_dim d_kv attention_head_size rotary_dim".split(), 8),
    **dict.fromkeys("qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim".split(), 8),
    **dict.fromkeys("q_lora_rank kv_lora_rank".split(), 16),
    **dict.fromkeys("max_position_embeddings n_positions max_target_positions".split(), 64),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k".split(), 2),
    **dict.fromkeys("n_group topk_group".split(), 1),
    **dict.fromkeys("embedding_size projection_dim".split(), 32),
    "max_source_positions": 32,
    "image_size": PIXELS,
    "patch_size": 8,
    "num_channels": 3,
    "num_mel_bins": MELS,
    "sliding_window": 6,
    "attention_chunk_size": 6,
    "first_k_dense_replace": 1,
    "num_frames": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "vocab_size_per_layer_input": VOCABULARY,
    "mamba_chunk_size": 16,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
# Latent attention has as many key heads as query heads.
LATENT = {"num_key_value_heads": 4}


@dataclass(frozen=True)
class Family:
    """A model type, how it is driven, and the auto class that builds it."""

    model_type: str
    kind: (
        str  # causal, encoder, seq2seq, speech, vision, video, audio, two-sided, text or multimodal (given text alone)
    )
    auto: str


def families() -> list[Family]:
    """Every model type of transformers that has one of the kinds, whether it can be built or not."""
    found: dict[str, Family] = {}

    def take(kind: str, auto: str, names: Any) -> None:
        for name in names:
            found.setdefault(name, Family(name, kind, auto))

    auto = modeling_auto
    take("encoder", "AutoModelForMaskedLM", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    seq2seq = [n for n in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if n not in SPEECH]
    for name in seq2seq:  # bart and its kin also have a masked-word head
        found.pop(name, None)
    take("seq2seq", "AutoModelForSeq2SeqLM", seq2seq)
    take("speech", "AutoModelForSpeechSeq2Seq", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)
    take("causal", "AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    take("multimodal", "AutoModelForImageTextToText", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    for name, classes in auto.MODEL_MAPPING_NAMES.items():
        try:
            cls = getattr(transformers, classes if isinstance(classes, str) else classes[0])
            given = cls.main_input_name
        except (ImportError, AttributeError):  # needs a package that is not installed
            continue
        kind = {"pixel_values": "vision", "input_values": "audio", "input_features": "audio"}.get(str(given))
        if kind is None and given == "input_ids":
            kind = "vision" if name.endswith("_vision") else "two-sided" if name in TWO_SIDED else "text"
        if kind is not None:
            take("video" if name in VIDEO else kind, "AutoModel", [name])
    for name in HEARING & set(found):
        found[name] = replace(found[name], kind="multimodal")
    return sorted(found.values(), key=lambda family: (family.kind, family.model_type))


SPEECH = set(modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)
TWO_SIDED = set(
    "align altclip aimv2 chinese_clip clip clipseg groupvit metaclip_2 owlv2 owlvit siglip siglip2 tipsv2 xclip".split()
)


VIDEO = {"timesformer", "videomae", "vivit", "vjepa2"}
HEARING = set(
    "audioflamingo3 fun_asr_nano glmasr granite_speech granite_speech_plus moss_transcribe_diarize musicflamingo "
    "qwen2_audio qwen3_asr vibevoice_asr voxtral".split()
)


def tiny_config(cls: type[PreTrainedConfig], changes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A config of this class with every size it has made small, its parts' too, and then `changes`."""
    whole = cls()
    defaults = whole.to_dict()
    small: dict[str, Any] = {}
    for name, size in SIZES.items():
        real = cls.attribute_map.get(name, name)
        if isinstance(defaults.get(real), int) and not isinstance(defaults[real], bool):
            small[real] = size
    if isinstance(defaults.get("image_size"), (list, tuple)):
        small["image_size"] = [PIXELS, PIXELS]
    if "kv_lora_rank" in defaults:
        small.update({cls.attribute_map.get(name, name): n for name, n in LATENT.items() if name in defaults})
    used = 3
    for name, value in defaults.items():
        if (
            name.endswith(("_token_id", "_token_index", "_idx", "_id"))
            and isinstance(value, int)
            and value >= VOCABULARY
        ):
            small[name], used = VOCABULARY - used, used + 1
    if isinstance(defaults.get("pad_token_id"), int):
        small["pad_token_id"] = 0
    changes = dict(changes or {})
    for name in cls.sub_configs:
        part = getattr(whole, name, None)
        if part is not None:
            small[name] = tiny_config(type(part), changes.pop(name, None)).to_dict()
    small.update(changes)
    return cls(**small)


def build(family: Family, seed: int = 0, **changes: Any) -> nn.Module:
    """The tiny model of one family, in eval mode, with weights that let attention differ from a mean."""
    cls = CONFIG_MAPPING[family.model_type]
    config = tiny_config(cls, {**OVERRIDES.get(family.model_type, {}), **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, family.auto).from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # initial weights of 0.02 make every softmax flat: a wrong mask would not show
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif not parameter.isfinite().all() or (parameter.numel() and parameter.abs().sum() == 0):
                parameter.normal_(0, 0.1)
    return model


def parameters(family: Family) -> int:
    """How many parameters the tiny model would have."""
    config = tiny_config(CONFIG_MAPPING[family.model_type], OVERRIDES.get(family.model_type))
    with torch.device("meta"):
        return sum(p.numel() for p in getattr(transformers, family.auto).from_config(config).parameters())


def inputs(
    family: Family, config: PreTrainedConfig, lengths: tuple[int, ...], side: str = "right"
) -> dict[str, Tensor]:
    """Inputs of a batch whose rows have these lengths, padded on one side."""
    generator = torch.Generator().manual_seed(1)
    batch, longest = len(lengths), max(lengths)

    def text() -> dict[str, Tensor]:
        ids = torch.randint(5, VOCABULARY - 20, (batch, longest), generator=generator)
        index = torch.arange(longest)
        held = torch.stack([index < n if side == "right" else index >= longest - n for n in lengths])
        return {"input_ids": ids.masked_fill(~held, 0), "attention_mask": held.long()}

    if family.kind in ("causal", "encoder", "text", "multimodal"):
        return text()
    if family.kind == "seq2seq":
        return {**text(), "decoder_input_ids": torch.randint(5, 70, (batch, 9), generator=generator)}
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", PIXELS)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(batch, getattr(vision, "num_channels", 3) or 3, height, width, generator=generator)
    if family.kind == "vision":
        return {"pixel_values": pixels}
    if family.kind == "video":
        return {"pixel_values": pixels[:, None] * torch.linspace(0.5, 1, 4).reshape(1, 4, 1, 1, 1)}
    if family.kind == "two-sided":
        held = text()
        ends = [n - 1 if side == "right" else longest - 1 for n in lengths]
        held["input_ids"][range(batch), ends] = config.text_config.eos_token_id or 2  # what CLIP pools at
        return {**held, "pixel_values": pixels}
    if family.kind == "speech":
        frames = 2 * getattr(config, "max_source_positions", 32)
        sound = torch.randn(batch, MELS, frames, generator=generator)
        given = {"input_features": sound}
        if family.model_type == "speech_to_text":
            given = {"input_features": sound.transpose(1, 2)}
        if family.model_type in ("moonshine", "speecht5"):
            given = {"input_values": torch.randn(batch, 4000, generator=generator)}
        return {**given, "decoder_input_ids": torch.randint(5, 70, (batch, 9), generator=generator)}
    assert family.kind == "audio"
    return {"input_values": torch.randn(batch, 4000, generator=generator)}


def logits_of(output: Any) -> Tensor:
    """The tensor that two implementations are compared by."""
    for name in ("logits", "last_hidden_state", "logits_per_image", "pred_boxes"):
        if isinstance(value := getattr(output, name, None), Tensor):
            return value
    return next(value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point())


def main() -> None:
    """Print one JSON line per family."""
    logging.disable()
    covered = 0
    for family in families():
        line: dict[str, Any] = {"model_type": family.model_type, "kind": family.kind}
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                if (count := parameters(family)) > LARGEST:
                    raise ValueError(f"{count:,} parameters, whatever its sizes: it has more than the config tells")
                model = build(family)
                model(**inputs(family, model.config, (3, 2)))
                line["class"] = type(model).__name__
                regard.huggingface.prepare(model)
            covered += 1
        except Exception as error:  # whatever a family needs that a small config does not give
            line["left_out"] = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        print(json.dumps(line), flush=True)
    print(json.dumps({"covered": covered}))


if __name__ == "__main__":
    sys.exit(main())
