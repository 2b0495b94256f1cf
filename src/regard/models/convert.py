"""Our models as those of transformers, and theirs as ours: the same numbers under other names.

Enters: a GPT-2, Llama, BERT, ViT or Marian of transformers, or one of our models.
Leaves: the other, with equal logits.
Floor 5; transformers is imported on use. A family says how to make each model from the other, and which of their
tensors, one after another, make each of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.models.bert import BERT
from regard.models.classifier import ViT
from regard.models.gpt import GPT
from regard.models.pretrained import Pretrained
from regard.models.seq2seq import Seq2Seq
from regard.nn.rotary import Rotary, scaling_as_dict, scaling_from_dict

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
_FROM, _TO = "models.from_huggingface", "models.to_huggingface"


class Pair(NamedTuple):
    """One tensor of ours and those of theirs that make it, joined along the first axis."""

    ours: str
    theirs: tuple[str, ...]
    how: str = "same"
    """"same"; "transposed", as GPT-2 keeps its weights; or "leading", theirs has further axes of 1 in front."""


class Family(NamedTuple):
    """How one kind of model becomes the other."""

    ours: Callable[[Any], Pretrained]
    theirs: Callable[[Any], Any]
    pairs: Callable[[Any], Iterator[Pair]]


def from_huggingface(model: Any) -> Any:
    """Our model with the numbers and the logits of one of transformers'.

    Args:
        model: a GPT2LMHeadModel, LlamaForCausalLM, BertForMaskedLM, BertForSequenceClassification,
            BertForTokenClassification, BertForQuestionAnswering, ViTForImageClassification or MarianMTModel.

    Returns:
        A GPT, BERT, ViT or Seq2Seq, in `eval`.

    Raises:
        ValueError: for another class, or a configuration that ours has no word for.

    Example:
        >>> import transformers
        >>> config = transformers.BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> theirs = transformers.BertForMaskedLM(config).eval()
        >>> tokens = torch.tensor([[3, 1, 4]])
        >>> torch.allclose(from_huggingface(theirs)(tokens), theirs(tokens).logits, atol=1e-5)
        True
    """
    kind = type(model).__name__
    if kind not in FAMILIES:
        raise ValueError(f"{_FROM}: model must be one of {', '.join(FAMILIES)}; got {kind}. Convert one of those.")
    family = FAMILIES[kind]
    ours = family.ours(model)
    held = model.state_dict()
    weights = {}
    for pair in family.pairs(ours):
        parts = [_turned(held[name], pair.how) for name in pair.theirs]
        weights[pair.ours] = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
    ours.load_state_dict(weights)
    return ours.eval()


def to_huggingface(model: Any) -> Any:
    """The model of transformers with the numbers and the logits of one of ours.

    Args:
        model: a GPT shaped as GPT-2 (learned positions, layer norms) or Llama (rotary, rms norms, swiglu, no biases), a
            BERT, a ViT, or a Seq2Seq shaped as Marian (norms last, sinusoidal_halves, a bias of the logits).

    Returns:
        A model of transformers, in `eval`.

    Raises:
        ValueError: where no class of transformers is shaped like the model.

    Example:
        >>> ours = ViT(8, 4, 3, dim=16, num_layers=1, norm_eps=1e-12).eval()
        >>> images = torch.randn(1, 3, 8, 8)
        >>> torch.allclose(to_huggingface(ours)(images).logits, ours(images), atol=1e-5)
        True
    """
    kind = _kind(model)
    family = FAMILIES[kind]
    theirs = family.theirs(model)
    held, weights = model.state_dict(), theirs.state_dict()
    for pair in family.pairs(model):
        wanted = [_turned(weights[name], pair.how) for name in pair.theirs]
        parts = held[pair.ours].split([len(t) for t in wanted]) if len(wanted) > 1 else (held[pair.ours],)
        for name, part in zip(pair.theirs, parts, strict=True):
            turned = part.T if pair.how == "transposed" else part
            weights[name] = turned.reshape(weights[name].shape).clone()
    theirs.load_state_dict(weights)
    theirs.tie_weights()
    return theirs.eval()


def _turned(t: Tensor, how: str) -> Tensor:
    if how == "transposed":
        return t.T
    while how == "leading" and t.ndim > 1 and t.shape[0] == 1:
        t = t[0]
    return t


def _kind(model: Any) -> str:
    """The class of transformers that is shaped as one of our models."""
    config = getattr(model, "config", {})
    if isinstance(model, BERT):
        return _BERTS[config["head"]]
    if isinstance(model, ViT):
        return "ViTForImageClassification"
    if isinstance(model, Seq2Seq):
        wanted = {"positions": "sinusoidal_halves", "norm_first": False, "head_bias": True, "target_vocab_size": None}
        wanted |= {"embedding_norm": False, "norm": "layer", "bias": True}
        _shaped("MarianMTModel", config, wanted)
        return "MarianMTModel"
    if isinstance(model, GPT):
        kind = "LlamaForCausalLM" if config.get("norm") == "rms" else "GPT2LMHeadModel"
        wanted = {"window": None, "norm_first": True}
        if kind == "LlamaForCausalLM":
            wanted |= {"positions": "rotary", "activation": "swiglu", "bias": False}
        else:
            wanted |= {"positions": "learned", "tied": True, "bias": True, "norm": "layer"}
        _shaped(kind, config, wanted)
        return kind
    raise ValueError(
        f"{_TO}: model must be a GPT, BERT, ViT or Seq2Seq; got {type(model).__name__}. transformers has none like it."
    )


_DEFAULTS = {
    "norm": "layer", "norm_first": True, "bias": True, "score": "softmax", "scale": None, "activation": "gelu",
    "num_kv_heads": None, "head_dim": None,
}  # fmt: skip


def _shaped(kind: str, config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wanted = {"score": "softmax", "scale": None, **wanted}
    if kind != "LlamaForCausalLM":
        wanted |= {"num_kv_heads": None, "head_dim": None}
    for name, value in wanted.items():
        own = config.get(name, _DEFAULTS.get(name))
        if own != value:
            raise ValueError(
                f"{_TO}: {name} must be {value!r} for {kind}; got {own!r}. No class of transformers is like it."
            )


def _need(kind: str, config: Any, **wanted: Any) -> None:
    for name, value in wanted.items():
        own = getattr(config, name, value)
        if own != value:
            raise ValueError(f"{_FROM}: {name} of a {kind} must be {value!r}; got {own!r}. Ours has no word for it.")


def _activation(word: str) -> str:
    if word not in ACTIVATIONS:
        raise ValueError(f"{_FROM}: the activation must be one of {', '.join(ACTIVATIONS)}; got {word!r}.")
    return ACTIVATIONS[word]


def _their_activation(model: Any) -> str:
    own = model.config.get("activation", "gelu")
    return next(theirs for theirs, word in ACTIVATIONS.items() if word == own)


def _both(ours: str, theirs: str, how: str = "same") -> Iterator[Pair]:
    """A weight and a bias."""
    for word in ("weight", "bias"):
        yield Pair(f"{ours}.{word}", (f"{theirs}.{word}",), how)


def _attention(ours: str, theirs: tuple[str, str, str, str], bias: bool = True) -> Iterator[Pair]:
    """A projection of three, and the one back."""
    for word in ("weight", "bias")[: 2 if bias else 1]:
        yield Pair(f"{ours}.in_proj_{word}", tuple(f"{name}.{word}" for name in theirs[:3]))
        yield Pair(f"{ours}.out_proj.{word}", (f"{theirs[3]}.{word}",))


def _shape_of(model: Any) -> dict[str, Any]:
    """Sizes of our model, whatever was left to defaults."""
    block = model.stack.blocks[0]
    return {
        "dim": model.dim, "heads": model.num_heads, "layers": model.num_layers,
        "eps": block.attention_norm.eps, "attention": block.attention,
        "dropout": getattr(block.drop, "p", 0.0),
    }  # fmt: skip


# ---- GPT-2 ----


def _from_gpt2(theirs: Any) -> GPT:
    c = theirs.config
    _need("GPT-2", c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return GPT(
        c.vocab_size, dim=c.n_embd, num_heads=c.n_head, num_layers=c.n_layer, hidden=c.n_inner or 4 * c.n_embd,
        activation=_activation(c.activation_function), norm_eps=c.layer_norm_epsilon, positions="learned",
        max_length=c.n_positions, dropout=c.resid_pdrop, attention_dropout=c.attn_pdrop,
    )  # fmt: skip


def _to_gpt2(ours: GPT) -> Any:
    import transformers

    s = _shape_of(ours.transformer)
    config = transformers.GPT2Config(
        vocab_size=ours.vocab_size, n_embd=s["dim"], n_head=s["heads"], n_layer=s["layers"],
        n_inner=ours.transformer.stack.blocks[0].feed_forward[0].out_features,  # pyright: ignore
        activation_function=_their_activation(ours), layer_norm_epsilon=s["eps"],
        n_positions=len(ours.transformer.positions.weight), resid_pdrop=s["dropout"], embd_pdrop=s["dropout"],  # pyright: ignore
        attn_pdrop=s["attention"].dropout, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _gpt2_pairs(ours: GPT) -> Iterator[Pair]:
    yield Pair("embedding.weight", ("transformer.wte.weight",))
    yield Pair("transformer.positions.weight", ("transformer.wpe.weight",))
    for i in range(ours.transformer.num_layers):
        own, theirs = f"transformer.stack.blocks.{i}", f"transformer.h.{i}"
        yield Pair(f"{own}.attention.in_proj_weight", (f"{theirs}.attn.c_attn.weight",), "transposed")
        yield Pair(f"{own}.attention.in_proj_bias", (f"{theirs}.attn.c_attn.bias",))
        for name, other in (
            ("attention.out_proj", "attn.c_proj"), ("feed_forward.0", "mlp.c_fc"), ("feed_forward.3", "mlp.c_proj")
        ):  # fmt: skip
            yield Pair(f"{own}.{name}.weight", (f"{theirs}.{other}.weight",), "transposed")
            yield Pair(f"{own}.{name}.bias", (f"{theirs}.{other}.bias",))
        yield from _both(f"{own}.attention_norm", f"{theirs}.ln_1")
        yield from _both(f"{own}.feed_forward_norm", f"{theirs}.ln_2")
    yield from _both("transformer.stack.norm", "transformer.ln_f")


# ---- Llama ----


def _from_llama(theirs: Any) -> GPT:
    c = theirs.config
    _need("Llama", c, hidden_act="silu", attention_bias=False, mlp_bias=False)
    rope = dict(c.rope_parameters)
    options: dict[str, Any] = {"base": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        options["scaling"] = _scaling(rope, c.max_position_embeddings)
    return GPT(
        c.vocab_size, tied=c.tie_word_embeddings, dim=c.hidden_size, num_heads=c.num_attention_heads,
        num_layers=c.num_hidden_layers, num_kv_heads=c.num_key_value_heads, head_dim=c.head_dim,
        hidden=c.intermediate_size, activation="swiglu", norm="rms", norm_eps=c.rms_norm_eps, bias=False,
        positions="rotary", position_options=options, attention_dropout=c.attention_dropout,
    )  # fmt: skip


_ROPE = {"original_length": "original_max_position_embeddings", "low_frequency": "low_freq_factor",
         "high_frequency": "high_freq_factor"}  # fmt: skip


def _scaling(rope: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """transformers' words for a scaling as ours."""
    known = {"factor", "beta_fast", "beta_slow", "attention_factor", *_ROPE}
    words = {name: rope[_ROPE.get(name, name)] for name in known if rope.get(_ROPE.get(name, name)) is not None}
    if rope["rope_type"] == "dynamic":  # which goes by the model's own length, whatever else is said
        words = {"factor": rope["factor"], "original_length": longest}
    return scaling_as_dict(scaling_from_dict({"kind": rope["rope_type"], **words}))


