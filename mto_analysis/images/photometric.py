"""Colour changes of a batch of images, each image with its own sampled strength: jitter, grey, blur, solarization.

The strengths are functions of (seed, epoch, image); torchvision applies them, to one image at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from mto_analysis.runtime.randomness import Keys, keyed_uniform
from mto_analysis.runtime.settings import Fraction, Positive, Rising, Settings, Within

_ADJUST = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)
_HUE = 3
_NUMBERS = 16  # random numbers per image, whatever is switched on, so that settings do not shift each other's


@dataclass(frozen=True)
class Photometric(Settings):
    """Random colour changes, in this order: jitter, grey, blur, solarization.

    Args:
        brightness: Factor sampled from 1 - this to 1 + this.
        contrast: Likewise, about the image's mean grey.
        saturation: Likewise, about each pixel's grey.
        hue: Turn sampled from -this to this, in turns of the colour circle (at most 0.5).
        jitter: Chance that these four are applied, in random order.
        grey: Chance of a grey image.
        blur: Chance of a Gaussian blur.
        blur_sigma: Its standard deviation in pixels, from and to.
        solarize: Chance that tones from the middle up are inverted.
    """

    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    hue: Annotated[float, Within("[0, 0.5]")] = 0.0
    jitter: Fraction = 1.0
    grey: Fraction = 0.0
    blur: Fraction = 0.0
    blur_sigma: Annotated[tuple[Positive, Positive], Rising(strict=False)] = (0.1, 2.0)
    solarize: Fraction = 0.0

    def apply(self, images: Tensor, keys: Keys, *, seed: int, epoch: int, purpose: str) -> Tensor:
        """Change each image by its own key; the input is left alone.

        Shapes:
            images: batch channels height width (0..255)
            keys: batch
            returns: batch channels height width (whole numbers 0..255)
        """
        numbers = keyed_uniform(keys, _NUMBERS, seed=seed, epoch=epoch, purpose=purpose)
        # One by one: torchvision has one strength per call. In eight bits, as PIL has them: sums of whole numbers are
        # exact, so the mean that `adjust_contrast` takes does not depend on the number of threads.
        pixels = images.round().to(torch.uint8)
        changed = [self._change(image, row) for image, row in zip(pixels, numbers.tolist(), strict=True)]
        return torch.stack(changed).to(images.dtype)

    def _change(self, image: Tensor, numbers: list[float]) -> Tensor:
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        if numbers[0] < self.jitter:
            for change in sorted(range(4), key=lambda change: numbers[1 + change]):
                spread = (2 * numbers[5 + change] - 1) * strengths[change]
                if strengths[change]:
                    image = _ADJUST[change](image, spread if change == _HUE else 1 + spread)
        if numbers[9] < self.grey:
            image = functional.rgb_to_grayscale(image, num_output_channels=3)
        if numbers[10] < self.blur:
            low, high = self.blur_sigma
            # Beyond the border torchvision reflects the image, which has to be larger than the kernel's radius.
            radius = min(min(image.shape[-2:]) - 1, int(3 * high + 0.5))
            image = functional.gaussian_blur(image, [2 * radius + 1] * 2, [low + (high - low) * numbers[11]] * 2)
        if numbers[12] < self.solarize:
            image = functional.solarize(image, 128)
        return image


CONMIM_TEACHER = Photometric(
    brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter=0.8, grey=0.2, blur=0.1, solarize=0.2
)
"""What ConMIM's teacher sees (TencentARC/ConMIM, ``datasets.py``); its student sees the plain crop."""
