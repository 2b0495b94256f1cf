"""One text through one model, recorded.

Enters: a `Loaded` model and a text (for a speech model the path of a .wav file), perhaps what it shall write.
Leaves: a `Look`: the recording, the texts as words, and which attention goes from which text to which.
Encoder-decoders write greedily first; what is recorded is one run over the whole of what they read and wrote.
Floor 6: stands on the recorder and the opened model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.lens.layers import Layer
from regard.lens.models import Loaded
from regard.lens.recorder import record
from regard.lens.recording import Recording
from regard.lens.sound import read_wav
from regard.lens.splitting import read_ids, read_text
from regard.lens.tokens import Side, join_pieces
from regard.lens.values import Values

SENTENCE = "The cat sat on the mat because it was tired"
ASPIRIN = "CC(=O)OC(C)=O.OC(=O)c1ccccc1O>>CC(=O)Oc1ccccc1C(=O)O"
DEFAULT_TEXTS = {
    "rxnmapper": ASPIRIN,
    "mathformer": "7+5=",
    "mathformer-sub": "9-4=",
    "mathformer-mul": "6*7=",
    "mathformer-div": "7/2=",
}
LONGEST_TARGET = 48
LARGEST_MAP = 24_000_000  # bytes of one layer's weights that a page takes whole; beyond, it asks for rows and tiles
FRAMES_A_WORD = 5
LABELS = {"encoder": "encoder self-attention", "decoder": "decoder self-attention", "cross": "cross-attention"}


@dataclass(frozen=True)
class Attention:
    """One kind of attention of a look: which layers, from which text to which."""

    kind: str
    label: str
    query_side: int
    key_side: int
    layers: tuple[Layer, ...]

    @property
    def causal(self) -> bool:
        """Whether a query sees only what comes before it."""
        return self.kind == "decoder"

    @property
    def num_heads(self) -> int:
        """Query heads of each layer."""
        return self.layers[0].num_heads

    @property
    def numbers(self) -> list[int]:
        """Layer numbers."""
        return [layer.number for layer in self.layers]


@dataclass(frozen=True)
class Look:
    """A recording with the words that its rows and columns stand for.

    Args:
        window: which of the recording's texts this is, and how many there are.
        values: the values of the layers, where the model ran here.
    """

    loaded: Loaded
    text: str
    recording: Recording
    sides: tuple[Side, ...]
    attentions: tuple[Attention, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)
    window: tuple[int, int] = (0, 1)
    values: Values = field(default_factory=Values)

    def long(self, index: int) -> bool:
        """Whether one layer's weights of an attention are too many to hand out whole."""
        attention = self.attentions[index]
        rows, cols = (len(self.sides[side].tokens) for side in (attention.query_side, attention.key_side))
        return 4 * attention.num_heads * rows * cols > LARGEST_MAP

    @property
    def front(self) -> int:
        """The attention that is shown first: cross-attention where there is one."""
        kinds = [attention.kind for attention in self.attentions]
        return kinds.index("cross") if "cross" in kinds else 0


def default_text(loaded: Loaded) -> str | None:
    """The text that a model is shown where none is given; None for a speech model."""
    return None if loaded.shape == "speech" else DEFAULT_TEXTS.get(loaded.id, SENTENCE)


def look(loaded: Loaded, text: str, target: str | None = None, progress: Callable[[str], None] | None = None) -> Look:
    """Run a text through a model and record it.

    Args:
        loaded: the model.
        text: the text, or a .wav file's path for a speech model.
        target: what an encoder-decoder shall have written; default what it writes greedily.
        progress: called with what happens next.

    Raises:
        ValueError: an empty text, or one too long for the model.
    """
    report = progress or (lambda _message: None)
    if not text.strip():
        raise ValueError("look: text must have a word in it; got an empty one. Pass a sentence.")
    if target is not None and loaded.shape in ("encoder", "decoder"):
        raise ValueError(
            f"look: --target must go with a model that reads one text and writes another; got {loaded.name}. "
            "Leave it out."
        )
    from regard.huggingface import observe

    run = {"speech": _speech, "encoder-decoder": _two_texts}.get(loaded.shape, _one_text)
    values = Values()
    with torch.no_grad(), observe(values.watch(loaded.model)):
        recording, sides, notes = run(loaded, text, target, report)
    attentions = attentions_of(recording, sides, loaded.name)
    left_out = {layer.number for layer in recording.layers} - {n for one in attentions for n in one.numbers}
    if left_out:
        notes = (*notes, f"Layers with other head counts are left out: {', '.join(map(str, sorted(left_out)))}.")
    return Look(loaded, text, recording, sides, attentions, (*notes, *recording.notes), values=values)


