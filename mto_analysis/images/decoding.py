"""One encoded image to pixels: with PIL, torchvision (JPEG files for training), numpy or tifffile.

Images of eight bits keep them. Values of any other image mean nothing until their range is known: the format states it
(PNG, PGM), or the user does; it is never taken from the values.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from mto_analysis.errors import DataError

#: The values of black and of white.
ValueRange = tuple[float, float]

_JPEG_START = b"\xff\xd8\xff"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_NPY_START = b"\x93NUMPY"
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BYTES: ValueRange = (0, 255)
_WORDS: ValueRange = (0, 65535)

# Tags of a TIFF file.
_BITS, _CHANNELS = 258, 277

#: PIL spreads the values of these formats over 16 bits, as the files say how many they use.
_STATING_FORMATS = ("PNG", "PPM", "JPEG2000")
# What PIL logs about files that it refuses is said in our words; without a handler it would go to stderr.
logging.getLogger("PIL.TiffImagePlugin").addHandler(logging.NullHandler())

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's


class _Samples(NamedTuple):
    """An image that is not one of PIL's eight-bit ones.

    Shapes:
        values: channels height width, or, as a NumPy file says of no axis what it is, any
    """

    values: np.ndarray
    range: ValueRange | None  #: as the format states it
    words: str
    layout_known: bool = True


def decode_image(content: bytes, value_range: ValueRange | None = None) -> Image.Image:
    """Decode to eight-bit RGB; raises whatever the decoder raises."""
    found = decode_samples(content, 3, value_range)
    if isinstance(found, Image.Image):
        return found
    return Image.fromarray((found.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def decode_samples(content: bytes, channels: int, value_range: ValueRange | None = None) -> Image.Image | Tensor:
    """Decode for a model: eight-bit images of one or three channels as such, all others as numbers.

    Grey images are repeated for a model of three channels, colour ones turned grey for a model of one.

    Shapes:
        returns: channels height width (float32, 0 is black and 1 is white; values may lie outside)

    Args:
        content: The encoded file.
        channels: Of the model.
        value_range: Values of black and white, in place of those that the format states; not of eight-bit images.
    """
    samples = _opened(content)
    if isinstance(samples, Image.Image):
        image = samples
        if channels in (1, 3):
            return image.convert("RGB" if channels == 3 else "L")
        values = np.asarray(image.convert(image.palette.mode) if image.palette else image)
        samples = _Samples(values[None] if values.ndim == 2 else values.transpose(2, 0, 1), _BYTES, "8 bits")
    values = _of_channels(_channels_first(samples, channels), channels)
    return torch.from_numpy(_scaled(values, samples, value_range)).contiguous()


def range_in_words(content: bytes, value_range: ValueRange | None) -> str:
    """Which values are black and white in an image that is not of eight bits, or nothing."""
    found = _opened(content)
    stated, what = (None, "8 bits") if isinstance(found, Image.Image) else (found.range, found.words)
    known = value_range or stated
    if known is None:
        return ""
    return (
        f"{what}, black at {known[0]:g}, white at {known[1]:g} ({'as given' if value_range else 'as the format says'})"
    )


def _opened(content: bytes) -> _Samples | Image.Image:
    """The values of an image, or PIL's image, not yet decoded, where that has eight bits."""
    if content.startswith(_NPY_START):
        array = np.load(io.BytesIO(content), allow_pickle=False)
        if array.dtype.kind not in "buif" or not array.size:
            raise ValueError(f"a NumPy array of {array.dtype} and shape {list(array.shape)} is no image")
        known = {np.dtype(np.uint8): _BYTES, np.dtype(bool): (0.0, 1.0)}.get(array.dtype)
        return _Samples(array, known, f"a NumPy array of {array.dtype}", layout_known=False)
    if content.startswith(_PNG_START) and content[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06"):
        # PIL would cut the channels down to eight bits.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            array = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8)).numpy()
        return _Samples(array[: len(array) - (len(array) in (2, 4))], _WORDS, "PNG of 16 bits")  # without alpha
    if content.startswith(_TIFF_STARTS):
        return _tiff(content)
    image = Image.open(io.BytesIO(content))
    if not image.mode.startswith(("I", "F")):
        return image
    stated = _WORDS if image.format in _STATING_FORMATS and image.mode != "F" else None
    return _Samples(np.asarray(image)[None], stated, f"{image.format} of mode {image.mode}")


def _tiff(content: bytes) -> _Samples | Image.Image:
    """PIL reads TIFF files of one deep channel, and cuts several ones down to eight bits each, if it reads them."""
    with contextlib.suppress(UnidentifiedImageError):
        image = Image.open(io.BytesIO(content))
        tags = image.tag_v2  # type: ignore[attr-defined]
        pages = getattr(image, "n_frames", 1)  # the channels of one image, or several images
        if pages == 1 and max(tags.get(_BITS, (1,))) <= 8 and not image.mode.startswith(("I", "F")):
            return image
        if pages == 1 and tags.get(_CHANNELS, 1) == 1:
            return _Samples(np.asarray(image)[None], None, f"TIFF of {np.asarray(image).dtype}")
    try:
        import tifffile
    except ImportError:
        raise DataError("needs the package tifffile; pip install 'mto-analysis[tiff]'") from None
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        array, axes = file.series[0].asarray(), file.series[0].axes
    if array.ndim not in (2, 3) or not {"Y", "X"} <= set(axes):
        raise ValueError(f"a TIFF with axes {axes} is no single image")
    # Bands of a deep image may be pages; pages of eight bits are scans, and times and depths are no channels.
    if array.ndim == 3 and not {"S", "C"} & set(axes) and (array.dtype.itemsize == 1 or {"T", "Z"} & set(axes)):
        raise ValueError(f"a TIFF with axes {axes} is several images")
    array = np.moveaxis(array, (axes.index("Y"), axes.index("X")), (-2, -1))
    known = _BYTES if array.dtype == np.uint8 else None
    return _Samples(array if array.ndim == 3 else array[None], known, f"TIFF of {array.dtype}")


def _channels_first(samples: _Samples, channels: int) -> np.ndarray:
    """The values ``channels height width``; of a NumPy array the axis that has as many entries as the model."""
    values = samples.values
    if samples.layout_known or values.ndim == 2:
        return values if values.ndim == 3 else values[None]
    if values.ndim != 3:
        raise DataError(f"has the shape {list(values.shape)}; an image has height, width and maybe channels")
    fitting = [axis for axis in (0, 2) if values.shape[axis] == channels]
    fitting = fitting or [axis for axis in (0, 2) if values.shape[axis] in (1, 3)]
    if len(fitting) != 1:
        why = "either" if fitting else "neither"
        raise DataError(f"has the shape {list(values.shape)}: {why} the first or the last axis are {channels} channels")
    return values if fitting == [0] else values.transpose(2, 0, 1)


def _of_channels(values: np.ndarray, channels: int) -> np.ndarray:
    have = len(values)
    if have == channels:
        return values
    if (have, channels) == (1, 3):
        return values.repeat(3, axis=0)
    if (have, channels) == (3, 1):
        return np.tensordot(np.asarray(_LUMA), values.astype(np.float64), axes=1)[None]
    raise DataError(f"has {have} channel{'s' * (have != 1)}, the model {channels}; give images of as many")


def _scaled(values: np.ndarray, samples: _Samples, stated: ValueRange | None) -> np.ndarray:
    """From black at 0 to white at 1, as float32."""
    known = stated or samples.range
    if known is None:
        raise DataError(
            f"is {samples.words} with values from {values.min():g} to {values.max():g}; state what is black and white "
            "with --value-range LOW HIGH (value_range of open_images)"
        )
    numbers = values.astype(np.float64)
    low, high = (float(each) for each in known)
    least, most = float(numbers.min()), float(numbers.max())
    if not np.isfinite([least, most]).all():
        raise ValueError("it holds values that are not finite")
    if stated is None and known == _WORDS and 0 < most < 4096:
        raise DataError(
            f"is {samples.words} but uses only values to {most:g}, so it would be black; state what is white "
            f"with --value-range 0 {most:g} or another range (value_range of open_images)"
        )
    if least < low - (high - low) or most > high + (high - low):
        raise DataError(f"has values from {least:g} to {most:g}, far outside of the stated range {low:g} to {high:g}")
    return ((numbers - low) / (high - low)).astype(np.float32)


@functools.cache
def _fast_decoder() -> Callable[[Tensor], Tensor] | None:
    """Torchvision's JPEG decoder, or torchcodec's, to which it is moving (torchvision 0.29 warns of that); or None."""
    with contextlib.suppress(ImportError):

        def decode(encoded: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                pixels: Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB)
                return pixels

        return decode
    with contextlib.suppress(ImportError):
        from torchcodec.decoders import decode_jpeg as decode_with_codec

        return lambda encoded: decode_with_codec(encoded, mode="RGB")
    return None


def decode_pixels(content: bytes, channels: int = 3, value_range: ValueRange | None = None) -> Tensor:
    """Decode for training, JPEG files with torchvision's decoder (about twice as fast as PIL's).

    Pixels of eight bits lie in memory as channels-last, which the resizing that follows is fastest on.

    Shapes:
        returns: channels height width (uint8; of images that are not in eight bits float32, 0 is black, 255 white)
    """
    fast = content[:3] == _JPEG_START and value_range is None and channels == 3
    if fast and (decode := _fast_decoder()) is not None:
        with Image.open(io.BytesIO(content)) as image:  # reads the header alone, and refuses what claims gigapixels
            plain = image.mode in ("L", "RGB")  # CMYK needs PIL's rules
        if plain:
            return decode(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    found = decode_samples(content, channels, value_range)
    if isinstance(found, Tensor):
        return found * 255
    return torch.from_numpy(np.atleast_3d(np.array(found))).permute(2, 0, 1)
