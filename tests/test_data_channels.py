"""Training images of any number of channels and depth: as the files have them, from memory and from workers alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pretraining_cases import contents, run, small_recipe

from mto_analysis import load_checkpoint, save_checkpoint
from mto_analysis.errors import DataError
from mto_analysis.images import Augmentation, TrainingData, open_images
from mto_analysis.masks import MaskRule
from mto_analysis.training import RunSettings, build_method
from mto_analysis.training.evaluation import Evaluation, score

SIDE = 16


def write_arrays(folder: Path, channels: int, dtype: type, count: int = 6) -> dict[str, np.ndarray]:
    """NumPy images ``channels height width``, of the full range of their type."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for row in range(count):
        values = random.integers(0, np.iinfo(dtype).max, (channels, SIDE, SIDE), dtype=dtype, endpoint=True)
        arrays[f"{row}.npy"] = values
        np.save(folder / f"{row}.npy", values)
    return arrays


def plain(channels: int) -> Augmentation:
    """Nothing is changed but black and white, which become 0 and 1."""
    return Augmentation(SIDE, padding=0, flip=0.0, mean=(0.0,) * channels, std=(1.0,) * channels)


def batches(folder: Path, augmentation: Augmentation, **options) -> dict[str, torch.Tensor]:
    images = open_images(folder, value_range=options.pop("value_range", None))
    data = TrainingData(images, augmentation, MaskRule("random", 0.5, 4), 4, **options)
    found = {}
    for batch in data.micro_batches(0, micro_batch=2):
        found |= dict(zip(batch.names, batch.images, strict=True))
    return found


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, np.uint8), (2, np.uint8), (4, np.uint8), (3, np.uint16), (5, np.uint16)]
)
def test_batches__hold_the_values_of_the_files(tmp_path, channels, dtype, in_memory) -> None:
    arrays = write_arrays(tmp_path, channels, dtype)
    white = float(np.iinfo(dtype).max)
    given = {} if dtype == np.uint8 else {"value_range": (0.0, white)}
    found = batches(tmp_path, plain(channels), in_memory=in_memory, **given)
    assert found.keys() == arrays.keys()
    for name, values in arrays.items():
        expected = torch.from_numpy(values.astype(np.float64) / white).float()
        torch.testing.assert_close(found[name], expected, atol=2e-7, rtol=1e-6)


def test_batches__are_the_same_from_memory_and_from_workers(tmp_path) -> None:
    write_arrays(tmp_path, 4, np.uint16)
    augmentation = Augmentation(8, mean=(0.5,) * 4, std=(0.2,) * 4)
    ways = [
        batches(tmp_path, augmentation, value_range=(0.0, 65535.0), **options)
        for options in ({"in_memory": True}, {"in_memory": False}, {"in_memory": False, "num_workers": 2})
    ]
    for name, image in ways[0].items():
        torch.testing.assert_close(image, ways[1][name], atol=2e-2, rtol=0)  # of the two kernels
        assert torch.equal(ways[1][name], ways[2][name])


def test_batches__mix_depths(tmp_path) -> None:
    grey = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "b.png")
    for in_memory in (True, False):
        found = batches(tmp_path, plain(1), in_memory=in_memory)
        torch.testing.assert_close(found["a.png"], found["b.png"])


def test_batches__of_another_number_of_channels_are_refused(tmp_path) -> None:
    write_arrays(tmp_path, 4, np.uint8)
    with pytest.raises(
        DataError, match=r"image \d\.npy has 4 channels, the model 2|neither the first or the last axis"
    ):
        batches(tmp_path, plain(2), in_memory=False)


def test_pretrain__trains_on_four_channels(tmp_path) -> None:
    write_arrays(tmp_path / "images", 4, np.uint16, 16)
    recipe = small_recipe(
        image_size="16", patch_size="4", mask_unit="4", mean="0.5,0.5,0.5,0.5", std="0.25,0.25,0.25,0.25"
    )
    assert recipe.model_config().channels == 4
    images = open_images(tmp_path / "images", value_range=(0.0, 65535.0))
    settings = RunSettings(device="cpu", value_range=(0.0, 65535.0))
    records = run(tmp_path / "run", recipe, settings, images=images)
    assert len(records) == recipe.epochs
    assert contents(tmp_path / "run" / "last.pth")["model"]["patch_embed.proj.weight"].shape[1] == 4
    model = load_checkpoint(tmp_path / "run" / "checkpoint-0002.pth")
    assert (model.info.channels, model.info.mean, model.info.std) == (4, (0.5,) * 4, (0.25,) * 4)
    assert not model.info.assumptions
    save_checkpoint(model, tmp_path / "native.safetensors")
    assert load_checkpoint(tmp_path / "native.safetensors").info.mean == (0.5,) * 4
    assert model(torch.rand(1, 4, 16, 16), torch.arange(16)[None] < 12) is not None


@pytest.mark.parametrize("method", ["mae", "simmim", "bootmae", "conmim"])
def test_methods__have_a_loss_for_any_number_of_channels(method) -> None:
    options = {"second_view": "no"} if method == "conmim" else {}
    recipe = small_recipe(method, mean="0.5,0.5", std="0.5,0.5", **options)
    built = build_method(recipe, seed=0)
    terms = built(*built.noise(4, torch.device("cpu")).inputs)
    assert all(term.isfinite() for term in terms.values())


def test_evaluation__of_other_channels_is_refused(tmp_path) -> None:
    for kind in "ab":
        for row in range(4):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (row, 0, 0)).save(tmp_path / kind / f"{row}.png")
    student = build_method(small_recipe(mean="0.5,0.5", std="0.5,0.5"), seed=0).student
    with pytest.raises(DataError, match="the model has 2: it has no score"):
        score(student, Evaluation("knn", tmp_path, tmp_path, neighbours=1))
