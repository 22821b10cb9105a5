"""Masks: the published rules, golden values, dependence on the key alone, and mask files."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from mto_analysis import DataError, MaskRule, block_mask, blockwise_mask, load_masks, mask_keys, random_mask, save_masks
from mto_analysis.masks import MaskKey, _blockwise, check_mask, mask_from_noise, topped_up_mask

IMAGES = [f"folder/{number}.jpg" for number in range(40)]


def visible_of(mask: torch.Tensor) -> list[int]:
    return (~mask).nonzero().flatten().tolist()


# The published rules.


@pytest.mark.parametrize(
    ("seed", "begin", "end"),
    [
        (2, [7, 9, 17, 20, 27, 28, 30, 31, 41, 61], [176, 180, 184, 185, 191]),
        (0, [2, 3, 12, 13, 18, 27, 28, 32], [168, 174, 179, 188, 192, 194]),
    ],
)
def test_mask_from_noise__gives_the_original_mae_masks(seed: int, begin: list[int], end: list[int]) -> None:
    # facebookresearch/mae, models_mae.py, random_masking: torch.rand after torch.manual_seed(seed), 196 patches.
    noise = torch.rand(1, 196, generator=torch.Generator().manual_seed(seed))
    visible = visible_of(mask_from_noise(noise, 49)[0])
    assert len(visible) == 49
    assert visible[: len(begin)] == begin
    assert visible[-len(end) :] == end


def test_mask_from_noise__gives_the_masks_of_the_golden_files(golden_of) -> None:
    for name in ("mae", "hf_vitmae"):
        golden = golden_of(name)
        with np.load(golden.source.parent / "inputs.npz") as file:
            noise = torch.from_numpy(file["noise"])
        assert torch.equal(mask_from_noise(noise, 16), golden.mask)


def test_blockwise__gives_the_original_beit_mask() -> None:
    # microsoft/unilm, beit/masking_generator.py after random.seed(0): 75 of 14 x 14, rows 3 to 13.
    mask = _blockwise(random.Random(0), (14, 14), 75, 16, 0.3)
    assert mask.sum() == 75
    rows = np.flatnonzero(mask.any(axis=1))
    assert (rows.min(), rows.max()) == (3, 13)


def test_block_mask_reference__gives_the_original_simmim_mask() -> None:
    # microsoft/SimMIM, data/data_simmim.py after numpy.random.seed(0): masked units of 7 x 7.
    order = np.random.RandomState(0).permutation(49).tolist()
    mask = np.array(reference.block_mask(order, (14, 14), 0.6, 2)).reshape(14, 14)
    units = [2, 4, 5, 7, 8, 10, 11, 13, 15, 16, 17, 18, 20, 22, *range(25, 35), 37, 40, 41, 42, 46, 48]
    assert np.flatnonzero(mask[::2, ::2]).tolist() == units


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75, 0.88])
@pytest.mark.parametrize("num_patches", [9, 64, 196])
def test_random_mask__is_the_reference_rule_on_the_keys_own_numbers(num_patches: int, ratio: float) -> None:
    keys = mask_keys(IMAGES[:3], k=2, seed=5, epoch=1)
    mask = random_mask(keys, num_patches, ratio)
    for row, key in zip(mask, keys, strict=True):
        numbers = key.generator()
        assert row.tolist() == reference.random_mask([numbers.random() for _ in range(num_patches)], ratio)


@pytest.mark.parametrize(("grid", "unit"), [((14, 14), 2), ((8, 8), 1), ((6, 9), 3), ((12, 8), 4)])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_block_mask__is_the_reference_rule_on_the_keys_own_order(
    grid: tuple[int, int], unit: int, ratio: float
) -> None:
    keys = mask_keys(IMAGES[:3])
    mask = block_mask(keys, grid, ratio, unit)
    for row, key in zip(mask, keys, strict=True):
        numbers = key.generator()
        noise = [numbers.random() for _ in range(grid[0] * grid[1] // unit**2)]
        order = sorted(range(len(noise)), key=noise.__getitem__)
        assert row.tolist() == reference.block_mask(order, grid, ratio, unit)


@pytest.mark.parametrize(
    ("grid", "num_masked", "min_block"), [((14, 14), 75, 16), ((14, 14), 120, 16), ((8, 8), 24, 5)]
)
def test_blockwise_mask__is_the_reference_rule_on_the_keys_own_numbers(
    grid: tuple[int, int], num_masked: int, min_block: int
) -> None:
    keys = mask_keys(IMAGES)
    mask = blockwise_mask(keys, grid, num_masked, min_block=min_block)
    for row, key in zip(mask, keys, strict=True):
        assert row.tolist() == reference.blockwise_mask(key.generator(), grid, num_masked, min_block)


def test_blockwise_mask__may_stop_short_but_never_goes_over() -> None:
    counts = blockwise_mask(mask_keys(map(str, range(300))), (14, 14), 75).sum(dim=1)
    assert counts.max() == 75
    assert 60 < counts.min() < 75  # ragged: some stop short
    assert (counts == 75).float().mean() == pytest.approx(0.69, abs=0.12)  # share in the original, by simulation


@pytest.mark.parametrize(
    ("rule", "grid", "patch_size", "num_masked"),
    [
        (MaskRule("random", 0.75, 16), (14, 14), 16, 147),  # MAE ViT-B, L
        (MaskRule("random", 0.75, 14), (16, 16), 14, 192),  # MAE ViT-H
        (MaskRule("block", 0.6, 32), (14, 14), 16, 120),  # SimMIM ViT
        (MaskRule("block", 0.6, 32), (48, 48), 4, 1408),  # SimMIM Swin, 192 px
        (MaskRule("block", 0.75, 32), (14, 14), 16, 148),  # ConMIM
    ],
)
def test_mask_rule_draw__masks_the_published_number_of_patches(
    rule: MaskRule, grid: tuple[int, int], patch_size: int, num_masked: int
) -> None:
    mask = rule.sample(mask_keys(IMAGES[:4]), grid, patch_size)
    assert mask.dtype == torch.bool
    assert mask.shape == (4, grid[0] * grid[1])
    assert mask.sum(dim=1).tolist() == [num_masked] * 4


def test_block_mask__masks_whole_square_units() -> None:
    mask = block_mask(mask_keys(IMAGES[:5]), (8, 12), 0.5, 4).reshape(5, 8, 12)
    units = mask[:, ::4, ::4]
    assert torch.equal(units.repeat_interleave(4, 1).repeat_interleave(4, 2), mask)
    assert units.sum(dim=(1, 2)).tolist() == [3] * 5


# A mask depends on its key, the whole key, and nothing else.


@pytest.mark.parametrize(
    "rule",
    [MaskRule("random", 0.75, 4), MaskRule("block", 0.6, 8), MaskRule("blockwise", 0.4, 4)],
    ids=lambda r: r.kind,
)
class TestKeys:
    def test_draw__does_not_depend_on_the_batch_or_the_order(self, rule: MaskRule) -> None:
        whole = rule.sample(mask_keys(IMAGES), (8, 8), 4)
        alone = torch.cat([rule.sample(mask_keys([image]), (8, 8), 4) for image in IMAGES])
        backwards = rule.sample(mask_keys(IMAGES[::-1]), (8, 8), 4).flip(0)
        assert torch.equal(whole, alone)
        assert torch.equal(whole, backwards)

    def test_draw__differs_with_each_part_of_the_key(self, rule: MaskRule) -> None:
        keys = [MaskKey(0, 0, "a", 0), MaskKey(1, 0, "a", 0), MaskKey(0, 1, "a", 0), MaskKey(0, 0, "b", 0)]
        keys += [MaskKey(0, 0, "a", 1), MaskKey(1, 1, "a", 1), MaskKey(11, 0, "a", 0), MaskKey(1, 10, "a", 0)]
        masks = rule.sample(keys, (8, 8), 4)
        assert len({tuple(mask.tolist()) for mask in masks}) == len(keys)

    def test_draw__leaves_global_random_numbers_alone(self, rule: MaskRule) -> None:
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        first = rule.sample(mask_keys(IMAGES[:2]), (8, 8), 4)
        assert random.getstate() == before[0]
        assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), before[2])
        random.seed(1)
        torch.manual_seed(1)
        assert torch.equal(first, rule.sample(mask_keys(IMAGES[:2]), (8, 8), 4))


PINNED = {
    "random": [
        [5, 7, 16, 23, 31, 33, 34, 35, 36, 39, 41, 49, 53, 54, 55, 63],
        [0, 4, 8, 11, 12, 13, 14, 20, 21, 27, 36, 41, 42, 45, 54, 60],
    ],
    "block": [
        [2, 3, 4, 5, 10, 11, 12, 13, 36, 37, 38, 39, 44, 45, 46, 47],
        [2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 18, 19, 22, 23],
    ],
}


def test_random_mask__never_changes_for_a_key() -> None:
    # Two laboratories, two versions, the same masks: these are promises. (Values of this project, not of the paper.)
    keys = [MaskKey(0, 0, "n01440764/cat.jpg", 0), MaskKey(7, 3, "12", 2)]
    assert [visible_of(mask) for mask in random_mask(keys, 64, 0.75)] == PINNED["random"]
    assert [visible_of(mask)[:16] for mask in block_mask(keys, (8, 8), 0.6, 2)] == PINNED["block"]


def test_random_mask__masks_every_patch_equally_often() -> None:
    share = random_mask(mask_keys(map(str, range(2000))), 16, 0.75).float().mean(dim=0)
    assert torch.allclose(share, torch.full((16,), 0.75), atol=0.04)  # 4 standard errors


@given(
    num_patches=st.integers(4, 80),
    ratio=st.floats(0.3, 0.7),
    seed=st.integers(-(2**40), 2**40),
    image=st.text(max_size=20),
)
def test_random_mask__partitions_the_patches_for_any_key(num_patches: int, ratio: float, seed: int, image: str) -> None:
    mask = random_mask(mask_keys([image, image + "2"], seed=seed), num_patches, ratio)
    assert (~mask).sum(dim=1).tolist() == [int(num_patches * (1 - ratio))] * 2


# Rules broken.


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_masks__refuse_ratios_outside_0_and_1(ratio: float) -> None:
    for draw in (
        lambda: random_mask(mask_keys("a"), 16, ratio),
        lambda: block_mask(mask_keys("a"), (4, 4), ratio, 2),
        lambda: MaskRule("random", ratio, 4),
    ):
        with pytest.raises(ValueError, match="mask_ratio must lie between 0 and 1"):
            draw()


def test_random_mask__refuses_a_ratio_that_leaves_nothing_visible() -> None:
    with pytest.raises(ValueError, match="mask must leave a patch visible in every row, row 0 does not"):
        random_mask(mask_keys("a"), 4, 0.9)


@pytest.mark.parametrize("unit", [0, 3, 8])
def test_block_mask__refuses_a_unit_that_does_not_divide_the_grid(unit: int) -> None:
    with pytest.raises(ValueError, match=f"a mask unit of {unit} patches does not divide the 4 x 4 grid"):
        block_mask(mask_keys("a"), (4, 4), 0.5, unit)


@pytest.mark.parametrize("num_masked", [0, 16])
def test_blockwise_mask__refuses_counts_that_leave_one_kind_out(num_masked: int) -> None:
    with pytest.raises(ValueError, match="num_masked must lie between 0 and 16"):
        blockwise_mask(mask_keys("a"), (4, 4), num_masked)


def test_mask_rule_draw__refuses_units_between_patches() -> None:
    with pytest.raises(ValueError, match="a mask unit of 10 px is not a multiple of the patch of 4 px"):
        MaskRule("block", 0.5, 10).sample(mask_keys("a"), (4, 4), 4)


def test_mask_rule__refuses_unknown_kinds_and_units() -> None:
    with pytest.raises(ValueError, match="kind must be random, block, blockwise or topped_up, got 'grid'"):
        MaskRule("grid", 0.5, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unit must be at least 1 pixel, got 0"):
        MaskRule("block", 0.5, 0)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 4), r"mask must be bool \[batch, num_patches\], got torch.float32 \[2, 4\]"),
        (torch.ones(4, dtype=torch.bool), "mask must be bool"),
        (torch.tensor([[True, False], [False, False]]), "mask must mask a patch in every row, row 1 does not"),
        (torch.tensor([[True, False], [True, True]]), "mask must leave a patch visible in every row, row 1 does not"),
        (torch.tensor([[True, False]]), "mask must have 3 patches, got 2"),
    ],
)
def test_check_mask__names_the_rule_that_is_broken(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mask(mask, 3 if mask.shape == (1, 2) else None)


# The rule and its options.


def test_with_options__keeps_what_is_not_given() -> None:
    rule = MaskRule("random", 0.75, 4)
    assert rule.with_options() == rule
    assert rule.with_options(ratio=0.5) == MaskRule("random", 0.5, 4)
    assert rule.with_options(unit=4) == rule  # the unit it has: still random patches
    assert rule.with_options(unit=8) == MaskRule("block", 0.75, 8)
    assert MaskRule("blockwise", 0.4, 16, min_block=9).with_options(ratio=0.3).min_block == 9


def test_mask_rule__says_itself_in_words() -> None:
    assert str(MaskRule("random", 0.75, 16)) == "0.75 of random patches of 16 px"
    assert str(MaskRule("block", 0.6, 32)) == "0.6 of units of 32 px"
    assert "blockwise" in str(MaskRule("blockwise", 0.38, 16))


def test_mask_rule_draw__shrinks_beit_rectangles_on_small_grids() -> None:
    mask = MaskRule("blockwise", 0.4, 4).sample(mask_keys(IMAGES), (8, 8), 4)
    assert mask.sum(dim=1).float().mean() > 20  # of 25: rectangles of 16 patches would mostly not fit


# Mask files.


def test_save_masks__loads_back_the_same(tmp_path: Path) -> None:
    names = ["a/b.jpg", "ü b,c.png", "7"]
    masks = torch.stack([random_mask(mask_keys(names, k=k), 16, 0.5) for k in range(2)], dim=1)
    save_masks(tmp_path / "masks.npz", masks.numpy(), names)
    loaded = load_masks(tmp_path / "masks.npz")
    assert list(loaded) == names
    for name, mask in zip(names, masks, strict=True):
        assert torch.equal(loaded[name], mask)
        assert loaded[name].dtype == torch.bool


def test_load_masks__takes_one_mask_per_image_without_the_middle_axis(tmp_path: Path) -> None:
    mask = random_mask(mask_keys("ab"), 16, 0.5)
    np.savez(tmp_path / "masks.npz", mask=mask.numpy(), names=np.array(["a", "b"]))
    loaded = load_masks(tmp_path / "masks.npz")
    assert torch.equal(loaded["b"], mask[1:])


GOOD = np.array([[[True, False]], [[False, True]]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mask": GOOD}, "not a mask file"),
        ({"mask": GOOD.astype(int), "names": ["a", "b"]}, "`mask` must be bool"),
        ({"mask": GOOD, "names": ["a"]}, "`names` .images., got"),
        ({"mask": GOOD, "names": ["a", "a"]}, "holds a name twice"),
        ({"mask": np.ones((1, 1, 2), dtype=bool), "names": ["a"]}, "mask must leave a patch visible"),
        ({"mask": np.zeros((1, 1, 2), dtype=bool), "names": ["a"]}, "mask must mask a patch"),
    ],
)
def test_load_masks__says_what_is_wrong_with_a_file(tmp_path: Path, content: dict, message: str) -> None:
    np.savez(tmp_path / "masks.npz", **content)
    with pytest.raises(DataError, match=message) as error:
        load_masks(tmp_path / "masks.npz")
    assert "masks.npz" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken", b"\x93NUMPY"])
def test_load_masks__refuses_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "masks.npz").write_bytes(content)
    with pytest.raises(DataError, match="not a mask file"):
        load_masks(tmp_path / "masks.npz")


def test_load_masks__refuses_damaged_files(tmp_path: Path) -> None:
    masks = torch.stack([random_mask(mask_keys(IMAGES), 196, 0.5)], dim=1)
    save_masks(tmp_path / "masks.npz", masks.numpy(), IMAGES)
    whole = (tmp_path / "masks.npz").read_bytes()
    damaged = [whole[: len(whole) // 2], whole[:200] + bytes(50) + whole[250:]]
    for content in damaged:
        (tmp_path / "masks.npz").write_bytes(content)
        with pytest.raises(DataError, match="not a mask file"):
            load_masks(tmp_path / "masks.npz")


def test_load_masks__refuses_a_plain_array_and_a_missing_file(tmp_path: Path) -> None:
    np.save(tmp_path / "masks.npy", GOOD)
    with pytest.raises(DataError, match="not a mask file"):
        load_masks(tmp_path / "masks.npy")
    with pytest.raises(FileNotFoundError, match=r"no mask file at .*none\.npz"):
        load_masks(tmp_path / "none.npz")


def test_load_masks__never_unpickles(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    np.savez(tmp_path / "masks.npz", mask=GOOD, names=np.array([Bomb(), "b"], dtype=object))
    with pytest.raises(DataError, match="not a mask file"):
        load_masks(tmp_path / "masks.npz")
    assert not marker.exists()


def test_save_masks__refuses_what_could_not_be_read_back(tmp_path: Path) -> None:
    for masks, names in ((GOOD, ["a"]), (GOOD[0], ["a"]), (GOOD.astype(int), ["a", "b"])):
        with pytest.raises(ValueError, match="masks must be bool"):
            save_masks(tmp_path / "masks.npz", masks, names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_patches", [2, 7, 64, 196])
def test_random_mask__takes_the_numbers_that_each_keys_generator_gives(num_patches: int) -> None:
    # They are made by the thousand, but must stay those of `random()`: masks of earlier results hang on them.
    keys = mask_keys([f"{row}.png" for row in range(20)], seed=3, epoch=2)
    mask = random_mask(keys, num_patches, 0.5)
    for key, row in zip(keys, mask.tolist(), strict=True):
        generator = key.generator()
        noise = [generator.random() for _ in range(num_patches)]
        visible = sorted(range(num_patches), key=noise.__getitem__)[: num_patches // 2]
        assert [place for place in range(num_patches) if not row[place]] == sorted(visible)


def test_topped_up_mask__is_exact_and_lies_mostly_in_rectangles() -> None:
    keys = mask_keys([str(number) for number in range(200)])
    mask = topped_up_mask(keys, (14, 14), 147)
    assert (mask.sum(dim=1) == 147).all()
    assert torch.equal(mask[3:4], topped_up_mask(keys[3:4], (14, 14), 147))

    def alike(masks: torch.Tensor) -> float:
        """How often neighbours are both masked or both visible."""
        grid = masks.reshape(-1, 14, 14)
        return float((grid[:, :, 1:] == grid[:, :, :-1]).float().mean())

    assert alike(random_mask(keys, 196, 0.75)) == pytest.approx(0.625, abs=0.01)  # 0.75^2 + 0.25^2
    assert alike(mask) > 0.64
    assert (topped_up_mask(keys, (8, 8), 48).sum(dim=1) == 48).all()


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (4, 4)])
def test_topped_up_mask__small_grids_do_not_hang(grid: tuple[int, int]) -> None:
    mask = topped_up_mask(mask_keys(["a", "b", "c"]), grid, grid[0] * grid[1] - 1)
    assert (~mask).sum(dim=1).tolist() == [1, 1, 1]


def test_load_masks__without_any_is_an_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", mask=np.zeros((0, 1, 64), bool), names=np.zeros(0, "U1"))
    with pytest.raises(DataError, match="holds no masks"):
        load_masks(tmp_path / "none.npz")
