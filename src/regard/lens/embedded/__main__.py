"""`python -m regard.lens.embedded NAME...` makes the folders of embedded models and prints their paths.

Enters: names. Leaves: one path a line on standard output, progress on standard error; exit status 1 and one sentence
where a model cannot be had. Floor 6.
"""

from __future__ import annotations

import sys

from regard.lens.embedded import NAMES, folder


def report(message: str, fraction: float) -> None:
    """Keep one line of standard error up to date; a line per step where it is not a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{fraction:4.0%} {message}", end="\n" if fraction == 1.0 else "", file=sys.stderr, flush=True)
    elif fraction in (0.0, 1.0):
        print(message, file=sys.stderr)


def main(names: list[str]) -> int:
    """Make each named model's folder, all of them where none is named."""
    try:
        for name in names or NAMES:
            print(folder(name, report))
    except (ImportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
