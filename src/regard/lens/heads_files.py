"""What `regard heads` writes and prints.

Enters: what `score_heads` returns.
Leaves: report.html, heads.parquet where it is asked for; a table in the terminal.
Floor 6: pyarrow and rich load when they are used."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regard.lens.heads import write_whole
from regard.lens.heads_report import report_html

SHOWN = ("previous", "induction", "duplicate", "coreference", "importance", "removal")


def check(parquet: bool) -> None:
    """Refuse Parquet before the work where it cannot be written.

    Raises:
        ValueError: pyarrow is not installed.
    """
    if parquet and find_spec("pyarrow") is None:
        raise ValueError("heads: --parquet must have pyarrow; got none. Run: pip install 'regard[corpus]'.")


def write(told: dict[str, Any], out: Path, parquet: bool) -> list[Path]:
    """Write the report, and the table as Parquet; the files' names."""
    write_whole(out / "report.html", report_html(told))
    written = [out / "heads.json", out / "report.html"]
    if parquet:
        import pyarrow
        from pyarrow import parquet as files

        rows = [{name: value for name, value in row.items() if name != "examples"} for row in told["heads"]]
        target, partial = out / "heads.parquet", out / f".heads.parquet.{os.getpid()}"
        files.write_table(pyarrow.Table.from_pylist(rows), partial)
        partial.replace(target)
        written.append(target)
    return written


def show(console: Any, told: dict[str, Any]) -> None:
    """Print the first heads of each score, and what removing groups of heads does."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("score")
    for place in ("first", "second", "third"):
        table.add_column(place)
    for name in SHOWN:
        rows = sorted((row for row in told["heads"] if name in row), key=lambda row: -row[name])[:3]
        if rows:
            table.add_row(name, *(f"L{row['layer']}H{row['head']} {row[name]:.3g}" for row in rows))
    console.print(
        f"{told['name']}  {len(told['heads'])} heads · {told['tokens']:,} tokens of {told['corpus']}", markup=False
    )
    console.print(table)
    for group in told["groups"]:
        band = group["random"]
        beside = f"; random sets {band['lowest']:.3g} to {band['highest']:.3g}" if band else ""
        console.print(
            f"without {group['name']} ({', '.join(group['heads'])}): loss {group['loss']:.3g} -> "
            f"{group['without']:.3g} on repeated tokens{beside}",
            soft_wrap=True,
            markup=False,
        )
    for note in told["notes"]:
        console.print(note, style="dim", markup=False)
