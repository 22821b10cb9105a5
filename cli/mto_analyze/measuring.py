"""From the options of a measuring command to what the library's studies take."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from mto_analyze.console import note, progress

if TYPE_CHECKING:
    from mto_analysis.images import Images
    from mto_analysis.probe.study import Settings

# Options that are settings of the measurement as they stand.
_SETTINGS = ("limit", "mask_ratio", "mask_unit", "masks_per_image", "seed", "batch_size", "num_workers", "strict")


def settings(given: Mapping[str, Any], **changes: Any) -> Settings:
    """How to measure, from the options of a command that has some of them.

    Args:
        given: Values of the options by name.
        changes: Settings that are not options as they stand.
    """
    import torch

    from mto_analysis.masks import load_masks
    from mto_analysis.probe.study import Settings
    from mto_analysis.runtime.devices import pick_device

    chosen = {name: given[name] for name in _SETTINGS if name in given}
    chosen["masks"] = load_masks(given["masks"]) if given["masks"] else None
    chosen["dtype"] = getattr(torch, given.get("dtype", "float32"))
    return Settings(**{**chosen, "device": pick_device(given["device"]), **changes})


def images(given: Mapping[str, Any]) -> Images:
    """The images of ``--images``, or the bundled ones."""
    from mto_analysis.demo import DEMO_IMAGES
    from mto_analysis.images import open_images

    if given["images"] is None:
        note(
            "no --images: measuring on 256 bundled CIFAR-10 images of 32 px, for a first look only",
            quiet=given["quiet"],
        )
    return open_images(given["images"] or DEMO_IMAGES)


def loading(given: Mapping[str, Any]) -> dict[str, Any]:
    """How checkpoints are loaded, and where notes go."""
    return {
        **{name: given[name] for name in ("num_heads", "decoder_num_heads", "offline")},
        "say": partial(note, quiet=given["quiet"]),
    }


def telling(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with warnings and progress."""
    return {**loading(given), "warn": note, "progress": partial(progress, quiet=given["quiet"])}