def _to_llama(ours: GPT) -> Any:
    import transformers

    s, rotary = _shape_of(ours.transformer), ours.transformer.positions
    assert isinstance(rotary, Rotary)
    if rotary.interleaved or rotary.dim != s["attention"].head_dim:
        raise ValueError(f"{_TO}: Rotary must turn whole heads in halves for LlamaForCausalLM; got {rotary}.")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rotary.base}
    longest = 4096
    if rotary.scaling is not None:
        words = {name: value for name, value in scaling_as_dict(rotary.scaling).items() if value is not None}
        rope["rope_type"] = words.pop("kind")
        rope |= {_ROPE.get(name, name): value for name, value in words.items()}
        longest = words.get("original_length", longest)
    block = ours.transformer.stack.blocks[0]
    config = transformers.LlamaConfig(
        vocab_size=ours.vocab_size, hidden_size=s["dim"], num_attention_heads=s["heads"],
        num_hidden_layers=s["layers"], num_key_value_heads=s["attention"].num_kv_heads,
        head_dim=s["attention"].head_dim, intermediate_size=block.feed_forward.down.in_features,  # pyright: ignore
        rms_norm_eps=s["eps"], rope_parameters=rope, max_position_embeddings=longest,
        tie_word_embeddings=ours.head is None, attention_dropout=s["attention"].dropout, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _llama_pairs(ours: GPT) -> Iterator[Pair]:
    yield Pair("embedding.weight", ("model.embed_tokens.weight",))
    if ours.head is not None:
        yield Pair("head.weight", ("lm_head.weight",))
    for i in range(ours.transformer.num_layers):
        own, theirs = f"transformer.stack.blocks.{i}", f"model.layers.{i}"
        names = tuple(f"{theirs}.self_attn.{letter}_proj" for letter in "qkvo")
        yield from _attention(f"{own}.attention", names, bias=False)  # pyright: ignore[reportArgumentType]
        gate_and_up = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
        yield Pair(f"{own}.feed_forward.up.weight", gate_and_up)
        yield Pair(f"{own}.feed_forward.down.weight", (f"{theirs}.mlp.down_proj.weight",))
        yield Pair(f"{own}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",))
        yield Pair(f"{own}.feed_forward_norm.weight", (f"{theirs}.post_attention_layernorm.weight",))
    yield Pair("transformer.stack.norm.weight", ("model.norm.weight",))


