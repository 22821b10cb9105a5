"""Figs. 1 and 2 of the public MAE and SimMIM ViT-B files: fetched, checked by their own loss, measured and drawn."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mto_analysis.checkpoints import LoadOptions, load_checkpoint, resolve, save_checkpoint
from mto_analysis.checkpoints.verification import verify_checkpoint
from mto_analysis.demo import DEMO_IMAGES
from mto_analysis.errors import CheckpointError
from mto_analysis.figures.paper.catalogue import PaperFigure, find_figures
from mto_analysis.figures.paper.drawing import draw_paper
from mto_analysis.figures.paper.inputs import Inputs
from mto_analysis.images import open_images
from mto_analysis.models.initialization import random_weights
from mto_analysis.probe.request import LoadedModel, Request, Settings
from mto_analysis.runtime.listener import Listener
from mto_analysis.runtime.processes import pick_device

#: The paper's own models, by their ids in the registry. The decoder of MAE is only in the "full" file.
PUBLIC = {"SimMIM": "simmim_vit_base_800e", "MAE": "mae_vit_base_full"}

_UNTRAINED = "SimMIM, random weights"


def draw_public(
    names: Iterable[str],
    out: str | Path,
    inputs: Inputs | None = None,
    *,
    overwrite: bool = False,
    arguments: Mapping[str, Any] | None = None,
    listener: Listener | None = None,
) -> Iterator[tuple[PaperFigure, list[Path]]]:
    """Draw the paper's own figures, from the files that its authors measured as far as they are public.

    No early SimMIM is published. Fig. 1(b) shows the final one beside checkpoints given in ``inputs``, or beside the
    same architecture with random weights.

    Yields:
        Each figure, and its files.
    """
    inputs, listener = inputs or Inputs(), listener or Listener()
    wanted = [each.name for each in find_figures(list(names) or ("fig1a", "fig1b", "fig2"), inputs=inputs)]
    given = [name for name in wanted if name not in ("fig1a", "fig1b", "fig2", "definitions", "controls")]
    if given:
        raise ValueError(f"{given[0]} shows no model; with public files draw fig1a, fig1b, fig2, definitions, controls")
    if inputs.checkpoints and "fig1b" not in wanted:
        raise ValueError("with public files --ckpt is the early model of fig1b; draw fig1b, or leave --ckpt out")
    if inputs.images is None:
        listener.note("images: the bundled CIFAR-10 ones, enlarged; for the paper's figures pass ImageNet's (--images)")
    images = inputs.images or DEMO_IMAGES
    loading = LoadOptions(**inputs.loading)
    paths = _fetched(loading.offline, listener)
    settings = Settings(device=pick_device(inputs.device))
    opened = open_images(images, value_range=inputs.value_range)
    request = Request(list(paths.values()), opened, settings, tuple(paths), loading)
    for path, loaded in zip(paths.values(), request.models(), strict=True):
        _check(path, loaded, inputs, listener)
    options: dict[str, Any] = {"overwrite": overwrite, "arguments": arguments, "listener": listener}
    both = dataclasses.replace(
        inputs, checkpoints=tuple(str(path) for path in paths.values()), labels=tuple(paths), images=images
    )
    if rest := [name for name in wanted if name != "fig1b"]:
        yield from draw_paper(rest, out, both, **options)
    if "fig1b" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            sources, labels = inputs.checkpoints, inputs.names
            if not sources:
                file = Path(folder) / "random.safetensors"
                save_checkpoint(random_weights(load_checkpoint(paths["SimMIM"]), 0), file)
                sources, labels = (str(file),), (_UNTRAINED,)
                listener.note("Fig. 1(b): no early SimMIM is public; random weights replace it (--ckpt takes one)")
            epochs = dataclasses.replace(both, checkpoints=(str(paths["SimMIM"]), *sources), labels=("SimMIM", *labels))
            yield from draw_paper(["fig1b"], out, epochs, **options)


def _fetched(offline: bool, listener: Listener) -> dict[str, Path]:
    """All files before the first is measured; what can be fetched is, also if another must be downloaded by hand."""
    found: dict[str, Path] = {}
    missing: list[CheckpointError] = []
    for label, name in PUBLIC.items():
        try:
            found[label] = resolve(name, offline=offline)
            listener.note(f"{label}: {name} is at {found[label]}")
        except CheckpointError as error:
            missing.append(error)
    if missing:
        raise CheckpointError("; ".join(str(error) for error in missing))
    return found


def _check(path: Path, loaded: LoadedModel, inputs: Inputs, listener: Listener) -> None:
    """Whole, as published, and better than predicting the mean."""
    verified = verify_checkpoint(path, LoadOptions(**inputs.loading))
    loss = loaded.own_loss
    if loss is None or loss.suspicious:
        words = "predicts no pixels" if loss is None else loss.in_words()
        raise CheckpointError(f"{path} should be {PUBLIC[loaded.label]}, but: {words}")
    listener.note(f"{loaded.label}: sha256 {verified.sha256[:12]}..., {loss.in_words()}")
