"""The parts of README.md that are copied from elsewhere: the file tree, and the help of the command line.

Enters: the first line of each source file, and `regard look --help`. Leaves: README.md with both brought up to date,
or, with --check, exit status 1 where they are not. `make format` writes them; a test checks them.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
README = CHECKOUT / "README.md"
SOURCES = {".py", ".cc", ".h", ".js", ".mjs", ".css", ".html"}
TOPS = {
    "kernels/": "C++ only: pointers and strides in, numbers out",
    "src/": "",
    "web/": "the page's sources, bundled into src/regard/lens/page",
}
# Folders that are listed by one line: what they hold follows what the other folders hold.
FOLDERS = {
    "recipes/": "one script each: a domain is an embedding and a mask; RESULTS.md says what was reached",
    "tests/": "tests mirror src/regard; a test's name is a sentence",
    "benchmarks/": "what `make bench` measured, on which machine, and cost against length as a picture",
    "docs/": "the picture above, reports, and the script that brings this tree and the help below up to date",
    "src/regard/lens/page/": "the built page, committed: one HTML file, whose script draws for --save too",
}
LEFT_OUT = {"__pycache__", "node_modules"}


def headline(file: Path) -> str:
    """The first sentence of what a source file says about itself, as far as its first line goes."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        words = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    else:
        comment = re.match(r"\s*(?:<!doctype html>\s*)?(?://+|/\*+|<!--)[ \t]*(.*?)[ \t]*(?:\*/|-->)?\n", text)
        words = comment[1] if comment else ""
    return words.partition(". ")[0].strip().rstrip(".")


def listed(folder: Path) -> Iterator[tuple[int, str, str]]:
    """Depth, name and headline of what a folder holds, files before folders."""
    depth = len(folder.relative_to(CHECKOUT).parts)
    files = sorted(file for file in folder.iterdir() if file.suffix in SOURCES and file.name != "__init__.py")
    folders = sorted(child for child in folder.iterdir() if child.is_dir() and child.name not in LEFT_OUT)
    for file in files:
        yield depth, file.name, headline(file)
    for child in folders:
        place = f"{child.relative_to(CHECKOUT)}/"
        if place in FOLDERS:
            yield depth, f"{child.name}/", FOLDERS[place]
        elif any(file.suffix in SOURCES for file in child.rglob("*") if not LEFT_OUT & set(file.parts)):
            head = child / "__init__.py"
            yield depth, f"{child.name}/", headline(head) if head.exists() else ""
            yield from listed(child)


def tree() -> str:
    """The file tree, one line each."""
    rows = []
    for top, words in TOPS.items():
        if (CHECKOUT / top).is_dir():
            rows += [(0, top, words), *listed(CHECKOUT / top)]
    rows += [(0, place, words) for place, words in FOLDERS.items() if "/" not in place[:-1]]
    width = max(2 * depth + len(name) for depth, name, _ in rows) + 2
    return "\n".join(f"{'  ' * depth + name:{width}}{words}".rstrip() for depth, name, words in rows)


def command_help() -> str:
    """What `regard look --help` prints, at 100 columns and without colour."""
    program = "import sys; sys.argv[0] = 'regard'; from regard.cli import main; main()"
    environment = {key: value for key, value in os.environ.items() if key not in {"FORCE_COLOR", "GITHUB_ACTIONS"}}
    environment |= {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": str(CHECKOUT / "src")}
    printed = subprocess.run(
        [sys.executable, "-c", program, "look", "--help"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    return "\n".join(line.rstrip() for line in printed.strip("\n").splitlines())


def filled(text: str) -> str:
    """A README with both parts as they are now."""
    for name, made in {"tree": tree(), "help": command_help()}.items():
        opening, closing = f"<!-- {name}: docs/readme.py writes it -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if not (found and ended):
            raise ValueError(f"readme: README.md must hold {opening} and {closing}; got none. Put them back.")
        text = f"{before}{opening}\n\n```\n{made}\n```\n\n{closing}{after}"
    return text


def main(arguments: list[str]) -> int:
    """Write README.md anew, or say with --check whether that would change it."""
    text = README.read_text(encoding="utf-8")
    now = filled(text)
    if arguments == ["--check"]:
        if now != text:
            print("README.md must show the tree and the help as they are; got older ones. Run: make format")
        return int(now != text)
    README.write_text(now, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
