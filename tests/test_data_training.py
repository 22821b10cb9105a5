"""Training batches: the same pictures, pixels and masks however a run is laid out; broken and vanished pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mto_analysis import MaskRule, open_pictures
from mto_analysis.data import TrainBatch, TrainingData
from mto_analysis.data.augmentation import method_augmentation

RULE = MaskRule("random", 0.75, 4)


def write_noise(folder: Path, count: int, size: tuple[int, int] | None = None, kind: str = "png") -> Path:
    numbers = np.random.default_rng(3)
    for row in range(count):
        width, height = size or (20 + 3 * row, 40 - row)
        path = folder / f"class{row % 3}" / f"{row:02}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 256, (7, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures of 16 px: held in memory."""
    return write_noise(tmp_path_factory.mktemp("small"), 20, (16, 16))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures of many sizes: decoded by workers."""
    return write_noise(tmp_path_factory.mktemp("large"), 20, kind="jpg")


def make(source: Path, method: str = "mae", **options) -> TrainingData:
    return TrainingData(open_pictures(source), method_augmentation(method, 16), RULE, 4, **options)


def contents(batches: Iterator[TrainBatch]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Image, second image and mask of each picture."""
    found = {}
    for batch in batches:
        second = batch.images if batch.second_images is None else batch.second_images
        for row, name in enumerate(batch.names):
            found[name] = (batch.images[row], second[row], batch.mask[row])
    return found


def assert_same(first: dict[str, tuple[torch.Tensor, ...]], second: dict[str, tuple[torch.Tensor, ...]]) -> None:
    assert first.keys() == second.keys()
    for name, tensors in first.items():
        for one, other in zip(tensors, second[name], strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("source", ["small", "large"])
@pytest.mark.parametrize("method", ["mae", "simmim", "conmim", "cifar"])
def test_micro_batches__do_not_depend_on_batch_size_processes_or_accumulation(
    source: str, method: str, request: pytest.FixtureRequest
) -> None:
    data = make(request.getfixturevalue(source), method)
    assert data.prepare() == (source == "small")
    whole = contents(data.micro_batches(3, micro_batch=16))
    assert len(whole) == 16
    for micro_batch, accumulation, processes in [(1, 16, 1), (8, 1, 2), (4, 2, 2), (4, 1, 4), (2, 2, 4), (16, 1, 1)]:
        parts: dict[str, tuple[torch.Tensor, ...]] = {}
        for process in range(processes):
            batches = data.micro_batches(
                3, micro_batch=micro_batch, accumulation=accumulation, process=process, processes=processes
            )
            parts |= contents(batches)
        assert_same(whole, parts)
