"""What `regard heads` found, brought to the page: scores to sort heads by, and a label where one role stands out.

Enters: a heads.json, and the look that it is shown with.
Leaves: `HeadLabels`: scores and labels by layer and head of the front attention; a file of another model is refused.
Floor 6: reads the file alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.lens.heads import FORMAT
from regard.lens.look import Look
from regard.lens.measures import names

LARGEST_FILE = 64_000_000
ROLES = ("previous", "next", "same", "first", "separator", "sink", "induction", "duplicate")
LEAST_ROLE = 0.4  # of all weight; below, no role says what a head does
LONGEST_NAME = 40
MOST_SCORES = 40


@dataclass(frozen=True)
class HeadLabels:
    """Scores of the heads over a corpus.

    Args:
        scores: by name a list of heads for each layer; None where a head has no such score.
        labels: for each layer and head (role, score) of its strongest role, or None.
    """

    scores: dict[str, list[list[float | None]]]
    labels: list[list[tuple[str, float] | None]]


def read_head_labels(path: str | Path, look: Look) -> HeadLabels:
    """Read a heads.json for the model that is shown.

    Args:
        path: what `regard heads` wrote.
        look: a text read by the same model.

    Raises:
        ValueError: a file that cannot be read, is no heads.json, or is of another model or shape.
    """
    told = _read(Path(path))
    if told.get("model") != look.loaded.id:
        raise ValueError(
            f"look: --heads must be of the model that is shown, {look.loaded.id}; got scores of "
            f"{str(told.get('model'))[:60]}. Run regard heads {look.loaded.id} CORPUS."
        )
    front = look.attentions[look.front]
    rows = [row for row in told["heads"] if isinstance(row, dict) and row.get("kind") == front.kind]
    found = {(row.get("layer"), row.get("head")): row for row in rows}
    wanted = [[(layer, head) for head in range(front.num_heads)] for layer in front.numbers]
    if len(found) != len(rows) or set(found) != {at for layer in wanted for at in layer}:
        raise ValueError(
            f"look: --heads must hold each of the {len(wanted)} × {front.num_heads} heads of {look.loaded.name} once; "
            f"got {len(rows)} that do not fit. Run regard heads {look.loaded.id} CORPUS again."
        )
    taken = names(look, look.front)
    scores = {}
    for name in list(told["scores"])[:MOST_SCORES]:
        if not isinstance(name, str) or len(name) > LONGEST_NAME:
            raise ValueError(f"look: --heads must name its scores in words; got {str(name)[:40]!r}. Write it again.")
        shown = f"{name}, over the corpus" if name in taken else name  # the page measures some of this text itself
        scores[shown] = [[_number(found[at].get(name)) for at in layer] for layer in wanted]
    return HeadLabels(scores, [[_label(found[at]) for at in layer] for layer in wanted])


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"look: --heads must be at most {LARGEST_FILE:,} bytes; got {path.stat().st_size:,}.")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as unread:
        raise ValueError(f"look: --heads must be a file that can be read; got {path} ({unread}).") from None
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        told = None
    lists = isinstance(told, dict) and all(isinstance(told.get(name), list) for name in ("heads", "scores"))
    if not isinstance(told, dict) or told.get("format") != FORMAT or not lists:
        raise ValueError(
            f"look: --heads must be a heads.json of regard heads; got {path.name}. Run regard heads MODEL CORPUS."
        )
    return told


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _label(row: dict[str, Any]) -> tuple[str, float] | None:
    held = [(role, score) for role in ROLES if (score := _number(row.get(role))) is not None]
    best = max(held, key=lambda one: one[1], default=None)
    return best if best is not None and best[1] >= LEAST_ROLE else None