# ---- BERT ----

_BERTS = {
    "masked": "BertForMaskedLM", "classify": "BertForSequenceClassification", "tag": "BertForTokenClassification",
    "span": "BertForQuestionAnswering",
}  # fmt: skip


def _from_bert(theirs: Any) -> BERT:
    c = theirs.config
    head = next(word for word, name in _BERTS.items() if name == type(theirs).__name__)
    _need("BERT", c, is_decoder=False, add_cross_attention=False)
    if head == "masked":
        _need("BERT with a masked head", c, tie_word_embeddings=True, hidden_act="gelu")
    return BERT(
        c.vocab_size, head=head, num_labels=c.num_labels, num_types=c.type_vocab_size, dim=c.hidden_size,
        num_heads=c.num_attention_heads, num_layers=c.num_hidden_layers, hidden=c.intermediate_size,
        activation=_activation(c.hidden_act), norm_eps=c.layer_norm_eps, max_length=c.max_position_embeddings,
        dropout=c.hidden_dropout_prob, attention_dropout=c.attention_probs_dropout_prob,
    )  # fmt: skip


def _to_bert(ours: BERT) -> Any:
    import transformers

    s, kind = _shape_of(ours.transformer), _BERTS[ours.kind]
    _shaped(
        kind, {"positions": "learned", **ours.config}, {"positions": "learned", "norm_first": False, "norm": "layer"}
    )
    config = transformers.BertConfig(
        vocab_size=ours.vocab_size, type_vocab_size=ours.types.num_embeddings,
        hidden_size=s["dim"], num_attention_heads=s["heads"], num_hidden_layers=s["layers"],
        intermediate_size=ours.transformer.stack.blocks[0].feed_forward[0].out_features,  # pyright: ignore
        hidden_act=_their_activation(ours), layer_norm_eps=s["eps"], hidden_dropout_prob=s["dropout"],
        max_position_embeddings=len(ours.transformer.positions.weight),  # pyright: ignore
        attention_probs_dropout_prob=s["attention"].dropout, pad_token_id=None,
    )  # fmt: skip
    config.num_labels = ours.config["num_labels"]
    return getattr(transformers, kind)(config)


