"""Whether a checkpoint is whole and the file it claims to be: recognized, every tensor checked, its hash compared."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mto_analysis.checkpoints import CheckpointReport, LoadOptions, inspect_checkpoint, open_checkpoint
from mto_analysis.checkpoints.downloading import recorded_digest
from mto_analysis.checkpoints.registry import Checkpoint, find_published
from mto_analysis.errors import CheckpointError


@dataclass(frozen=True)
class Verification:
    """What a checkpoint turned out to be.

    Args:
        report: What it holds, as ``inspect`` says.
        sha256: Hash of its weights.
        published_as: The registry's id for the file, where its source or name tells.
        compared_with: What the hash was compared with: ``published``, ``recorded`` at the first download, or nothing.
    """

    report: CheckpointReport
    sha256: str
    published_as: str | None
    compared_with: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def verify_checkpoint(source: str | Path, loading: LoadOptions | None = None) -> Verification:
    """Check a checkpoint as far as it can be checked without running it.

    Example:
        >>> from mto_analysis.demo import DEMO_CHECKPOINTS
        >>> verify_checkpoint(DEMO_CHECKPOINTS["MAE"]).report.info.family
        'mae'
    """
    options = loading or LoadOptions()
    opened = open_checkpoint(source, mmap=True, weights=options.weights, offline=options.offline)
    report = inspect_checkpoint(opened, **options.keywords())
    entry = find_published(str(source), opened.path)
    compared = compare_hash(opened.path, opened.sha256, entry)
    return Verification(report, opened.sha256, entry.id if entry else None, compared)


def compare_hash(path: Path, sha256: str, entry: Checkpoint | None) -> tuple[str, ...]:
    """Compare a checkpoint's hash with what is known of it: which of ``published`` and ``recorded`` there were."""
    compared = []
    if entry is not None and entry.digest and path.is_file():
        algorithm, beginning = entry.digest.split(":")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if not found.startswith(beginning):
            raise CheckpointError(
                f"{path} is not {entry.id}: its {algorithm} is {found[: len(beginning)]}..., published is {beginning}"
            )
        compared.append("published")
    if recorded := recorded_digest(path):
        if recorded != sha256:
            raise CheckpointError(f"{path} has changed since it was fetched; delete it and fetch it again")
        compared.append("recorded")
    return tuple(compared)
