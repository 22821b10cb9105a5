"""Training batches: the same images, pixels and masks however a run is laid out; broken and vanished images."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mto_analysis import DataError, MaskRule, mask_keys, open_images
from mto_analysis.images import (
    Augmentation,
    BrokenImage,
    Images,
    TrainBatch,
    TrainingData,
    choose_images,
    steps_in_epoch,
)
from mto_analysis.images.augmentation import method_augmentation

RULE = MaskRule("random", 0.75, 4)
METHODS = ["mae", "simmim", "conmim", "cifar"]


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
    """Twenty images of 16 px: held in memory."""
    return write_noise(tmp_path_factory.mktemp("small"), 20, (16, 16))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of many sizes: decoded by workers."""
    return write_noise(tmp_path_factory.mktemp("large"), 20, kind="jpg")


@pytest.fixture(params=["small", "large"])
def source(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def make(source: Path, method: str = "mae", **options) -> TrainingData:
    return TrainingData(open_images(source), method_augmentation(method, 16), RULE, 4, **options)


def contents(batches: Iterable[TrainBatch]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Image, second image and mask of each image."""
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


# What a batch depends on.


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches__do_not_depend_on_batch_size_processes_or_accumulation(source: Path, method: str) -> None:
    data = make(source, method)
    assert data.prepare() == ("small" in source.name)
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


def test_micro_batches__give_every_optimizer_step_the_same_images(source: Path) -> None:
    data = make(source)
    order = [open_images(source).names[row] for row in data.order(1)]
    for micro_batch, accumulation, processes in [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]:
        steps: list[list[str]] = [[] for _ in range(5)]
        for process in range(processes):
            batches = data.micro_batches(
                1, micro_batch=micro_batch, accumulation=accumulation, process=process, processes=processes
            )
            for number, batch in enumerate(batches):
                assert len(batch.names) == micro_batch
                steps[number // accumulation] += batch.names
        assert [sorted(step) for step in steps] == [sorted(order[4 * step : 4 * step + 4]) for step in range(5)]


def test_micro_batches__share_images_out_as_documented(small: Path) -> None:
    data = make(small)
    order = [open_images(small).names[row] for row in data.order(0)]
    batches = list(data.micro_batches(0, micro_batch=3, accumulation=1, process=1, processes=2))
    assert [batch.names for batch in batches] == [tuple(order[start : start + 3]) for start in (3, 9, 15)]


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches__do_not_depend_on_workers(large: Path, method: str) -> None:
    alone, helped = make(large, method), make(large, method, num_workers=2)
    for epoch in (0, 4):  # the same workers serve the second epoch
        assert_same(
            contents(alone.micro_batches(epoch, micro_batch=4)), contents(helped.micro_batches(epoch, micro_batch=4))
        )


def test_micro_batches__start_anew_after_an_epoch_was_left_half_way(large: Path) -> None:
    data = make(large, num_workers=2)
    next(data.micro_batches(0, micro_batch=2))
    assert_same(contents(data.micro_batches(1, micro_batch=4)), contents(make(large).micro_batches(1, micro_batch=4)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_micro_batches__skip_steps_without_reading_them(source: Path, num_workers: int) -> None:
    data = make(source, num_workers=num_workers)
    whole = list(data.micro_batches(2, micro_batch=2, accumulation=2))
    rest = list(data.micro_batches(2, micro_batch=2, accumulation=2, skip_steps=3))
    assert [batch.names for batch in rest] == [batch.names for batch in whole[6:]]
    assert_same(contents(rest), contents(whole[6:]))
    assert list(data.micro_batches(2, micro_batch=2, accumulation=2, skip_steps=5)) == []


def test_micro_batches__read_only_what_is_not_skipped(large: Path) -> None:
    images = open_images(large)
    read: list[int] = []

    class Watched(Images):
        names = images.names

        def read(self, index: int) -> bytes:
            read.append(index)
            return images.read(index)

    data = TrainingData(Watched(), Augmentation(16), RULE, 4, in_memory=False)
    list(data.micro_batches(0, micro_batch=4, skip_steps=4, process=0, processes=1))
    assert read == data.order(0)[16:].tolist()


def test_micro_batches__do_not_depend_on_the_other_images(source: Path) -> None:
    images = open_images(source)
    some = choose_images(images, images.names[5:11])
    whole = contents(make(source, "conmim").micro_batches(0, micro_batch=1))
    data = TrainingData(some, method_augmentation("conmim", 16), RULE, 4)
    assert data.prepare() == ("small" in source.name)
    few = contents(data.micro_batches(0, micro_batch=6))
    assert_same({name: whole[name] for name in few}, few)


@pytest.mark.parametrize("change", ["seed", "epoch"])
def test_micro_batches__change_with_seed_and_epoch(source: Path, change: str) -> None:
    first = contents(make(source).micro_batches(0, micro_batch=1))
    other = contents(make(source, seed=int(change == "seed")).micro_batches(int(change == "epoch"), micro_batch=1))
    assert list(first) != list(other)
    assert first.keys() == other.keys()
    for place in (0, 2):  # image and mask
        differ = [not torch.equal(first[name][place], other[name][place]) for name in first]
        assert np.mean(differ) > 0.8


def test_micro_batches__hold_every_image_once_and_drop_the_incomplete_batch(small: Path) -> None:
    data = make(small)
    assert len(data) == 20
    assert steps_in_epoch(len(data), 3) == 6
    names = [name for batch in data.micro_batches(0, micro_batch=3) for name in batch.names]
    assert len(set(names)) == len(names) == 18


def test_order__visits_places_evenly(small: Path) -> None:
    data = make(small)
    orders = np.stack([data.order(epoch) for epoch in range(400)])
    assert (np.sort(orders, axis=1) == np.arange(20)).all()
    assert abs(orders.mean(axis=0) - 9.5).max() < 1.5  # five standard errors
    assert len({tuple(order) for order in orders.tolist()}) == 400


@pytest.mark.parametrize("rule", [RULE, MaskRule("block", 0.6, 8), MaskRule("blockwise", 0.4, 4)])
def test_micro_batches__draw_the_masks_of_their_keys(source: Path, rule: MaskRule) -> None:
    data = TrainingData(open_images(source), Augmentation(16), rule, 4, seed=7)
    for batch in data.micro_batches(5, micro_batch=6):
        assert torch.equal(batch.mask, rule.sample(mask_keys(batch.names, seed=7, epoch=5), (4, 4), 4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_micro_batches__leave_global_random_numbers_alone(source: Path, num_workers: int) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    list(make(source, "conmim", num_workers=num_workers).micro_batches(0, micro_batch=5))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_micro_batches__are_not_changed_by_autocast(small: Path) -> None:
    plain = contents(make(small).micro_batches(0, micro_batch=4))
    with torch.autocast("cpu", torch.bfloat16):
        cast = contents(make(small).micro_batches(0, micro_batch=4))
    assert_same(plain, cast)


# Memory and workers give the same images.


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches__are_the_same_from_memory_and_from_workers(small: Path, method: str) -> None:
    held = contents(make(small, method, in_memory=True).micro_batches(0, micro_batch=4))
    worked = contents(make(small, method, in_memory=False).micro_batches(0, micro_batch=4))
    assert held.keys() == worked.keys()
    for name in held:
        # The two round a resize differently: one level of 255, over the standard deviation.
        assert (held[name][0] - worked[name][0]).abs().max() < 2.01 / 255 / 0.224
        assert torch.equal(held[name][2], worked[name][2])


def test_prepare__reports_progress(small: Path) -> None:
    seen: list[tuple[int, int]] = []
    data = make(small, on_progress=lambda done, total: seen.append((done, total)))
    assert data.prepare()
    assert data.prepare()
    assert seen == [(20, 20)]


def test_prepare__goes_to_workers_for_images_of_many_sizes(tmp_path: Path) -> None:
    write_noise(tmp_path, 6, (16, 16))
    Image.new("RGB", (12, 16)).save(tmp_path / "class0" / "other.png")
    assert not make(tmp_path).prepare()
    assert len(contents(make(tmp_path).micro_batches(0, micro_batch=7))) == 7
    with pytest.raises(DataError, match=r"class0/other\.png is not of the size of the others"):
        make(tmp_path, in_memory=True).prepare()


def test_prepare__holds_larger_images_of_one_size_if_asked(tmp_path: Path) -> None:
    write_noise(tmp_path, 6, (40, 24))
    assert not make(tmp_path).prepare()
    data = make(tmp_path, in_memory=True)
    assert data.prepare()
    (batch,) = data.micro_batches(0, micro_batch=6)
    assert batch.images.shape == (6, 3, 16, 16)


# Images that cannot be used.


@pytest.fixture(params=["small", "large"])
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_noise(tmp_path, 20, (16, 16) if request.param == "small" else None, "jpg")
    (tmp_path / "class0" / "03.jpg").write_bytes(b"not an image")
    path = tmp_path / "class1" / "07.jpg"
    path.write_bytes(path.read_bytes()[:300])
    (tmp_path / "class2" / "11.jpg").write_bytes(b"")
    return tmp_path


BROKEN = ["class0/03.jpg", "class1/07.jpg", "class2/11.jpg"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_micro_batches__replace_broken_images_by_others(broken: Path, num_workers: int) -> None:
    found: list[BrokenImage] = []
    data = make(broken, on_broken=found.append, num_workers=num_workers)
    for epoch in (0, 1):
        batches = list(data.micro_batches(epoch, micro_batch=4))
        names = [name for batch in batches for name in batch.names]
        assert len(names) == 20  # batches keep their size
        assert not set(BROKEN) & set(names)
        for batch in batches:
            assert torch.equal(batch.mask, RULE.sample(mask_keys(batch.names, epoch=epoch), (4, 4), 4))
    assert sorted(image.name for image in found) == sorted(data.broken) == BROKEN  # each once
    assert all("\n" not in reason and reason for reason in data.broken.values())


def test_micro_batches__replace_broken_images_the_same_way_everywhere(broken: Path) -> None:
    def names(**options) -> Iterator[tuple[str, ...]]:
        return (batch.names for batch in make(broken, **options).micro_batches(2, micro_batch=2))

    # None is memory for the small ones.
    orders = [list(names()), list(names(in_memory=False)), list(names(in_memory=False, num_workers=2))]
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_micro_batches__stop_at_a_broken_image_if_strict(broken: Path, num_workers: int) -> None:
    with pytest.raises(DataError, match=r"^image class\d/\d\d\.jpg cannot be decoded \(\w+: .*\)$") as error:
        list(make(broken, strict=True, num_workers=num_workers).micro_batches(0, micro_batch=20))
    assert any(name in str(error.value) for name in BROKEN)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_micro_batches__name_a_file_that_is_gone(tmp_path: Path, num_workers: int) -> None:
    write_noise(tmp_path, 8, kind="jpg")
    data = make(tmp_path, num_workers=num_workers)
    list(data.micro_batches(0, micro_batch=4))
    (tmp_path / "class1" / "04.jpg").unlink()
    with pytest.raises(DataError, match=r"^image class1/04\.jpg cannot be read .* restore it, then resume$"):
        list(data.micro_batches(1, micro_batch=4))


@pytest.mark.parametrize("in_memory", [True, False])
def test_micro_batches__say_that_nothing_can_be_decoded(tmp_path: Path, in_memory: bool) -> None:
    for row in range(4):
        (tmp_path / f"{row}.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"can(not)? be decoded"):
        list(make(tmp_path, in_memory=in_memory).micro_batches(0, micro_batch=2))


def test_micro_batches__say_that_there_are_too_few_images(small: Path) -> None:
    data = make(small)
    with pytest.raises(DataError, match="20 images do not fill one batch of 24; choose a smaller one"):
        data.micro_batches(0, micro_batch=6, accumulation=2, processes=2)
    with pytest.raises(DataError, match="do not fill one batch of 21"):
        steps_in_epoch(len(data), 21)


@pytest.mark.parametrize(
    "options",
    [{"micro_batch": 0}, {"accumulation": 0}, {"process": 1}, {"process": -1}, {"processes": 0}, {"skip_steps": -1}],
)
def test_micro_batches__refuse_numbers_that_make_no_sense(small: Path, options: dict) -> None:
    with pytest.raises(ValueError, match="micro_batch, accumulation and processes must be at least 1"):
        make(small).micro_batches(0, **({"micro_batch": 2} | options))


def test_training_data__refuses_settings_that_do_not_fit(small: Path) -> None:
    images = open_images(small)
    with pytest.raises(ValueError, match="patch_size must divide image_size 16, got 5"):
        TrainingData(images, Augmentation(16), RULE, 5)
    with pytest.raises(ValueError, match="a mask unit of 3 patches does not divide the 4 x 4 grid"):
        TrainingData(images, Augmentation(16), MaskRule("block", 0.5, 12), 4)
    with pytest.raises(ValueError, match="num_workers must be at least 0"):
        TrainingData(images, Augmentation(16), RULE, 4, num_workers=-1)


class _Deadly:
    """Images of which one ends the process that reads it."""

    labels, class_names = None, ()

    def __init__(self, source: Path) -> None:
        self._images = open_images(source)
        self.names = self._images.names

    def read(self, index: int) -> bytes:
        if index == 3:
            os._exit(9)
        return self._images.read(index)

    def open(self, index: int) -> Image.Image:
        return self._images.open(index)


def test_micro_batches__of_kept_workers_are_taken_in_part_and_one_after_the_other(large: Path) -> None:
    data, plain = (TrainingData(open_images(large), Augmentation(16), RULE, 4, num_workers=n) for n in (1, 0))
    first = data.micro_batches(0, micro_batch=4)
    next(first)
    with pytest.raises(RuntimeError, match="carrying out other plans"):
        next(data.micro_batches(1, micro_batch=4))
    first.close()  # as training does after so many steps
    for epoch in (1, 2):
        one, two = (list(each.micro_batches(epoch, micro_batch=4)) for each in (data, plain))
        assert len(one) == len(two)
        assert all(torch.equal(a.images, b.images) for a, b in zip(one, two, strict=True))


# torch's loader may hear of the same end once more while it is taken down.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_micro_batches__say_that_a_worker_process_ended(large: Path) -> None:
    data = TrainingData(_Deadly(large), Augmentation(16), RULE, 4, num_workers=1)
    with pytest.raises(DataError, match=r"^a process that decodes images ended \(.*use fewer workers$"):
        list(data.micro_batches(0, micro_batch=4))
