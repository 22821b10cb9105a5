"""From the options of a measuring command to the library's request, and from its result to files."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mto_analysis.runtime.listener import Listener
from mto_analysis.runtime.processes import Processes
from mto_analyze.console import frozen_imports, note, progress
from mto_analyze.options import LoadingOptions, Precision
from mto_analyze.repeating import write_record

if TYPE_CHECKING:
    from mto_analysis.probe.request import Request


def _import_libraries() -> None:
    """Import what every measurement needs, without garbage collection, which takes a fifth of the time."""
    if "torch" not in sys.modules:
        with frozen_imports():
            import matplotlib.figure  # noqa: F401
            import pandas  # noqa: F401
            import timm.data  # noqa: F401


def options_of(settings: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the options that are called as fields of a dataclass are."""
    return {field.name: given[field.name] for field in fields(settings) if field.name in given}


def listener(given: Mapping[str, Any]) -> Listener:
    """Notes and progress on stderr, unless quiet; warnings always."""
    quiet = given["quiet"]
    return Listener(partial(note, quiet=quiet), note, partial(progress, quiet=quiet))


def loading(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of :class:`~mto_analysis.checkpoints.LoadOptions` among the options of a command; no torch is imported."""
    names = (*inspect.get_annotations(LoadingOptions), "mask_ratio", "weights")
    found = {name: given[name] for name in names if name in given}
    return found if found.get("weights") in (None, "model", "model_ema") else found | {"weights": "model"}


def sources(given: Mapping[str, Any]) -> list[str]:
    """What to measure: checkpoints, and models that functions of the user make, with the file of their weights.

    Raises:
        ValueError: If there is neither, or a file of weights is for several models or for none.
    """
    _import_libraries()
    from mto_analysis.probe.live_source import LiveSource

    models, weights = given.get("model") or (), str(given.get("weights", "model"))
    file = None if weights in ("model", "model_ema") else Path(weights)
    if file is not None and len(models) != 1:
        raise ValueError(f"--weights must be model or model_ema, or with one --model its file, got {weights}")
    if models and not given["ckpt"] and weights == "model_ema":
        raise ValueError("--weights model_ema is for checkpoints (--ckpt); a model of your own has the weights it has")
    found = [*(given["ckpt"] or ()), *(LiveSource(model, file) for model in models)]
    if not found:
        raise ValueError("give a checkpoint with --ckpt CKPT, or a model of your own with --model MODULE:FACTORY")
    return found


def request(
    given: Mapping[str, Any],
    *,
    chosen: Sequence[str] = (),
    processes: Processes | None = None,
    **changes: Any,
) -> Request:
    """What to measure, from the options of a command that has some of them.

    Args:
        given: Values of the options by name.
        chosen: Names of the images, instead of all.
        processes: Those of a launcher.
        changes: Settings that are not options as they stand.
    """
    _import_libraries()
    from mto_analysis.checkpoints import LoadOptions
    from mto_analysis.demo import DEMO_IMAGES
    from mto_analysis.images import choose_images, open_images
    from mto_analysis.masks import load_masks
    from mto_analysis.probe.request import Request, Settings
    from mto_analysis.runtime.precision import DTYPES
    from mto_analysis.runtime.processes import pick_device

    told, found = listener(given), sources(given)
    images = open_images(given["images"] or DEMO_IMAGES, value_range=given["value_range"])
    settings = options_of(Settings, given)
    if settings.get("match_visible"):  # then a ratio is only of use where a file's own cannot be read
        settings["mask_ratio"] = None
    settings["masks"] = load_masks(given["masks"]) if given["masks"] else None
    settings["device"] = pick_device(given["device"])
    settings["dtype"] = DTYPES[given.get("precision", Precision.fp32)]
    if given["images"] is None:
        told.note("no --images: measuring on 256 bundled CIFAR-10 images of 32 px, for a first look only")
    return Request(
        found,
        choose_images(images, list(dict.fromkeys(chosen))) if chosen else images,
        Settings(**settings, **changes),
        given["label"] or (),
        LoadOptions(**loading(given)),
        told,
        processes or Processes(),
    )


def write(given: Mapping[str, Any], files: Sequence[str], outputs: Mapping[str, Any], **metadata: Any) -> None:
    """Write what a command has measured into ``--out``, with ``run.json``, ``run.toml`` and ``methods.md``, and say so.

    Args:
        given: Values of the options by name.
        files: Names of all files, as announced before measuring.
        outputs: As for :func:`~mto_analysis.figures.files.write_outputs`.
        metadata: For ``run.json``.
    """
    from mto_analysis.figures.files import file_names, write_outputs
    from mto_analysis.runtime.outputs import OutputFolder, run_metadata
    from mto_analysis.runtime.processes import pick_device

    folder = OutputFolder(given["out"], files, overwrite=given["overwrite"])
    if "device" in given:
        metadata["device"] = pick_device(given["device"])
    metadata = run_metadata(given, **metadata)
    write_outputs(folder, {**outputs, "run.json": metadata})
    made = file_names([*outputs, "run.json"])  # not all that was announced: an image may have been broken
    written = [*(name for name in files if name in made), *write_record(folder.path, metadata)]
    note(f"wrote {', '.join(written)} to {folder.path}", quiet=given["quiet"])
