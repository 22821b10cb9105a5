"""A few chosen images, prepared and masked for each checkpoint in turn: what is drawn, not only measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mto_analysis.images import Images, image_batches
from mto_analysis.images.interface import choose_rows
from mto_analysis.models import MaskedImageModel
from mto_analysis.probe.own_loss import OwnLoss
from mto_analysis.probe.request import LoadedModel, Request, masked_batch


@dataclass(frozen=True)
class ShownModel:
    """One checkpoint with the chosen images, on its device.

    Shapes:
        images: batch channels height width
        mask: batch num_patches
    """

    label: str
    model: MaskedImageModel
    names: tuple[str, ...]
    images: Tensor
    mask: Tensor
    own_loss: OwnLoss | None  #: ``None`` where the family predicts no pixels
    metadata: dict[str, Any]  #: For ``run.json``.


def show(loaded: LoadedModel, images: Images) -> ShownModel:
    """Prepare and mask all of some images for a loaded model; the caller measures under ``undisturbed``."""
    model = loaded.model
    batch = next(image_batches(images, model.info, batch_size=len(images.names)))
    pixels, mask = masked_batch(model, batch, loaded.masks)
    return ShownModel(loaded.label, model, batch.names, pixels, mask, loaded.own_loss, loaded.metadata)


def shown_models(request: Request) -> Iterator[ShownModel]:
    """Load one checkpoint after the other, with all images of the request for each; their own loss is that of these."""
    rows = request.settings.rows(request.images)
    chosen = choose_rows(request.images, rows)
    for loaded in request.models(checked=rows):
        yield show(loaded, chosen)
