"""How a model's images were prepared, as far as it lies beside the weights: mean, standard deviation, size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mto_analysis.checkpoints.metadata import (
    numbers,
    openmmlab_config,
    refuse_other,
    section,
    size,
    slowfast_config,
    within,
)
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.errors import CheckpointError
from mto_analysis.models.interface import ImageSize
from mto_analysis.runtime.pixels import IMAGENET_MEAN, IMAGENET_STD

#: Of a colour image; what is published of means and deviations is for these.
IMAGE_CHANNELS = 3
_LARGEST_BYTE = 255
_SOURCE = "preprocessor_config.json"
_ASSUMED = "assumed"


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel of pixels scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean_source: str
    std_source: str = ""

    def __post_init__(self) -> None:
        """Both come from one place unless told otherwise."""
        object.__setattr__(self, "std_source", self.std_source or self.mean_source)

    @property
    def source(self) -> str:
        """Where both come from, as printed."""
        if self.mean_source == self.std_source:
            return self.mean_source
        return f"mean {self.mean_source}, std {self.std_source}"

    @property
    def assumption(self) -> str:
        """What had to be assumed, as printed, or nothing."""
        assumed = {
            name: values
            for name, values, source in (("mean", self.mean, self.mean_source), ("std", self.std, self.std_source))
            if source == _ASSUMED
        }
        if not assumed:
            return ""
        channels = len(self.mean)
        words = " and ".join(f"{name} {values}" for name, values in assumed.items())
        options = " and ".join(f"--{name}" for name in assumed)
        return f"images of {channels} channel{'s' * (channels > 1)} have {words}: the file does not say; give {options}"

    def overridden(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> Statistics:
        """These, with what the user gives in their place."""
        found = self if mean is None else replace(self, mean=tuple(mean), mean_source="given")
        return found if std is None else replace(found, std=tuple(std), std_source="given")

    def check(self, channels: int) -> None:
        """Refuse what does not fit a model."""
        both = (("mean", self.mean, self.mean_source), ("std", self.std, self.std_source))
        for name, values, source in both:
            if len(values) != channels:
                raise CheckpointError(
                    f"{name} ({source}) has {len(values)} values, the model {channels} channels; give --{name}"
                )
            if not all(0 <= value <= 1 if name == "mean" else 0 < value < math.inf for value in values):
                span = "lie in 0..1" if name == "mean" else "be above 0"
                raise CheckpointError(
                    f"{name} ({source}) must {span}, for pixels in 0..1, got {list(values)}; give --{name}"
                )


def unpublished_statistics(channels: int) -> Statistics:
    """What is assumed for images that are not colour: grey ones have the average of ImageNet's, others 0 and 1."""
    mean, std = [0.0] * channels, [1.0] * channels
    if channels == 1:
        mean, std = [sum(IMAGENET_MEAN) / IMAGE_CHANNELS], [sum(IMAGENET_STD) / IMAGE_CHANNELS]
    rounded = tuple(round(value, 4) for value in mean), tuple(round(value, 4) for value in std)
    return Statistics(*rounded, _ASSUMED)


def stated_statistics(raw: RawCheckpoint, channels: int) -> Statistics | None:
    """Of a Hugging Face ``preprocessor_config.json``, or of the config of mmpretrain or PySlowFast, if any."""
    if raw.preprocessor:
        return _of_preprocessor(raw.preprocessor, channels)
    bytes_ = section(openmmlab_config(raw), "data_preprocessor")
    mean, std = numbers(bytes_.get("mean")), numbers(bytes_.get("std"))
    if mean and std:
        scaled = [tuple(round(value / _LARGEST_BYTE, 6) for value in values) for values in (mean, std)]
        return Statistics(scaled[0], scaled[1], "file")
    data = section(slowfast_config(raw), "DATA")
    refuse_other(data, "its config (DATA)", REVERSE_INPUT_CHANNEL=False)
    mean, std = numbers(data.get("MEAN")), numbers(data.get("STD"))
    return Statistics(mean, std, "file") if mean and std else None


def prepared_size(raw: RawCheckpoint) -> ImageSize | None:
    """Size of the images that a Hugging Face ``preprocessor_config.json`` makes, where it is always the same."""
    settings = raw.preprocessor
    cropped = settings.get("do_center_crop") is True
    if not cropped and settings.get("do_resize") is False:
        return None
    stated = settings.get("crop_size" if cropped else "size")
    if isinstance(stated, Mapping):  # of the shorter side alone, the other one follows the image
        stated = [stated.get("height"), stated.get("width")]
    return size({"size": stated}, "size")


def _of_preprocessor(settings: Mapping[str, Any], channels: int) -> Statistics | None:
    factor = within(settings, "rescale_factor", 1 / _LARGEST_BYTE)
    if settings.get("do_rescale") is False or not math.isclose(factor, 1 / _LARGEST_BYTE, rel_tol=1e-3):
        raise CheckpointError(
            f"{_SOURCE}: only pixels scaled by 1/255 are read (do_rescale, rescale_factor); give --mean and --std"
        )
    if settings.get("do_normalize") is False:
        return Statistics((0.0,) * channels, (1.0,) * channels, _SOURCE)
    mean, std = (_of_channels(settings, name, channels) for name in ("image_mean", "image_std"))
    if (mean is None) != (std is None):
        raise CheckpointError(f"{_SOURCE} has only one of image_mean and image_std; give --mean and --std")
    if mean is None and settings.get("do_normalize") is True:
        raise CheckpointError(f"{_SOURCE} has do_normalize, but no image_mean and image_std; give --mean and --std")
    return Statistics(mean, std, _SOURCE) if mean is not None and std is not None else None


def _of_channels(settings: Mapping[str, Any], name: str, channels: int) -> tuple[float, ...] | None:
    """One number for each channel, or one for all."""
    if (stated := settings.get(name)) is None:
        return None
    values = numbers(stated) or numbers([stated] * channels)
    if values is None:
        raise CheckpointError(f"{_SOURCE}: {name} must be numbers, got {stated!r}; give --mean and --std")
    return values
