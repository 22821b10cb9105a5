"""One encoded image to eight-bit RGB, with PIL or, for JPEG files on the way to training, torchvision."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["decode_image", "decode_pixels", "to_rgb"]

_JPEG_START = b"\xff\xd8\xff"


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits per colour. PIL alone would clip the upper 255/256 of a 16-bit image's tones to white."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        tones = np.asarray(image, dtype=np.float64) / 257
        image = Image.fromarray(tones.round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def decode_image(content: bytes) -> Image.Image:
    """Decode with PIL; raises whatever the decoder raises."""
    with Image.open(io.BytesIO(content)) as image:
        return to_rgb(image)


@functools.cache
def _fast_decoder() -> Callable[[Tensor], Tensor] | None:
    """Torchvision's JPEG decoder, or torchcodec's, to which it is moving (torchvision 0.29 warns of that); or None."""
    with contextlib.suppress(ImportError):
        from torchvision.io import ImageReadMode, decode_jpeg

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


def decode_pixels(content: bytes) -> Tensor:
    """Decode to pixels, JPEG files with torchvision's decoder (about twice as fast as PIL's), others with PIL.

    Pixels lie in memory as channels-last, which the resizing that follows is fastest on.

    Shapes:
        returns: channels height width (uint8)
    """
    if content[:3] == _JPEG_START and (decode := _fast_decoder()) is not None:
        with Image.open(io.BytesIO(content)) as image:  # reads the header alone, and refuses what claims gigapixels
            plain = image.mode in ("L", "RGB")  # CMYK needs PIL's rules
        if plain:
            return decode(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return torch.from_numpy(np.array(decode_image(content))).permute(2, 0, 1)
