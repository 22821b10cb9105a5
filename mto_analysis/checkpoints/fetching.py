"""From what a user calls a checkpoint (a path, a registry id, a hub address, a URL) to a path on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import platformdirs

from mto_analysis.checkpoints.containers import first_line
from mto_analysis.checkpoints.downloading import check_digest, download
from mto_analysis.checkpoints.reading import weight_files
from mto_analysis.checkpoints.registry import Checkpoint, find_checkpoint, find_source
from mto_analysis.errors import CheckpointError, CheckpointNotFoundError

_REVISION = r"refs/(?:pr|convert)/\w+|[^/@]+"
_HUB = re.compile(
    rf"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<early>{_REVISION}))?(?:/(?P<file>[^@]+))?(?:@(?P<late>{_REVISION}))?"
)
_HUB_PAGE = re.compile(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)/(?:resolve|blob)/([^/]+)/([^?]+)(?:\?.*)?")
_HUB_SETTINGS = ("config.json", "preprocessor_config.json")
_HUB_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ID = re.compile(r"[\w.-]+")


def resolve(source: str | Path, *, offline: bool = False, cache: str | Path | None = None) -> Path:
    """Find a checkpoint on this machine, fetching it first where that is needed and allowed.

    Args:
        source: A path (what exists always wins), an id of the registry, ``hf://owner/name[@revision]`` for a folder of
            the Hugging Face hub, ``hf://owner/name/file[@revision]`` for one file of it, or a URL.
        offline: Never touch the network.
        cache: Folder for fetched files; by default ``MTO_ANALYSIS_CACHE`` or the system's place, and the hub's own.

    Raises:
        CheckpointNotFoundError: If there is no such path or id.
        CheckpointError: If it cannot be fetched; says what to do.

    Example:
        >>> from mto_analysis.demo import DEMO_CHECKPOINTS
        >>> resolve(DEMO_CHECKPOINTS["MAE"]).name
        'mae_cifar10_final.safetensors'
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:  # too long for a name, or a zero byte in it
        raise CheckpointNotFoundError(f"no checkpoint at {text[:80]!a}: {first_line(error)}") from error
    if isinstance(source, Path):
        raise CheckpointNotFoundError(f"no checkpoint at {path}")
    if text.startswith("hf://"):
        return _from_hub(text, offline, cache)
    if text.startswith(("http://", "https://")):
        if page := _HUB_PAGE.fullmatch(text):
            return _from_hub(f"hf://{page[1]}@{page[2]}/{unquote(page[3])}", offline, cache)
        return _from_address(find_source(text), text, offline, cache)
    if not _ID.fullmatch(text) or path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise CheckpointNotFoundError(f"no checkpoint at {path}")
    try:
        entry = find_checkpoint(text)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(f"no checkpoint at {path}, and {error}") from error
    if entry.source.startswith("hf://"):
        return _from_hub(entry.source, offline, cache)
    return _from_address(entry, entry.source, offline, cache)


