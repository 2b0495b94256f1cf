"""What was measured, as one JSON file that later runs join.

Enters: a file, or nothing yet.
Leaves: `{"schema", "machine", "columns": {column: {name: item}}}`, checked when read, written whole or not at all.
Floor 0: knows nothing of attention.

A column is an instruction set that everything was held to, or "best". An item says when it was taken, at which commit
and on which instruction sets ("taken", "commit", "isa", "torch_isa"), and holds "seconds" (a contender: median, low,
high, best, samples), "absent" (a contender: why), "ceilings", "others" (share of the
cores that other processes used meanwhile), and what else its kind has; or "skipped", a reason.
"""

from __future__ import annotations

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
DISTURBED = 0.1  # share of all cores
_MOST_BYTES = 1 << 26
_TIMING = ("median", "low", "high", "best", "samples")
_ITEM = {"taken": str, "isa": str, "torch_isa": str, "quick": bool, "seconds": dict}


class Results:
    """Items by column and name, kept in a file.

    Args:
        file: read where it is there; written by `put`.
        machine: what this machine is; a file of another one is refused.

    Raises:
        ValueError: the file is not of this form, or was taken on another machine or with other versions.
    """

    def __init__(self, file: Path, machine: dict[str, Any]) -> None:
        self.file, self.machine = file, machine
        self.columns: dict[str, dict[str, dict[str, Any]]] = {}
        if file.exists():
            data = read(file)
            differing = [
                name for name in {**machine, **data["machine"]} if machine.get(name) != data["machine"].get(name)
            ]
            if differing:
                name = sorted(differing)[0]
                raise ValueError(
                    f"bench: {file.name} must have been taken on this machine with these versions; got {name} "
                    f"{data['machine'].get(name)!r} where it is {machine.get(name)!r} now. Write to another file."
                )
            self.columns = data["columns"]

    @classmethod
    def opened(cls, file: Path) -> Results:
        """A file's results as they are, wherever they were taken: to be shown, not joined."""
        return cls(file, read(file)["machine"])

    def has(self, column: str, name: str) -> bool:
        """Whether an item was measured already."""
        return name in self.columns.get(column, {})

    def put(self, column: str, name: str, item: dict[str, Any]) -> None:
        """Add or replace an item, and write the file."""
        stamped = {"taken": datetime.now(UTC).isoformat(timespec="seconds"), **item}
        data = {"schema": SCHEMA, "machine": self.machine, "columns": self.columns}
        self.columns.setdefault(column, {})[name] = check_item(name, stamped)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write(self.file, json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n")


def disturbed(item: dict[str, Any]) -> bool:
    """Whether other processes used more of the cores than a measurement bears.

    Example:
        >>> disturbed({"others": 0.02}), disturbed({"others": 0.3})
        (False, True)
    """
    return item.get("others", 0.0) > DISTURBED


def write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def read(file: Path) -> dict[str, Any]:
    """Read and check a file of results.

    Raises:
        ValueError: it is not of this form.
    """
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"bench: {file.name} must hold at most 64 MiB; got more. Name a file that bench wrote.")
    try:
        data = json.loads(file.read_text("utf-8"))
    except ValueError:
        raise ValueError(
            f"bench: {file.name} must be JSON; got something else. Name a file that bench wrote."
        ) from None
    whole = isinstance(data, dict) and data.get("schema") == SCHEMA
    if not whole or not isinstance(data.get("machine"), dict) or not isinstance(data.get("columns"), dict):
        raise ValueError(
            f"bench: {file.name} must have schema {SCHEMA}, machine and columns; got something else. "
            "Name a file that this version of bench wrote, or a new one."
        )
    for column in data["columns"].values():
        if not isinstance(column, dict):
            raise ValueError(
                f"bench: columns of {file.name} must be objects; got {type(column).__name__}. Name another."
            )
        for name, item in column.items():
            check_item(name, item)
    return data


def check_item(name: str, item: Any) -> dict[str, Any]:
    """Return an item if it has the form of one.

    Raises:
        ValueError: a field is missing, of the wrong type, or not a positive number of seconds.

    Example:
        >>> check_item("dense forward", {"taken": "2026"})
        Traceback (most recent call last):
        ValueError: bench: item 'dense forward' must have isa as str; got none. Measure it again.
    """
    for field, kind in _ITEM.items():
        value = item.get(field) if isinstance(item, dict) else None
        if not isinstance(value, kind):
            got = "none" if value is None else type(value).__name__
            raise ValueError(f"bench: item {name!r} must have {field} as {kind.__name__}; got {got}. Measure it again.")
    for who, timing in item["seconds"].items():
        numbers = [timing.get(part) for part in _TIMING] if isinstance(timing, dict) else [None]
        if not all(isinstance(number, (int, float)) and 0 < number < math.inf for number in numbers):
            raise ValueError(
                f"bench: item {name!r} must have {', '.join(_TIMING)} of {who} above 0; got {timing}. Measure it again."
            )
    return item
