"""What the numbers depend on besides the code.

Enters: nothing.
Leaves: the processor, threads, instruction sets, versions, and the commit where there is one.
Floor 1: above native.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from regard import native

LIBRARIES = ("torch", "numpy", "transformers", "onnxruntime", "openvino")


def machine() -> dict[str, object]:
    """Processor, cores, threads, system and versions, as JSON takes them: the same for every run that may be joined."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isas": native.isas(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := version(name))},
    }


def moment() -> dict[str, object]:
    """What may differ from run to run: the instruction sets in use, and the commit."""
    return {"isa": native.isa(), "torch_isa": torch.backends.cpu.get_cpu_capability(), "commit": commit()}


def others_share(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """Share of all cores' time that went to other processes (or other machines) between two `used()`.

    Example:
        >>> others_share((10.0, 5.0, 3.0), (18.0, 9.0, 6.0))  # 4 of 8 seconds in use, 3 of them by us
        0.125
    """
    spent, busy, own = (later - earlier for earlier, later in zip(before, after, strict=True))
    return max(0.0, busy - own) / spent if spent > 0 else 0.0


def used() -> tuple[float, float, float]:
    """Seconds of all cores so far: in all, those in use, those used by this process; zeros where none are counted."""
    counts = Path("/proc/stat")
    if not counts.exists():
        return 0.0, 0.0, 0.0
    ticks = [int(number) for number in counts.read_text("ascii").split("\n", 1)[0].split()[1:9]]
    per_second = os.sysconf("SC_CLK_TCK")
    total, idle = sum(ticks), ticks[3] + ticks[4]
    return total / per_second, (total - idle) / per_second, time.process_time()


def version(name: str) -> str | None:
    """The version of an installed distribution, None where it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name as its maker gives it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with a + where files differ; None in a wheel."""
    folder = Path(__file__).resolve().parents[3]
    if not (folder / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
