"""Colour changes of a batch of images, each with its own keyed strength: jitter, grey, blur, solarisation.

Every operation is element by element or a sum of whole numbers, so an image does not depend on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mto_analysis.images.resampling import blur_matrices, resample
from mto_analysis.runtime.randomness import Keys, keyed_uniform

__all__ = ["CONMIM_TEACHER", "Photometric"]

_GREY = (0.299, 0.587, 0.114)
_NUMBERS = 16  # random numbers per image, whatever is switched on, so that settings do not shift each other's


@dataclass(frozen=True)
class Photometric:
    """Random colour changes, in this order: jitter, grey, blur, solarisation.

    Args:
        brightness: Factor drawn from 1 - this to 1 + this.
        contrast: Likewise, about the image's mean grey.
        saturation: Likewise, about each pixel's grey.
        hue: Turn drawn from -this to this, in turns of the colour circle (at most 0.5).
        jitter: Chance that these four are applied, in random order.
        grey: Chance of a grey image.
        blur: Chance of a Gaussian blur.
        blur_sigma: Its standard deviation in pixels, from and to.
        solarize: Chance that tones from the middle up are inverted.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter: float = 1.0
    grey: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("brightness", "contrast", "saturation", "jitter", "grey", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie between 0 and 0.5, got {self.hue}")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma must be positive and rise, got {self.blur_sigma}")

    def apply(self, images: Tensor, keys: Keys, *, seed: int, epoch: int, purpose: str) -> Tensor:
        """Change each image by its own key; the input is left alone.

        Shapes:
            images: batch channels height width (0..255)
            keys: batch
            returns: batch channels height width (0..255)
        """
        numbers = keyed_uniform(keys, _NUMBERS, seed=seed, epoch=epoch, purpose=purpose)
        images = images / 255
        jittered = numbers[:, 0] < self.jitter
        order = np.argsort(numbers[:, 1:5], axis=1, kind="stable")
        for place in range(4):
            for change in range(4):
                rows = np.flatnonzero(jittered & (order[:, place] == change))
                if len(rows) and self._strength(change):
                    self._jitter(images, rows, change, numbers[rows, 5 + change])
        rows = np.flatnonzero(numbers[:, 9] < self.grey)
        if len(rows):
            index = _on(images, rows)
            images[index] = _grey(images[index]).expand(-1, 3, -1, -1)
        rows = np.flatnonzero(numbers[:, 10] < self.blur)
        if len(rows):
            self._blur(images, rows, numbers[rows, 11])
        rows = np.flatnonzero(numbers[:, 12] < self.solarize)
        if len(rows):
            index = _on(images, rows)
            chosen = images[index]
            bright = (chosen >= 128 / 255).to(chosen.dtype)
            images[index] = chosen + bright * (1 - 2 * chosen)
        return images * 255

    def _strength(self, change: int) -> float:
        return (self.brightness, self.contrast, self.saturation, self.hue)[change]

    def _jitter(self, images: Tensor, rows: np.ndarray, change: int, numbers: np.ndarray) -> None:
        strength = self._strength(change)
        spread = torch.from_numpy((2 * numbers - 1) * strength).to(images.device, torch.float32).view(-1, 1, 1, 1)
        index = _on(images, rows)
        chosen = images[index]
        if change == 0:
            chosen = chosen * (1 + spread)
        elif change == 1:
            # Whole levels of grey, whose sum is exact, as PIL's contrast has them.
            level = (_grey(chosen) * 255).round().to(torch.int64).sum(dim=(1, 2, 3), keepdim=True)
            level = level.to(torch.float64) / (chosen.shape[2] * chosen.shape[3] * 255)
            chosen = _blend(level.to(torch.float32), chosen, 1 + spread)
        elif change == 2:
            chosen = _blend(_grey(chosen), chosen, 1 + spread)
        else:
            chosen = _turn_hue(chosen, spread.squeeze(1))
        images[index] = chosen.clamp_(0, 1)

    def _blur(self, images: Tensor, rows: np.ndarray, numbers: np.ndarray) -> None:
        low, high = self.blur_sigma
        index = _on(images, rows)
        size = images.shape[-1]
        radius = min(size - 1, int(3 * high + 0.5))
        matrices = blur_matrices(torch.from_numpy(low + (high - low) * numbers).to(images.device), size, radius)
        whole = (images[index] * 255).round_().transpose(1, 2).contiguous()
        images[index] = resample(whole, matrices, matrices) / 255


CONMIM_TEACHER = Photometric(
    brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter=0.8, grey=0.2, blur=0.1, solarize=0.2
)
"""What ConMIM's teacher sees (TencentARC/ConMIM, ``datasets.py``); its student sees the plain crop."""


def _on(images: Tensor, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows).to(images.device)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (red * _GREY[0] + green * _GREY[1] + blue * _GREY[2]).unsqueeze(1)


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return base * (1 - factor) + images * factor


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue in the HSV hexagon; value and saturation stay.

    Shapes:
        images: batch channels height width (0..1)
        turn: batch 1 1
    """
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Sums with 0 and 1 choose between values as `torch.where` does, which takes five times as long on a CPU.
    safe = chroma + (chroma == 0).to(chroma.dtype)
    is_red = (value == red).to(chroma.dtype)
    is_green = (value == green).to(chroma.dtype) * (1 - is_red)
    is_blue = 1 - is_red - is_green
    hue = ((green - blue) * is_red + (blue - red) * is_green + (red - green) * is_blue) / safe
    hue = hue + 2 * is_green + 4 * is_blue
    hue = hue / 6 + turn
    hue = (hue - hue.floor()) * 6
    # Each colour falls from the value by the chroma, by how far the hue is from its own sector.
    parts = []
    for sector in (5, 3, 1):
        place = hue + sector
        place = place - 6 * (place >= 6).to(place.dtype)
        ramp = torch.minimum(place, 4 - place).clamp_(0, 1)
        parts.append(value - chroma * ramp)
    return torch.stack(parts, dim=1)
