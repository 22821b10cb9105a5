"""Every public checkpoint of masked image modelling that we know of, as data: where it is, what it holds.

The rows are ``assets/registry.csv``. Which layouts are read, and what reading them was tried on, is
``assets/claims.csv``, which a test compares with the converters.
"""

from __future__ import annotations

import csv
import difflib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mto_analysis.errors import CheckpointNotFoundError
from mto_analysis.runtime.pixels import CLIP, HALF, IMAGENET

_REGISTRY = Path(__file__).parents[1] / "assets/registry.csv"
_CLAIMS = Path(__file__).parents[1] / "assets/claims.csv"

_STATISTICS = {"imagenet": IMAGENET, "half": HALF, "clip": CLIP}


@dataclass(frozen=True)
class Claim:
    """What the claim rests on that files of a family are read right.

    Args:
        family: Of the registry.
        layout: Name of their layout.
        basis: ``original code`` (tokens of every layer equal those of the original code), ``slow reference`` (those of
            a second implementation, written in the tests from the original's rules), or nothing: it is not read.
        original: The original code and its commit or version.
        golden: Where the tests hold its tokens; else they were compared once.
    """

    family: str
    layout: str
    basis: str
    original: str
    golden: str

    def __str__(self) -> str:
        """In words, as printed beside each file."""
        if self.basis == "original code":
            return f"original code: {self.original}{'' if self.golden else ' (compared once)'}"
        return self.basis


@dataclass(frozen=True)
class Checkpoint:
    """One published file; ``None`` and an empty text mean that nobody published the fact.

    Args:
        id: Our name for it.
        family: Whose method and file format.
        style: Where masked tokens live: ``inpainting``, ``decoder``, or empty without mask token.
        backbone: Encoder, as its authors call it.
        epochs: Of pre-training.
        iterations: Of pre-training, where epochs were not counted.
        image_size: Side of the images in pixels.
        patch_size: Side of a patch in pixels.
        mask_ratio: Fraction masked in pre-training.
        mask_unit: Side in pixels of what is masked at once.
        mask_shape: ``random``, ``blockwise`` or another way of choosing.
        has_mask_token: Without one nothing can be measured.
        has_decoder: Whether what predicts the target is inside.
        obstacle: Why this file does not load although its layout is read.
        normalization: ``imagenet``, ``half`` or ``clip`` statistics; see :attr:`mean_and_std`.
        source: What :func:`~mto_analysis.checkpoints.fetching.resolve` takes: a URL or ``hf://owner/name[/file]``.
        digest: ``algorithm:beginning`` of the file's hash, as its authors published it.
        licence: Of the repository that publishes it.
        basis: What the row rests on: ``names seen`` (somebody printed the tensor names), ``code`` (that wrote or reads
            the file), ``published statement`` or ``uncertain``. No file of the list was opened for it.
        notes: What to know before using it.
    """

    id: str
    family: str
    style: Literal["inpainting", "decoder", ""]
    backbone: str
    epochs: int | None
    iterations: int | None
    image_size: int | None
    patch_size: int | None
    mask_ratio: float | None
    mask_unit: int | None
    mask_shape: str
    has_mask_token: bool
    has_decoder: bool
    obstacle: str
    normalization: str
    source: str
    digest: str
    licence: str
    basis: str
    notes: str

    @property
    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Channel statistics of pre-training, on pixels scaled to 0..1."""
        return _STATISTICS.get(self.normalization)

    @property
    def layout(self) -> str | None:
        """Name of the layout the file should have."""
        claim = _claims().get(self.family)
        return claim.layout if claim else None

    @property
    def loads(self) -> bool:
        """Whether it holds a mask token, nothing is known to be in the way, and its layout is one we read."""
        claim = _claims().get(self.family)
        return self.has_mask_token and not self.obstacle and claim is not None and bool(claim.basis)

    @property
    def evidence(self) -> str:
        """What reading its layout was tried on, if it loads; see :class:`Claim`."""
        return str(_claims()[self.family]) if self.loads else ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON, with what is derived."""
        derived = {"layout": self.layout, "loads": self.loads, "evidence": self.evidence}
        return {**asdict(self), "mean_and_std": self.mean_and_std, **derived}


def list_checkpoints(*, family: str | None = None, with_mask_token: bool = False) -> list[Checkpoint]:
    """The registry, or a part of it.

    Args:
        family: Only this family.
        with_mask_token: Only files with a mask token.

    Example:
        >>> [each.id for each in list_checkpoints(family="simmim_vit")]
        ['simmim_vit_base_800e']
    """
    rows = _rows()
    families = sorted({row.family for row in rows})
    if family is not None and family not in families:
        raise ValueError(f"family must be one of {', '.join(families)}, got {family!r}{_like(family, families)}")
    return [row for row in rows if family in (None, row.family) and (row.has_mask_token or not with_mask_token)]


def find_checkpoint(name: str) -> Checkpoint:
    """The row of an id.

    Example:
        >>> find_checkpoint("mae_vit_base_full").has_decoder
        True
    """
    for row in _rows():
        if row.id == name:
            return row
    guess = _like(name, [row.id for row in _rows()])
    raise CheckpointNotFoundError(f"no checkpoint has the id {name!r}{guess or '; see mto-analyze checkpoints list'}")


def find_source(source: str) -> Checkpoint | None:
    """The row whose file is at a URL or hub address; ``None`` where several or no rows are."""
    found = [row for row in _rows() if row.source == source]
    return found[0] if len(found) == 1 else None


def find_published(source: str, path: Path) -> Checkpoint | None:
    """The row that a file claims to be: by the id or address it was asked for with, else by its published name."""
    for row in _rows():
        if source in (row.id, row.source):
            return row
    # checkpoint.pth and the like are the names of several published files, and of everybody's own.
    named = [row for row in _rows() if row.source.rpartition("/")[2] == path.name]
    return named[0] if len(named) == 1 else None


def layout_evidence(layout: str) -> str:
    """What reading files of a layout was tried on, see :class:`Claim`: of several families the least that holds.

    Example:
        >>> layout_evidence("HiViT MAE"), layout_evidence("mto_analysis")
        ('slow reference', 'written by this package')
    """
    if layout == "mto_analysis":
        return "written by this package"
    claims = [claim for claim in _claims().values() if claim.layout == layout]
    weakest_first = ("", "slow reference", "original code")
    return str(min(claims, key=lambda claim: weakest_first.index(claim.basis))) if claims else "key names only"


def _like(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


@cache
def _claims() -> dict[str, Claim]:
    with _CLAIMS.open(encoding="utf-8", newline="") as file:
        return {values["family"]: Claim(**values) for values in csv.DictReader(file)}


@cache
def _rows() -> tuple[Checkpoint, ...]:
    with _REGISTRY.open(encoding="utf-8", newline="") as file:
        return tuple(_row(values) for values in csv.DictReader(file))


def _row(values: dict[str, Any]) -> Checkpoint:
    whole = ("epochs", "iterations", "image_size", "patch_size", "mask_unit")
    truth = ("has_mask_token", "has_decoder")
    metadata = {name: int(values[name]) if values[name] else None for name in whole}
    ratio = float(values["mask_ratio"]) if values["mask_ratio"] else None
    return Checkpoint(**{**values, **metadata, **{name: values[name] == "yes" for name in truth}, "mask_ratio": ratio})
