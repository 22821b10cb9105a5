"""Images: where they come from, how they are preprocessed, and what happens to broken ones."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import write_images
from PIL import Image
from tiny_models import make_simmim

from mto_analysis import DataError, MaskRule, ModelInfo, image_batches, mask_keys, open_images
from mto_analysis.images import BrokenImage

INFO = ModelInfo("simmim_vit", "inpainting", 16, 4, MaskRule("block", 0.5, 8))
NAMES = ["A.png", "a/deep/w.png", "a/z.jpg", "b/x.png", "b/y.png", "c.png"]


def all_images(source: Path, **options) -> tuple[list[str], torch.Tensor]:
    batches = list(image_batches(open_images(source), INFO, **options))
    return [name for batch in batches for name in batch.names], torch.cat([batch.images for batch in batches])


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def solid(value: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, (value, value // 2, 255 - value))


def write_parquet(path: Path, count: int = 10, *, rows_in_group: int = 3, as_struct: bool = True) -> Path:
    content = [encoded(solid(10 * row)) for row in range(count)]
    column = [{"bytes": each, "path": f"{row}.png"} for row, each in enumerate(content)] if as_struct else content
    pq.write_table(pa.table({"image": column, "label": list(range(count))}), path, row_group_size=rows_in_group)
    return path


# Where they come from.


def test_open_images__finds_nested_files_in_the_order_of_names(image_folder: Path) -> None:
    (image_folder / "notes.txt").write_text("no image")
    (image_folder / "folder.png").mkdir()
    assert list(open_images(image_folder).names) == NAMES
    assert list(open_images(str(image_folder)).names) == NAMES


def test_open_images__knows_suffixes_in_either_case(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.jpeg", "c.Tif", "d.webp", "e.bmp"):
        solid(9).save(tmp_path / name)
    assert len(open_images(tmp_path).names) == 5
    names, images = all_images(tmp_path)
    assert names == ["a.JPG", "b.jpeg", "c.Tif", "d.webp", "e.bmp"]
    assert torch.allclose(images[2], images[4])


def test_open_images__reads_a_list_relative_to_itself(image_folder: Path) -> None:
    listing = image_folder / "list.txt"
    listing.write_text(f"# a comment\nc.png\n\n  b/x.png  \n{image_folder / 'A.png'}\n")
    names, images = all_images(listing)
    assert names == ["c.png", "b/x.png", str(image_folder / "A.png")]  # in the order of the list
    folder = dict(zip(*all_images(image_folder), strict=True))
    assert torch.equal(images, torch.stack([folder["c.png"], folder["b/x.png"], folder["A.png"]]))


@pytest.mark.parametrize("as_struct", [True, False])
@pytest.mark.parametrize("rows_in_group", [1, 3, 100])
def test_open_images__reads_parquet_with_any_row_groups(tmp_path: Path, rows_in_group: int, as_struct: bool) -> None:
    path = write_parquet(tmp_path / "p.parquet", rows_in_group=rows_in_group, as_struct=as_struct)
    names, images = all_images(path, batch_size=4)
    assert names == [str(row) for row in range(10)]
    red = images[:, 0].mean(dim=(1, 2)) * INFO.std[0] + INFO.mean[0]
    assert torch.allclose(red, torch.arange(10) * 10 / 255, atol=1e-5)
    backwards = open_images(path)
    assert [np.asarray(backwards.open(row))[0, 0, 0] for row in (9, 0, 5)] == [90, 0, 50]


def test_open_images__reads_one_image(image_folder: Path) -> None:
    assert all_images(image_folder / "a" / "z.jpg")[0] == ["z.jpg"]


def test_open_images__says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "twice.txt").write_text("a.png\na.png\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 broken")
    (tmp_path / "table.csv").write_text("a,b\n")
    pq.write_table(pa.table({"photo": [1], "text": ["x"]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "rows.parquet")
    for name, message in {
        "empty": r"empty holds no images \(\.avif, \.bmp",
        "empty.txt": "lists no images",
        "twice.txt": "lists an image twice",
        "binary.txt": "is not a text file",
        "broken.parquet": "is not a readable Parquet file",
        "table.csv": "is neither a folder, a list",
        "column.parquet": r"no column of image bytes, and none is `image`: photo \(int64\), text",
        "rows.parquet": "holds no rows",
    }.items():
        with pytest.raises(DataError, match=message) as error:
            open_images(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no images at .*none"):
        open_images(tmp_path / "none")


# Preprocessing.


def prepared_by_hand(image: Image.Image, side: int) -> np.ndarray:
    """Shorter side to ``side`` by bicubic interpolation, centre crop, 0..1, normalized: PIL and NumPy alone."""
    image = image.convert("RGB")
    width, height = image.size
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float64) / 255
    return ((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (40, 24), (23, 51), (7, 9), (300, 20)])
def test_image_batches__prepare_as_pil_alone_does(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "p.png")
    _, images = all_images(tmp_path)
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images[0].numpy(), prepared_by_hand(image, 16), atol=2e-6)


def test_image_batches__use_the_models_own_size_and_normalization(tmp_path: Path) -> None:
    solid(100).save(tmp_path / "p.png")
    info = ModelInfo("x", "decoder", 24, 4, MaskRule("random", 0.75, 4), mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    (batch,) = image_batches(open_images(tmp_path), info)
    assert batch.images.shape == (1, 3, 24, 24)
    expected = [(100 / 255 - 0.5) / 0.5, (50 / 255 - 0.5) / 0.25, (155 / 255 - 0.5) / 0.5]
    assert batch.images[0, :, 5, 7].tolist() == pytest.approx(expected, abs=1e-6)


def test_image_batches__take_images_of_every_mode(tmp_path: Path) -> None:
    grey = Image.new("L", (16, 16), 128)
    modes = {
        "grey.png": grey,
        "cmyk.jpg": Image.new("CMYK", (16, 16), (0, 0, 0, 127)),
        "rgba.png": Image.new("RGBA", (16, 16), (128, 128, 128, 40)),
        "la.png": Image.new("LA", (16, 16), (128, 9)),
        "palette.gif": grey.convert("P"),
        "one bit.png": Image.new("1", (16, 16), 1),
    }
    for name, image in modes.items():
        image.save(tmp_path / name)
    images = dict(zip(*all_images(tmp_path), strict=True))
    expected = torch.tensor([(128 / 255 - m) / s for m, s in zip(INFO.mean, INFO.std, strict=True)])
    for name in ("grey.png", "cmyk.jpg", "rgba.png", "la.png", "palette.gif"):
        assert images[name].shape == (3, 16, 16)
        assert torch.allclose(images[name].mean(dim=(1, 2)), expected, atol=0.03), name
    white = torch.tensor([(1 - m) / s for m, s in zip(INFO.mean, INFO.std, strict=True)])
    assert torch.allclose(images["one bit.png"][:, 0, 0], white, atol=1e-5)


def test_image_batches__keep_the_tones_of_16_bit_images(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray((ramp // 257).astype(np.uint8)).save(tmp_path / "plain.png")
    images = dict(zip(*all_images(tmp_path), strict=True))
    assert torch.allclose(images["deep.png"], images["plain.png"], atol=0.03)  # not clipped to white


# Broken images.


@pytest.fixture
def with_broken(image_folder: Path) -> Path:
    (image_folder / "b" / "broken.png").write_bytes(b"not an image")
    whole = (image_folder / "a" / "z.jpg").read_bytes()
    (image_folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (image_folder / "empty.png").write_bytes(b"")
    return image_folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_image_batches__report_broken_images_and_go_on(with_broken: Path, num_workers: int) -> None:
    broken: list[BrokenImage] = []
    names, images = all_images(with_broken, on_broken=broken.append, batch_size=2, num_workers=num_workers)
    assert names == NAMES
    assert len(images) == 6
    assert [image.name for image in broken] == ["b/broken.png", "cut.jpg", "empty.png"]
    for image in broken:
        assert image.reason
        assert "\n" not in image.reason
        assert "0x" not in image.reason, "an address says nothing"


def test_image_batches__are_strict_by_default(with_broken: Path) -> None:
    with pytest.raises(DataError, match=r"image b/broken\.png cannot be read \(UnidentifiedImageError"):
        all_images(with_broken)


def test_image_batches__report_missing_files_and_empty_rows(tmp_path: Path) -> None:
    solid(1).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\nnone.png\n")
    content = [encoded(solid(1)), None, b"junk"]
    pq.write_table(pa.table({"image": pa.array(content, pa.binary())}), tmp_path / "p.parquet")
    for source, missing in (("list.txt", ["none.png"]), ("p.parquet", ["1", "2"])):
        broken: list[BrokenImage] = []
        names, _ = all_images(tmp_path / source, on_broken=broken.append)
        assert len(names) == 1
        assert [image.name for image in broken] == missing


def test_image_batches__skip_batches_without_a_good_image(with_broken: Path) -> None:
    sizes = [
        len(batch.names)
        for batch in image_batches(open_images(with_broken), INFO, batch_size=1, on_broken=lambda image: None)
    ]
    assert sizes == [1] * 6


def test_image_batches__refuse_images_that_claim_gigapixels(tmp_path: Path, monkeypatch) -> None:
    solid(1, (64, 64)).save(tmp_path / "bomb.png")
    solid(1).save(tmp_path / "fine.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL refuses twice as much
    broken: list[BrokenImage] = []
    assert all_images(tmp_path, on_broken=broken.append)[0] == ["fine.png"]
    assert "DecompressionBomb" in broken[0].reason


# Batches.


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7])
def test_image_batches__spread_a_limit_evenly(image_folder: Path, limit: int) -> None:
    names, _ = all_images(image_folder, limit=limit)
    count = min(limit, 6)
    assert names == [NAMES[math.floor(index * 6 / count)] for index in range(count)]


def test_image_batches__do_not_cut_off_a_folder_sorted_by_class(tmp_path: Path) -> None:
    write_images(tmp_path, tuple(f"{kind}/{number}.png" for kind in "abcd" for number in range(5)))
    names, _ = all_images(tmp_path, limit=8)
    assert [name[0] for name in names] == list("aabbccdd")


def test_image_batches__do_not_depend_on_workers_or_batch_size(image_folder: Path, tmp_path: Path) -> None:
    for source in (image_folder, write_parquet(tmp_path / "p.parquet")):
        names, images = all_images(source, batch_size=4)
        for options in ({"batch_size": 1}, {"batch_size": 64}, {"batch_size": 2, "num_workers": 2}):
            other_names, other_images = all_images(source, **options)
            assert other_names == names
            assert torch.equal(other_images, images)
    sizes = [len(batch.names) for batch in image_batches(open_images(image_folder), INFO, batch_size=4)]
    assert sizes == [4, 2]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_image_batches__leave_global_random_numbers_alone(image_folder: Path, num_workers: int) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    all_images(image_folder, num_workers=num_workers)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"limit": 0}, {"limit": -1}, {"num_workers": -1}])
def test_image_batches__refuse_numbers_that_make_no_sense(image_folder: Path, options: dict) -> None:
    with pytest.raises(ValueError, match="batch_size and limit must be at least 1, num_workers at least 0"):
        all_images(image_folder, **options)


def test_image_batches__fit_the_model(image_folder: Path) -> None:
    model = make_simmim()
    (batch,) = image_batches(open_images(image_folder), model.info)
    mask = model.info.mask_rule.sample(mask_keys(batch.names), model.info.grid, model.info.patch_size)
    assert model(batch.images, mask).shape == (6, 3, 16, 16)