def _bert_pairs(ours: BERT) -> Iterator[Pair]:
    body = "bert.embeddings"
    yield Pair("embedding.weight", (f"{body}.word_embeddings.weight",))
    yield Pair("transformer.positions.weight", (f"{body}.position_embeddings.weight",))
    yield Pair("types.weight", (f"{body}.token_type_embeddings.weight",))
    yield from _both("norm", f"{body}.LayerNorm")
    for i in range(ours.transformer.num_layers):
        own, theirs = f"transformer.stack.blocks.{i}", f"bert.encoder.layer.{i}"
        q, k, v = (f"{theirs}.attention.self.{word}" for word in ("query", "key", "value"))
        yield from _attention(f"{own}.attention", (q, k, v, f"{theirs}.attention.output.dense"))
        yield from _both(f"{own}.attention_norm", f"{theirs}.attention.output.LayerNorm")
        yield from _both(f"{own}.feed_forward.0", f"{theirs}.intermediate.dense")
        yield from _both(f"{own}.feed_forward.3", f"{theirs}.output.dense")
        yield from _both(f"{own}.feed_forward_norm", f"{theirs}.output.LayerNorm")
    if ours.kind == "masked":
        yield from _both("head.0", "cls.predictions.transform.dense")
        yield from _both("head.2", "cls.predictions.transform.LayerNorm")
        yield Pair("head_bias", ("cls.predictions.bias",))
    elif ours.kind == "classify":
        yield from _both("head.0", "bert.pooler.dense")
        yield from _both("head.3", "classifier")
    else:
        yield from _both("head", "classifier" if ours.kind == "tag" else "qa_outputs")


