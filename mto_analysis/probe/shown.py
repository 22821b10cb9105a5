"""A few chosen images, prepared and masked for each checkpoint in turn: what is drawn, not only measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mto_analysis.checkpoints import checkpoint_sha256, resolve
from mto_analysis.images import Images, image_batches
from mto_analysis.models import MaskedImageModel
from mto_analysis.probe.own_loss import OwnLoss, own_loss
from mto_analysis.probe.study import Settings, load_source
from mto_analysis.runtime.outputs import chosen_labels

__all__ = ["ShownModel", "shown_models"]


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
    facts: dict[str, Any]  #: For ``run.json``.


def shown_models(
    sources: Sequence[str | Path],
    chosen: Images,
    settings: Settings | None = None,
    *,
    labels: Sequence[str] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    offline: bool = False,
    say: Callable[[str], None] = lambda message: None,
    warn: Callable[[str], None] = lambda message: None,
) -> Iterator[ShownModel]:
    """Load one checkpoint after the other, with the same images for each; the caller measures under ``undisturbed``.

    Args:
        sources: Checkpoints: paths, registry ids, ``hf://owner/name``, URLs.
        chosen: From :func:`~mto_analysis.images.open_images`; ``settings.limit`` of them are taken, spread evenly.
        settings: Masks and device.
        labels: Names of the models; by default from the paths.
        num_heads: For checkpoints that do not hold their head counts.
        decoder_num_heads: The same for decoders.
        offline: Never touch the network.
        say: Takes notes: masks, and the model's own loss beside that of predicting the mean.
        warn: Takes the warning that a model does no better than predicting the mean.

    Raises:
        ValueError: If labels do not fit.
        CheckpointError: If a checkpoint cannot be used.
        DataError: If an image cannot be read.
    """
    settings = settings or Settings()
    names = chosen_labels(sources, labels)
    count = min(settings.limit or len(chosen.names), len(chosen.names))
    paths = [resolve(source, offline=offline) for source in sources]
    for source, path, label in zip(sources, paths, names, strict=True):
        model = load_source(path, num_heads, decoder_num_heads, several=len(sources) > 1).to(settings.device)
        masks, words, rule = settings.mask_source(model)
        batch = next(image_batches(chosen, model.info, batch_size=count, limit=settings.limit))
        images, mask = batch.images.to(settings.device), masks(batch.names, 0).to(settings.device)
        loss = own_loss(model, images, mask)
        say(f"{label}: {model.info.family} ({model.info.layout}), {model.info.pixels}; masks: {words}")
        if loss is not None:
            (warn if loss.suspicious else say)(f"{label}: {loss.in_words(len(images))}")
        facts = {
            "model": label,
            "source": str(source),
            "sha256": checkpoint_sha256(path),
            "info": asdict(model.info),
            "config": asdict(model.config),
            "mask_rule": asdict(rule) if rule else None,
            "masks": words,
            "own_loss": loss._asdict() if loss else None,
        }
        yield ShownModel(label, model, batch.names, images, mask, loss, facts)
