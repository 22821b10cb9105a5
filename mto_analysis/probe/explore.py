"""Dot products of every pair of tokens, for a few images at every layer depth, packed for the report's explorer.

X X^T is symmetric, and every kind of affinity map, H and the quadrants follow from it: half of it is kept, in 24 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mto_analysis.affinity import TokenSplit, affinity_matrix, heterogeneity, quadrant_mass, row_entropy
from mto_analysis.errors import NumericalError
from mto_analysis.probe.engine import undisturbed
from mto_analysis.probe.reconstruction import in_colour, to_pixels
from mto_analysis.probe.shown import ShownModel

#: Larger token grids (the first stages of a Swin) are left out: a map of 576 patches takes half a megabyte.
MAX_PATCHES = 400

_LEVELS = 2**24 - 1


@dataclass(frozen=True)
class PackedProducts:
    """A symmetric matrix as the 24-bit levels of its lower triangle, row by row: ``low + step * level``.

    No value is off by more than half a ``step``. Raw dot products reach thousands, where 16 bits would be off by
    hundredths of a nat; 24 bits are as exact as the float32 products themselves.
    """

    size: int
    low: float
    step: float
    levels: bytes

    @classmethod
    def pack(cls, products: np.ndarray) -> PackedProducts:
        """Quantize a matrix; only its lower triangle is looked at.

        Example:
            >>> packed = PackedProducts.pack(np.array([[1.0, 2.0], [2.0, 5.0]]))
            >>> packed.unpack().round(6).tolist(), len(packed.levels)
            ([[1.0, 2.0], [2.0, 5.0]], 9)
        """
        values = products[np.tril_indices(len(products))].astype(np.float64)
        low, high = float(values.min()), float(values.max())
        step = (high - low) / _LEVELS or 1.0
        levels = np.rint((values - low) / step).astype("<u4")
        return cls(len(products), low, step, levels.view(np.uint8).reshape(-1, 4)[:, :3].tobytes())

    def unpack(self) -> np.ndarray:
        """The matrix, as the explorer reads it.

        Shapes:
            returns: size size
        """
        three = np.frombuffer(self.levels, dtype=np.uint8).reshape(-1, 3)
        levels = np.zeros((len(three), 4), dtype=np.uint8)
        levels[:, :3] = three
        rows, columns = np.tril_indices(self.size)
        matrix = np.empty((self.size, self.size))
        matrix[rows, columns] = matrix[columns, rows] = self.low + self.step * levels.view("<u4").ravel()
        return matrix


@dataclass(frozen=True)
class ExploredDepth:
    """One image at one layer depth.

    Shapes:
        mask: num_patches
    """

    layer_depth: int
    mask: np.ndarray
    products: PackedProducts  #: patches in row-major order
    heterogeneity: float  #: as the library measures it, from the tokens
    quadrant_mass: tuple[float, ...]  #: quadrants 1 to 4

    @property
    def stored_heterogeneity(self) -> float:
        """H again, from the packed products."""
        logits = self.products.unpack()[self.mask][:, ~self.mask]
        return float(row_entropy(torch.from_numpy(logits)).mean())


@dataclass(frozen=True)
class ExploredImage:
    """One image at every layer depth whose token grid is not too large.

    Shapes:
        pixels: height width channels (uint8)
    """

    image: str
    pixels: np.ndarray
    depths: tuple[ExploredDepth, ...]


@dataclass(frozen=True)
class Explored:
    """The chosen images in one stack of one model."""

    model: str
    stack: str
    family: str
    num_depths: int  #: the last layer depth of the stack
    aspect: float  #: columns over rows of the grid of patches
    in_order: bool  #: whether patches are at their places; else the grid shows tokens in their own order, on no image
    left_out: tuple[int, ...]  #: layer depths with more than :data:`MAX_PATCHES` patches
    images: tuple[ExploredImage, ...]

    @property
    def product_error(self) -> float:
        """Largest error of a stored dot product, half of the largest step."""
        return max((depth.products.step / 2 for depth in self._depths()), default=0.0)

    @property
    def heterogeneity_error(self) -> float:
        """Largest difference between H from the stored products and H as the library measures it, in nats."""
        return max((abs(depth.stored_heterogeneity - depth.heterogeneity) for depth in self._depths()), default=0.0)

    def _depths(self) -> Iterator[ExploredDepth]:
        return (depth for image in self.images for depth in image.depths)


def explore_shown(shown: ShownModel) -> list[Explored]:
    """Run the chosen images through each stack of a model and keep the dot products of their tokens."""
    model, info = shown.model, shown.model.info
    colours = in_colour(to_pixels(shown.images, info)).clamp(0, 1)
    pixels = (colours * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
    times = info.frames // info.tubelet
    pixels = pixels.repeat(1, times, 1, 1)  # of a video, the frames below each other
    aspect = info.grid[1] / (times * info.grid[0])
    explored = []
    for stack in model.stacks:
        depths: list[list[ExploredDepth]] = [[] for _ in shown.names]
        left_out = []
        with undisturbed(model):
            for layer in model.layer_tokens(shown.images, shown.mask, stack):
                if layer.mask.shape[1] > MAX_PATCHES:
                    left_out.append(layer.depth)
                    continue
                split = TokenSplit(layer.mask)
                products = affinity_matrix(layer.tokens, kind="dot").cpu().numpy()
                if not np.isfinite(products).all():
                    raise NumericalError(f"a dot product is not finite in stack {stack} at layer depth {layer.depth}")
                measured = heterogeneity(layer.tokens, split).tolist()
                masses = quadrant_mass(layer.tokens, split).tolist()
                masks = layer.mask.cpu().numpy()
                for row, image in enumerate(depths):
                    packed = PackedProducts.pack(products[row])
                    image.append(ExploredDepth(layer.depth, masks[row], packed, measured[row], tuple(masses[row])))
        in_order = model.order_is_known(stack)
        background = (pixels if in_order else torch.full_like(pixels, 127)).numpy()
        images = tuple(ExploredImage(name, background[row], tuple(depths[row])) for row, name in enumerate(shown.names))
        explored.append(
            Explored(shown.label, stack, info.family, model.depth(stack), aspect, in_order, tuple(left_out), images)
        )
    return explored