# ---- ViT ----


def _from_vit(theirs: Any) -> ViT:
    c = theirs.config
    _need("ViT", c, qkv_bias=True)
    return ViT(
        c.image_size, c.patch_size, c.num_labels, channels=c.num_channels, dim=c.hidden_size,
        num_heads=c.num_attention_heads, num_layers=c.num_hidden_layers, hidden=c.intermediate_size,
        activation=_activation(c.hidden_act), norm_eps=c.layer_norm_eps, dropout=c.hidden_dropout_prob,
        attention_dropout=c.attention_probs_dropout_prob,
    )  # fmt: skip


def _to_vit(ours: ViT) -> Any:
    import transformers

    s, c = _shape_of(ours.transformer), ours.config
    _shaped("ViTForImageClassification", c, {"norm_first": True, "norm": "layer", "bias": True})
    config = transformers.ViTConfig(
        image_size=c["image_size"], patch_size=c["patch"], num_channels=c["channels"],
        hidden_size=s["dim"], num_attention_heads=s["heads"], num_hidden_layers=s["layers"],
        intermediate_size=ours.transformer.stack.blocks[0].feed_forward[0].out_features,  # pyright: ignore
        hidden_act=_their_activation(ours), layer_norm_eps=s["eps"], hidden_dropout_prob=s["dropout"],
        attention_probs_dropout_prob=s["attention"].dropout,
    )  # fmt: skip
    config.num_labels = c["num_classes"]
    return transformers.ViTForImageClassification(config)


def _vit_pairs(ours: ViT) -> Iterator[Pair]:
    yield Pair("embedding.first", ("vit.embeddings.cls_token",))
    yield Pair("transformer.positions.weight", ("vit.embeddings.position_embeddings",), "leading")
    yield from _both("embedding.projection", "vit.embeddings.patch_embeddings.projection")
    for i in range(ours.transformer.num_layers):
        own, theirs = f"transformer.stack.blocks.{i}", f"vit.layers.{i}"
        names = tuple(f"{theirs}.attention.{letter}_proj" for letter in "qkvo")
        yield from _attention(f"{own}.attention", names)  # pyright: ignore[reportArgumentType]
        yield from _both(f"{own}.attention_norm", f"{theirs}.layernorm_before")
        yield from _both(f"{own}.feed_forward_norm", f"{theirs}.layernorm_after")
        yield from _both(f"{own}.feed_forward.0", f"{theirs}.mlp.fc1")
        yield from _both(f"{own}.feed_forward.3", f"{theirs}.mlp.fc2")
    yield from _both("transformer.stack.norm", "vit.layernorm")
    yield from _both("head", "classifier")


