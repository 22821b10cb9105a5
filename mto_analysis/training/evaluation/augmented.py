"""Augmented training batches with labels, each image a function of (seed, epoch, name), through timm's transforms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import Mixup, create_transform  # type: ignore[attr-defined]
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import RandomResizedCrop

from mto_analysis.images import EpochData
from mto_analysis.images.interface import unreadable
from mto_analysis.images.loading import Loader
from mto_analysis.images.sampling import Rows
from mto_analysis.images.workers import BatchPlan
from mto_analysis.models import ModelInfo
from mto_analysis.runtime.randomness import keyed_permutation, name_keys
from mto_analysis.training.evaluation.classifier_settings import ClassifierSettings
from mto_analysis.training.evaluation.features import LabelledImages, check_colours
from mto_analysis.training.randomness import seeded_globally


class LabelledBatch(NamedTuple):
    """Augmented images on the device, with what they are to be taken for.

    Shapes:
        images: batch channels height width (float32, normalized)
        targets: batch (class indices), or with mixup and cutmix batch num_classes (probabilities)
    """

    images: Tensor
    targets: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Arguments of a classifier's forward."""
        return self.images, self.targets


class AugmentedData(EpochData):
    """Training images of a classifier; a step sees the same images however they are shared out.

    Args:
        images: With labels.
        info: Of the model: the size and the normalization of its images.
        settings: Of augmentation, mixup and cutmix.
        num_classes: Classes in all.
        seed: Of order, augmentation, mixup and cutmix.
        num_workers: Processes that decode and augment; batches do not depend on it.
        device: Where batches go.
    """

    def __init__(
        self,
        images: LabelledImages,
        info: ModelInfo,
        settings: ClassifierSettings,
        num_classes: int,
        *,
        seed: int = 0,
        num_workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._images, self._seed, self._workers = images, seed, num_workers
        self._device = device or torch.device("cpu")
        self._transform = _transform(info, settings)
        self._mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        if settings.mixup or settings.cutmix:
            self._mix = Mixup(  # type: ignore[no-untyped-call]
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                label_smoothing=settings.smoothing,
                num_classes=num_classes,
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images.rows)

    @property
    def skipped(self) -> dict[str, Any]:
        """What was skipped beside the images, by kind; a broken one is an error."""
        return dict(self._images.images.skipped)

    def order(self, epoch: int) -> Rows:
        """The rows of all images in the order of an epoch."""
        names = [self._images.images.names[row] for row in self._images.rows]
        return keyed_permutation(name_keys(names), seed=self._seed, epoch=epoch)

    def _batches(self, plans: Sequence[BatchPlan]) -> Iterator[LabelledBatch]:
        if not plans:
            return
        loader = Loader(
            _Augmented(self._images, self._transform, self._seed, plans[0].epoch),
            batch_sampler=[plan.rows.tolist() for plan in plans],
            num_workers=self._workers,
        )
        for plan, batch in zip(plans, loader, strict=True):
            images, targets = (each.to(self._device, non_blocking=True) for each in batch)
            if self._mix is not None:
                with seeded_globally(self._seed, plan.epoch, "step", *plan.place):
                    images, targets = self._mix(images, targets)
            yield LabelledBatch(images, targets)


def _transform(info: ModelInfo, settings: ClassifierSettings) -> Callable[[Image.Image], Tensor]:
    check_colours(info)
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
    if settings.clamp_crop:
        replaced = transform.transforms[0]
        transform.transforms[0] = _ClampedCrop(
            info.image_size, settings.crop_scale, interpolation=replaced.interpolation
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


class _ClampedCrop(RandomResizedCrop):  # type: ignore[misc]
    """MAE's random crop: one sample of area and ratio, whose sides are cut to those of the image where they are longer.

    torchvision samples again instead, so its crops are smaller, and hardly ever the whole image.

    Source:
        facebookresearch/mae ``util/crop.py``, which follows TensorFlow's.
    """

    @staticmethod
    def get_params(img: Image.Image, scale: Sequence[float], ratio: Sequence[float]) -> tuple[int, int, int, int]:
        """Top, left, height and width."""
        area, log_ratio = torch.rand(2).tolist()
        area = (scale[0] + (scale[1] - scale[0]) * area) * img.height * img.width
        root = math.exp(0.5 * (math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * log_ratio))
        height, width = min(round(area**0.5 / root), img.height), min(round(area**0.5 * root), img.width)
        top, left = (int(torch.randint(room + 1, ())) for room in (img.height - height, img.width - width))
        return top, left, height, width


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
            raise unreadable(name, error) from None
        with seeded_globally(self._seed, self._epoch, "augmentation", name):
            return self._transform(image), self._labels[item]
