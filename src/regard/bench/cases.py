"""One piece of work that several libraries can do: which keys a query sees, the shapes, forward or with its gradient.

Enters: a `Case`.
Leaves: its name, its operations and bytes, its tensors (the same in every run), and its mask in each library's words.
Floor 1: above the masks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from regard import masks
from regard.mask_algebra import Mask

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("forward", "forward+backward", "decode", "statistics")
MASKS = ("dense", "causal", "window", "documents")
_COLD = 1 << 28  # bytes of keys and values that decoding walks through: a model's layers never find theirs in a cache


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Args:
        kind: "forward", "forward+backward", "decode" (one query a sequence), or "statistics" (of a forward pass).
        dtype: "float32", "bfloat16" or "float16".
        seq_len: of keys, and of queries but in decoding.
        head_dim: of queries, keys and values.
        mask: "dense", "causal", "window" (a query sees itself and the `reach` - 1 keys before it), or "documents" of
            `reach` tokens each.
        reach: keys of a window or a document.
        batch, num_heads, num_kv_heads: as in `regard.attention`.
        precision: of float32 products, as `torch.set_float32_matmul_precision` takes it.
        sweep: whether this is one length of a sweep, where a call may be found too long to be made.
    """

    kind: str
    dtype: str
    seq_len: int
    head_dim: int
    mask: str = "dense"
    reach: int = 0
    batch: int = 1
    num_heads: int = 8
    num_kv_heads: int = 8
    precision: str = "highest"
    sweep: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("kind", KINDS), ("dtype", tuple(DTYPES)), ("mask", MASKS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Case: {name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}. Choose one."
                )
        if self.mask in ("window", "documents") and self.reach < 1:
            raise ValueError(f"Case: reach must be at least 1 under a {self.mask} mask; got {self.reach}. Pass one.")

    @property
    def name(self) -> str:
        """What it is called in tables, in JSON and on the command line.

        Example:
            >>> Case("forward", "float32", 8192, 64, "window", 512).name
            'window of 512 forward float32 8192 x 64'
        """
        words = [self.mask if not self.reach else f"{self.mask} of {self.reach}", self.kind, self.dtype]
        words += [self.precision] if self.precision != "highest" else []
        words += [f"batch {self.batch}"] if self.batch > 1 else []
        words += [f"{self.num_heads}/{self.num_kv_heads} heads"] if self.num_heads != self.num_kv_heads else []
        return " ".join([*(["length"] if self.sweep else []), *words, f"{self.seq_len} x {self.head_dim}"])

    @property
    def queries(self) -> int:
        """Queries of each sequence."""
        return 1 if self.kind == "decode" else self.seq_len

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key that it sees, in one head."""
        n, reach = self.seq_len, min(self.reach or self.seq_len, self.seq_len)
        return {
            "dense": self.queries * n,
            "causal": n * (n + 1) / 2,
            "window": reach * (reach + 1) / 2 + (n - reach) * reach,
            "documents": n // reach * reach**2 + (n % reach) ** 2,
        }[self.mask]

    @property
    def flops(self) -> float:
        """Operations of the products: two forward; five more for a gradient, whose weights are computed again."""
        products = 7 if self.kind == "forward+backward" else 2
        return 2 * products * self.batch * self.num_heads * self.pairs * self.head_dim

    @property
    def moved(self) -> float:
        """Bytes of q, k, v and out, each counted once (and of their gradients)."""
        rows = 2 * self.num_heads * self.queries + 2 * self.num_kv_heads * self.seq_len
        times = 2 if self.kind == "forward+backward" else 1
        return times * self.batch * rows * self.head_dim * DTYPES[self.dtype].itemsize

    def small(self, seq_len: int, reach: int = 24) -> Case:
        """The same work on shorter sequences."""
        return replace(self, seq_len=seq_len, reach=reach if self.reach else 0)

    def regard_mask(self) -> Mask | None:
        """The mask as regard has it."""
        if self.mask == "dense":
            return None
        if self.mask == "causal":
            return masks.causal()
        if self.mask == "window":
            return masks.sliding_window(self.reach - 1, 0)
        return masks.documents(torch.arange(self.seq_len) // self.reach)

    def bool_mask(self, rows: Tensor | None = None) -> Tensor:
        """True where a query may attend, `(queries or rows, seq_len)`."""
        key = torch.arange(self.seq_len)
        query = (torch.arange(self.queries) if rows is None else rows)[:, None]
        if self.mask == "dense":
            return torch.ones(len(query), self.seq_len, dtype=torch.bool)
        if self.mask == "documents":
            return query // self.reach == key // self.reach
        seen = query >= key
        return seen if self.mask == "causal" else seen & (query - key < self.reach)


@dataclass
class Inputs:
    """q, k and v of a case; in decoding many of them, taken in turn, so that each call reads from memory."""

    sets: list[tuple[Tensor, Tensor, Tensor]]
    turning: bool = True
    _turn: Iterator[int] = field(default_factory=itertools.count)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors of the next call: the first ones, over and over, while `turning` is False."""
        return self.sets[next(self._turn) % len(self.sets) if self.turning else 0]


def inputs(case: Case) -> Inputs:
    """Draw the tensors of a case: normal numbers, the same in every run."""
    generator = torch.Generator().manual_seed(20260301)
    dtype, grad = DTYPES[case.dtype], case.kind == "forward+backward"

    def draw(num_heads: int, rows: int) -> Tensor:
        shape = (case.batch, num_heads, rows, case.head_dim)
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad)

    sets = 1 if case.kind != "decode" else math.ceil(_COLD / case.moved)
    kv, n = case.num_kv_heads, case.seq_len
    return Inputs([(draw(case.num_heads, case.queries), draw(kv, n), draw(kv, n)) for _ in range(sets)])
