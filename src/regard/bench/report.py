"""What was measured, for people: tables in a terminal, and the same as markdown between two markers of a document.

Enters: the columns and the machine of `results`.
Leaves: rows of text; a rich table; a document with its part filled.
Floor 6: beside run; rich loads on first use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.bench.model import model_cases
from regard.bench.results import DISTURBED, disturbed, write
from regard.bench.rows import CLASSES, ROWS, Row, class_of, sweep_cases, table_cases

if TYPE_CHECKING:
    from rich.table import Table

OPENING, CLOSING = "<!-- measured: regard bench writes it -->", "<!-- end of measured -->"
Items = Mapping[str, Mapping[str, Any]]
_NONE = "–"


@dataclass(frozen=True)
class Grid:
    """A table as text: a title, the heads of its columns, and rows; the first column is words, the others numbers."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Table:
        """The table for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for index, head in enumerate(self.heads):
            table.add_column(head, justify="left" if index == 0 else "right", no_wrap=index > 0)
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """The table as markdown, under its title."""
        lines = [self.heads, ["---", *("---:" for _ in self.heads[1:])], *self.rows]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def asked_table(columns: Mapping[str, Items]) -> Grid:
    """The figures asked of regard: reached / asked in each column. † falls short, * rests on a part of its cases,
    ~ on one that other processes disturbed."""
    kinds = {column: class_of(_isa(items)) for column, items in columns.items()}
    rows = []
    for row in ROWS:
        cells = [_against(row, columns[column], kind) for column, kind in kinds.items()]
        if any(cell != _NONE for cell in cells):
            rows.append([row.title, *cells])
    heads = ["reached / asked", *(_head(column, columns[column], kinds[column]) for column in columns)]
    return Grid(
        "Figures asked for: ratio to PyTorch's own unless said († falls short, * not all cases yet, ~ disturbed)",
        heads,
        rows,
    )


def _isa(items: Items) -> str:
    return next((str(item["isa"]) for item in items.values()), "")


def _head(column: str, items: Items, kind: int | None) -> str:
    held = _isa(items) if column == "best" else f"held to {column}"
    return held if kind is None else f"{held} ({CLASSES[kind]})"


def _against(row: Row, items: Items, kind: int | None) -> str:
    reached = row.reached(items)
    if reached is None:
        return _NONE
    asked = None if kind is None else row.asked[kind]
    mark = "" if row.whole(items) else "*"
    mark += "~" if any(disturbed(dict(items[case.name])) for case in row.cases if case.name in items) else ""
    mark += "†" if asked is not None and not row.met(reached, asked) else ""
    return f"{_number(row, reached)}{mark} / {_NONE if asked is None else _number(row, asked)}"


def _number(row: Row, value: float) -> str:
    if row.figure == "share":
        return f"{value:.0%}"
    return f"{value:.1e}" if row.figure == "largest error" else f"{value:.3g}"


def short_rows(columns: Mapping[str, Items]) -> list[tuple[str, str, float, float]]:
    """Column, title, reached and asked of every row that falls short."""
    found = []
    for column, items in columns.items():
        kind = class_of(_isa(items))
        for row in ROWS:
            reached, asked = row.reached(items), None if kind is None else row.asked[kind]
            if reached is not None and asked is not None and not row.met(reached, asked):
                found.append((column, row.title, reached, asked))
    return found


def case_table(column: str, items: Items) -> Grid:
    """Every case of a column: times, ratios to PyTorch and to the best of all others, spread, share of the ceiling."""
    rows = []
    for case in table_cases():
        item = items.get(case.name)
        if item is None or not item["seconds"]:
            continue
        seconds = {who: timing["median"] for who, timing in item["seconds"].items()}
        mine, timing = seconds.pop("regard"), item["seconds"]["regard"]
        best = min(seconds, key=lambda who: seconds[who], default=None)
        rows.append(
            [
                case.name + (" ~" if disturbed(dict(item)) else ""), _time(mine), _ratio(seconds.get("torch"), mine),
                _NONE if best is None else f"{_ratio(seconds[best], mine)} {best}",
                f"{(timing['high'] - timing['low']) / mine:.0%}", f"{item['share']:.0%} {item['bound']}",
            ]
        )  # fmt: skip
    title = f"Cases, {_head(column, items, None)}: each contender's time over regard's"
    return Grid(title, ["case", "regard", "PyTorch", "best other", "spread", "of the ceiling"], rows)


def others_table(items: Items) -> Grid:
    """What the other libraries took, over regard's time, and the seconds that they need before a first call."""
    names = ("flex", "onnxruntime", "openvino", "torch, queries as rows")
    rows = []
    for case in table_cases():
        item = items.get(case.name, {"seconds": {}})
        if any(name in item["seconds"] for name in names):
            mine = item["seconds"]["regard"]["median"]
            cells = [_ratio(item["seconds"].get(name, {}).get("median"), mine) for name in names]
            ready = item.get("prepared", {}).get("flex")
            rows.append([case.name, *cells, _NONE if ready is None else f"{ready:.1f} s"])
    heads = ["case", "FlexAttention", "ONNX Runtime", "OpenVINO", "PyTorch, queries as rows", "flex: mask and compile"]
    return Grid("Other libraries: their time over regard's", heads, rows)


def _time(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds >= 1
        else f"{1e3 * seconds:.3g} ms"
        if seconds >= 1e-3
        else f"{1e6 * seconds:.3g} µs"
    )


def _ratio(theirs: float | None, mine: float) -> str:
    return _NONE if theirs is None else f"{theirs / mine:.2f}"


