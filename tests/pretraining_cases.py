"""Runs small enough for any test: 32 px images, patches of 8 px, two blocks."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from mto_analysis.demo import DEMO_IMAGES
from mto_analysis.images import choose_images, open_images
from mto_analysis.training import RunSettings, load_recipe, pretrain

SMALL = {
    "patch_size": "8",
    "model.dim": "32",
    "model.depth": "2",
    "model.num_heads": "2",
    "model.mlp_dim": "64",
    "epochs": "2",
    "batch_size": "16",
}
SMALL_MAE = {
    **SMALL,
    "mask_unit": "8",
    "model.decoder_dim": "16",
    "model.decoder_depth": "2",
    "model.decoder_num_heads": "2",
    "model.decoder_mlp_dim": "32",
}
SMALL_SIMMIM = {**SMALL, "drop_path": "0.3", "warmup_epochs": "1"}
#: Columns that depend on how fast the machine is.
TIMING = ("images_per_second", "data_wait", "seconds", "hours")


def small_recipe(method: str = "mae", **options: str) -> Any:
    """A recipe of a method, made small."""
    small = SMALL_MAE if method == "mae" else SMALL_SIMMIM if method == "simmim" else SMALL
    return load_recipe(f"{method}_cifar10").with_options({**small, **options})


def some_images(count: int = 64) -> Any:
    """Bundled CIFAR-10 test images."""
    images = open_images(DEMO_IMAGES)
    return choose_images(images, images.names[:count])


def run(folder: Path, recipe: Any = None, settings: RunSettings | None = None, **more: Any) -> list[Any]:
    """A whole run, on the CPU."""
    settings = settings or RunSettings(device="cpu", log_every=2)
    images = more.pop("images", None) or some_images()
    return list(pretrain(recipe or small_recipe(), images, folder, settings, **more))


def contents(path: Path) -> dict[str, Any]:
    """A checkpoint with its tensors."""
    return torch.load(path, map_location="cpu", weights_only=True)


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal bit for bit, but for times."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key not in TIMING)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def rows(path: Path) -> list[dict[str, str]]:
    """A table without the columns that depend on the machine."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


class Stopped(Exception):
    """Ends a run where a test wants it to."""


def stop_after(step: int) -> Any:
    """Stop a run after a step, as a kill would."""

    def stop(record: Any) -> None:
        if record.step == step:
            raise Stopped

    return stop
