"""Augmentation: keyed parameters, geometry as PIL and torchvision have it, colours as torchvision has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from mto_analysis.images import CONMIM_TEACHER, Augmentation, Photometric
from mto_analysis.images.augmentation import Geometry, method_augmentation
from mto_analysis.runtime.randomness import keyed_permutation, keyed_uniform, name_keys

KEYS = name_keys(f"{row}.png" for row in range(4000))


def numbers(count: int, **options) -> np.ndarray:
    return keyed_uniform(KEYS, count, **({"seed": 0, "epoch": 0, "purpose": "test"} | options))


def draw(augmentation: Augmentation, height: int, width: int, count: int = 4000, epoch: int = 0) -> Geometry:
    sizes = (np.full(count, side, dtype=np.int64) for side in (height, width))
    return augmentation.sample(KEYS[:count], *sizes, seed=0, epoch=epoch)


def smooth(height: int, width: int, count: int = 1) -> torch.Tensor:
    """Images, batch channels height width (uint8)."""
    pixels = np.random.default_rng(height).integers(0, 256, (count, 9, 7, 3), dtype=np.uint8)
    images = [Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC) for one in pixels]
    return torch.from_numpy(np.stack([np.asarray(one) for one in images])).permute(0, 3, 1, 2)


# Keyed numbers.


def test_keyed_uniform__gives_independent_even_numbers() -> None:
    values = numbers(6)
    assert values.min() >= 0
    assert values.max() < 1
    assert np.abs(values.mean(axis=0) - 0.5).max() < 0.025  # five standard errors
    assert np.abs(np.corrcoef(values.T) - np.eye(6)).max() < 0.08
    counts = np.histogram(values, bins=64, range=(0, 1))[0]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 120  # chi square of 63


def test_keyed_uniform__depends_on_every_part_of_the_key() -> None:
    first = numbers(3)
    for change in ({"seed": 1}, {"epoch": 1}, {"purpose": "other"}, {"seed": 2**70}):
        other = numbers(3, **change)
        assert not np.intersect1d(first, other).size
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.05


def test_keyed_uniform__does_not_depend_on_the_rows_beside_it() -> None:
    alone = keyed_uniform(KEYS[7:8], 3, seed=0, epoch=0, purpose="test")
    np.testing.assert_array_equal(alone[0], numbers(5)[7, :3])


def test_keyed_permutation__orders_names_and_not_rows() -> None:
    names = [f"{row}.png" for row in range(50)]
    order = [names[row] for row in keyed_permutation(name_keys(names), seed=1, epoch=2)]
    backwards = names[::-1]
    assert [backwards[row] for row in keyed_permutation(name_keys(backwards), seed=1, epoch=2)] == order
    assert order != names


# Geometry.


def test_draw__gives_crops_of_the_wanted_area_and_ratio() -> None:
    geometry = draw(Augmentation(224), 375, 500)
    assert (geometry.top >= 0).all()
    assert (geometry.left >= 0).all()
    assert (geometry.top + geometry.height <= 375).all()
    assert (geometry.left + geometry.width <= 500).all()
    area = geometry.height * geometry.width / (375 * 500)
    ratio = geometry.width / geometry.height
    assert area.min() > 0.19
    assert area.max() <= 1
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    assert abs(geometry.flip.mean() - 0.5) < 0.04


def test_draw__has_the_distribution_of_torchvision() -> None:
    from torchvision.transforms import RandomResizedCrop

    state = torch.get_rng_state()
    torch.manual_seed(0)
    theirs = np.array(
        [RandomResizedCrop.get_params(torch.zeros(3, 60, 100), [0.2, 1], [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    torch.set_rng_state(state)
    ours = np.stack(draw(Augmentation(32), 60, 100)[:4], axis=1)
    error = np.sqrt((theirs.var(axis=0) + ours.var(axis=0)) / 4000)
    assert (np.abs(theirs.mean(axis=0) - ours.mean(axis=0)) < 4.5 * error).all()
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.08)


@pytest.mark.parametrize("size", [(10, 100), (100, 10), (3, 1000)])
def test_draw__takes_the_centre_of_images_too_long_for_a_crop(size: tuple[int, int]) -> None:
    height, width = size
    geometry = draw(Augmentation(32, scale=(0.9, 1.0)), height, width, 10)
    crop_height, crop_width = (10, 13) if height == 10 else (13, 10) if width == 10 else (3, 4)
    assert set(geometry.height.tolist()) == {crop_height}
    assert set(geometry.width.tolist()) == {crop_width}
    assert set(geometry.top.tolist()) == {(height - crop_height) // 2}
    assert set(geometry.left.tolist()) == {(width - crop_width) // 2}


def test_draw__shifts_evenly_by_up_to_the_padding() -> None:
    geometry = draw(method_augmentation("cifar", 32), 32, 32)
    for shift in (geometry.top, geometry.left):
        values, counts = np.unique(shift, return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert counts.min() > 350


def test_draw__of_one_image_is_that_of_a_batch() -> None:
    augmentation = Augmentation(32)
    heights, widths = (np.random.default_rng(side).integers(1, 600, 500) for side in (0, 1))
    batch = augmentation.sample(KEYS[:500], heights, widths, seed=3, epoch=9)
    for row in range(500):
        one = augmentation.sample(KEYS[row : row + 1], heights[row : row + 1], widths[row : row + 1], seed=3, epoch=9)
        assert [values[0] for values in one] == [values[row] for values in batch]


# Pixels.


def pil_crop(image: torch.Tensor, geometry: Geometry, row: int, augmentation: Augmentation) -> np.ndarray:
    top, left, height, width = (int(values[row]) for values in geometry[:4])
    kernel = Image.Resampling[augmentation.interpolation.upper()]
    side = augmentation.image_size
    whole = Image.fromarray(image.permute(1, 2, 0).numpy())
    result = np.asarray(whole.crop((left, top, left + width, top + height)).resize((side, side), kernel))
    return result[:, ::-1] if geometry.flip[row] else result


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (20, 30), (48, 40)])
def test_apply__crops_and_resizes_as_pil(size: tuple[int, int], interpolation) -> None:
    augmentation = Augmentation(32, scale=(0.1, 1.0), interpolation=interpolation)
    images = smooth(*size, count=40)
    geometry = draw(augmentation, *size, 40)
    batch = augmentation.apply_to_batch(images.transpose(1, 2).contiguous(), geometry)
    assert batch.shape == (40, 3, 32, 32)
    for row in range(40):
        expected = pil_crop(images[row], geometry, row, augmentation).astype(int)
        one = augmentation.apply_to_image(images[row], Geometry(*(values[row : row + 1] for values in geometry)))
        error = np.abs(batch[row].permute(1, 2, 0).numpy() - expected)
        assert error.max() <= 2  # a level's difference after the columns can grow by the rows' kernel
        assert error.mean() < 0.25  # PIL's own weights are rounded
        assert np.abs(one.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2


def test_apply__shifts_with_reflected_borders() -> None:
    augmentation = method_augmentation("cifar", 8)
    images = smooth(8, 8, count=30)
    geometry = draw(augmentation, 8, 8, 30)
    batch = augmentation.apply_to_batch(images.transpose(1, 2).contiguous(), geometry)
    for row in range(30):
        padded = np.pad(images[row].numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
        top, left = 4 + geometry.top[row], 4 + geometry.left[row]
        expected = padded[:, top : top + 8, left : left + 8]
        expected = expected[:, :, ::-1] if geometry.flip[row] else expected
        np.testing.assert_array_equal(batch[row].numpy(), expected)
        one = augmentation.apply_to_image(images[row], Geometry(*(values[row : row + 1] for values in geometry)))
        np.testing.assert_array_equal(one.numpy(), expected)


def test_apply_to_image__makes_images_of_other_sizes_square_before_it_shifts_them() -> None:
    augmentation = Augmentation(8, padding=0, flip=0)
    (image,) = smooth(16, 24)
    one = augmentation.apply_to_image(image, draw(augmentation, 16, 24, 1))
    whole = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((12, 8), Image.Resampling.BICUBIC)
    assert np.abs(one.permute(1, 2, 0).numpy().astype(int) - np.asarray(whole)[:, 2:10].astype(int)).max() <= 1


def test_resample__is_exact_in_any_order() -> None:
    augmentation = Augmentation(64)
    images = torch.randint(0, 256, (50, 64, 3, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    geometry = draw(augmentation, 64, 64, 50)
    whole = augmentation.apply_to_batch(images, geometry)
    doubled = augmentation.apply_to_batch(images.repeat(3, 1, 1, 1), Geometry(*(np.tile(v, 3) for v in geometry)))
    assert torch.equal(whole.repeat(3, 1, 1, 1), doubled)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(whole, augmentation.apply_to_batch(images, geometry))
    finally:
        torch.set_num_threads(threads)


# Colours.


@pytest.mark.parametrize(
    ("name", "strength", "theirs"),
    [
        ("brightness", 0.4, lambda image, number: functional.adjust_brightness(image, 1 + number)),
        ("contrast", 0.4, lambda image, number: functional.adjust_contrast(image, 1 + number)),
        ("saturation", 0.2, lambda image, number: functional.adjust_saturation(image, 1 + number)),
        ("hue", 0.1, lambda image, number: functional.adjust_hue(image, number)),
    ],
)
def test_photometric__changes_colours_as_torchvision(name: str, strength: float, theirs) -> None:
    images = smooth(16, 16, count=20)
    changed = Photometric(**{name: strength}).apply(images.float(), KEYS[:20], seed=0, epoch=0, purpose="p")
    place = 5 + ["brightness", "contrast", "saturation", "hue"].index(name)
    spread = (2 * keyed_uniform(KEYS[:20], 16, seed=0, epoch=0, purpose="p")[:, place] - 1) * strength
    for row in range(20):
        assert torch.equal(changed[row], theirs(images[row], float(spread[row])).float()), row


def test_photometric__applies_each_change_as_often_as_asked() -> None:
    images = smooth(8, 8).float().expand(4000, -1, -1, -1)
    for name, chance in {"grey": 0.2, "solarize": 0.2, "blur": 0.1}.items():
        changed = Photometric(**{name: chance}).apply(images, KEYS, seed=0, epoch=0, purpose="p")
        moved = (changed - images).abs().amax(dim=(1, 2, 3)) > 0.01
        # A blur of a tenth of a pixel moves nothing.
        assert abs(moved.float().mean() - chance * (0.9 if name == "blur" else 1)) < 0.03, name
    jittered = Photometric(brightness=0.4, jitter=0.8).apply(images, KEYS, seed=0, epoch=0, purpose="p")
    moved = (jittered - images).abs().amax(dim=(1, 2, 3)) > 0.01
    assert abs(moved.float().mean() - 0.8) < 0.03


def test_photometric__makes_grey_and_inverts_bright_tones() -> None:
    images = smooth(8, 8, count=3).float()
    grey = Photometric(grey=1).apply(images, KEYS[:3], seed=0, epoch=0, purpose="p")
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert torch.equal(grey[:, 0], functional.rgb_to_grayscale(images.to(torch.uint8))[:, 0].float())
    inverted = Photometric(solarize=1).apply(images, KEYS[:3], seed=0, epoch=0, purpose="p")
    expected = torch.where(images < 128, images, 255 - images)
    assert (inverted - expected).abs().max() < 1e-3


def test_photometric__blurs_as_a_gaussian() -> None:
    images = torch.zeros(1, 3, 33, 33)
    images[:, :, 16, 16] = 255
    images[:, :, :, :8] = 200
    blurred = Photometric(blur=1, blur_sigma=(1.5, 1.5)).apply(images, KEYS[:1], seed=0, epoch=0, purpose="p")
    expected = functional.gaussian_blur(
        torch.nn.functional.pad(images, (9, 9, 9, 9), "replicate"), [11, 11], [1.5, 1.5]
    )
    assert (blurred - expected[:, :, 9:-9, 9:-9]).abs().max() < 1.5


def test_photometric__does_not_depend_on_the_batch_and_leaves_its_input_alone() -> None:
    images = smooth(12, 12, count=64).float()
    before = images.clone()
    whole = CONMIM_TEACHER.apply(images, KEYS[:64], seed=0, epoch=0, purpose="p")
    assert torch.equal(images, before)
    assert whole.min() >= 0
    assert whole.max() <= 255
    for start, stop in [(0, 1), (5, 8), (11, 64)]:
        part = CONMIM_TEACHER.apply(images[start:stop], KEYS[start:stop], seed=0, epoch=0, purpose="p")
        assert torch.equal(part, whole[start:stop])


def test_photometric__does_not_depend_on_the_number_of_threads() -> None:
    images = smooth(224, 224, count=8).float()  # large enough that torch shares a mean among threads
    strong = Photometric(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(strong.apply(images, KEYS[:8], seed=0, epoch=0, purpose="p"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_photometric__depends_on_seed_epoch_and_purpose() -> None:
    images = smooth(12, 12, count=4).float()
    first = {"seed": 0, "epoch": 0, "purpose": "p"}
    whole = CONMIM_TEACHER.apply(images, KEYS[:4], **first)
    assert torch.equal(whole, CONMIM_TEACHER.apply(images, KEYS[:4], **first))
    for other in ({"seed": 1}, {"epoch": 1}, {"purpose": "q"}):
        assert not torch.equal(whole, CONMIM_TEACHER.apply(images, KEYS[:4], **first | other)), other


def test_finish__gives_the_second_view_the_same_geometry() -> None:
    augmentation = Augmentation(16, second_view=Photometric(solarize=1), mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))
    pixels = smooth(16, 16, count=4)
    images, second = augmentation.finish(pixels, KEYS[:4], seed=0, epoch=0)
    std = torch.tensor([0.5, 0.25, 1.0]).view(3, 1, 1)
    assert torch.allclose(images * std + 0.5, pixels / 255, atol=1e-6)
    assert second is not None
    assert torch.allclose(second * std + 0.5, torch.where(pixels < 128, pixels, 255 - pixels) / 255, atol=1e-6)


def test_finish__changes_the_first_view_if_asked() -> None:
    pixels = smooth(16, 16, count=4)
    images, second = Augmentation(16, color_jitter=Photometric(grey=1)).finish(pixels, KEYS[:4], seed=0, epoch=0)
    assert second is None
    grey = images * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(
        3, 1, 1
    )
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-5)


# Settings.


def test_method_augmentation__has_the_originals_values() -> None:
    assert method_augmentation("mae", 224) == Augmentation(224, (0.2, 1.0))
    half = (0.5, 0.5, 0.5)
    assert method_augmentation("bootmae", 224) == Augmentation(224, (0.2, 1.0), mean=half, std=half)
    simmim, conmim, cifar = (method_augmentation(name, 32) for name in ("simmim", "conmim", "cifar"))
    assert (simmim.scale, simmim.interpolation) == ((0.67, 1.0), "bilinear")
    assert (conmim.scale, conmim.second_view, conmim.color_jitter) == ((0.08, 1.0), CONMIM_TEACHER, None)
    assert cifar.padding == 4
    with pytest.raises(ValueError, match="method must be one of mae, bootmae, simmim, conmim, cifar, got 'dino'"):
        method_augmentation("dino", 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"scale": (0.0, 1.0)}, r"scale must lie in \(0, 1\], got 0.0"),
        ({"scale": (0.8, 0.2)}, r"scale must not fall, got \(0.8, 0.2\)"),
        ({"ratio": (2.0, 1.0)}, "ratio must not fall"),
        ({"flip": 1.5}, r"flip must lie in \[0, 1\]"),
        ({"interpolation": "nearest"}, "interpolation must be one of bicubic, bilinear, got 'nearest'"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be above 0, got 0.0"),
        ({"std": (1.0, 1.0)}, "std must have as many values as mean"),
        ({"mean": (0.5,), "std": (0.5,), "second_view": CONMIM_TEACHER}, "3 channels, not 1"),
        ({"padding": 16}, "padding must lie between"),
    ],
)
def test_augmentation__refuses_values_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**({"image_size": 16} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"brightness": 1.5}, r"brightness must lie in \[0, 1\]"),
        ({"hue": 0.6}, r"hue must lie in \[0, 0.5\]"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma must be above 0, got 0.0"),
    ],
)
def test_photometric__refuses_values_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Photometric(**options)
