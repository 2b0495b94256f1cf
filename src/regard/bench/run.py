"""`regard bench`: what is asked for, one process a column, one item after the other, joined in one file.

Enters: options, as the command line or a Python call gives them.
Leaves: `Results`; tables, markdown and a plot made of them.
Floor 6: above everything else here but the process that measures a column.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

from regard.bench import held
from regard.bench.machine import machine
from regard.bench.model import model_cases
from regard.bench.results import Results, disturbed
from regard.bench.rows import sweep_cases, table_cases

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        only: words or patterns (`*`, `?`) of which an item's name must hold one; empty: every item.
        columns: "best", or instruction sets that all libraries are held to.
        quick: a minute's version: fewer lengths, shorter samples, no libraries but PyTorch, no model.
        resume: leave out what the file holds already; what other processes disturbed is measured again, last.
        budget: seconds after which a column begins no further item; None: no end.
        seconds: for all samples of one item; each contender gets three samples at least.
        longest: a call of a sweep that would take longer than these seconds is left out.
        threads: of every library; None: PyTorch's default.
    """

    only: tuple[str, ...] = ()
    columns: tuple[str, ...] = (held.FREE,)
    quick: bool = False
    resume: bool = False
    budget: float | None = None
    seconds: float = 4.0
    longest: float = 20.0
    threads: int | None = None

    def __post_init__(self) -> None:
        for column in self.columns:
            held.check_column(column)
        for name in ("budget", "seconds", "longest", "threads"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"bench: {name} must be above 0; got {value}. Pass a positive number.")


def items(options: Options) -> list[str]:
    """Names of the items that the options ask for, in the order in which they are measured.

    Raises:
        ValueError: a pattern of `only` fits none.

    Example:
        >>> items(Options(only=("decode*batch 8",)))[0]
        'dense decode float32 batch 8 32/8 heads 8192 x 128'
    """
    names = [
        case.name for case in [*table_cases(options.quick), *sweep_cases(options.quick), *model_cases(options.quick)]
    ]
    for pattern in options.only:
        if not any(_fits(name, pattern) for name in names):
            raise ValueError(f"bench: only must fit an item's name; got {pattern!r}, which fits none. See --list.")
    return [name for name in names if not options.only or any(_fits(name, pattern) for pattern in options.only)]


def _fits(name: str, pattern: str) -> bool:
    return fnmatch(name, f"*{pattern}*")


def bench(options: Options, file: Path | None = None, say: Say = print) -> Results:
    """Measure, one process a column, and return what the file then holds.

    Args:
        options: what to measure.
        file: where results are kept and joined; None: nowhere.
        say: called with a line for each item.

    Raises:
        ValueError: nothing to measure, or the file is of another machine.
        RuntimeError: a column's process failed.
    """
    wanted = items(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="regard-bench-") as scratch:
        target = Path(scratch, "bench.json") if file is None else file
        for column in options.columns:
            known = Results(target, machine())
            left = [name for name in wanted if not (options.resume and known.has(column, name))]
            if options.resume:
                left += [name for name in wanted if name not in left and disturbed(known.columns[column][name])]
            say(f"[{column}] {len(left)} items to measure, {len(wanted) - len(left)} kept")
            if left:
                _column(column, left, options, target, say)
        return Results(target, machine())


def _column(column: str, names: list[str], options: Options, target: Path, say: Say) -> None:
    """Run regard.bench.column in a process that is held, and pass its lines on."""
    asked = json.dumps({**asdict(options), "column": column, "names": names, "file": str(target.resolve())})
    with subprocess.Popen(
        [sys.executable, "-m", "regard.bench.column"], env=held.environment(column), encoding="utf-8",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(asked)
            process.stdin.close()
            for line in process.stdout:
                say(line.rstrip("\n"))
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise RuntimeError(
            f"bench: the process of column {column} must end well; got status {process.returncode}. "
            "What it measured before is kept: see its message above, and run with --resume."
        )
