"""Sentences in which one word stands for another: the built-in ones, and files of them.

Enters: nothing, or a file of probes.
Leaves: `Probe`: a text, where the word that asks stands, and the words that it may stand for; twins that differ in the
end alone.
Floor 5: imports no library but the standard one."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

MOST_PROBES = 20_000
Characters = tuple[int, int]


@dataclass(frozen=True)
class Probe:
    """One text with a pronoun, as half-open character ranges.

    Args:
        text: the text.
        pronoun: the word that asks.
        right: what it stands for.
        other: what it does not stand for; None where the file names none.
    """

    text: str
    pronoun: Characters
    right: Characters
    other: Characters | None


# "it" means the first noun in the first five and the second in the others.
IT = (
    ("The horse stopped at the gate because it was thirsty.", "horse", "gate"),
    ("The baby threw the spoon because it was angry.", "baby", "spoon"),
    ("The truck hit the wall because it was going too fast.", "truck", "wall"),
    ("The bird left the branch because it was frightened.", "bird", "branch"),
    ("The knife cut the rope because it was sharp.", "knife", "rope"),
    ("The girl ate the cake because it was sweet.", "cake", "girl"),
    ("The man closed the window because it was broken.", "window", "man"),
    ("The farmer sold the cow because it was old.", "cow", "farmer"),
    ("The sailor dropped the anchor because it was heavy.", "anchor", "sailor"),
    ("The boat could not pass the bridge because it was too low.", "bridge", "boat"),
)
# Twins that differ in the end alone: "it" turns from the first noun to the second.
TWINS = (
    ("The horse stopped at the gate because it was {}.", "horse", "gate", "thirsty", "locked"),
    ("The truck hit the wall because it was {}.", "truck", "wall", "going too fast", "in the wrong place"),
    ("The bird left the branch because it was {}.", "bird", "branch", "frightened", "rotten"),
    ("The knife cut the rope because it was {}.", "knife", "rope", "sharp", "thin"),
    ("The piano did not fit through the door because it was {}.", "piano", "door", "too wide", "too narrow"),
    ("The dog caught the rabbit because it was {}.", "dog", "rabbit", "fast", "slow"),
    ("The boat could not pass the bridge because it was {}.", "boat", "bridge", "too tall", "too low"),
    ("The ball hit the vase and it {}.", "ball", "vase", "bounced", "broke"),
)


def built_in() -> list[Probe]:
    """The ten sentences in which "it" stands for a noun."""
    return [Probe(text, _word(text, "it"), _word(text, right), _word(text, other)) for text, right, other in IT]


def twins() -> list[tuple[Probe, Probe]]:
    """The eight pairs of sentences in which the end alone says what "it" is."""
    pairs = []
    for frame, first, second, end, other_end in TWINS:
        one, two = frame.format(end), frame.format(other_end)
        pairs.append(
            (
                Probe(one, _word(one, "it"), _word(one, first), _word(one, second)),
                Probe(two, _word(two, "it"), _word(two, second), _word(two, first)),
            )
        )
    return pairs


def read(path: str | Path, mask: str | None = None, skip_broken: bool = False) -> tuple[list[Probe], list[str]]:
    """Probes of a file.

    Args:
        path: a .tsv in the layout of GAP (columns Text, Pronoun, Pronoun-offset, A, A-offset, A-coref, B, ...); or text
            in blocks of three lines and a blank one: a sentence with [MASK], "[MASK]", the two candidates between
            commas, and the right one (four lines).
        mask: what stands in the place of [MASK]; default "they".
        skip_broken: leave out what cannot be read, instead of refusing the file.

    Returns:
        The probes, and a sentence for each that was left out.

    Raises:
        ValueError: a file that cannot be read, or a line in it; the message says which.
    """
    file = Path(path)
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as unread:
        raise ValueError(f"heads: --probes must be a text file that can be read; got {path} ({unread}).") from None
    found: list[Probe] = []
    broken: list[str] = []
    source = _rows(text, mask or "they") if file.suffix != ".tsv" else _gap(text)
    for line, one in source:
        if isinstance(one, Probe):
            found.append(one)
        elif skip_broken:
            broken.append(f"{file.name}, line {line}: {one}")
        else:
            raise ValueError(
                f"heads: --probes must hold probes; got line {line} of {file.name}: {one}. "
                "Mend it, or pass --skip-broken."
            )
        if len(found) > MOST_PROBES:
            raise ValueError(f"heads: --probes must hold at most {MOST_PROBES}; got more in {file.name}. Split it.")
    if not found:
        raise ValueError(
            f"heads: --probes must hold a probe; got none in {file.name}. Pass GAP's .tsv or [MASK] blocks."
        )
    return found, broken


def _word(text: str, word: str) -> Characters:
    match = re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)
    assert match is not None, (text, word)
    return match.span()


def _gap(text: str) -> list[tuple[int, Probe | str]]:
    found: list[tuple[int, Probe | str]] = []
    reader = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    for line, row in enumerate(reader, 2):
        try:
            spans = {
                name: (int(row[f"{name}-offset"]), int(row[f"{name}-offset"]) + len(row[name]))
                for name in ("Pronoun", "A", "B")
            }
            coref = [row[f"{name}-coref"].upper() == "TRUE" for name in ("A", "B")]
            if any(row["Text"][slice(*span)] != row[name] for name, span in spans.items()):
                found.append((line, "an offset does not stand at its word"))
                continue
        except (KeyError, TypeError, ValueError):
            found.append((line, "a column of GAP is missing or no number"))
            continue
        if coref[0] != coref[1]:  # rows in which neither is meant ask nothing
            right, other = ("A", "B") if coref[0] else ("B", "A")
            found.append((line, Probe(row["Text"], spans["Pronoun"], spans[right], spans[other])))
    return found


def _rows(text: str, mask: str) -> list[tuple[int, Probe | str]]:
    found: list[tuple[int, Probe | str]] = []
    block: list[tuple[int, str]] = []
    for line, content in [*enumerate(text.splitlines(), 1), (0, "")]:
        if content.strip():
            block.append((line, content.strip()))
            continue
        if block:
            found.append((block[0][0], _block([one for _, one in block], mask)))
        block = []
    return found


def _block(lines: list[str], mask: str) -> Probe | str:
    if len(lines) != 4 or lines[0].count("[MASK]") != 1:
        return "a block must be a sentence with one [MASK], a line [MASK], the candidates and the right one"
    sentence = re.sub(r"\s+", " ", lines[0])
    at = sentence.index("[MASK]")
    text = sentence.replace("[MASK]", mask)
    candidates = [one.strip() for one in lines[2].split(",")]
    answer = lines[3].strip().lower()
    others = [one for one in candidates if one.lower() != answer]
    if len(candidates) != 2 or len(others) != 1:
        return "the right one must be one of two candidates"
    places = {name: re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE) for name in (answer, others[0])}
    if any(place is None for place in places.values()):
        return "a candidate does not stand in the sentence"
    right, other = (place.span() for place in places.values() if place is not None)
    return Probe(text, (at, at + len(mask)), right, other)
