"""A saved recording as a look.

Enters: a directory that `Recording.save` wrote, and which of its texts.
Leaves: a `Look` at that text, without the model; tensors stay mapped.
The words come from the model's tokenizer where it is found on this machine, else each token is named by its number.
Floor 6: stands on the recording and on the embedded models' tokenizers."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from torch import Tensor

from regard.lens.layers import Layer, Step
from regard.lens.look import Look, attentions_of
from regard.lens.models import Loaded
from regard.lens.recording import Recording
from regard.lens.splitting import read_ids
from regard.lens.storage import MANIFEST
from regard.lens.tokens import Side, Token, Word


def is_recording(path: str) -> bool:
    """Whether a directory holds a recording."""
    try:
        return (Path(path) / MANIFEST).is_file()
    except (OSError, ValueError):  # a text too long, or with a zero in it, is no path
        return False


def open_look(directory: str | Path, window: int = 0) -> Look:
    """Open one text of a saved recording.

    Args:
        directory: what `Recording.save` wrote.
        window: which of its texts, from 0.

    Raises:
        ValueError: no recording there, a damaged one, or no such text in it.

    Example:
        >>> open_look("./nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: recording: directory must hold a manifest.json; got nowhere without one. Pass what ...
    """
    return look_at(Recording.open(directory), window)


def look_at(recording: Recording, window: int = 0, tokenizer: Any = None) -> Look:
    """One text of a recording as a look.

    Args:
        recording: in memory or opened.
        window: which of its texts, from 0.
        tokenizer: what names its tokens. Default: the model's, where it is on this machine.

    Raises:
        ValueError: no such text, or one that was written step by step and not read at once.
    """
    count = max(len(layer.steps) for layer in recording.layers)
    if not 0 <= window < count:
        raise ValueError(f"look: window must be from 0 to {count - 1}; got {window}. Choose one of those.")
    layers = [_one(layer, layer.steps[min(window, len(layer.steps) - 1)]) for layer in recording.layers]
    part = Recording(
        layers, recording.model, recording.tokenizer, recording.texts, recording.token_ids, recording.notes
    )
    name = Path(str(recording.model.get("id") or "a recording")).name
    kinds = {layer.kind for layer in layers}
    shape = "encoder-decoder" if "cross" in kinds else "decoder" if "decoder" in kinds else "encoder"
    loaded = Loaded(name, name, model=None, tokenizer=None, features=None, shape=shape, longest=None)
    tokenizer = tokenizer or _tokenizer(recording)
    sides, notes = _sides(part, layers, window, tokenizer)
    text = recording.texts[window] if window < len(recording.texts) else ""
    shown = text if text else " ".join(word.text for word in sides[0].words[:40])
    notes += () if len(layers[0].steps) == 1 else (f"Text {window + 1} of {count} in this recording.",)
    return Look(
        loaded,
        shown[:2000],
        part,
        sides,
        attentions_of(part, sides, name),
        (*notes, *recording.notes),
        (window, count),
    )


def _one(layer: Layer, step: Step) -> Layer:
    return Layer(layer.module, layer.number, layer.kind, [step])


def _sides(
    recording: Recording, layers: list[Layer], window: int, tokenizer: Any
) -> tuple[tuple[Side, ...], tuple[str, ...]]:
    cross = next((layer.steps[0] for layer in layers if layer.kind == "cross"), None)
    front = layers[0].steps[0]
    lengths = (
        [("text", front.seq_len_kv)] if cross is None else [("source", cross.seq_len_kv), ("target", cross.seq_len_q)]
    )
    sides, unnamed = [], False
    for name, length in lengths:
        held = recording.token_ids.get(name, [])
        ids: Tensor | None = held[window].reshape(-1) if window < len(held) else None
        if ids is not None and len(ids) == length and tokenizer is not None:
            sides.append(read_ids(tokenizer, ids.tolist(), name))
            continue
        unnamed = True
        sides.append(_named_by_place(name, length))
    notes = ("The words of this recording are not known here: each token is named by its place.",) if unnamed else ()
    return tuple(sides), notes


def _named_by_place(name: str, length: int) -> Side:
    collecting = gc.isenabled()
    gc.disable()  # so many small objects at once: looking for garbage among them would take four times as long
    try:
        tokens = tuple(Token(str(at), False, at) for at in range(length))
        return Side(name, tokens, tuple(Word(token.text, (token.word, token.word + 1), False) for token in tokens))
    finally:
        if collecting:
            gc.enable()


def _tokenizer(recording: Recording) -> Any:
    """The recording's tokenizer: a directory on this machine, where its sum is the recorded one."""
    facts = recording.tokenizer
    if facts is None or not Path(str(facts["id"])).is_dir():
        return None
    from transformers import AutoTokenizer

    from regard.lens.fingerprint import tokenizer_facts

    try:
        found = AutoTokenizer.from_pretrained(facts["id"], local_files_only=True)
    except (OSError, ValueError):
        return None
    return found if tokenizer_facts(found)["sha256"] == facts["sha256"] else None