def drop_fetched(source: str | Path, path: Path) -> bool:
    """Delete the weights of a checkpoint from the cache; fetched again, they must have the same hash.

    What was given by its path or put into the cache by hand is nobody's to delete.

    Returns:
        Whether it was deleted.
    """
    text = os.fspath(source)
    address = find_checkpoint(text).source if _ID.fullmatch(text) and not Path(text).exists() else text
    by_hand = "drive.google.com" in urlsplit(address).netloc
    if by_hand or not address.startswith(("hf://", "http://", "https://")):
        return False
    files = weight_files(path)
    contents = {file.resolve() for file in files}  # the hub's cache links to them
    for file in files:
        file.unlink()
    snapshots = next((each for each in (path, *path.parents) if each.name == "snapshots"), None)
    links = [each for each in snapshots.rglob("*") if each.is_symlink()] if snapshots else []
    for content in contents - {link.resolve() for link in links}:  # another revision may hold the same
        content.unlink(missing_ok=True)
    return True


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where files fetched from URLs are kept."""
    if cache is None:
        cache = os.environ.get("MTO_ANALYSIS_CACHE")
    if cache is None:
        cache = platformdirs.user_cache_path("mto-analysis")
    return Path(cache).expanduser()


def _from_address(entry: Checkpoint | None, url: str, offline: bool, cache: str | Path | None) -> Path:
    """A file behind a URL, in a folder of its own in the cache: there already, placed by hand, or fetched."""
    parts = urlsplit(url)
    folder = cache_folder(cache) / (entry.id if entry else f"url-{hashlib.sha256(url.encode()).hexdigest()[:16]}")
    digest = entry.digest if entry else ""
    if "drive.google.com" in parts.netloc:
        there = _only_file(folder)
        if there is None:
            choose = f"choose the file of {entry.id if entry else 'your model'}, " if "/folders/" in url else ""
            raise CheckpointError(
                f"files on Google Drive must be downloaded by hand: open {url}, {choose}click Download, "
                f"put the file into {folder.absolute()} (any name), and run this again"
            )
        check_digest(there, digest)
        return there
    target = folder / (re.sub(r"[^\w.-]", "_", unquote(PurePosixPath(parts.path).name)) or "checkpoint")
    if target.exists():
        check_digest(target, digest)
        return target
    if offline:
        raise CheckpointError(f"{url} is not in {folder.parent.absolute()}, and offline nothing is fetched")
    return download(url, target, digest=digest)


def _only_file(folder: Path) -> Path | None:
    aside = (".sha256", ".part", ".tag", ".crdownload", ".download", ".lock")
    found = [path for path in folder.glob("[!.]*") if path.is_file() and not path.name.endswith(aside)]
    if len(found) > 1:
        raise CheckpointError(f"{folder} must hold one checkpoint, it has {', '.join(sorted(p.name for p in found))}")
    return found[0] if found else None


def _from_hub(address: str, offline: bool, cache: str | Path | None) -> Path:
    """A file, or a folder with settings and weights, in the hub's own cache."""
    match = _HUB.fullmatch(address)
    if match is None or (match["early"] and match["late"]):
        raise CheckpointError(f"{address} must be hf://owner/name[@revision] or hf://owner/name/file[@revision]")
    from huggingface_hub import constants

    offline = offline or bool(constants.HF_HUB_OFFLINE)
    where: dict[str, Any] = {
        "repo_id": match["repo"],
        "revision": match["early"] or match["late"],
        "local_files_only": offline,
        "cache_dir": None if cache is None else Path(cache).expanduser() / "hub",
    }
    if match["file"]:
        found = _hub_file(address, match["file"], where)
        if found is None:
            raise CheckpointError(_hub_absence(address, match["file"], offline))
        return found
    for name in _HUB_SETTINGS:
        _hub_file(address, name, where)
    for name in _HUB_WEIGHTS:
        found = _hub_file(address, name, where)
        if found is None:
            continue
        for shard in _shards(found) if name.endswith(".json") else ():
            if _hub_file(address, shard, where) is None:
                raise CheckpointError(_hub_absence(address, shard, offline))
        return found.parent
    raise CheckpointError(_hub_absence(address, f"neither {' nor '.join(_HUB_WEIGHTS[::2])}", offline))


def _hub_absence(address: str, what: str, offline: bool) -> str:
    if offline:
        return f"{address} is not in the Hugging Face cache, and offline nothing is fetched"
    return f"{address} has {what}; name one of its files, as hf://owner/name/file"


def _hub_file(address: str, name: str, where: dict[str, Any]) -> Path | None:
    """One file of a hub repository; ``None`` if it has no such file (offline: if the cache has none)."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(filename=name, **where))
    except errors.LocalEntryNotFoundError as error:
        if where["local_files_only"]:
            return None
        raise CheckpointError(f"{address}: the hub cannot be reached; try again, or --offline if cached") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{address} is given out on request: ask on its page, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{address}: no such repository on the hub, or it is private (`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{address}: the repository has no revision {where['revision']}") from error
    except errors.EntryNotFoundError:
        return None
    except Exception as error:  # the hub's client passes on those of its HTTP library, which has changed before
        raise CheckpointError(f"{address} cannot be fetched from the hub ({first_line(error)})") from error


def _shards(index: Path) -> list[str]:
    """Names of the weight files that an index lists."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(PurePosixPath(name).name for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} has no readable weight_map") from error