def _one_text(
    loaded: Loaded, text: str, _target: str | None, report: Callable[[str], None]
) -> tuple[Recording, tuple[Side, ...], tuple[str, ...]]:
    ids, side = read_text(loaded.tokenizer, text)
    _check_length(loaded, ids, loaded.longest, "text")
    report(f"running {loaded.name}")
    options = {"use_cache": False} if loaded.shape == "decoder" else {}
    with record(loaded.model, tokenizer=loaded.tokenizer, texts=[text]) as recording:
        loaded.model(input_ids=torch.tensor([ids]), **options)
    return recording, (side,), ()


def _two_texts(
    loaded: Loaded, text: str, target: str | None, report: Callable[[str], None]
) -> tuple[Recording, tuple[Side, ...], tuple[str, ...]]:
    ids, source = read_text(loaded.tokenizer, text, "source")
    _check_length(loaded, ids, loaded.longest, "text")
    inputs = {"input_ids": torch.tensor([ids])}
    written = _written(loaded, inputs, target, report)
    _check_length(loaded, written, loaded.longest, "target")
    report(f"running {loaded.name}")
    with record(loaded.model, tokenizer=loaded.tokenizer, texts=[text]) as recording:
        loaded.model(**inputs, decoder_input_ids=torch.tensor([written]), use_cache=False)
    return recording, (source, read_ids(loaded.tokenizer, written, "target")), (_how_written(target),)


def _speech(
    loaded: Loaded, text: str, target: str | None, report: Callable[[str], None]
) -> tuple[Recording, tuple[Side, ...], tuple[str, ...]]:
    rate = int(loaded.features.sampling_rate)
    if Path(text).suffix.lower() != ".wav":
        raise ValueError(
            f"look: TEXT must be the path of a .wav file for {loaded.name}, which hears speech; got {text!r}. "
            "Pass a recording of a few seconds."
        )
    report(f"reading {Path(text).name}")
    samples = read_wav(text, rate)
    seconds, longest = len(samples) / rate, float(getattr(loaded.features, "chunk_length", 30))
    if seconds > longest:
        raise ValueError(
            f"look: sound must last at most {longest:.0f} seconds for {loaded.name}; got {seconds:.1f}. Cut it shorter."
        )
    features = loaded.features(samples.numpy(), sampling_rate=rate, return_tensors="pt").input_features
    inputs = {"input_features": features.to(loaded.model.dtype)}
    written = _written(loaded, inputs, target, report)
    _check_length(loaded, written, loaded.longest, "target")
    report(f"running {loaded.name}")
    with record(loaded.model, tokenizer=loaded.tokenizer, texts=[Path(text).name]) as recording:
        loaded.model(**inputs, decoder_input_ids=torch.tensor([written]), use_cache=False)
    frames = max(layer.steps[0].seq_len_kv for layer in recording.layers if layer.kind != "decoder")
    source = _frames(frames, seconds, longest)
    return recording, (source, read_ids(loaded.tokenizer, written, "target")), (_how_written(target),)


def _written(loaded: Loaded, inputs: dict[str, Tensor], target: str | None, report: Callable[[str], None]) -> list[int]:
    """Token ids that the decoder reads: its start, then what was, or shall have been, written."""
    config, told = loaded.model.config, loaded.model.generation_config
    start = next(
        (
            own
            for own in (told.decoder_start_token_id, getattr(config, "decoder_start_token_id", None))
            if own is not None
        ),
        loaded.tokenizer.pad_token_id,
    )
    if start is None:
        raise ValueError(
            f"look: model must say how its decoder starts; got {loaded.name} without decoder_start_token_id. "
            "Set it in its config."
        )
    prompt = [int(start), *_prompt(told)] if loaded.shape == "speech" else [int(start)]
    if target is not None:
        if not target.strip():
            raise ValueError(
                "look: --target must have a word in it; got an empty one. Pass what the model shall write."
            )
        ids, _ = read_text(loaded.tokenizer, target, "target", special_tokens=loaded.shape != "speech")
        eos = loaded.tokenizer.eos_token_id
        return prompt + (ids[:-1] if ids and ids[-1] == eos else ids)
    report(f"{loaded.name} is writing")
    room = LONGEST_TARGET if loaded.longest is None else min(LONGEST_TARGET, loaded.longest - len(prompt))
    return _greedy(loaded.model, inputs, prompt, room)


