"""Augmentation: what is done to each image, as a pure function of (seed, epoch, name).

Geometry is drawn here for one image or a thousand alike; it is applied by batch on the device
(:func:`Augmentation.apply_to_batch`, small images held in memory) or image by image in worker processes
(:func:`Augmentation.apply_to_image`, large ones).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mto_analysis.images.photometric import CONMIM_TEACHER, Photometric
from mto_analysis.images.resampling import Interpolation, crop_matrices, resample, shift_matrices
from mto_analysis.runtime.randomness import Keys, keyed_uniform
from mto_analysis.runtime.settings import Count, Fraction, Natural, Positive, Rising, Settings, Share

__all__ = ["CONMIM_TEACHER", "Augmentation", "Geometry", "Photometric", "method_augmentation"]

_TRIES = 10  # draws of a crop before the centre is taken, as in torchvision

Whole = npt.NDArray[np.int64]


class Geometry(NamedTuple):
    """Where each image is cut, and whether it is mirrored.

    Shapes:
        top, left, height, width: batch (pixels; of shifted images, top and left may be negative)
        flip: batch
    """

    top: Whole
    left: Whole
    height: Whole
    width: Whole
    flip: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Augmentation(Settings):
    """Random resized crop (or shift), flip and colour changes of a training image.

    Args:
        image_size: Side of the result in pixels.
        scale: Smallest and largest area of the crop, as a fraction of the image's.
        ratio: Smallest and largest ratio of the crop's width to its height, drawn evenly in its logarithm.
        flip: Chance of a mirror image.
        interpolation: Kernel of the resize; where it makes smaller, antialiased as PIL's.
        mean: Of each channel 0..1, taken off; as many as images have channels.
        std: Of the channels, divided by.
        padding: If given, there is no crop: images are shifted by up to so many pixels, with reflected borders.
        color_jitter: Colour changes of the images, or None.
        second_view: If given, each image comes a second time, with the same geometry and these colour changes.
    """

    image_size: Count
    scale: Annotated[tuple[Share, Share], Rising(strict=False)] = (0.2, 1.0)
    ratio: Annotated[tuple[Positive, Positive], Rising(strict=False)] = (3 / 4, 4 / 3)
    flip: Fraction = 0.5
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)
    padding: Natural | None = None
    color_jitter: Photometric | None = None
    second_view: Photometric | None = None

    def __post_init__(self) -> None:
        """Check what belongs together, too."""
        super().__post_init__()
        colours = self.color_jitter is not None or self.second_view is not None
        self._refuse(
            (f"std must have as many values as mean, got {self.mean} and {self.std}", len(self.mean) != len(self.std)),
            (
                f"padding must lie between 0 and image_size - 1, got {self.padding}",
                (self.padding or 0) >= self.image_size,
            ),
            (f"colours can be changed of images with 3 channels, not {self.channels}", colours and self.channels != 3),
        )

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(self.mean)

    def sample(self, keys: Keys, heights: Whole, widths: Whole, *, seed: int, epoch: int) -> Geometry:
        """Draw the geometry of images of these sizes.

        A crop is torchvision's: ten tries of an area and a ratio, the first that fits is placed at random, else the
        largest centre crop of a ratio that is allowed.

        Shapes:
            keys, heights, widths: batch
        """
        return self.place(self.numbers(keys, seed=seed, epoch=epoch), heights, widths)

    def numbers(self, keys: Keys, *, seed: int, epoch: int) -> npt.NDArray[np.float64]:
        """The random numbers behind the geometry, which do not need the sizes of the images.

        Shapes:
            keys: batch
            returns: batch 23
        """
        return keyed_uniform(keys, 3 + 2 * _TRIES, seed=seed, epoch=epoch, purpose="geometry")

    def place(self, numbers: npt.NDArray[np.float64], heights: Whole, widths: Whole) -> Geometry:
        """The geometry that random numbers stand for.

        Shapes:
            numbers: batch 23
            heights, widths: batch
        """
        flip = numbers[:, 0] < self.flip
        if self.padding is not None:
            top, left = (np.floor(numbers[:, 1:3] * (2 * self.padding + 1)).astype(np.int64) - self.padding).T
            size = np.full(len(numbers), self.image_size, dtype=np.int64)
            return Geometry(top, left, size, size, flip)
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * numbers[:, 3 : 3 + _TRIES]) * (
            heights * widths
        ).reshape(-1, 1)
        low, high = (math.log(bound) for bound in self.ratio)
        ratio = np.exp(low + (high - low) * numbers[:, 3 + _TRIES :])
        width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (width > 0) & (width <= widths.reshape(-1, 1)) & (height > 0) & (height <= heights.reshape(-1, 1))
        first = fits.argmax(axis=1)
        rows = np.arange(len(numbers))
        height, width, fits = height[rows, first], width[rows, first], fits[rows, first]
        if not fits.all():
            tall, wide = np.rint(widths / self.ratio[0]), np.rint(heights * self.ratio[1])
            height = np.where(fits, height, np.minimum(heights, tall.astype(np.int64)))
            width = np.where(fits, width, np.minimum(widths, wide.astype(np.int64)))
        top = np.where(fits, np.floor(numbers[:, 1] * (heights - height + 1)), (heights - height) // 2)
        left = np.where(fits, np.floor(numbers[:, 2] * (widths - width + 1)), (widths - width) // 2)
        return Geometry(top.astype(np.int64), left.astype(np.int64), height, width, flip)

    def apply_to_batch(self, pixels: Tensor, geometry: Geometry) -> Tensor:
        """Cut, resize and mirror images of one size, on their device.

        Shapes:
            pixels: batch height channels width (0..255)
            returns: batch channels image_size image_size (float32, whole numbers 0..255)
        """
        top, left, height, width = (torch.from_numpy(values).to(pixels.device) for values in geometry[:4])
        flip = torch.from_numpy(geometry.flip).to(pixels.device)
        if self.padding is not None:
            rows = shift_matrices(top, None, self.image_size)
            columns = shift_matrices(left, flip, self.image_size)
        else:
            size, kind = self.image_size, self.interpolation
            rows = crop_matrices(top, height, None, pixels.shape[1], size, kind)
            columns = crop_matrices(left, width, flip, pixels.shape[3], size, kind)
        return resample(pixels, rows, columns)

    def apply_to_image(self, pixels: Tensor, geometry: Geometry) -> Tensor:
        """Cut, resize and mirror one image of any size.

        Shapes:
            pixels: channels height width (uint8 or float32, 0..255)
            returns: channels image_size image_size (the same)
        """
        top, left, height, width, flip = (values[0].item() for values in geometry)
        if self.padding is not None:
            pixels = fit_to_square(pixels, self.image_size)
            rows = shift_matrices(torch.tensor([top]), None, self.image_size)
            columns = shift_matrices(torch.tensor([left]), torch.tensor([flip]), self.image_size)
            return resample(pixels.transpose(0, 1).unsqueeze(0).contiguous(), rows, columns)[0].to(pixels.dtype)
        crop = pixels[:, top : top + height, left : left + width]
        result = _resized(crop, (self.image_size, self.image_size), self.interpolation)
        return result.flip(-1) if flip else result

    def finish(self, images: Tensor, keys: Keys, *, seed: int, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Colour changes and normalization: the images (which are used up) and, if asked for, their second view.

        Shapes:
            images: batch channels height width (0..255)
            returns: batch channels height width (float32), and the same or None
        """
        images = images.to(torch.float32)
        second = None
        if self.second_view is not None:
            changed = self.second_view.apply(images, keys, seed=seed, epoch=epoch, purpose="second view")
            second = self._normalized(changed)
        if self.color_jitter is not None:
            images = self.color_jitter.apply(images, keys, seed=seed, epoch=epoch, purpose="colour")
        return self._normalized(images), second

    def _normalized(self, images: Tensor) -> Tensor:
        mean = torch.tensor([255 * value for value in self.mean], device=images.device).view(1, -1, 1, 1)
        factor = torch.tensor([1 / (255 * value) for value in self.std], device=images.device).view(1, -1, 1, 1)
        return images.sub_(mean).mul_(factor)


