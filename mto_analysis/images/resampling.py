"""Crop, resize, shift and flip of a batch as two matrix products per image, every value exact in float32.

A resize is linear in rows and in columns, so each image has a matrix for either. Weights are whole multiples of
2**-14 and pixels are whole numbers, so each sum of products fits float32's 24 bits: it is exact in whatever order it
is added, and an image does not depend on the batch it is in, on the device or on the number of threads.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Interpolation = Literal["bicubic", "bilinear"]

_UNIT = 2.0**14


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2, which PIL uses (torch's plain ``interpolate`` has -3/4)."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _bilinear(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_min_(0)


def _exact(weights: Tensor) -> Tensor:
    return (weights * _UNIT).round_().div_(_UNIT)


def crop_matrices(
    start: Tensor, length: Tensor, flip: Tensor | None, side: int, size: int, interpolation: Interpolation
) -> Tensor:
    """One matrix per image that cuts ``length`` pixels from ``start`` on and resizes them to ``size``, as PIL does.

    Where pixels are merged the kernel widens with them (antialiasing), and it stops at the borders of the crop.

    Shapes:
        start, length, flip: batch
        returns: batch size side
    """
    shape = (-1, 1, 1)
    start, length = start.to(torch.float32).view(shape), length.to(torch.float32).view(shape)
    scale = length / size
    spread = scale.clamp_min(1)
    target = torch.arange(size, dtype=torch.float32, device=start.device).add_(0.5).view(1, -1, 1)
    if flip is not None:
        target = torch.where(flip.view(shape), size - target, target)
    source = torch.arange(side, dtype=torch.float32, device=start.device).add_(0.5) - start  # of the crop's own pixels
    distance = ((source - target * scale) / spread).abs_()
    weights = _bicubic(distance) if interpolation == "bicubic" else _bilinear(distance)
    weights = weights * ((source > 0) & (source < length))
    return _exact(weights / weights.sum(dim=2, keepdim=True))


def shift_matrices(shift: Tensor, flip: Tensor | None, size: int) -> Tensor:
    """One matrix per image that shifts it by whole pixels; what enters at a border is its reflection.

    Shapes:
        shift, flip: batch
        returns: batch size size
    """
    target = torch.arange(size, device=shift.device).expand(len(shift), size)
    if flip is not None:
        target = torch.where(flip.view(-1, 1), size - 1 - target, target)
    source = (target + shift.view(-1, 1)).abs()
    source = (size - 1) - (size - 1 - source).abs()  # reflected without repeating the border pixel
    return (source.unsqueeze(2) == torch.arange(size, device=shift.device)).to(torch.float32)


def resample(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply a matrix to the columns and one to the rows of each image; bytes are whole numbers 0..255 after each.

    Shapes:
        pixels: batch height channels width (uint8 or float32, 0..255)
        rows: batch new_height height
        columns: batch new_width width
        returns: batch channels new_height new_width (float32; of bytes whole numbers)
    """
    batch, height, channels, width = pixels.shape
    whole = _same if pixels.is_floating_point() else _whole
    # A GPU may shorten the factors of a float32 product (TF32), which would break the exact sums; not so in float64.
    dtype = torch.float64 if pixels.device.type == "cuda" else torch.float32
    with torch.autocast(pixels.device.type, enabled=False):
        across = pixels.to(dtype).view(batch, height * channels, width) @ columns.to(dtype).transpose(1, 2)
        across = whole(across).view(batch, height, channels * columns.shape[1])
        down = whole(rows.to(dtype) @ across)
    down = down.view(batch, rows.shape[1], channels, columns.shape[1])
    return down.transpose(1, 2).to(torch.float32).contiguous()


def _same(values: Tensor) -> Tensor:
    return values


def _whole(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)
