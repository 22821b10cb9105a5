"""Images to batches for measuring: preprocessed as the model expects, in the order of names, without chance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import create_transform  # type: ignore[attr-defined]
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from mto_analysis.errors import DataError
from mto_analysis.images.interface import Images, reason_of, spread_rows, unreadable
from mto_analysis.images.loading import Loader
from mto_analysis.models import ModelInfo
from mto_analysis.models.interface import height_and_width


class ImageBatch(NamedTuple):
    """Preprocessed images with their names.

    Shapes:
        images: batch channels height width
    """

    names: tuple[str, ...]
    images: Tensor


class BrokenImage(NamedTuple):
    """An image that could not be decoded, and why."""

    name: str
    reason: str


def preprocessing(info: ModelInfo) -> Callable[[Image.Image | Tensor], Tensor]:
    """What a model expects: resized to cover its input (bicubic), centre crop, channels normalized.

    Eight-bit images are resized in eight bits, by PIL; others, of any number of channels, as they are.

    Shapes:
        returns: image, or channels height width -> channels height width (of the model)
    """
    size = height_and_width(info.image_size)
    transform: Callable[[Image.Image], Tensor] = create_transform(
        size, is_training=False, interpolation="bicubic", mean=info.mean, std=info.std, crop_pct=1.0
    )
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (info.mean, info.std))
    return lambda image: (_cover(image, size) - mean) / std if isinstance(image, Tensor) else transform(image)


def _cover(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize so that an image covers a size, then cut out its centre.

    Shapes:
        pixels: channels height width
    """
    scale = max(side / own for side, own in zip(size, pixels.shape[1:], strict=True))
    covering = [max(side, int(own * scale)) for side, own in zip(size, pixels.shape[1:], strict=True)]
    if covering != list(pixels.shape[1:]):
        resized = interpolate(pixels[None], covering, mode="bicubic", antialias=True, align_corners=False)
        pixels = resized[0]
    top, left = ((own - side) // 2 for own, side in zip(covering, size, strict=True))
    return pixels[:, top : top + size[0], left : left + size[1]]


_Item = tuple[str, Tensor | str | DataError]


class _Prepared(Dataset[_Item]):
    """Images after preprocessing; a broken one gives its reason instead of a tensor, and an error is handed over."""

    def __init__(self, images: Images, rows: Sequence[int], info: ModelInfo) -> None:
        self._images, self._rows, self._channels = images, rows, info.channels
        self._transform = preprocessing(info)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> _Item:
        row = self._rows[item]
        name = self._images.names[row]
        try:
            return name, self._transform(self._images.samples(row, self._channels))
        except DataError as error:  # would come out of a worker with its whole traceback
            return name, error
        except Exception as error:  # decoders fail in many ways, and one bad file must not end a run
            return name, reason_of(error)


def image_batches(
    images: Images,
    info: ModelInfo,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    num_workers: int = 0,
    on_broken: Callable[[BrokenImage], None] | None = None,
) -> Iterator[ImageBatch]:
    """Preprocessed batches, in the order of names; broken images are reported and left out.

    Args:
        images: From :func:`open_images`.
        info: Of the model that will see them.
        batch_size: Images in a batch.
        limit: Use so many images, spread evenly over the names, so that a folder sorted by class is not cut off.
        num_workers: Processes that decode; results do not depend on it.
        on_broken: Called for each image that cannot be decoded; by default that is an error.

    Raises:
        ValueError: If a number is not positive.
        DataError: If an image is broken and ``on_broken`` is not given, has not the channels of the model, or values
            whose range nobody states.
    """
    if batch_size < 1 or (limit is not None and limit < 1) or num_workers < 0:
        raise ValueError(
            f"batch_size and limit must be at least 1, num_workers at least 0, got {batch_size=}, {limit=}"
        )
    rows = spread_rows(len(images.names), limit)
    loader = Loader(_Prepared(images, rows, info), batch_size=batch_size, num_workers=num_workers, collate=_one_tensor)
    for names, pixels, failures in loader:
        for name, failure in failures:
            if isinstance(failure, DataError):
                raise failure
            if on_broken is None:
                raise unreadable(name, failure)
            on_broken(BrokenImage(name, failure))
        if names:
            yield ImageBatch(names, pixels)


def _one_tensor(items: Sequence[tuple[str, Tensor | DataError | str]]) -> tuple[tuple[str, ...], Any, list[Any]]:
    """Names and pixels of the good images, and the others; each tensor would come through a file of its own."""
    good = [(name, content) for name, content in items if isinstance(content, Tensor)]
    failures = [(name, content) for name, content in items if not isinstance(content, Tensor)]
    return tuple(name for name, _ in good), torch.stack([each for _, each in good]) if good else None, failures
