"""Augmented training batches with labels, each image a function of (seed, epoch, name), through timm's transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mto_analysis.errors import DataError
from mto_analysis.models import ModelInfo
from mto_analysis.runtime.randomness import keyed_permutation, name_keys
from mto_analysis.training.evaluation.classifier_settings import ClassifierSettings
from mto_analysis.training.evaluation.features import LabelledImages
from mto_analysis.training.randomness import seed_globally
from mto_analysis.training.shares import steps_in_epoch

__all__ = ["Share", "augmented_batches"]


class Share(NamedTuple):
    """How an optimizer step's images are shared out: micro-batches of each of ``processes``."""

    micro_batch: int
    accumulation: int = 1
    process: int = 0
    processes: int = 1

    @property
    def global_batch(self) -> int:
        """Images in an optimizer step."""
        return self.micro_batch * self.accumulation * self.processes


def augmented_batches(
    images: LabelledImages,
    info: ModelInfo,
    settings: ClassifierSettings,
    share: Share,
    *,
    seed: int,
    epoch: int,
    num_workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of one process in one epoch; a step sees the same images however they are shared out.

    To be used inside :func:`~mto_analysis.training.randomness.global_state_restored`.

    Shapes:
        returns: batch channels height width (normalised), batch (labels)
    """
    steps = steps_in_epoch(len(images.rows), share.global_batch)
    names = [images.images.names[row] for row in images.rows]
    order = keyed_permutation(name_keys(names), seed=seed, epoch=epoch)
    size = share.micro_batch
    starts = ((n * share.processes + share.process) * size for n in range(steps * share.accumulation))
    loader: DataLoader[Any] = DataLoader(
        _Augmented(images, _transform(info, settings), seed, epoch),
        batch_sampler=[order[start : start + size].tolist() for start in starts],
        num_workers=num_workers,
        generator=torch.Generator(),
    )
    yield from loader


def _transform(info: ModelInfo, settings: ClassifierSettings) -> Callable[[Image.Image], Tensor]:
    from timm.data import create_transform  # type: ignore[attr-defined]

    transform = create_transform(
        info.image_size,
        is_training=True,
        scale=settings.crop_scale,
        hflip=settings.flip,
        color_jitter=0.0,
        auto_augment=settings.auto_augment,
        interpolation="bicubic",
        mean=info.mean,
        std=info.std,
        re_prob=settings.erasing,
        re_mode="pixel",
    )
    for each in transform.transforms:
        for change in getattr(each, "ops", ()):
            if "Posterize" in getattr(change, "name", ""):
                change.level_fn = partial(_a_bit_at_least, change.level_fn)
    return transform  # type: ignore[no-any-return]


def _a_bit_at_least(level_of: Callable[..., tuple[int, ...]], *arguments: Any) -> tuple[int, ...]:
    """At its strongest, timm's posterize keeps no bit: older Pillow made the image black, newer ones refuse."""
    bits, *rest = level_of(*arguments)
    return (max(bits, 1), *rest)


class _Augmented(Dataset[tuple[Tensor, int]]):
    def __init__(
        self, images: LabelledImages, transform: Callable[[Image.Image], Tensor], seed: int, epoch: int
    ) -> None:
        self._images, self._rows, self._labels = images.images, images.rows, images.labels.tolist()
        self._transform, self._seed, self._epoch = transform, seed, epoch

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        row = self._rows[item]
        name = self._images.names[row]
        try:
            image = self._images.open(row)
        except Exception as error:  # decoders fail in many ways
            raise DataError(f"image {name} cannot be read ({type(error).__name__}: {error})") from None
        seed_globally(self._seed, self._epoch, "augmentation", name)
        return self._transform(image), self._labels[item]