def sweep_table(items: Items, dtype: str) -> Grid:
    """Cost against length: regard's time, tokens a second, and PyTorch's time over it, for each mask."""
    found: dict[int, list[str]] = {}
    kinds = list(dict.fromkeys((case.mask, case.reach) for case in sweep_cases()))
    for case in sweep_cases():
        if case.dtype == dtype and case.name in items:
            item = items[case.name]
            row = found.setdefault(case.seq_len, [_NONE] * (3 * len(kinds)))
            at = 3 * kinds.index((case.mask, case.reach))
            if "skipped" in item:
                row[at] = item["skipped"].removeprefix("a call would take ")
                continue
            mine = item["seconds"]["regard"]["median"]
            theirs = item["seconds"].get("torch", {}).get("median")
            row[at : at + 3] = [_time(mine), f"{item['tokens'] / mine:,.0f}", _ratio(theirs, mine)]
    heads = ["tokens"]
    for mask, reach in kinds:
        heads += [f"{mask} of {reach}" if reach else mask, "tokens/s", "PyTorch"]
    return Grid(
        f"Cost against length, {dtype}, 8 heads of 64: time a call, tokens a second, PyTorch's time over regard's",
        heads, [[f"{length:,}", *cells] for length, cells in sorted(found.items())],
    )  # fmt: skip


def model_table(items: Items) -> Grid:
    """SmolLM2 end to end."""
    rows = []
    for case in model_cases():
        item = items.get(case.name)
        if item is not None:
            mine, theirs = (item["seconds"][who] for who in ("regard", "torch"))
            spread = (mine["high"] - mine["low"]) / mine["median"]
            rows.append(
                [
                    case.name, _time(mine["median"]), _time(theirs["median"]), _ratio(theirs["median"], mine["median"]),
                    f"{spread:.0%}", f"{item['tokens'] / mine['median']:,.0f}", f"{item['agreement']:.0%}",
                ]
            )  # fmt: skip
    heads = ["task", "regard", "sdpa", "ratio", "spread", "tokens/s", "same token"]
    return Grid("SmolLM2 (135M) end to end, transformers with regard and with sdpa", heads, rows)


def ceilings_table(columns: Mapping[str, Items]) -> Grid:
    """The best of the ceilings that were measured beside the cases."""
    parts = {
        "FMA peak, float32, GFLOP/s": "float32_gflops", "pairs of bfloat16, GFLOP/s": "pairs_gflops",
        "tiles, GFLOP/s": "tiles_gflops", "read, GB/s": "read_gb_per_s", "copy (read + write), GB/s": "copy_gb_per_s",
    }  # fmt: skip
    rows = []
    for words, part in parts.items():
        cells = []
        for items in columns.values():
            known = [item["ceilings"][part] for item in items.values() if item.get("ceilings", {}).get(part)]
            cells.append(f"{min(known):,.0f} to {max(known):,.0f}" if known else _NONE)
        rows.append([words, *cells])
    heads = [
        "ceiling, lowest to highest of the run",
        *(_head(column, items, None) for column, items in columns.items()),
    ]
    return Grid("The machine's own ceilings, measured before each case", heads, rows)


def grids(columns: Mapping[str, Items]) -> Iterator[Grid]:
    """Every table that has rows."""
    every = [asked_table(columns), ceilings_table(columns)]
    every += [case_table(column, items) for column, items in columns.items()]
    for items in columns.values():
        every += [
            others_table(items),
            sweep_table(items, "float32"),
            sweep_table(items, "bfloat16"),
            model_table(items),
        ]
    yield from (grid for grid in every if grid.rows)


def taken(machine: Mapping[str, Any], columns: Mapping[str, Items]) -> str:
    """Where and when: one line a column."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [f"{machine['processor']} ({', '.join(machine['isas'])}), {machine['threads']} threads; {versions}."]
    for column, items in columns.items():
        if items:
            when = sorted(str(item["taken"]) for item in items.values())
            commits = sorted({str(item["commit"]) for item in items.values() if item.get("commit")})
            torch_isa = "/".join(sorted({str(item["torch_isa"]) for item in items.values()}))
            quick = " (some of them quick)" if any(item["quick"] for item in items.values()) else ""
            noisy = sum(disturbed(dict(item)) for item in items.values())
            noise = f" ({noisy} of them while other processes used over {DISTURBED:.0%} of the cores)" if noisy else ""
            lines.append(
                f"- column {column}: regard on {_isa(items)}, PyTorch on {torch_isa}; "
                f"{len(items)} items{quick}{noise}, {when[0][:16]} to {when[-1][:16]} UTC, "
                f"commit {', '.join(commits) or 'unknown'}."
            )
    return "\n".join(lines)


def fill(document: Path, machine: Mapping[str, Any], columns: Mapping[str, Items], plot: Path | None = None) -> None:
    """Write the tables between the markers of a markdown document.

    Raises:
        ValueError: the document lacks the markers.
    """
    text = document.read_text(encoding="utf-8") if document.exists() else f"{OPENING}\n{CLOSING}\n"
    before, found, rest = text.partition(OPENING)
    _, ended, after = rest.partition(CLOSING)
    if not (found and ended):
        raise ValueError(f"bench: {document.name} must hold {OPENING} and {CLOSING}; got a document without. Add them.")
    parts = [taken(machine, columns), *(grid.markdown() for grid in grids(columns))]
    if plot is not None:
        parts.insert(2, f"![Seconds a call against tokens, both axes logarithmic]({plot.name})")
    write(document, f"{before}{OPENING}\n\n" + "\n\n".join(parts) + f"\n\n{CLOSING}{after}")
