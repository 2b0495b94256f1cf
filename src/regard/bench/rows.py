"""The figures asked of regard, row by row, and the cases that each row rests on; the lengths of the sweeps.

Enters: what was measured.
Leaves: each row's figure beside the one asked for, per class of machine.
Floor 2: above the cases.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from regard.bench.cases import Case

CLASSES = ("AMX", "AVX-512", "AVX2")  # of machines; figures are asked for each
LENGTHS = (2048, 8192)
SWEEP = tuple(2**power for power in range(9, 18))  # 512 to 131,072
Asked = tuple[float | None, float | None, float | None]


@dataclass(frozen=True)
class Row:
    """One figure.

    Args:
        title: what is compared.
        cases: what it rests on; the row's figure is the median of theirs.
        figure: "ratio" (a contender's time over regard's), "cost" (regard's time over a contender's), "share" (of the
            ceiling that binds), "error" (to float64, over a contender's) or "largest error".
        asked: the figure asked for on each of `CLASSES`; None: none.
        other: the contender.
    """

    title: str
    cases: tuple[Case, ...]
    figure: str
    asked: Asked
    other: str = "torch"

    @property
    def lower(self) -> bool:
        """Whether a smaller figure is the better one."""
        return self.figure in ("cost", "error", "largest error")

    def reached(self, items: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The figure, None while no case of it has been measured.

        Args:
            items: what was measured in one column, by the names of the cases.

        Example:
            >>> case = Case("forward", "float32", 512, 64)
            >>> timed = {"seconds": {"regard": {"median": 1.0}, "torch": {"median": 3.0}}}
            >>> Row("forward", (case,), "ratio", (2.0, None, None)).reached({case.name: timed})
            3.0
        """
        figures = [_figure(self, items[case.name]) for case in self.cases if case.name in items]
        known = [figure for figure in figures if figure is not None]
        return statistics.median(known) if known else None

    def whole(self, items: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether every case of it has been measured."""
        return all(case.name in items and _figure(self, items[case.name]) is not None for case in self.cases)

    def met(self, reached: float, asked: float) -> bool:
        """Whether what was reached is what was asked for, at the two digits that tables show.

        Example:
            >>> Row("forward", (), "ratio", (2.0, None, None)).met(1.996, 2.0)
            True
        """
        return reached <= asked * 1.005 if self.lower else reached >= asked * 0.995


def _figure(row: Row, item: Mapping[str, Any]) -> float | None:
    if row.figure == "share":
        return item.get("share")
    if row.figure == "largest error":
        return item.get("errors", {}).get("regard")
    held = item.get("errors" if row.figure == "error" else "seconds", {})
    if "regard" not in held or row.other not in held:
        return None
    if row.figure == "error":
        return held["regard"] / held[row.other]
    mine, theirs = held["regard"]["median"], held[row.other]["median"]
    return mine / theirs if row.figure == "cost" else theirs / mine


def _dense(kind: str, dtype: str, head_dim: int, precision: str = "highest") -> tuple[Case, ...]:
    return tuple(Case(kind, dtype, length, head_dim, precision=precision) for length in LENGTHS)


def _window(kind: str, dtype: str) -> tuple[Case, ...]:
    return (Case(kind, dtype, 8192, 64, "window", 512),)


def _decode(dtype: str, batch: int) -> Case:
    return Case("decode", dtype, 8192, 128, batch=batch, num_heads=32, num_kv_heads=8)


def _rows() -> list[Row]:
    both, train = ("float32", "bfloat16"), "forward+backward"
    rows = [
        Row("forward bfloat16, D 64", _dense("forward", "bfloat16", 64), "ratio", (3.5, 1.5, 1.2)),
        Row("forward bfloat16, D 128", _dense("forward", "bfloat16", 128), "ratio", (2.3, 1.5, 1.2)),
        Row("forward float16, D 64", _dense("forward", "float16", 64), "ratio", (3.0, 1.3, 1.2)),
        Row("forward float16, D 128", _dense("forward", "float16", 128), "ratio", (2.5, 1.2, 1.2)),
        Row("forward float32 highest, D 64", _dense("forward", "float32", 64), "ratio", (2.0, 1.3, 1.15)),
        Row("forward float32 highest, D 128", _dense("forward", "float32", 128), "ratio", (1.8, 1.15, 1.15)),
        Row(
            "its error over PyTorch's, at most",
            (*_dense("forward", "float32", 64), *_dense("forward", "float32", 128)),
            "error",
            (1.0, 1.0, 1.0),
        ),
    ]
    for dim, asked in ((64, (3.0, 1.3, 1.15)), (128, (3.0, 1.15, 1.15))):
        rows.append(Row(f"forward float32 high, D {dim}", _dense("forward", "float32", dim, "high"), "ratio", asked))
    high = (*_dense("forward", "float32", 64, "high"), *_dense("forward", "float32", 128, "high"))
    rows.append(Row("its error to float64, at most", high, "largest error", (2e-5, 2e-5, 2e-5)))
    for dtype in both:
        case = Case("forward", dtype, 512, 64, "causal")
        rows.append(Row(f"causal {dtype}, length 512", (case,), "ratio", (2.0, 1.8, 1.5)))
    for dtype, dim, asked in (
        ("bfloat16", 64, (4.0, 2.0, 1.5)),
        ("bfloat16", 128, (2.5, 2.0, 1.5)),
        ("float32", 64, (5.0, 3.3, 2.0)),
        ("float32", 128, (3.5, 2.0, 2.0)),
    ):
        rows.append(Row(f"forward + backward {dtype}, D {dim}", _dense(train, dtype, dim), "ratio", asked))
    rows += [
        Row("window 512 of 8,192 float32", _window("forward", "float32"), "ratio", (18, 18, 15)),
        Row("window 512 of 8,192 bfloat16", _window("forward", "bfloat16"), "ratio", (25, 10, 15)),
        Row("the same float32, against FlexAttention", _window("forward", "float32"), "ratio", (5, 4, 3), "flex"),
        Row("the same bfloat16, against FlexAttention", _window("forward", "bfloat16"), "ratio", (8, 4, 3), "flex"),
    ]
    rows += [Row(f"window, forward + backward {d}", _window(train, d), "ratio", (15, 12, 10)) for d in both]
    for dtype in both:
        case = Case("forward", dtype, 8192, 64, "documents", 1024)
        rows.append(Row(f"eight documents in 8,192 {dtype}", (case,), "ratio", (10, 10, 8)))
    for dtype in both:
        rows.append(Row(f"decode 32/8 {dtype}, batch 1", (_decode(dtype, 1),), "ratio", (3.0, 3.0, 2.5)))
        rows.append(Row(f"decode 32/8 {dtype}, batch 8", (_decode(dtype, 8),), "ratio", (4.0, 4.0, 2.5)))
    for dtype, asked in (("bfloat16", (0.4, 0.8, 0.8)), ("float32", (None, 0.8, 0.8))):
        rows.append(Row(f"share of the peak, {dtype}, D 64", _dense("forward", dtype, 64), "share", asked))
    reading = tuple(_decode(dtype, batch) for dtype in both for batch in (1, 8))
    rows.append(Row("share of the read bandwidth, decode", reading, "share", (0.9, 0.9, 0.9)))
    counted = (Case("statistics", "float32", 2048, 64), Case("statistics", "bfloat16", 2048, 64))
    rows.append(Row("statistics over plain forward, at most", counted, "cost", (1.6, 1.6, 1.6), "plain"))
    small = (Case("forward", "float32", 128, 64),)
    rows.append(Row("a call of 128 x 64 over PyTorch's, at most", small, "cost", (1.0, 1.0, 1.0)))
    return rows


ROWS = tuple(_rows())


def table_cases(quick: bool = False) -> list[Case]:
    """The cases of all rows, each once; quick: up to 2,048 tokens, and windows, documents and decoding as they are."""
    cases = dict.fromkeys(case for row in ROWS for case in row.cases)
    return [
        case
        for case in cases
        if not quick or case.seq_len <= 2048 or case.mask != "dense" or (case.kind == "decode" and case.batch == 1)
    ]


def sweep_cases(quick: bool = False) -> list[Case]:
    """Windows of 512, documents of 1,024 and all pairs, from 512 to 131,072 tokens (quick: 8,192)."""
    lengths = [length for length in SWEEP if not quick or length <= 8192]
    kinds = [
        Case("forward", "bfloat16", 512, 64, mask, reach)
        for mask, reach in (("window", 512), ("documents", 1024), ("dense", 0))
    ]
    return [
        replace(kind, dtype=dtype, seq_len=length, sweep=True)
        for dtype in ("float32", "bfloat16")
        for kind in kinds
        for length in lengths
    ]


def class_of(isa: str) -> int | None:
    """Which of `CLASSES` an instruction set belongs to; None: no figure is asked for.

    Example:
        >>> class_of("avx512_bf16"), class_of("avx2"), class_of("portable")
        (1, 2, None)
    """
    if "amx" in isa:
        return 0
    return 1 if isa.startswith("avx512") else 2 if isa == "avx2" else None
