"""A text file as windows of tokens, line by line.

Enters: a UTF-8 file with one text a line, and a tokenizer.
Leaves: `Window`s with their line numbers; broken lines are refused, or skipped and named.
Floor 5: imports torch alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_LINE = 4_000_000  # bytes


@dataclass(frozen=True)
class Window:
    """Some tokens of one line.

    Args:
        line: its number, from 1.
        ids: token ids, the model's own markers included.
    """

    line: int
    ids: tuple[int, ...]


def windows(
    path: str | Path,
    tokenizer: Any,
    longest: int,
    *,
    markers: bool,
    after: int = 0,
    skip: Callable[[int, str], None] | None = None,
) -> Iterator[Window]:
    """The windows of a file.

    Args:
        path: the file.
        tokenizer: of the model.
        longest: tokens of a window; a longer line is cut into several.
        markers: whether the model's own markers go around each window.
        after: the line to go on after. Default the beginning.
        skip: told the number of a broken line and why; default None, which refuses the file.

    Raises:
        ValueError: no such file, or a broken line; the message says which.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"heads: CORPUS must be a text file; got {path}. Check the path.")
    first = [token for token in (getattr(tokenizer, "cls_token_id", None),) if markers and token is not None]
    last = [token for token in (getattr(tokenizer, "sep_token_id", None),) if markers and token is not None]
    room = longest - len(first) - len(last)
    if room < 2:
        raise ValueError(f"heads: --window must leave room for two tokens; got {longest}. Pass a larger one.")
    with file.open("rb") as lines:
        number = 0
        while raw := lines.readline(LONGEST_LINE + 1):
            number += 1
            why, text = _read(raw)
            if len(raw) > LONGEST_LINE:
                while raw and not raw.endswith(b"\n"):
                    raw = lines.readline(LONGEST_LINE)
            if number <= after or not (why or text.strip()):
                continue
            if why:
                if skip is None:
                    raise ValueError(
                        f"heads: every line of CORPUS must be UTF-8 text; got line {number}, {why}. "
                        "Mend it, or pass --skip-broken."
                    )
                skip(number, why)
                continue
            ids = tokenizer(text.strip(), add_special_tokens=False, verbose=False)["input_ids"]
            for start in range(0, len(ids), room):
                part = ids[start : start + room]
                if len(part) > 1:
                    yield Window(number, (*first, *part, *last))


def _read(raw: bytes) -> tuple[str, str]:
    """(what is wrong, text); one of them is empty."""
    if len(raw) > LONGEST_LINE:
        return f"longer than {LONGEST_LINE:,} bytes", ""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8", ""
    if any(unicodedata.category(char) == "Cc" and char not in "\t\r\n\f\v" for char in text):
        return "with control characters", ""
    return "", text
