"""The one interface behind which every family lives: stacks, tokens layer by layer, reconstruction, metadata."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from mto_analysis.masks import MaskRule, check_mask
from mto_analysis.runtime.pixels import IMAGENET_MEAN, IMAGENET_STD
from mto_analysis.taps.tokens import LayerTokens

#: Side of a square image in pixels, or its height and width.
ImageSize = int | tuple[int, int]

#: What is assumed of the head counts that a file does not state, as printed.
HEADS_ASSUMED = {
    "num_heads": "the encoder has as many heads as published models of its width",
    "decoder_num_heads": "the decoder has as many heads as published models of its width",
}


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Both sides of an image.

    Example:
        >>> height_and_width(224), height_and_width((64, 96))
        ((224, 224), (64, 96))
    """
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def as_image_size(height: int, width: int) -> ImageSize:
    """The side of a square, or both sides: the opposite of :func:`height_and_width`.

    Example:
        >>> as_image_size(224, 224), as_image_size(64, 96)
        (224, (64, 96))
    """
    return height if height == width else (height, width)


def check_heads(width: int, heads: int, name: str = "num_heads") -> None:
    """Refuse a number of attention heads that does not divide the width they share."""
    if heads < 1 or width % heads:
        raise ValueError(f"{name} must divide the width {width}, got {heads}")


