"""Cost against length as a picture: seconds a call over tokens, both axes logarithmic, with the slopes O(n) and O(n²).

Enters: the items of one column.
Leaves: an SVG file, the same bytes for the same numbers.
Floor 6: beside report; matplotlib loads on first use.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from regard.bench.results import write
from regard.bench.rows import sweep_cases

COLOURS = {"window": "#1b6ca8", "documents": "#2a7f4f", "dense": "#b0413e"}


def check_plot(file: Path) -> None:
    """Refuse a name that `plot` could not write, before anything is measured.

    Raises:
        ValueError: the name does not end in .svg.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if file.suffix != ".svg":
        raise ValueError(f"bench: plot must be a .svg file; got {file.name}. Rename it.")
    import_module("matplotlib")


def points(items: Mapping[str, Mapping[str, Any]], dtype: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Tokens and seconds of each (mask, contender), in the order of length."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for case in sweep_cases():
        if case.dtype == dtype:
            for who, timing in items.get(case.name, {}).get("seconds", {}).items():
                found.setdefault((case.mask, who), []).append((case.seq_len, timing["median"]))
    return found


def plot(file: Path, items: Mapping[str, Mapping[str, Any]]) -> bool:
    """Draw both dtypes side by side; returns whether there was anything to draw."""
    held = {dtype: points(items, dtype) for dtype in ("float32", "bfloat16")}
    held = {dtype: lines for dtype, lines in held.items() if lines}
    if not held:
        return False
    check_plot(file)
    matplotlib = import_module("matplotlib")
    Figure = import_module("matplotlib.figure").Figure

    with matplotlib.rc_context({"svg.hashsalt": "regard", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(5.2 * len(held), 4.6), layout="constrained")
        for axes, (dtype, lines) in zip(figure.subplots(1, len(held), squeeze=False)[0], held.items(), strict=True):
            for (mask, who), line in lines.items():
                axes.loglog(
                    *zip(*line, strict=True), color=COLOURS[mask], marker="o", markersize=3,
                    linestyle="-" if who == "regard" else (0, (1, 2)), label=f"{mask}, {who}",
                )  # fmt: skip
            first, last = (end(n for line in lines.values() for n, _ in line) for end in (min, max))
            floor = min(seconds for line in lines.values() for _, seconds in line) / 2
            for power, words in ((1, "O(n)"), (2, "O(n²)")):
                axes.loglog([first, last], [floor, floor * (last / first) ** power], color="#999", linewidth=0.8)
                axes.annotate(words, (last, floor * (last / first) ** power), color="#666", ha="right", va="bottom")
            axes.set_title(f"{dtype}, 8 heads of 64", loc="left", fontsize=10)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}")
            axes.set_xlabel("tokens")
            axes.set_ylabel("seconds a call")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    write(file, "\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n")
    return True