def _resized(pixels: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """Antialiased resize of one image, in eight bits where it has them.

    Shapes:
        pixels: channels height width (uint8 or float32)
    """
    return torch.nn.functional.interpolate(
        pixels.unsqueeze(0), size=size, mode=interpolation, align_corners=False, antialias=True
    ).squeeze(0)


def fit_to_square(pixels: Tensor, size: int) -> Tensor:
    """Shorter side resized to ``size`` (bicubic), centre crop.

    Shapes:
        pixels: channels height width (uint8 or float32)
        returns: channels size size (the same)
    """
    height, width = pixels.shape[1:]
    if (height, width) == (size, size):
        return pixels
    shorter = min(height, width)
    height, width = round(height * size / shorter), round(width * size / shorter)
    pixels = _resized(pixels, (height, width), "bicubic")
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[:, top : top + size, left : left + size]


def method_augmentation(method: str, image_size: int) -> Augmentation:
    """The augmentation of an original method's pre-training code, at another size if asked for.

    ========  ==========================================================================================
    method    as in
    ========  ==========================================================================================
    mae       facebookresearch/mae ``main_pretrain.py``: crops of 0.2 to 1 of the area, bicubic; flip
    bootmae   LightDXY/BootMAE ``datasets.py`` (``resize_scale`` 0.2): as MAE, mean and std 0.5
    simmim    microsoft/SimMIM ``data_simmim.py``: 0.67 to 1, torchvision's default kernel, bilinear; flip
    conmim    TencentARC/ConMIM ``datasets.py``: 0.08 to 1 (its default), bicubic; flip; the teacher sees the
              same crop with colour jitter, grey, blur and solarization, the student sees it plain
    cifar     32 px images: shifted by up to 4 px with reflected borders; flip
    ========  ==========================================================================================

    Raises:
        ValueError: If there is no such method.

    Example:
        >>> method_augmentation("simmim", 224).scale
        (0.67, 1.0)
    """
    known = {
        "mae": Augmentation(image_size),
        "bootmae": Augmentation(image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        "simmim": Augmentation(image_size, scale=(0.67, 1.0), interpolation="bilinear"),
        "conmim": Augmentation(image_size, scale=(0.08, 1.0), second_view=CONMIM_TEACHER),
        "cifar": Augmentation(image_size, padding=min(4, image_size - 1)),
    }
    if method not in known:
        raise ValueError(f"method must be one of {', '.join(known)}, got {method!r}")
    return known[method]
