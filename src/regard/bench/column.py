"""The process that measures one column: `python -m regard.bench.column` reads what to do from standard input.

Enters: JSON of the options, the column, the items' names and the file.
Leaves: each item in the file as soon as it is measured, and a line on standard output.
Floor 6: beside run, which starts it with the environment that holds it to an instruction set.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from regard.bench import held
from regard.bench.cases import Case
from regard.bench.machine import machine, moment, others_share, used
from regard.bench.measure import measure
from regard.bench.model import ModelCase, measure_model, model_cases
from regard.bench.results import Results, disturbed
from regard.bench.rows import sweep_cases, table_cases


def main() -> None:
    """Measure what standard input asks for."""
    asked = json.load(sys.stdin)
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    column, file, quick = asked["column"], Path(asked["file"]), asked["quick"]
    cases = {case.name: case for case in [*table_cases(), *sweep_cases(), *model_cases()]}
    began, stamp = time.perf_counter(), {**moment(), "quick": quick}
    results = Results(file, machine())
    for done, name in enumerate(asked["names"]):
        if asked["budget"] is not None and time.perf_counter() - began > asked["budget"]:
            print(f"  the budget is spent; {len(asked['names']) - done} items are left for --resume", flush=True)
            return
        before = used()
        item = _measure(cases[name], asked, column)
        item["others"] = others_share(before, used())
        results.put(column, name, {**stamp, **item})
        print("  " + line(name, item), flush=True)


def _measure(case: Case | ModelCase, asked: dict[str, Any], column: str) -> dict[str, Any]:
    seconds = asked["seconds"] / (8 if asked["quick"] else 1)
    if isinstance(case, ModelCase):
        return measure_model(case, seconds=5 * seconds)
    return measure(case, seconds=seconds, longest=asked["longest"], held=column != held.FREE, quick=asked["quick"])


def line(name: str, item: dict[str, Any]) -> str:
    """An item in one line: what regard took, and how many times as long each of the others.

    Example:
        >>> line(
        ...     "decode",
        ...     {"seconds": {"regard": {"median": 2e-3}, "torch": {"median": 6e-3}}, "share": 0.5, "bound": "peak"},
        ... )
        'decode: 2 ms, torch 3.00, 50% of the peak'
    """
    if "skipped" in item:
        return f"{name}: left out, {item['skipped']}"
    seconds = {who: timing["median"] for who, timing in item["seconds"].items()}
    mine = seconds.pop("regard")
    words = [f"{1e3 * mine:.3g} ms", *(f"{who} {theirs / mine:.2f}" for who, theirs in seconds.items())]
    if "share" in item:
        words.append(f"{item['share']:.0%} of the {item['bound']}")
    if disturbed(item):
        words.append(f"disturbed: others used {item['others']:.0%} of the cores")
    return f"{name}: {', '.join(words)}"


if __name__ == "__main__":
    main()
