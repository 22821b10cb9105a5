"""How checkpoints are loaded: what their files leave open, and what is wanted in place of what they state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mto_analysis.checkpoints.reading import Weights
from mto_analysis.models.interface import ImageSize


@dataclass(frozen=True)
class LoadOptions:
    """The arguments of :func:`~mto_analysis.checkpoints.load_checkpoint`, on their way through a study.

    Args:
        num_heads: As there, or ``auto``: the number with the lowest loss on the images of a study.
        decoder_num_heads: The same for the decoder.
        mean: As there.
        std: As there.
        image_size: As there.
        mask_ratio: As there.
        weights: As there.
        offline: As there.
    """

    num_heads: int | Literal["auto"] | None = None
    decoder_num_heads: int | Literal["auto"] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: ImageSize | None = None
    mask_ratio: float | None = None
    weights: Weights = "model"
    offline: bool = False

    def keywords(self) -> dict[str, Any]:
        """As keyword arguments; head counts to be chosen by the loss are left out."""
        return {name: value for name, value in vars(self).items() if value != "auto"}
