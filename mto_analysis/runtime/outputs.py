"""Files that a run leaves behind: written whole or not at all, never over somebody's work, and ``run.json``."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from filelock import FileLock, Timeout

from mto_analysis.errors import OutputError, OutputExistsError, RunInUseError

if TYPE_CHECKING:
    import pandas as pd

_LOCK = ".lock"
_REPORTED_PACKAGES = ("mto-analysis", "torch", "timm", "numpy", "pandas", "matplotlib", "pillow", "safetensors")


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the whole new one."""
    with atomic_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` when the block ends well, and vanishes when it does not."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result should be as readable as any other file the user creates.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file did not fit
        raise


def check_writable(folder: Path) -> None:
    """Whether a folder can be written, found out by writing; folders that it lacks are made and removed again."""
    lacking = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        words = f"{error.filename or folder} cannot be written ({error.strerror})"
        raise OutputError(words, advice="choose another --out") from error
    finally:
        for each in lacking:
            with contextlib.suppress(OSError):
                each.rmdir()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be.

    The lock ends with this process, however it ends, and worker processes do not inherit it.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file, and a run needs a folder; choose another --out")
    before = folder.exists()
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=1)  # another process may be looking whether it is free
    except Timeout:
        raise RunInUseError(
            f"{folder} is in use by another process; wait until it ends, or choose another --out"
        ) from None
    try:
        yield
    finally:
        (folder / _LOCK).unlink(missing_ok=True)  # while it is held; others find that it is gone
        if not before:
            with contextlib.suppress(OSError):  # the run is in it
                folder.rmdir()
        lock.release()


def folder_in_use(folder: Path) -> bool:
    """Whether another process holds the lock of a folder."""
    if not (folder / _LOCK).exists():
        return False
    try:
        with FileLock(folder / _LOCK, timeout=0):
            return False
    except Timeout:
        return True


def csv_bytes(table: pd.DataFrame) -> bytes:
    """A table as CSV with full float precision."""
    return table.to_csv(index=False, lineterminator="\n").encode()


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """A mapping as indented JSON; what JSON does not know, as text."""
    return (json.dumps(content, indent=2, default=str) + "\n").encode()


class OutputFolder:
    """A folder of results whose file names are known before the work starts.

    Args:
        path: The folder; made when the first file is written.
        names: File names that the run will write.
        overwrite: Replace these files when they exist.
    """

    def __init__(self, path: str | Path, names: Iterable[str], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.names = tuple(names)
        if self.path.exists() and not self.path.is_dir():
            raise OutputExistsError(f"{self.path} is a file, and results need a folder; choose another --out")
        check_writable(self.path)
        there = [name for name in self.names if (self.path / name).exists()]
        if folder := next((self.path / name for name in there if (self.path / name).is_dir()), None):
            raise OutputExistsError(
                f"{folder} is a folder, and a file of this name is to be written; choose another --out"
            )
        if there and not overwrite:
            raise OutputExistsError(
                f"{self.path} already holds {', '.join(there)}; choose another --out or pass --overwrite"
            )

    def _write(self, name: str, content: bytes) -> Path:
        if name not in self.names:
            raise ValueError(f"{name} was not announced; announced are {', '.join(self.names)}")
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, content)
        return self.path / name

    def write_table(self, name: str, table: pd.DataFrame) -> Path:
        """Write a table as CSV with full float precision."""
        return self._write(name, csv_bytes(table))

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a mapping as indented JSON."""
        return self._write(name, json_bytes(content))

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write ready bytes."""
        return self._write(name, content)


def file_word(name: str) -> str:
    """A name as part of a file name.

    Example:
        >>> file_word("SimMIM, epoch 100")
        'SimMIM-epoch-100'
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def file_words(names: Sequence[str]) -> list[str]:
    """Names as parts of file names that differ, also where a file system takes upper and lower case for the same.

    Example:
        >>> file_words(["MAE 1", "mae-1", "SimMIM"])
        ['MAE-1', 'mae-1-2', 'SimMIM']
    """
    words: list[str] = []
    taken: set[str] = set()
    for name in names:
        word = base = file_word(name) or "unnamed"
        number = 1
        while word.lower() in taken:
            number += 1
            word = f"{base}-{number}"
        taken.add(word.lower())
        words.append(word)
    return words


def labels_of(sources: Sequence[str | Path]) -> list[str]:
    """Short names for checkpoints: the file's stem, with as many folders before it as tell them apart.

    Example:
        >>> labels_of(["runs/mae/last.pth", "runs/simmim/last.pth"])
        ['mae/last', 'simmim/last']
    """
    parts = [(*Path(source).parts[:-1], Path(source).stem) for source in sources]
    for depth in range(1, max(len(part) for part in parts) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError("a checkpoint is given twice; name them apart with --label")


def chosen_labels(sources: Sequence[str | Path], labels: Sequence[str] | None) -> list[str]:
    """The labels that were given, or those of :func:`labels_of`."""
    names = list(labels) if labels else labels_of(sources)
    if len(names) != len(sources) or len(set(names)) != len(names):
        raise ValueError(f"give one different label per checkpoint: {len(sources)} checkpoints, labels {names}")
    if odd := odd_label(names):
        raise ValueError(f"the label {odd}; give --label")
    return names


def odd_label(names: Iterable[str]) -> str:
    """The first name that figures would take for something else, and why; empty if there is none."""
    odd = next((name for name in names if name.startswith("_") or "$" in name), None)
    return "" if odd is None else f"{odd!r} begins with _ or contains $, which figures read otherwise"


def run_metadata(arguments: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Metadata that make a run repeatable: versions, machine, command line, arguments, and what the caller adds."""
    versions = {}
    for package in _REPORTED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "arguments": dict(arguments),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        **more,
    }
