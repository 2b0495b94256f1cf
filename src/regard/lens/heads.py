"""`regard heads`: what each head of a model does over a text file.

Enters: an opened model, a corpus with one text a line, perhaps probes.
Leaves: a directory with heads.json. A run that is stopped goes on where it was: its sums lie in state.json, written
whole every few seconds, and come back with the same bits.
Floor 6: stands on scores, gates, probes and the corpus."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard import huggingface
from regard.lens.corpus import Window, windows
from regard.lens.cuts import Head, tile
from regard.lens.fingerprint import versions
from regard.lens.gates import Loss, gradients, removed
from regard.lens.head_scores import SCORES, Reader, Tally, marks_of
from regard.lens.models import Loaded
from regard.lens.numbering import Numbering, Place
from regard.lens.probes import Probe
from regard.lens.recorder import routed
from regard.lens.splitting import read_text

FORMAT = "regard-heads/1"
LARGEST_WINDOW = 512
SAVE_EVERY = 3.0  # seconds
REPEATED, TURNS = 24, 4  # random tokens, said twice; how many such texts
RANDOM_SETS = 12
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """How a corpus is read.

    Args:
        window: tokens read together.
        most_windows: stop after so many; None reads all.
        removal: windows over which the loss without each head is measured; 0 measures none.
        removal_window: their tokens.
        seed: of all that is random.
        skip_broken: skip broken lines instead of refusing the file.
    """

    window: int = 128
    most_windows: int | None = None
    removal: int = 2
    removal_window: int = 64
    seed: int = 0
    skip_broken: bool = False


def score_heads(
    loaded: Loaded,
    corpus: str | Path,
    out: str | Path,
    probes: Sequence[Probe] = (),
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every head of a model over a corpus, and keep the result under `out`.

    Args:
        loaded: an encoder or a decoder.
        corpus: a UTF-8 file, one text a line.
        out: a directory; made where it is not there. A run that was stopped goes on there.
        probes: sentences with pronouns.
        settings: how it is read.
        progress: called with what happens and the share that is done.

    Returns:
        What heads.json holds: "heads", one dict each with its layer, head and scores; "groups", what removing heads
        does to the loss on repeated random tokens (decoders); "notes".

    Raises:
        ValueError: a model with another task, a corpus that cannot be read, settings out of range, or a directory that
            holds another run.
    """
    settings, report = settings or Settings(), progress or (lambda _message, _share: None)
    _check(settings, loaded)
    run = _Run(loaded, Path(corpus), Path(out), settings)
    with routed(loaded.model):
        run.read(report)
        run.repeat(report)
        run.probe(probes)
        run.remove(report)
        groups = run.groups(report)
    told = run.told(groups, len(probes))
    write_whole(Path(out) / "heads.json", json.dumps(told, indent=1, ensure_ascii=False))
    run.state.unlink(missing_ok=True)
    return told


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _Run:
    """One run over a corpus: its sums, and where it stands."""

    def __init__(self, loaded: Loaded, corpus: Path, folder: Path, settings: Settings) -> None:
        self.loaded, self.corpus, self.settings, self.state = loaded, corpus, settings, folder / "state.json"
        self.loss = Loss(loaded.model, loaded.tokenizer)
        self.numbering = Numbering(loaded.model)
        self.markers = loaded.shape == "encoder"
        room = (loaded.longest or 10**9) - (2 if self.markers else 0)
        self.repeated = min(REPEATED, room // 2)
        self.tallies: dict[Place, Tally] = {}
        self.line = self.part = self.windows = self.tokens = 0
        self.skipped: dict[int, str] = {}
        self.kept: list[list[int]] = []  # windows on which heads are removed
        self.done: list[str] = []
        self.notes: list[str] = []
        self.saved = time.monotonic()
        size = corpus.stat().st_size if corpus.is_file() else -1
        self.identity = {"format": FORMAT, "model": loaded.id, "corpus": corpus.name, "bytes": size,
                         "versions": versions(), **asdict(settings)}  # fmt: skip
        self._resume()

    def read(self, report: Progress) -> None:
        """Every window: where each head looks, and its gradient."""
        if "read" in self.done:
            return
        tokenizer, most = self.loaded.tokenizer, self.settings.most_windows
        special = set(tokenizer.all_special_ids)
        skip = self.skipped.__setitem__ if self.settings.skip_broken else None
        stood, line, part, size = (self.line, self.part), 0, 0, 0
        whole = max(self.identity["bytes"], 1)
        for window in windows(
            self.corpus, tokenizer, self.settings.window, markers=self.markers, after=max(self.line - 1, 0), skip=skip
        ):
            part = part + 1 if window.line == line else 1
            line = window.line
            if (line, part) <= stood:
                continue
            if most is not None and self.windows >= most:
                break
            pieces = [tokenizer.decode([token]) for token in window.ids]
            marks = marks_of(pieces, window.ids, special)
            self._window(window, Reader(self.tallies, pieces, marks, window.line))
            self.line, self.part = line, part
            size += sum(len(piece.encode()) for piece in pieces)
            report(f"line {line}, window {self.windows}", self.windows / most if most else min(1.0, size / whole))
            if time.monotonic() - self.saved > SAVE_EVERY:
                self._save()
        if not self.windows:
            raise ValueError(f"heads: CORPUS must hold a text of two tokens; got none in {self.corpus.name}. Fill it.")
        self._finish("read")

    def _window(self, window: Window, reader: Reader) -> None:
        seed = window.line + self.settings.seed
        if self.loss.task == "masked":  # where heads look is read without the masks
            self._look(torch.tensor([window.ids]), reader.see)
            own = gradients(self.loss, self.numbering, window.ids, seed)
        else:
            own = gradients(self.loss, self.numbering, window.ids, seed, reader.see)
        for place, gradient in own.items():
            self.tallies[place].add("importance", gradient)
        self.windows += 1
        self.tokens += len(window.ids)
        if len(self.kept) < self.settings.removal:
            self.kept.append(list(window.ids[: self.settings.removal_window]))

    def _look(self, ids: Tensor, see: Callable[[Any, Place], None]) -> None:
        def placed(call: Any) -> None:
            place = self.numbering.place(call)
            if place is not None:
                see(call, place)

        self.numbering.next_pass()
        with torch.no_grad(), huggingface.observe(placed, self.loaded.model):
            self.loaded.model(input_ids=ids)

    def repeat(self, report: Progress) -> None:
        """Random tokens said twice: who looks at the same token's first turn, and who at what followed it."""
        if "repeat" in self.done:
            return
        for turn in range(TURNS):
            report("repeated random tokens", turn / TURNS)
            ids, start = self._repeated(turn)

            def see(call: Any, place: Place, start: int = start) -> None:
                second = start + self.repeated
                w = tile(call, range(second, second + self.repeated - 1))[0].double()
                self.tallies[place].add("duplicate", w[:, :, start:].diagonal(0, 1, 2).sum(1), self.repeated - 1)
                self.tallies[place].add("induction", w[:, :, start + 1 :].diagonal(0, 1, 2).sum(1), self.repeated - 1)

            self._look(torch.tensor([ids]), see)
        self._finish("repeat")

    def _repeated(self, turn: int) -> tuple[list[int], int]:
        """Token ids of one text of random tokens said twice, and where its first turn begins."""
        tokenizer = self.loaded.tokenizer
        special = set(tokenizer.all_special_ids)
        usable = [
            token for token in range(min(len(tokenizer), self.loaded.model.config.vocab_size)) if token not in special
        ]
        generator = torch.Generator().manual_seed(1000 * self.settings.seed + turn)
        drawn = torch.randint(len(usable), (self.repeated,), generator=generator).tolist()
        once = [usable[at] for at in drawn]
        first = [token for token in (getattr(tokenizer, "cls_token_id", None),) if self.markers and token is not None]
        last = [token for token in (getattr(tokenizer, "sep_token_id", None),) if self.markers and token is not None]
        return [*first, *once, *once, *last], len(first)

    def probe(self, probes: Sequence[Probe]) -> None:
        """Pronouns: whether a head looks at what one stands for."""
        if "probe" in self.done:
            return
        left_out = 0
        for probe in probes:
            ids, at = spans_of(self.loaded, probe)
            longest = self.loaded.longest or LARGEST_WINDOW
            if at is None or len(ids) > min(longest, LARGEST_WINDOW):
                left_out += 1
                continue
            asks, right, other = at

            def see(call: Any, place: Place, asks: Any = asks, right: Any = right, other: Any = other) -> None:
                row = tile(call, range(*asks))[0].double().mean(1)
                to_right, to_other = row[:, slice(*right)].sum(1), row[:, slice(*other)].sum(1)
                self.tallies[place].add("coreference", to_right - to_other)
                self.tallies[place].add("coreference_right", (to_right > to_other).double())

            self._look(torch.tensor([ids]), see)
        if left_out:
            self.notes.append(
                f"{left_out} of {len(probes)} probes were left out: too long, or a noun comes after the pronoun in "
                "a model that reads from left to right."
            )
        self._finish("probe")

    def remove(self, report: Progress) -> None:
        """The loss without each head in turn, less the loss of the whole model."""
        places = list(self.tallies)
        sets = [[Head(place.module, head, place.kind)] for place in places for head in range(self._heads(place))]
        for number, ids in enumerate(self.kept):
            if f"remove {number}" in self.done:
                continue
            whole, losses = removed(
                self.loss, self.numbering, ids, sets, seed=number,
                progress=lambda share, number=number: report("removing each head", (number + share) / len(self.kept)),
            )  # fmt: skip
            lost = torch.tensor(losses, dtype=torch.float64) - whole
            for place, own in zip(places, lost.split([self._heads(place) for place in places]), strict=True):
                self.tallies[place].add("removal", own)
            self._finish(f"remove {number}")

    def groups(self, report: Progress) -> list[dict[str, Any]]:
        """Loss on the second turn of repeated random tokens without the heads that look back, and without others."""
        if self.loss.task != "next":
            return []
        ranked = {name: self._ranked(name) for name in ("induction", "previous")}
        chosen = {
            "2 induction heads": ranked["induction"][:2],
            "2 previous-token heads": ranked["previous"][:2],
            "2 induction and 2 previous-token heads": ranked["induction"][:2] + ranked["previous"][:2],
        }
        every = [Head(place.module, head, place.kind) for place in self.tallies for head in range(self._heads(place))]
        special = {(head.layer, head.head) for heads in chosen.values() for head in heads}
        others = [head for head in every if (head.layer, head.head) not in special]
        generator = torch.Generator().manual_seed(self.settings.seed)

        def some(count: int) -> list[Head]:
            return [others[at] for at in torch.randperm(len(others), generator=generator)[:count].tolist()]

        random = {count: [some(count) for _ in range(RANDOM_SETS)] for count in (2, 4) if len(others) >= count}
        sets = [*chosen.values(), *(one for group in random.values() for one in group)]
        totals, whole = torch.zeros(len(sets), dtype=torch.float64), 0.0
        for turn in range(TURNS):
            ids, start = self._repeated(turn)
            own, losses = removed(
                self.loss, self.numbering, ids, sets, only=slice(start + self.repeated, len(ids) - 1),
                progress=lambda share, turn=turn: report("removing groups", (turn + share) / TURNS),
            )  # fmt: skip
            whole += own / TURNS
            totals += torch.tensor(losses, dtype=torch.float64) / TURNS
        found, at = [], len(chosen)
        bands = {}
        for count, group in random.items():
            bands[count] = totals[at : at + len(group)]
            at += len(group)
        for (name, heads), total in zip(chosen.items(), totals.tolist(), strict=False):
            band = bands.get(len(heads))
            found.append({
                "name": name, "heads": [self._named(head) for head in heads], "loss": whole, "without": total,
                "random": None if band is None else
                {"lowest": float(band.min()), "median": float(band.median()), "highest": float(band.max()),
                 "sets": len(band)},
            })  # fmt: skip
        return found

    def told(self, groups: list[dict[str, Any]], probes: int) -> dict[str, Any]:
        """What heads.json holds."""
        rows = []
        for place, tally in self.tallies.items():
            for head, scores in enumerate(tally.scores()):
                rows.append({"kind": place.kind, "layer": place.number, "head": head, **scores,
                             "examples": tally.examples[head]})  # fmt: skip
        rows.sort(key=lambda row: (row["kind"], row["layer"], row["head"]))
        skipped = [f"line {line}: {why}" for line, why in sorted(self.skipped.items())]
        return {
            **self.identity,
            "name": self.loaded.name,
            "task": self.loss.task,
            "windows": self.windows,
            "tokens": self.tokens,
            "probes": probes,
            "scores": [name for name in SCORES if any(name in row for row in rows)],
            "skipped": skipped,
            "notes": self.notes,
            "groups": groups,
            "heads": rows,
        }

    def _heads(self, place: Place) -> int:
        return self.tallies[place].num_heads

    def _ranked(self, name: str) -> list[Head]:
        scored = [
            (own[name], place, head) for place, tally in self.tallies.items() for head, own in enumerate(tally.scores())
        ]
        scored.sort(key=lambda one: -one[0])
        return [Head(place.module, head, place.kind) for _, place, head in scored]

    def _named(self, head: Head) -> str:
        place = next(place for place in self.tallies if place.module == head.layer)
        return f"L{place.number}H{head.head}"

    def _finish(self, stage: str) -> None:
        self.done.append(stage)
        self._save()

    def _save(self) -> None:
        held = {
            "identity": self.identity, "line": self.line, "part": self.part, "windows": self.windows,
            "tokens": self.tokens, "skipped": list(self.skipped.items()), "kept": self.kept, "done": self.done,
            "notes": self.notes, "tallies": [[*place, tally.to_json()] for place, tally in self.tallies.items()],
        }  # fmt: skip
        write_whole(self.state, json.dumps(held))
        self.saved = time.monotonic()

    def _resume(self) -> None:
        if not self.state.is_file():
            return
        try:
            held = json.loads(self.state.read_text("utf-8"))
            same = held["identity"] == json.loads(json.dumps(self.identity))
        except (ValueError, KeyError, TypeError):
            same, held = False, {}
        if not same:
            raise ValueError(
                f"heads: --out must be empty or hold this run; got {self.state.parent}, which holds another. "
                "Remove its state.json, or choose another directory."
            )
        self.line, self.part, self.windows, self.tokens = (held[k] for k in ("line", "part", "windows", "tokens"))
        self.skipped = {int(line): why for line, why in held["skipped"]}
        self.kept, self.done, self.notes = held["kept"], held["done"], held["notes"]
        self.tallies = {Place(*one[:4]): Tally.from_json(one[4]) for one in held["tallies"]}


def spans_of(loaded: Loaded, probe: Probe) -> tuple[list[int], tuple[tuple[int, int], ...] | None]:
    """Token ids of a probe, and the token ranges of pronoun, right and other noun; None where one cannot be seen."""
    ids, side = read_text(loaded.tokenizer, probe.text)
    if probe.other is None or not getattr(loaded.tokenizer, "is_fast", False):
        return ids, None
    offsets = loaded.tokenizer(probe.text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    found = []
    for start, stop in (probe.pronoun, probe.right, probe.other):
        inside = [at for at, (first, last) in enumerate(offsets) if first < stop and start < last and first != last]
        if not inside:
            return ids, None
        found.append((inside[0], inside[-1] + 1))
    asks, *nouns = found
    if loaded.shape == "decoder" and any(noun[1] > asks[0] for noun in nouns):
        return ids, None
    assert len(side.tokens) == len(ids)
    return ids, tuple(found)


def _check(settings: Settings, loaded: Loaded) -> None:
    longest = min(LARGEST_WINDOW, loaded.longest or LARGEST_WINDOW)
    if not 4 <= settings.window <= longest:
        raise ValueError(f"heads: --window must be from 4 to {longest} for {loaded.name}; got {settings.window}.")
    for name, least in (("most_windows", 1), ("removal", 0)):
        given = getattr(settings, name)
        if given is not None and given < least:
            flag = name.replace("most_windows", "windows")
            raise ValueError(f"heads: --{flag} must be at least {least}; got {given}. Pass a larger number.")
