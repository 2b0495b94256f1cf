"""What each head does over a corpus, as sums that grow text by text.

Enters: the attention calls of windows of tokens, of repeated random tokens, of probes.
Leaves: `Tally`: sums of every head, which add up over texts, go to disk and come back with the same bits; and scores.

With w_ij the weight of query i for key j, n_i the keys that i sees, x_ij = w_ij − 1 / n_i, means over queries:
previous, next, same: w_{i,i−1}, w_{i,i+1}, w_{i,i}; first: w_{i,0} for i > 0
separator: weight on marks and the model's own markers; sink: largest mean weight that one position of a text receives
distance: Σ_j w_ij |i − j|; entropy: −Σ_j w_ij ln w_ij in nats
positional = Σ_b S_b² / N_b / Σ_ij x_ij², where bucket b holds the pairs at one distance j − i (exact to 8, then half
octaves), the first key in a bucket of its own, S_b sums x over its N_b pairs: the share of a head's departure from
uniform attention that the distance alone foretells; content = 1 − positional
induction: w from a token's second turn to what followed its first; duplicate: to its first turn (random tokens, twice)
coreference: w from a pronoun to what it stands for, less that to the other candidate; coreference_right: share of the
probes in which that is above 0
importance: mean over windows of |∂L / ∂gate| (Michel et al. 2019, equation 2)
Floor 6: stands on the cuts' tiles and numbering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.lens.cuts import tile
from regard.lens.numbering import Place

SCORES = (
    "previous", "next", "same", "first", "separator", "sink", "distance", "entropy", "positional", "content",
    "induction", "duplicate", "coreference", "coreference_right", "importance", "removal",
)  # fmt: skip
MEANS = (
    "previous", "next", "same", "first", "separator", "sink", "distance", "entropy", "induction", "duplicate",
    "coreference", "coreference_right", "importance", "removal",
)  # fmt: skip
EXACT, OCTAVE = 8, 2
BUCKETS = 2 * (EXACT + 16) + 2
EXAMPLES = 5


@dataclass
class Tally:
    """The sums of one attention module's heads.

    Args:
        sums: name -> (num_heads,) float64.
        counts: name -> how many numbers each sum holds.
        bucket_sums: (num_heads, BUCKETS), sums of x.
        bucket_counts: (BUCKETS,), pairs in each.
        squares: (num_heads,), sums of x².
        examples: for each head its strongest links that are no neighbour and no separator.
    """

    num_heads: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    bucket_sums: Tensor = field(default_factory=lambda: torch.zeros(0))
    bucket_counts: Tensor = field(default_factory=lambda: torch.zeros(BUCKETS, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0))
    examples: list[list[dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Empty sums, where none were given."""
        if not self.squares.numel():
            self.bucket_sums = torch.zeros(self.num_heads, BUCKETS, dtype=torch.float64)
            self.squares = torch.zeros(self.num_heads, dtype=torch.float64)
            self.examples = [[] for _ in range(self.num_heads)]

    def add(self, name: str, total: Tensor, count: int = 1) -> None:
        """Add a sum over `count` numbers, (num_heads,)."""
        total = total.double()
        self.sums[name] = total + self.sums[name] if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + count

    def scores(self) -> list[dict[str, float]]:
        """Of each head, every score that there is."""
        found = {name: self.sums[name] / self.counts[name] for name in MEANS if self.counts.get(name)}
        if self.squares.numel() and bool((self.bucket_counts > 0).any()):
            told = (self.bucket_sums.square() / self.bucket_counts.clamp(min=1)).sum(1)
            found["positional"] = torch.where(self.squares > 0, told / self.squares.clamp(min=1e-300), 0.0).clamp(0, 1)
            found["content"] = 1 - found["positional"]
        return [{name: float(own[head]) for name, own in found.items()} for head in range(self.num_heads)]

    def to_json(self) -> dict[str, Any]:
        """Everything, with every bit."""
        return {
            "num_heads": self.num_heads,
            "sums": {name: own.tolist() for name, own in self.sums.items()},
            "counts": self.counts,
            "bucket_sums": self.bucket_sums.tolist(),
            "bucket_counts": self.bucket_counts.tolist(),
            "squares": self.squares.tolist(),
            "examples": self.examples,
        }

    @staticmethod
    def from_json(held: dict[str, Any]) -> Tally:
        """What `to_json` gave."""
        wide = {
            name: torch.tensor(held[name], dtype=torch.float64) for name in ("bucket_sums", "bucket_counts", "squares")
        }
        sums = {name: torch.tensor(own, dtype=torch.float64) for name, own in held["sums"].items()}
        return Tally(held["num_heads"], sums, dict(held["counts"]), **wide, examples=held["examples"])