def _greedy(model: Any, inputs: dict[str, Tensor], prompt: list[int], room: int) -> list[int]:
    """The likeliest next token, again and again, until the end token (left out) or `room` tokens."""
    told = model.generation_config
    ends = told.eos_token_id if isinstance(told.eos_token_id, list) else [told.eos_token_id]
    never, not_first = (list(getattr(told, name, None) or []) for name in ("suppress_tokens", "begin_suppress_tokens"))
    forced = getattr(told, "forced_bos_token_id", None)
    encoded = model.get_encoder()(**inputs)
    written, cache, fresh = list(prompt), None, list(prompt)
    for turn in range(room):
        given = {"decoder_input_ids": torch.tensor([fresh]), "past_key_values": cache, "use_cache": True}
        answer = model(encoder_outputs=encoded, **given)
        scores, cache = answer.logits[0, -1].clone(), answer.past_key_values
        scores[[token for token in never + (not_first if not turn else []) if token < len(scores)]] = -torch.inf
        token = int(forced) if forced is not None and not turn else int(scores.argmax())
        if token in ends:
            break
        written.append(token)
        fresh = [token]
    return written


def _prompt(told: Any) -> list[int]:
    """What stands between a speech decoder's start and its text: language, task, no timestamps."""
    forced = getattr(told, "forced_decoder_ids", None)
    if forced:
        return [int(token) for _, token in forced if token is not None]
    prompt = []
    if getattr(told, "is_multilingual", False):
        languages, tasks = getattr(told, "lang_to_id", None) or {}, getattr(told, "task_to_id", None) or {}
        prompt += [own for own in (languages.get("<|en|>"), tasks.get("transcribe")) if own is not None]
    silent = getattr(told, "no_timestamps_token_id", None)
    return prompt + ([int(silent)] if silent is not None else [])


def _frames(count: int, seconds: float, longest: float) -> Side:
    """The positions of an audio encoder as times; what lies past the sound is one word."""
    step = longest / count
    sounding = min(count, max(1, round(seconds / step)))
    pieces = [
        (f"{at * step:.2f} s", at >= sounding, at // FRAMES_A_WORD if at < sounding else count) for at in range(count)
    ]
    side = join_pieces("source", [(text, False, number) for text, _, number in pieces])
    words = tuple(
        type(word)("silence" if first >= sounding else f"{first * step:.1f} s", (first, last), first >= sounding)
        for word in side.words
        for first, last in [word.tokens]
    )
    tokens = tuple(type(t)(t.text, at >= sounding, t.word) for at, t in enumerate(side.tokens))
    return Side("source", tokens, words)


def _how_written(target: str | None) -> str:
    what = (
        "The target is what the model wrote, the likeliest token each time."
        if target is None
        else "The target was given."
    )
    return f"{what} A row of the target is a token that was read in order to write the next one."


def attentions_of(recording: Recording, sides: tuple[Side, ...], name: str) -> tuple[Attention, ...]:
    """The attentions of a recording that go from token to token of its texts.

    Args:
        recording: with one step a layer.
        sides: its texts.
        name: what people call the model.

    Raises:
        ValueError: none does.
    """
    found = []
    for kind in ("encoder", "decoder", "cross"):
        layers = sorted((one for one in recording.layers if one.kind == kind), key=lambda one: one.number)
        if not layers:
            continue
        one_text = len(sides) == 1
        query, key = (0, 0) if one_text or kind == "encoder" else (1, 1 if kind == "decoder" else 0)
        size = (len(sides[query].tokens), len(sides[key].tokens))
        fitting = [
            one
            for one in layers
            if (one.num_heads, one.num_kv_heads) == (layers[0].num_heads, layers[0].num_kv_heads)
            and (one.steps[0].seq_len_q, one.steps[0].seq_len_kv) == size
        ]
        if fitting:
            label = "self-attention" if one_text else LABELS[kind]
            found.append(Attention(kind, label, query, key, tuple(fitting)))
    if not found:
        raise ValueError(
            f"look: model must attend from token to token of its text; got {name}, which does not. Choose another."
        )
    return tuple(found)


def _check_length(loaded: Loaded, ids: list[int], longest: int | None, what: str) -> None:
    if not ids:
        raise ValueError(f"look: {what} must have a token in it; got none. Pass a sentence.")
    if longest is not None and len(ids) > longest:
        raise ValueError(
            f"look: {what} must be at most {longest} tokens for {loaded.name}; got {len(ids)}. Make it shorter."
        )
