"""Every public checkpoint of masked image modelling that we know of, as data: where it is, what it holds.

The rows are ``assets/registry.csv``. Whether a file loads is not written there but asked of the layouts.
"""

from __future__ import annotations

import csv
import difflib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mto_analysis.checkpoints.layouts import LAYOUTS
from mto_analysis.errors import CheckpointNotFoundError

__all__ = ["Checkpoint", "find_checkpoint", "find_published", "find_source", "list_checkpoints"]

_REGISTRY = Path(__file__).parents[1] / "assets/registry.csv"

#: Which of :data:`~mto_analysis.checkpoints.layouts.LAYOUTS` the files of a family have.
_LAYOUT_OF = {
    "beit": "BEiT / data2vec vision / EVA",
    "beitv2": "BEiT v2",
    "bootmae": "BootMAE",
    "cae": "CAE",
    "conmim": "ConMIM",
    "crossmae": "CrossMAE",
    "data2vec_vision": "BEiT / data2vec vision / EVA",
    "dinov2": "DINOv2",
    "eva02": "EVA-02",
    "greenmim": "GreenMIM",
    "hf_beit": "Hugging Face BEiT",
    "hf_hiera_mae": "Hugging Face Hiera MAE",
    "hf_swin_mim": "Hugging Face Swin for masked image modelling",
    "hf_vit_mae": "Hugging Face ViTMAE",
    "hiera_mae": "Hiera MAE",
    "hivit_mae": "HiViT MAE",
    "ibot": "iBOT",
    "ijepa": "I-JEPA",
    "mae": "facebookresearch/mae",
    "mae_lite": "MAE-Lite",
    "mae_pytorch": "MAE-pytorch",
    "milan": "MILAN",
    "mixmim": "MixMIM",
    "mmpretrain_beit": "mmpretrain BEiT",
    "mmpretrain_beitv2": "mmpretrain BEiT v2",
    "mmpretrain_cae": "mmpretrain CAE",
    "mmpretrain_mae": "mmpretrain MAE",
    "mmpretrain_maskfeat": "mmpretrain MaskFeat",
    "mmpretrain_mff": "mmpretrain MFF",
    "mmpretrain_milan": "mmpretrain MILAN",
    "mmpretrain_mixmim": "mmpretrain MixMIM",
    "mmpretrain_simmim": "mmpretrain SimMIM Swin",
    "openmixup_a2mim": "OpenMixup A2MIM",
    "openmixup_simmim": "OpenMixup SimMIM ViT",
    "simmim_swin": "SimMIM Swin",
    "simmim_swinv2": "SimMIM SwinV2",
    "simmim_vit": "microsoft/SimMIM ViT",
}

#: Families for which the tests hold tokens of the original code in this very layout.
_PARITY = {"bootmae", "conmim", "hf_beit", "hf_vit_mae", "mae", "simmim_swin", "simmim_vit"}

_STATISTICS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


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
    def mean_and_std(self) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
        """Channel statistics of pre-training, on pixels scaled to 0..1."""
        return _STATISTICS.get(self.normalization)

    @property
    def layout(self) -> str | None:
        """Name of the layout the file should have."""
        return _LAYOUT_OF.get(self.family)

    @property
    def loads(self) -> bool:
        """Whether it holds a mask token, nothing is known to be in the way, and its layout is one we read."""
        read = any(each.name == self.layout and each.convert for each in LAYOUTS)
        return self.has_mask_token and not self.obstacle and read

    @property
    def evidence(self) -> str:
        """What reading its layout was tried on: ``parity`` with the original code, or the ``key layout only``."""
        if not self.loads:
            return ""
        return "parity" if self.family in _PARITY else "key layout only"

    @property
    def by_hand(self) -> bool:
        """Whether it must be downloaded in a browser."""
        return self.source.startswith("https://drive.google.com/")

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON, with what is derived."""
        derived = {"layout": self.layout, "loads": self.loads, "evidence": self.evidence}
        return {**asdict(self), "mean_and_std": self.mean_and_std, **derived}


def list_checkpoints(*, family: str | None = None, with_mask_token: bool = False) -> list[Checkpoint]:
    """The registry, or a part of it.

    Args:
        family: Only this family.
        with_mask_token: Only files with a mask token.

    Raises:
        ValueError: If there is no such family.

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

    Raises:
        CheckpointNotFoundError: If there is none; names the nearest.

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


def _like(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


@cache
def _rows() -> tuple[Checkpoint, ...]:
    with _REGISTRY.open(encoding="utf-8", newline="") as file:
        return tuple(_row(values) for values in csv.DictReader(file))


def _row(values: dict[str, Any]) -> Checkpoint:
    whole = ("epochs", "iterations", "image_size", "patch_size", "mask_unit")
    truth = ("has_mask_token", "has_decoder")
    facts = {name: int(values[name]) if values[name] else None for name in whole}
    ratio = float(values["mask_ratio"]) if values["mask_ratio"] else None
    return Checkpoint(**{**values, **facts, **{name: values[name] == "yes" for name in truth}, "mask_ratio": ratio})