@dataclass(frozen=True)
class ModelInfo:
    """What a user must know about a model to measure it.

    Args:
        family: Architecture, e.g. ``mae`` or ``simmim_vit``.
        style: Where masked tokens live: ``inpainting`` (encoder) or ``decoder``.
        image_size: Side of the input image in pixels, or height and width where they differ.
        patch_size: Side of an input patch in pixels.
        mask_rule: How the model was masked in pre-training.
        mean: Channel means of pixels scaled to 0..1.
        std: Channel standard deviations of pixels scaled to 0..1.
        target: What the model predicts: ``pixels``, ``normalized_pixels`` (each patch centred and scaled),
            ``normalized_channels`` (each channel of a patch by itself), ``locally_normalized_pixels`` (by the
            neighbourhood of each pixel), ``features``, or ``None`` where the file does not say.
        criterion: Error of the model's own loss: ``l1`` or ``l2``, or ``None`` where it predicts no pixels.
        layout: Whose file it was read from.
        caveat: What a reader of its curves must know, printed beside them.
        mask_rule_source: Where the mask rule comes from, as printed: the file, the published model, or a rule.
        channels: Of the input image.
        statistics_source: Where mean and standard deviation come from, as printed.
        assumptions: What neither the file nor its shapes settle, as printed.
        frames: Of a video; 1 for images.
        tubelet: Frames that a patch spans.
        unsettled_heads: Numbers of attention heads that the file does not state: ``num_heads``, ``decoder_num_heads``.
    """

    family: str
    style: Literal["inpainting", "decoder"]
    image_size: ImageSize
    patch_size: int
    mask_rule: MaskRule
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    target: (
        Literal["pixels", "normalized_pixels", "normalized_channels", "locally_normalized_pixels", "features"] | None
    ) = None
    criterion: Literal["l1", "l2"] | None = None
    layout: str = "mto_analysis"
    mask_rule_source: str = "given"
    caveat: str = ""
    channels: int = 3
    statistics_source: str = "published"
    assumptions: tuple[str, ...] = ()
    unsettled_heads: tuple[str, ...] = ()
    frames: int = 1
    tubelet: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        if self.style not in ("inpainting", "decoder"):
            raise ValueError(f"style must be inpainting or decoder, got {self.style!r}")
        height, width = height_and_width(self.image_size)
        object.__setattr__(self, "image_size", as_image_size(height, width))
        if self.patch_size < 1 or height % self.patch_size or width % self.patch_size:
            raise ValueError(f"a patch of {self.patch_size} px does not divide an image of {self.pixels}")
        if self.tubelet < 1 or self.frames < 1 or self.frames % self.tubelet:
            raise ValueError(f"a tubelet of {self.tubelet} frames does not divide a video of {self.frames}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image, or in a frame."""
        height, width = height_and_width(self.image_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def mask_grid(self) -> tuple[int, ...]:
        """Rows and columns of patches, with those in time in front for videos: the grid of a mask."""
        times = self.frames // self.tubelet
        return (times, *self.grid) if self.frames > 1 else self.grid

    @property
    def pixels(self) -> str:
        """The image size in words: ``224 px``, or ``64 x 96 px`` (height and width); of videos with their frames."""
        size = f"{self.image_size} px" if isinstance(self.image_size, int) else "{} x {} px".format(*self.image_size)
        return size if self.frames == 1 else f"{self.frames} frames of {size}"

    @property
    def num_patches(self) -> int:
        """Patches of an image or video; the number of columns of a mask."""
        return math.prod(self.mask_grid)

    @property
    def mask_ratio(self) -> float:
        """Native fraction of patches (units, for block masks) that are masked."""
        return self.mask_rule.ratio

    @property
    def mask_unit(self) -> int:
        """Native side in pixels of the square that is masked at once."""
        return self.mask_rule.unit


class MaskedImageModel(nn.Module, ABC):
    """A masked image model whose tokens can be watched layer by layer.

    A family sets :attr:`stacks`, takes its settings as a frozen dataclass ``config`` and its :class:`ModelInfo`, and
    implements :meth:`depth`, :meth:`_layer_tokens` and :meth:`_reconstruct`; one whose encoder is of use downstream
    also :meth:`encoder_blocks`, :meth:`_whole` and :meth:`final_norm`. Images are normalized float tensors
    ``batch channels height width``; masks are bool ``batch num_patches``, True = masked.
    """

    #: Names of the stacks of blocks that hold masked tokens: ``encoder``, ``decoder``, ``pixel_decoder`` ...
    stacks: ClassVar[tuple[str, ...]]

    #: Tokens that the encoder puts before those of patches: 1 for a class token.
    encoder_prefix_tokens: int = 1

    def __init__(self, config: Any, info: ModelInfo) -> None:
        super().__init__()
        self.config = config
        self.info = info

    def layer_tokens(self, images: Tensor, mask: Tensor, stack: str | None = None) -> Iterator[LayerTokens]:
        """Patch tokens of a stack, one layer depth at a time.

        Depth 0 is the input of the first block in which masked tokens exist, depth l the output of block l. Each depth
        is computed when it is asked for, and nothing is kept: measure it, then let it go.

        Shapes:
            images: batch channels height width
            mask: batch num_patches

        Args:
            images: Normalized images.
            mask: True where masked.
            stack: Which of :attr:`stacks`; ``None`` means the only one.

        Raises:
            ValueError: If shapes are off, the stack is unknown, or there are several and none was named.
        """
        chosen = self._choose(stack)
        self._check(images, mask)
        return self._layer_tokens(images, mask, chosen)

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """What the model predicts for every patch, laid out as an image, in the space of its target.

        Shapes:
            images: batch channels height width
            mask: batch num_patches
            returns: batch channels height width

        Raises:
            ValueError: If shapes are off, or the family predicts no pixels.
        """
        self._check(images, mask)
        return self._reconstruct(images, mask)

    def encode(self, images: Tensor, *, norm: bool = True, layer: int | None = None) -> Tensor:
        """Encoder tokens of whole images, without any mask: what downstream tasks use.

        Shapes:
            images: batch channels height width
            returns: batch num_tokens dim (:attr:`encoder_prefix_tokens` first, then patches, row-major)

        Args:
            images: Normalized images.
            norm: Apply the encoder's final norm; fine-tuning replaces it where it averages patches.
            layer: Output of which block, counted from 1; later blocks are not run. By default of the last one.

        Raises:
            ValueError: If shapes are off, the family has no encoder that sees whole images, or there is no such block.
        """
        depth = len(self.encoder_blocks())
        if layer is not None and not 1 <= layer <= depth:
            raise ValueError(f"layer must lie between 1 and {depth}, the number of blocks, got {layer}")
        x = next(islice(self.encoder_tokens(images), layer or depth, None))
        return self.final_norm()(x) if norm else x

    def encoder_tokens(self, images: Tensor) -> Iterator[Tensor]:
        """Encoder tokens of whole images at every layer depth, before the final norm; each depth runs when asked for.

        Shapes:
            images: batch channels height width
            yields: batch num_tokens dim, from the input of the first block on

        Raises:
            ValueError: As :meth:`encode`.
        """
        self._check_images(images)
        return self._whole(images)

    def encoder_blocks(self) -> Sequence[nn.Module]:
        """The encoder's blocks in order, for layer-wise learning rates and drop path.

        Raises:
            ValueError: If the family has no encoder that sees whole images.
        """
        raise ValueError(self._no_encoder)

    def _whole(self, images: Tensor) -> Iterator[Tensor]:
        """Encoder tokens of whole images at every layer depth, before the final norm."""
        raise ValueError(self._no_encoder)

    def final_norm(self) -> nn.Module:
        """The encoder's final norm.

        Raises:
            ValueError: If the family has no encoder that sees whole images.
        """
        raise ValueError(self._no_encoder)

    @property
    def _no_encoder(self) -> str:
        return f"a {self.info.family} model has no encoder here that sees whole images, so it cannot be evaluated"

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """The same as :meth:`reconstruct`."""
        return self.reconstruct(images, mask)

    def position_embedding(self, stack: str) -> Tensor | None:
        """What was added to the patch tokens of layer depth 0 for their place, where it can be taken off again.

        Shapes:
            returns: 1 num_patches dim, or ``None`` where positions act otherwise (relative biases) or not at all
        """
        return None

    def stack_blocks(self, stack: str) -> Sequence[nn.Module]:
        """The blocks of a stack in order, for watching their attention, or none.

        Their attention is over prefix tokens first, then patches.
        """
        return ()

    def suffix_tokens(self, stack: str) -> int:
        """Tokens of a stack behind those of patches."""
        return 0

    def order_is_known(self, stack: str) -> bool:
        """Whether the tokens of a stack are in the order of patches, so that they have places in the image."""
        return True

    def stacks_for(self, images: Tensor, mask: Tensor) -> Sequence[str]:
        """The stacks that hold masked tokens for these images and masks: all, but for models whose stacks are found."""
        return self.stacks

    @abstractmethod
    def depth(self, stack: str) -> int:
        """The last layer depth of a stack, its number of blocks."""

    @abstractmethod
    def _layer_tokens(self, images: Tensor, mask: Tensor, stack: str) -> Iterator[LayerTokens]: ...

    @abstractmethod
    def _reconstruct(self, images: Tensor, mask: Tensor) -> Tensor: ...

    def _choose(self, stack: str | None) -> str:
        names = ", ".join(self.stacks)
        if stack is None:
            if len(self.stacks) > 1:
                raise ValueError(f"the model has several stacks with masked tokens, name one: {names}")
            return self.stacks[0]
        if stack not in self.stacks:
            raise ValueError(f"stack must be one of {names}, got {stack!r}")
        return stack

    def _check_images(self, images: Tensor) -> None:
        channels = getattr(self.config, "channels", self.info.channels)
        height, width = height_and_width(self.info.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != (channels, height, width):
            raise ValueError(f"images must be [batch, {channels}, {height}, {width}], got {list(images.shape)}")

    def _check(self, images: Tensor, mask: Tensor) -> None:
        self._check_images(images)
        check_mask(mask, self.info.num_patches)
        if len(mask) != len(images):
            raise ValueError(f"images and mask must have the same batch, got {len(images)} and {len(mask)}")
