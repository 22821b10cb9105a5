"""What a mask is and how to sample one: random (MAE), in block units (SimMIM), blockwise (BEiT); mask files.

A mask is a bool tensor ``batch num_patches`` in row-major order, True = masked. Every mask is a function of its key
``(seed, epoch, image id, k)`` alone, sampled on the CPU, so it is the same on every device and for every batch size and
number of workers.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import random
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mto_analysis.errors import DataError, DataNotFoundError

__all__ = [
    "MaskKey",
    "MaskRule",
    "block_mask",
    "blockwise_mask",
    "check_mask",
    "load_masks",
    "mask_from_noise",
    "mask_keys",
    "masks_sha256",
    "masks_to_bytes",
    "random_mask",
    "save_masks",
    "topped_up_mask",
]


class MaskKey(NamedTuple):
    """All that a mask depends on; ``image`` is the image's relative path or row, ``k`` counts its masks."""

    seed: int
    epoch: int
    image: str
    k: int

    def generator(self) -> random.Random:
        """The key's own generator; Python guarantees that ``random()`` gives the same numbers in every version."""
        text = f"{self.seed}\x1f{self.epoch}\x1f{self.image}\x1f{self.k}"
        return random.Random(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big"))


def mask_keys(images: Iterable[str], *, k: int = 0, seed: int = 0, epoch: int = 0) -> list[MaskKey]:
    """One key per image.

    Example:
        >>> mask_keys(["cat.jpg"], k=1, seed=7)
        [MaskKey(seed=7, epoch=0, image='cat.jpg', k=1)]
    """
    return [MaskKey(seed, epoch, str(image), k) for image in images]


def check_mask(mask: Tensor, num_patches: int | None = None) -> None:
    """Check the one mask convention: bool, ``batch num_patches``, each row with a masked and a visible patch.

    Raises:
        ValueError: If the mask breaks a rule; the message names the row.
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"mask must be bool [batch, num_patches], got {mask.dtype} {list(mask.shape)}")
    if num_patches is not None and mask.shape[1] != num_patches:
        raise ValueError(f"mask must have {num_patches} patches, got {mask.shape[1]}")
    count = mask.sum(dim=1)
    for rule, bad in (("mask a patch", count == 0), ("leave a patch visible", count == mask.shape[1])):
        if bool(bad.any()):
            raise ValueError(f"mask must {rule} in every row, row {int(bad.nonzero()[0])} does not")


def _check_ratio(mask_ratio: float) -> None:
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio must lie between 0 and 1, got {mask_ratio}")


def mask_from_noise(noise: Tensor, num_visible: int) -> Tensor:
    """MAE's rule: the ``num_visible`` patches of smallest noise stay visible.

    Shapes:
        noise: batch num_patches
        returns: batch num_patches

    Source:
        He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022); facebookresearch/mae.

    Example:
        >>> mask_from_noise(torch.tensor([[0.3, 0.1, 0.9, 0.2]]), num_visible=1)
        tensor([[ True, False,  True,  True]])
    """
    first = noise.argsort(dim=1, stable=True)[:, :num_visible]
    return torch.ones(noise.shape, dtype=torch.bool, device=noise.device).scatter_(1, first, False)


def random_mask(keys: Sequence[MaskKey], num_patches: int, mask_ratio: float) -> Tensor:
    """MAE's random mask: ``int(num_patches * (1 - mask_ratio))`` patches stay visible.

    Shapes:
        returns: batch num_patches

    Raises:
        ValueError: If the ratio is outside (0, 1) or leaves nothing masked or nothing visible.

    Example:
        >>> random_mask(mask_keys(["a", "b"]), num_patches=196, mask_ratio=0.75).sum(dim=1)
        tensor([147, 147])
    """
    _check_ratio(mask_ratio)
    mask = mask_from_noise(_uniform(keys, num_patches), int(num_patches * (1 - mask_ratio)))
    check_mask(mask)
    return mask


def block_mask(keys: Sequence[MaskKey], grid: tuple[int, int], mask_ratio: float, unit: int) -> Tensor:
    """SimMIM's mask in square units: ``ceil(units * mask_ratio)`` units of ``unit`` x ``unit`` patches are masked.

    Shapes:
        returns: batch num_patches

    Args:
        keys: One key per row.
        grid: Rows and columns of the patch grid.
        mask_ratio: Fraction of units to mask.
        unit: Side of a unit in patches; must divide both sides of the grid.

    Source:
        Xie et al., "SimMIM" (CVPR 2022); microsoft/SimMIM.

    Example:
        >>> block_mask(mask_keys(["a"]), grid=(14, 14), mask_ratio=0.6, unit=2).sum(dim=1)  # 30 of 49 units
        tensor([120])
    """
    _check_ratio(mask_ratio)
    rows, columns = grid
    if unit < 1 or rows % unit or columns % unit:
        raise ValueError(f"a mask unit of {unit} patches does not divide the {rows} x {columns} grid")
    num_units = (rows // unit) * (columns // unit)
    # The units that MAE's rule leaves visible are the ones SimMIM masks: both take the first of a random order.
    units = ~mask_from_noise(_uniform(keys, num_units), math.ceil(num_units * mask_ratio))
    units = units.reshape(len(keys), rows // unit, columns // unit)
    mask = units.repeat_interleave(unit, dim=1).repeat_interleave(unit, dim=2).flatten(1)
    check_mask(mask)
    return mask


def blockwise_mask(
    keys: Sequence[MaskKey],
    grid: tuple[int, int],
    num_masked: int,
    *,
    min_block: int = 16,
    min_aspect: float = 0.3,
) -> Tensor:
    """BEiT's blockwise mask: rectangles are added until ``num_masked`` patches are masked, or ten tries in a row fail.

    It may stop short, so the count of masked patches differs between rows.

    Shapes:
        returns: batch num_patches

    Args:
        keys: One key per row.
        grid: Rows and columns of the patch grid.
        num_masked: Number of patches to mask at most.
        min_block: Smallest area of a rectangle, in patches.
        min_aspect: Smallest aspect ratio; the largest is its inverse.

    Source:
        Bao et al., "BEiT" (ICLR 2022); microsoft/unilm.

    Example:
        >>> int(blockwise_mask(mask_keys(["a"]), grid=(14, 14), num_masked=75).sum()) <= 75
        True
    """
    if not 0 < num_masked < grid[0] * grid[1]:
        raise ValueError(f"num_masked must lie between 0 and {grid[0] * grid[1]}, got {num_masked}")
    masks = [_blockwise(key.generator(), grid, num_masked, min_block, min_aspect) for key in keys]
    mask = torch.from_numpy(np.stack(masks)).flatten(1)
    check_mask(mask)
    return mask


def topped_up_mask(keys: Sequence[MaskKey], grid: tuple[int, int], num_masked: int) -> Tensor:
    """BootMAE's mask: blockwise rectangles over 120 of 196 patches, topped up at random to exactly ``num_masked``.

    Up to three patches of the rectangles then become visible in exchange for others, as the original rolls its order
    of patches (there by one number for a whole batch, here by one for each image).

    Shapes:
        returns: batch num_patches

    Args:
        keys: One key per row.
        grid: Rows and columns of the patch grid; on others than 14 x 14 the rectangles are in proportion.
        num_masked: Number of patches to mask.

    Source:
        Dong et al., "Bootstrapped Masked Autoencoders" (ECCV 2022); LightDXY/BootMAE, ``masking_generator.py``.

    Example:
        >>> topped_up_mask(mask_keys(["a", "b"]), grid=(14, 14), num_masked=147).sum(dim=1)
        tensor([147, 147])
    """
    num_patches = grid[0] * grid[1]
    if not 0 < num_masked < num_patches:
        raise ValueError(f"num_masked must lie between 0 and {num_patches}, got {num_masked}")
    blocked, least, most = (max(1, round(num_patches * each / 196)) for each in (120, 16, 60))
    mask = torch.ones(len(keys), num_patches, dtype=torch.bool)
    for row, key in zip(mask, keys, strict=True):
        generator = key.generator()
        # The original tries without end; here the order below fills up what a thousand tries in a row do not.
        block = _blockwise(generator, grid, min(blocked, num_patches - 1), least, 0.3, max_block=most, max_tries=1000)
        rank = np.array([generator.random() for _ in range(num_patches)]) + block.flatten()
        order = np.roll(np.argsort(rank, kind="stable"), generator.randint(0, 3))
        row[torch.from_numpy(order[: num_patches - num_masked])] = False
    check_mask(mask)
    return mask


def _blockwise(
    generator: random.Random,
    grid: tuple[int, int],
    num_masked: int,
    min_block: int,
    min_aspect: float,
    *,
    max_block: int | None = None,
    max_tries: int = 10,
) -> np.ndarray:
    rows, columns = grid
    mask = np.zeros(grid, dtype=bool)
    log_aspect = (math.log(min_aspect), -math.log(min_aspect))
    tries = 0
    while (remaining := num_masked - int(mask.sum())) > 0 and tries < max_tries:
        tries += 1
        remaining = min(remaining, max_block or remaining)
        area = generator.uniform(min_block, remaining)
        aspect = math.exp(generator.uniform(*log_aspect))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = generator.randint(0, rows - height), generator.randint(0, columns - width)
        block = mask[top : top + height, left : left + width]
        if 0 < block.size - int(block.sum()) <= remaining:
            block[:] = True
            tries = 0
    return mask


def _uniform(keys: Sequence[MaskKey], count: int) -> Tensor:
    """The first ``count`` values of each key's ``random()``, made by the thousand; training samples a mask per image.

    ``random()`` takes two 32-bit words of the generator and keeps 27 bits of the first and 26 of the second.
    ``getrandbits`` hands out the same words, the first in the lowest bits.

    Shapes:
        returns: batch count (float64)
    """
    bits = b"".join(key.generator().getrandbits(64 * count).to_bytes(8 * count, "little") for key in keys)
    words = np.frombuffer(bits, dtype="<u4").astype(np.float64).reshape(len(keys), count, 2)
    return torch.from_numpy((np.floor(words[..., 0] / 32) * 2.0**26 + np.floor(words[..., 1] / 64)) / 2.0**53)


@dataclass(frozen=True)
class MaskRule:
    """How a model's masks are sampled.

    Args:
        kind: ``random`` (MAE), ``block`` (SimMIM), ``blockwise`` (BEiT) or ``topped_up`` (BootMAE).
        ratio: Fraction of patches (units, for ``block``) to mask.
        unit: Side of the square that is masked at once, in pixels.
        min_block: Smallest rectangle of ``blockwise``, in patches.
    """

    kind: Literal["random", "block", "blockwise", "topped_up"]
    ratio: float
    unit: int
    min_block: int = 16

    def __post_init__(self) -> None:
        """Check the values."""
        if self.kind not in ("random", "block", "blockwise", "topped_up"):
            raise ValueError(f"kind must be random, block, blockwise or topped_up, got {self.kind!r}")
        _check_ratio(self.ratio)
        if self.unit < 1:
            raise ValueError(f"unit must be at least 1 pixel, got {self.unit}")

    def with_options(self, *, ratio: float | None = None, unit: int | None = None) -> MaskRule:
        """The same rule with another ratio or unit; another unit means square units (kind ``block``)."""
        kind = self.kind if unit is None or unit == self.unit else "block"
        return MaskRule(
            kind, self.ratio if ratio is None else ratio, self.unit if unit is None else unit, self.min_block
        )

    def sample(self, keys: Sequence[MaskKey], grid: Sequence[int], patch_size: int) -> Tensor:
        """Sample one mask per key on a grid of patches; on one of video all frames have the same (tubes, as VideoMAE).

        Args:
            keys: One key per row.
            grid: Rows and columns of patches, with those in time in front for videos.
            patch_size: Side of a patch in pixels.

        Shapes:
            returns: batch num_patches

        Raises:
            ValueError: If the unit is not a multiple of the patch or does not divide the grid.
        """
        *times, rows, columns = grid
        frame = self._sample(keys, (rows, columns), patch_size)
        return frame.repeat(1, math.prod(times))

    def _sample(self, keys: Sequence[MaskKey], grid: tuple[int, int], patch_size: int) -> Tensor:
        num_patches = grid[0] * grid[1]
        if self.kind == "random":
            return random_mask(keys, num_patches, self.ratio)
        if self.kind == "topped_up":
            return topped_up_mask(keys, grid, num_patches - int(num_patches * (1 - self.ratio)))
        if self.kind == "blockwise":
            # A rectangle of BEiT's 16 patches does not fit a grid of a few patches; there it shrinks in proportion.
            min_block = max(1, min(self.min_block, round(num_patches * self.min_block / 196)))
            return blockwise_mask(keys, grid, max(1, int(num_patches * self.ratio)), min_block=min_block)
        if self.unit % patch_size:
            raise ValueError(f"a mask unit of {self.unit} px is not a multiple of the patch of {patch_size} px")
        return block_mask(keys, grid, self.ratio, self.unit // patch_size)

    def __str__(self) -> str:
        """In words, as printed beside results."""
        what = {
            "random": "random patches",
            "block": "units",
            "blockwise": "blockwise rectangles, patches",
            "topped_up": "rectangles topped up at random, patches",
        }[self.kind]
        return f"{self.ratio:.4g} of {what} of {self.unit} px"


def masks_sha256(masks: Mapping[str, Sequence[Tensor]]) -> str:
    """SHA-256 of masks by image name, whatever their order: the same masks of the same images have the same.

    Hashed are, sorted by name, the name, a zero byte, the numbers of masks and patches, a line feed, and one byte per
    patch, 1 = masked.

    Args:
        masks: For each image its masks, each of ``num_patches``; as from :func:`load_masks`.

    Example:
        >>> masks_sha256({"cat.jpg": torch.tensor([[True, False]])})[:8]
        '72013455'
    """
    digest = hashlib.sha256()
    for name in sorted(masks):
        stacked = np.stack([mask.numpy() for mask in masks[name]]).astype(np.uint8)
        digest.update(os.fsencode(name) + b"\0" + "{} {}\n".format(*stacked.shape).encode() + stacked.tobytes())
    return digest.hexdigest()


def masks_to_bytes(masks: np.ndarray, names: Sequence[str]) -> bytes:
    """The bytes of a mask file: ``mask`` bool [images, masks, patches] and ``names`` [images].

    Raises:
        ValueError: If shape, type or the number of names is off.
    """
    if masks.dtype != bool or masks.ndim != 3 or len(names) != len(masks):
        raise ValueError(
            f"masks must be bool [images, masks, patches] with one name per image, "
            f"got {masks.dtype} {list(masks.shape)} and {len(names)} names"
        )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mask=masks, names=np.asarray(names, dtype=str))
    return buffer.getvalue()


def save_masks(path: str | Path, masks: np.ndarray, names: Sequence[str]) -> None:
    """Write a mask file, whole or not at all; another laboratory reads it with :func:`load_masks`."""
    from mto_analysis.runtime.outputs import write_atomically

    write_atomically(Path(path), masks_to_bytes(masks, names))


def load_masks(path: str | Path) -> Mapping[str, Tensor]:
    """Read a mask file: for each image name its masks.

    Shapes:
        returns: name -> masks num_patches

    Raises:
        DataNotFoundError: If there is no such file.
        DataError: If it is not a mask file or breaks the mask convention.
    """
    path = Path(path)
    if not path.is_file():
        raise DataNotFoundError(f"no mask file at {path}")
    try:
        # Opened here: numpy leaves the file open when the archive is broken.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            masks, names = file["mask"], file["names"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a mask file (an .npz with `mask` and `names`): {error}") from error
    if masks.ndim == 2:  # one mask per image, written without the middle axis
        masks = masks[:, None, :]
    if masks.dtype != bool or masks.ndim != 3 or names.shape != (len(masks),):
        raise DataError(
            f"{path}: `mask` must be bool [images, masks, patches] and `names` [images], "
            f"got {masks.dtype} {list(masks.shape)} and {list(names.shape)}"
        )
    if not len(names):
        raise DataError(f"{path} holds no masks")
    if len(set(names.tolist())) != len(names):
        raise DataError(f"{path}: `names` holds a name twice")
    tensor = torch.from_numpy(masks)
    try:
        check_mask(tensor.flatten(0, 1))
    except ValueError as error:
        raise DataError(f"{path}: {error} (counting {masks.shape[1]} masks per image)") from error
    return dict(zip((str(name) for name in names), tensor, strict=True))
