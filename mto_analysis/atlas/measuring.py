"""From one checkpoint to its rows of the table: fetch, compare the hash, measure every layer depth."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mto_analysis.atlas.table import NAME, SCHEMA_VERSION, check_table, join_tables
from mto_analysis.checkpoints import LoadOptions, checkpoint_sha256, resolve
from mto_analysis.checkpoints.registry import (
    Checkpoint,
    find_checkpoint,
    find_published,
    layout_evidence,
    list_checkpoints,
)
from mto_analysis.checkpoints.verification import compare_hash
from mto_analysis.errors import CheckpointError, DataError
from mto_analysis.images import Images
from mto_analysis.images.image_sets import ImageSet
from mto_analysis.masks import masks_sha256
from mto_analysis.models.interface import height_and_width
from mto_analysis.probe.measures import names_of
from mto_analysis.probe.request import Request, Settings
from mto_analysis.probe.study import HeterogeneityStudy, measure_checkpoints
from mto_analysis.runtime.listener import Listener
from mto_analysis.runtime.precision import DTYPES

#: Without those per head and per pair of layers, of which a deep model has thousands of rows.
PER_LAYER = "all,-attention,-cka"


@dataclass(frozen=True)
class Entry:
    """A checkpoint of the atlas.

    Args:
        name: Id of the registry, or a name of the user's.
        source: Where it is, as :func:`~mto_analysis.checkpoints.resolve` takes it.
        sha256: What its hash must be, where a table says so.
    """

    name: str
    source: str
    sha256: str = ""


@dataclass(frozen=True)
class Protocol:
    """How all checkpoints of an atlas are measured: each with the masks of its own rule.

    Args:
        seed: Seed of the random masks.
        masks_per_image: Masks per image.
        measures: As :class:`~mto_analysis.probe.request.Settings` take them; by default all that are per layer.
        precision: Of the model's forward: ``fp64``, ``fp32``, ``fp16`` or ``bf16``.
        batch_size: Images at once; values do not depend on it beyond rounding.
        num_workers: Processes that decode images.
        device: ``auto`` (of the machine that measures), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        loading: What is given for what files leave open.
        contributor: Who measures, for the table.
    """

    seed: int = 0
    masks_per_image: int = 1
    measures: str = PER_LAYER
    precision: str = "fp32"
    batch_size: int = 32
    num_workers: int = 0
    device: str = "cpu"
    loading: LoadOptions = field(default_factory=LoadOptions)
    contributor: str = ""

    def __post_init__(self) -> None:
        """Check the measures, before anything is downloaded."""
        names_of(self.measures)

    def settings(self) -> Settings:
        """As a study takes them; an image that cannot be read would be another set, so it is an error."""
        return Settings(
            masks_per_image=self.masks_per_image,
            seed=self.seed,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            device=self.device,
            dtype=DTYPES[self.precision],
            strict=True,
            measures=self.measures,
            keep_masks=True,
        )

    def given(self) -> str:
        """What was given for what files leave open, as JSON with sorted keys."""
        default = vars(LoadOptions())
        chosen = {key: value for key, value in vars(self.loading).items() if key not in ("weights", "offline")}
        return json.dumps({key: value for key, value in sorted(chosen.items()) if value != default[key]})

    def identity(self) -> dict[str, Any]:
        """Columns that say how was measured; rows of one atlas have the same."""
        return {
            "mask_seed": self.seed,
            "masks_per_image": self.masks_per_image,
            "measures": self.measures,
            "precision": self.precision,
            "weights": self.loading.weights,
            "loading": self.given(),
        }


def loading_from(text: str) -> LoadOptions:
    """The inverse of :meth:`Protocol.given`.

    Example:
        >>> loading_from('{"num_heads": 12}').num_heads
        12
    """
    known = vars(LoadOptions()).keys() - {"weights", "offline"}
    try:
        given = json.loads(text)
        if not isinstance(given, dict) or given.keys() - known:
            raise ValueError(f"an object with some of {', '.join(sorted(known))} is needed")
    except ValueError as error:
        raise DataError(f"loading {text[:60]} cannot be read: {error}") from error
    options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return LoadOptions(**options)


def choose_entries(names: Sequence[str] = (), *, families: Sequence[str] = (), every: bool = False) -> list[Entry]:
    """The checkpoints that are asked for.

    Args:
        names: Ids of the registry, or sources of your own, as ``SOURCE`` or ``NAME=SOURCE``.
        families: All of these families that can be measured.
        every: All of the registry that can be measured.

    Example:
        >>> [entry.name for entry in choose_entries(families=["simmim_vit"])]
        ['simmim_vit_base_800e']
    """
    rows = [row for family in families for row in list_checkpoints(family=family)]
    rows += list_checkpoints() if every else []
    entries = [Entry(row.id, row.id) for row in rows if row.loads]
    entries += [_entry(name) for name in names]
    if not entries:
        raise ValueError(
            f"no checkpoint to measure: {'none of these can be' if rows else 'give ids, --family or --all'}"
        )
    chosen: dict[str, Entry] = {}
    for entry in entries:
        if chosen.setdefault(entry.name.lower(), entry) != entry:
            raise ValueError(f"two checkpoints are called {entry.name}; name them apart as NAME=SOURCE")
    return list(chosen.values())


def _entry(text: str) -> Entry:
    name, equals, source = text.partition("=")
    if equals and not Path(text).exists() and not re.search(r"[/\\]", name):
        return _named(name, source)
    try:
        row = find_checkpoint(text)
    except CheckpointError:
        stem = re.sub(r"[?#].*", "", text).rstrip("/").rpartition("/")[2]
        return _named(re.sub(r"[^\w.-]", "-", Path(stem).stem).lstrip("._-"), text)
    if not row.loads:
        why = row.obstacle or ("its layout is not read" if row.has_mask_token else "it has no mask token")
        raise CheckpointError(f"{row.id} cannot be measured: {why}")
    return Entry(row.id, row.id)


def _named(name: str, source: str) -> Entry:
    if not NAME.fullmatch(name) or not source:
        raise ValueError(f"{name}={source} is not NAME=SOURCE: a name has up to 100 letters, digits, dots, _ and -")
    with suppress(CheckpointError):
        known = find_checkpoint(name)
        if source not in (known.id, known.source):
            raise ValueError(
                f"{source}: {name} is the id of another file, {known.source}; give it another name as NAME=SOURCE"
            )
    return Entry(name, _absolute(source))


def _absolute(source: str) -> str:
    """A source that other working folders understand, too."""
    path = Path(source).expanduser()
    return os.path.abspath(path) if path.exists() else source  # noqa: PTH100 - links keep their names


def measure_entry(
    entry: Entry, images: Images, image_set: ImageSet, protocol: Protocol, listener: Listener | None = None
) -> tuple[pd.DataFrame, Path]:
    """Fetch a checkpoint, compare its hash, and measure it.

    Returns:
        Its rows of the table, and where the file is.
    """
    path = resolve(entry.source, offline=protocol.loading.offline)
    published = find_published(entry.source, path)
    sha256 = checkpoint_sha256(path)
    if entry.sha256 not in ("", sha256):
        raise CheckpointError(f"{entry.source} has the sha256 {sha256[:8]}..., measured was {entry.sha256[:8]}...")
    compared = compare_hash(path, sha256, published)
    told = listener or Listener()
    request = Request([path], images, protocol.settings(), [entry.name], protocol.loading, told)
    study = measure_checkpoints(request)
    columns = {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": entry.name,
        "source": entry.source,
        "file_sha256": sha256,
        "hash_compared_with": " and ".join(compared),
        **_columns_of(study, published),
        **protocol.identity(),
        "masks_sha256": masks_sha256(study.masks[entry.name]),
        "image_set": image_set.name,
        "images_sha256": image_set.sha256,
        "hardware": _hardware(protocol.device),
        **{f"{name.replace('-', '_')}_version": version(name) for name in ("mto-analysis", "torch", "timm")},
        "contributor": protocol.contributor,
    }
    rows = join_tables([_values(study).assign(**columns).astype({"epochs": "Int64"})])
    check_table(rows, entry.name)
    return rows, path


def _columns_of(study: HeterogeneityStudy, published: Checkpoint | None) -> dict[str, Any]:
    """What is known of the model, the same in all its rows."""
    (model,) = study.models
    info, loss = model["info"], model["own_loss"] or {}
    return {
        "family": info["family"],
        "style": info["style"],
        "layout": info["layout"],
        # A file may be another one than the registry says, so what was recognized decides.
        "evidence": (published.evidence if published and published.layout == info["layout"] else "")
        or layout_evidence(info["layout"]),
        "backbone": published.backbone if published else "",
        "epochs": (published.epochs if published else None) or pd.NA,
        "image_size": "x".join(map(str, dict.fromkeys(height_and_width(info["image_size"])))),
        "patch_size": info["patch_size"],
        "config": json.dumps(model["config"], default=str),
        "assumptions": "; ".join(info["assumptions"]),
        "mask_rule": model["masks"],
        "own_loss": loss.get("loss", np.nan),
        "own_loss_of_mean": loss.get("predict_the_mean", np.nan),
        "own_loss_target": loss.get("target", ""),
    }


def _values(study: HeterogeneityStudy) -> pd.DataFrame:
    """All measures that are defined, one below the other."""
    visible = study.table[["stack", "layer_depth", "num_visible"]]
    rows = study.measures.drop(columns=["model", "other_model"]).dropna(subset="value")
    return rows.merge(visible, on=["stack", "layer_depth"], how="left")


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()})"
