"""What is random in a step: torch's generators by seed, step and process, and noise that stands for images."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from mto_analysis.images import TrainBatch
from mto_analysis.masks import mask_keys

if TYPE_CHECKING:
    from mto_analysis.training.recipes import Recipe

__all__ = ["noise_batch", "step_randomness"]


@contextlib.contextmanager
def step_randomness(seed: int, step: int, process: int, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded for one step of one process (drop path), and afterwards as they were."""
    text = f"{seed}\x1f{step}\x1f{process}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(key)
        yield


def noise_batch(recipe: Recipe, count: int, device: torch.device) -> TrainBatch:
    """Noise for images, with masks as the recipe draws them; to try things out."""
    side = recipe.image_size
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    names = tuple(map(str, range(count)))
    grid = (side // recipe.patch_size,) * 2
    mask = recipe.mask_rule.draw(mask_keys(names), grid, recipe.patch_size).to(device)
    return TrainBatch(names, images, images if recipe.second_view else None, mask)
