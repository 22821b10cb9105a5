"""One file over HTTP, taken up again where it stopped, and never under its own name before it is whole."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from mto_analysis.checkpoints.containers import check_container
from mto_analysis.errors import CheckpointError
from mto_analysis.runtime.outputs import write_atomically

if TYPE_CHECKING:
    import requests

#: Seconds to wait for a connection, and for the next bytes.
TIMEOUT = (10.0, 60.0)
#: Times that a transfer is taken up again before giving up; the next run goes on from there.
ATTEMPTS = 5
#: Seconds before the second attempt, twice as many before the third, and so on.
BACKOFF = 1.0

_CHUNK = 1 << 16


def download(url: str, target: Path, *, digest: str = "") -> Path:
    """Fetch a file, or go on with ``target.part`` of an earlier attempt if it is still the same file.

    Args:
        url: Where.
        target: Where to; its folder is made. Beside it, ``target.sha256`` records the hash.
        digest: ``algorithm:beginning`` of the hash it must have, where known.
    """
    part = target.with_name(f"{target.name}.part")
    with _as_our_errors(url, target), _alone(target):
        if target.exists():  # another process was faster
            return target
        _transfer(url, part)
        try:
            check_container(part)
            check_digest(part, digest, record=target)
        except CheckpointError as error:
            _discard(part)
            raise CheckpointError(f"{url} gave no whole checkpoint: {error}".replace(str(part), "it")) from error
        part.replace(target)
        _tag(part).unlink(missing_ok=True)
    return target


def check_digest(path: Path, digest: str = "", *, record: Path | None = None) -> str:
    """SHA-256 of a file, checked against what is published and recorded; recorded if nothing was.

    Args:
        path: The file.
        digest: ``algorithm:beginning`` as published, or empty.
        record: The file beside which the hash is recorded, if that is not ``path`` itself.
    """
    algorithm, _, beginning = (digest or "sha256:").partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
        file.seek(0)
        sha256 = found if algorithm == "sha256" else hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(beginning):
        raise CheckpointError(f"{path} has the {algorithm} {found[: len(beginning)]}..., published is {beginning}")
    recorded = recorded_digest(record or path)
    if recorded is None:
        note = _record(record or path)
        write_atomically(note, f"{sha256}  {(record or path).name}\n".encode())
    elif recorded != sha256:
        raise CheckpointError(f"{path} is not the file that was first fetched (sha256 {recorded[:8]}...); delete both")
    return sha256


def recorded_digest(path: Path) -> str | None:
    """The SHA-256 that was recorded beside a file when it was first fetched."""
    try:
        return _record(path).read_text(encoding="ascii").split()[0]
    except (OSError, ValueError, IndexError):
        return None


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _tag(part: Path) -> Path:
    """Where the server's name for the version that ``part`` belongs to is kept."""
    return part.with_name(f"{part.name}.tag")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag(part).unlink(missing_ok=True)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Two processes that want the same file take turns: one fetches, the other finds it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        yield


@contextmanager
def _as_our_errors(url: str, target: Path) -> Iterator[None]:
    import requests

    try:
        yield
    except requests.RequestException as error:
        own = isinstance(error.args[0] if error.args else None, str)  # else a chain of the HTTP library's objects
        why = str(error) if own else "it timed out" if isinstance(error, requests.Timeout) else type(error).__name__
        raise CheckpointError(f"fetching {url} failed ({why}); run it again to resume") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"no space left for {url} in {target.parent}; give another --cache") from error
        raise CheckpointError(f"{target.parent} cannot hold {url}: {error.strerror or error}") from error


def _transfer(url: str, part: Path) -> None:
    """Fill ``part``, in as many attempts as are allowed."""
    import requests

    with requests.Session() as session:
        session.max_redirects = 10
        for attempt in range(ATTEMPTS):
            try:
                _attempt(session, url, part)
                return
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
                if attempt == ATTEMPTS - 1:
                    raise
            time.sleep(BACKOFF * 2**attempt)


def _attempt(session: requests.Session, url: str, part: Path) -> None:
    """Ask for what is missing of ``part``; everything if the server names no version, or another one."""
    import requests

    have = part.stat().st_size if part.exists() else 0
    tag = _tag(part).read_text(encoding="utf-8") if _tag(part).exists() else ""
    headers = {"Accept-Encoding": "identity"}
    if have and tag:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        goes_on = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status_code == 416 and response.headers.get("Content-Range") == f"bytes */{have}":
            return  # all of it is there: only the renaming was interrupted
        if response.status_code in (206, 416) and not (goes_on and _version(response) in ("", tag)):
            _discard(part)
            raise requests.ConnectionError("the file changed while it was fetched, or the server confuses its parts")
        _check_answer(response, url)
        if not goes_on:
            _discard(part)
            have = 0
            if version := _version(response):
                _tag(part).write_text(version, encoding="utf-8")
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        if total is not None and total - have > shutil.disk_usage(part.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with part.open("ab") as file, _bar(part.stem, have, total) as advance:
            for chunk in response.iter_content(_CHUNK):
                file.write(chunk)
                advance(len(chunk))
        if total is not None and part.stat().st_size != total:
            raise requests.ConnectionError(f"got {part.stat().st_size} of {total} bytes")


def _version(response: requests.Response) -> str:
    """A name for the version of a file that a server accepts as condition for going on with it."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")


def _check_answer(response: requests.Response, url: str) -> None:
    import requests

    code, reason = response.status_code, response.reason
    if code == 429 or code >= 500:
        raise requests.ConnectionError(f"{code} {reason}")
    if not response.ok:
        raise CheckpointError(f"{url} cannot be fetched: {code} {reason}")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise CheckpointError(f"{url} is a web page, not weights; open it in a browser to find the file's own link")


@contextmanager
def _bar(name: str, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, if that is a terminal; gives what to call with each number of bytes."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total, completed=done)
        yield lambda count: progress.advance(task, count)
