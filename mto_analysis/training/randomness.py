"""What is random in a step: generators seeded by keys and restored afterwards, and noise in the place of images."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from mto_analysis.images import TrainBatch
from mto_analysis.masks import mask_keys
from mto_analysis.training.methods.recipe import Recipe


@contextlib.contextmanager
def step_randomness(seed: int, step: int, process: int, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded for one step of one process (drop path), and afterwards as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_number(seed, step, process, size=7))
        yield


@contextlib.contextmanager
def seeded_globally(*key: object) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generators seeded by the parts of a key, and afterwards as they were.

    Transforms of timm sample from the global generators.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    number = _number(*key, size=8)
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(number)
            np.random.seed(number % 2**32)  # noqa: NPY002
            torch.manual_seed(number % 2**63)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _number(*key: object, size: int) -> int:
    """A number of so many bytes that depends on every part of a key."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=size).digest()
    return int.from_bytes(digest, "big")


def noise_batch(recipe: Recipe, count: int, device: torch.device) -> TrainBatch:
    """Noise for images, with masks as the recipe samples them; to try things out."""
    side = recipe.image_size
    images = torch.randn(count, len(recipe.mean), side, side, generator=torch.Generator().manual_seed(0)).to(device)
    names = tuple(map(str, range(count)))
    grid = (side // recipe.patch_size,) * 2
    mask = recipe.mask_rule.sample(mask_keys(names), grid, recipe.patch_size).to(device)
    return TrainBatch(names, images, images if recipe.augmentation().second_view else None, mask)