class Reader:
    """Adds the attention calls of one window to the tallies.

    Args:
        tallies: where to.
        pieces: the window's tokens as text.
        marks: which of them are marks or markers, bool (n,).
        line: the window's line, for the examples.
    """

    def __init__(
        self,
        tallies: dict[Place, Tally],
        pieces: Sequence[str],
        marks: Tensor,
        line: int,
    ) -> None:
        self.tallies, self.pieces, self.marks, self.line = tallies, pieces, marks, line
        n = len(pieces)
        index = torch.arange(n)
        self.away = index[None] - index[:, None]  # j − i
        self.buckets = buckets(self.away)

    def see(self, call: Any, place: Place) -> None:
        """Add one call."""
        tally = self.tallies.setdefault(place, Tally(call.q.shape[1]))
        n = call.q.shape[2]
        scores = tile(call, range(n), "biased")[0]
        seen = (scores > -torch.inf).any(0)
        w = torch.where(scores == -torch.inf, 0.0, (scores - call.lse.detach()[0, :, :, None]).exp()).double()
        tally.add("previous", w.diagonal(-1, 1, 2).sum(1), n - 1)
        tally.add("next", w.diagonal(1, 1, 2).sum(1), n - 1)
        tally.add("same", w.diagonal(0, 1, 2).sum(1), n)
        tally.add("first", w[:, 1:, 0].sum(1), n - 1)
        tally.add("separator", w[:, :, self.marks].sum((1, 2)), n)
        readers = seen.sum(0).clamp(min=1)
        tally.add("sink", (w.sum(1) / readers)[:, readers >= max(2, n // 4)].amax(1))
        tally.add("distance", (w * self.away.abs()).sum((1, 2)), n)
        tally.add("entropy", -torch.special.xlogy(w, w).sum((1, 2)), n)
        x = torch.where(seen, w - 1 / seen.sum(1, keepdim=True).clamp(min=1), 0.0)
        tally.bucket_sums.index_add_(1, self.buckets.flatten(), x.flatten(1))
        tally.bucket_counts.index_add_(0, self.buckets.flatten(), seen.flatten().double())
        tally.squares += x.square().sum((1, 2))
        self._examples(tally, w)

    def _examples(self, tally: Tally, w: Tensor) -> None:
        plain = w.masked_fill(self.away.abs() < 2, 0)
        plain[:, :, self.marks] = 0
        plain[:, self.marks] = 0
        plain[:, :, 0] = 0
        n = w.shape[2]
        values, where = plain.flatten(1).topk(min(3, n * n))
        for head, held in enumerate(tally.examples):
            for value, at in zip(values[head].tolist(), where[head].tolist(), strict=True):
                if value < 0.05 or (len(held) == EXAMPLES and value <= held[-1]["weight"]):
                    break
                query, key = divmod(at, n)
                first, last = max(0, min(query, key) - 4), min(n, max(query, key) + 3)
                if last - first > 60:
                    continue
                held.append({"weight": value, "line": self.line, "query": query - first, "key": key - first,
                             "tokens": list(self.pieces[first:last])})  # fmt: skip
                held.sort(key=lambda one: -one["weight"])
                del held[EXAMPLES:]


def buckets(away: Tensor) -> Tensor:
    """The bucket of each pair, int64: 0 for the first key, else by distance and side."""
    size = away.abs()
    far = EXACT + ((size.clamp(min=EXACT) / EXACT).log2() * OCTAVE).floor().long().clamp(max=15)
    step = torch.where(size <= EXACT, size, far + 1).clamp(max=EXACT + 16)
    found = torch.where(away >= 0, step + 1 + (EXACT + 16), step.neg() + 1 + (EXACT + 16))
    found[:, 0] = 0
    return found


def marks_of(pieces: Sequence[str], ids: Sequence[int], special: set[int]) -> Tensor:
    """Which tokens are the model's markers or hold no letter or digit, bool (n,)."""
    plain = [
        token not in special and any(char.isalnum() for char in piece) for piece, token in zip(pieces, ids, strict=True)
    ]
    return ~torch.tensor(plain)