# ---- Marian ----


def _from_marian(theirs: Any) -> Seq2Seq:
    c = theirs.config
    _need(
        "Marian", c, share_encoder_decoder_embeddings=True, tie_word_embeddings=True,
        decoder_attention_heads=c.encoder_attention_heads, decoder_ffn_dim=c.encoder_ffn_dim,
    )  # fmt: skip
    return Seq2Seq(
        c.vocab_size, start_token=c.decoder_start_token_id, end_token=c.eos_token_id, head_bias=True, dim=c.d_model,
        embedding_scale=c.d_model**0.5 if c.scale_embedding else 1.0, num_heads=c.encoder_attention_heads,
        num_layers=c.encoder_layers, decoder_layers=c.decoder_layers, hidden=c.encoder_ffn_dim, norm_first=False,
        activation=_activation(c.activation_function), positions="sinusoidal_halves", dropout=c.dropout,
        attention_dropout=c.attention_dropout,
    )  # fmt: skip


def _to_marian(ours: Seq2Seq) -> Any:
    import transformers

    s = _shape_of(ours.encoder)
    if ours.embedding_scale not in (1.0, s["dim"] ** 0.5):
        raise ValueError(
            f"{_TO}: embedding_scale must be 1 or the root of dim for MarianMTModel; got {ours.embedding_scale}. Scale "
            "the table."
        )
    hidden = ours.encoder.stack.blocks[0].feed_forward[0].out_features  # pyright: ignore
    config = transformers.MarianConfig(
        vocab_size=ours.vocab_size, d_model=s["dim"], encoder_layers=s["layers"],
        decoder_layers=ours.decoder.num_layers, encoder_attention_heads=s["heads"],
        decoder_attention_heads=s["heads"], encoder_ffn_dim=hidden, decoder_ffn_dim=hidden,
        activation_function=_their_activation(ours), dropout=s["dropout"], attention_dropout=s["attention"].dropout,
        scale_embedding=ours.embedding_scale != 1.0, pad_token_id=ours.start_token, eos_token_id=ours.end_token,
        decoder_start_token_id=ours.start_token, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


def _marian_pairs(ours: Seq2Seq) -> Iterator[Pair]:
    yield Pair("source_embedding.weight", ("model.shared.weight",))
    yield Pair("head_bias", ("final_logits_bias",), "leading")
    for side in ("encoder", "decoder"):
        attentions = {"attention": "self_attn", "cross": "encoder_attn"}
        if side == "encoder":
            del attentions["cross"]
        for i in range(getattr(ours, side).num_layers):
            own, theirs = f"{side}.stack.blocks.{i}", f"model.{side}.layers.{i}"
            for name, other in attentions.items():
                q, k, v, out = (f"{theirs}.{other}.{word}_proj" for word in ("q", "k", "v", "out"))
                yield from _attention(f"{own}.{name}", (q, k, v, out))
                yield from _both(f"{own}.{name}_norm", f"{theirs}.{other}_layer_norm")
            yield from _both(f"{own}.feed_forward.0", f"{theirs}.fc1")
            yield from _both(f"{own}.feed_forward.3", f"{theirs}.fc2")
            yield from _both(f"{own}.feed_forward_norm", f"{theirs}.final_layer_norm")


FAMILIES = {
    "GPT2LMHeadModel": Family(_from_gpt2, _to_gpt2, _gpt2_pairs),
    "LlamaForCausalLM": Family(_from_llama, _to_llama, _llama_pairs),
    **dict.fromkeys(_BERTS.values(), Family(_from_bert, _to_bert, _bert_pairs)),
    "ViTForImageClassification": Family(_from_vit, _to_vit, _vit_pairs),
    "MarianMTModel": Family(_from_marian, _to_marian, _marian_pairs),
}
