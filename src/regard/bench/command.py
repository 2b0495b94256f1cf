"""`regard bench` behind its options: what is refused before anything is measured, and what is shown after.

Enters: the options as typed.
Leaves: tables on a console; JSON, markdown and a plot where they were asked for.
Floor 6: above run and report, below the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regard import native
from regard.bench import held, report
from regard.bench.machine import machine
from regard.bench.plot import check_plot, plot
from regard.bench.results import Results
from regard.bench.run import Options, bench, items

if TYPE_CHECKING:
    from rich.console import Console

ALL = ("avx512", "avx2")  # what "all" holds to, where the processor has it


@dataclass(frozen=True)
class Wanted:
    """The options of the command line, in their order there."""

    only: tuple[str, ...] = ()
    isa: tuple[str, ...] = ()
    quick: bool = False
    json: Path | None = None
    resume: bool = False
    budget: float | None = None
    markdown: Path | None = None
    plot: Path | None = None
    seconds: float = 4.0
    threads: int | None = None
    listed: bool = False
    show: bool = False


def columns(isa: tuple[str, ...]) -> tuple[str, ...]:
    """Columns by the names of the command line: "all" stands for several, none for "best".

    Example:
        >>> columns(()), columns(("best", "best"))
        (('best',), ('best',))
    """
    every = [held.FREE, *(name for name in ALL if name in native.isas())]
    return tuple(dict.fromkeys(one for name in isa or (held.FREE,) for one in (every if name == "all" else [name])))


def run(console: Console, wanted: Wanted) -> None:
    """Do what the options say.

    Raises:
        ValueError, ImportError, RuntimeError: an option that cannot be, a library that is not there, or a process
            that failed.
    """
    options = Options(
        wanted.only,
        columns(wanted.isa),
        wanted.quick,
        wanted.resume,
        wanted.budget,
        wanted.seconds,
        threads=wanted.threads,
    )
    for name, needed in (("resume", wanted.resume), ("show", wanted.show)):
        if needed and wanted.json is None:
            raise ValueError(f"bench: --{name} must have a file to read; got none. Name it with --json FILE.")
    if wanted.plot is not None:
        check_plot(wanted.plot)
    if wanted.listed:
        for name in items(options):
            console.print(name, markup=False)
        return
    if wanted.show and wanted.json is not None:
        if not wanted.json.is_file():
            raise ValueError(f"bench: --json must name a file that exists; got {wanted.json}. Measure first.")
        found = Results.opened(wanted.json)
    else:
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)
        known = machine()
        console.print(f"{known['processor']}, {known['threads']} threads, {native.isa()}", markup=False)
        found = bench(options, wanted.json, lambda line: console.print(line, markup=False, soft_wrap=True))
    drawn = None
    if wanted.plot is not None and plot(wanted.plot, found.columns.get(held.FREE, {})):
        drawn = wanted.plot
    if wanted.markdown is not None:
        report.fill(wanted.markdown, found.machine, found.columns, drawn)
    for grid in report.grids(found.columns):
        console.print()
        console.print(grid.rich())
    console.print()
    console.print(report.taken(found.machine, found.columns), markup=False)
    short = report.short_rows(found.columns)
    if short:
        console.print(f"{len(short)} figures fall short (†).")
