"""Images that are not eight-bit RGB: their range is stated or refused, their channels are the model's."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mto_analysis import DataError, MaskRule, ModelInfo, image_batches, open_images
from mto_analysis.images import Augmentation, TrainingData
from mto_analysis.images.decoding import decode_image, decode_samples

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(array: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, array)
    else:
        Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def info_of(channels: int, size: int | tuple[int, int] = 16) -> ModelInfo:
    rule = MaskRule("random", 0.75, 4)
    return ModelInfo("mae", "decoder", size, 4, rule, mean=(0.0,) * channels, std=(1.0,) * channels, channels=channels)


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        ((RAMP / 255).astype(np.float32), "tiff"),
        (RAMP.astype(np.int32), "tiff"),
        (RAMP.astype(np.uint16), "tiff"),
        ((RAMP * 16.0).astype(np.uint16), "tiff"),
        (RAMP.astype(np.float32) * 40, "tiff"),
        (RAMP.astype(np.float64), "npy"),
        (RAMP.astype(np.uint16), "npy"),
        (RAMP.astype(np.uint16), "png"),  # the format states 0 to 65535, where these would be black
    ],
)
def test_values_of_unknown_range__are_refused_and_right_when_it_is_stated(array: np.ndarray, kind: str) -> None:
    content = saved(array, kind)
    with pytest.raises(DataError, match=r"--value-range .*\(value_range of open_images\)"):
        decode_image(content)
    high = float(array.max())
    assert np.abs(np.asarray(decode_image(content, (0, high)))[..., 0].astype(int) - RAMP).max() <= 1
    samples = decode_samples(content, 1, (0, high))
    torch.testing.assert_close(samples[0], torch.from_numpy(RAMP / 255).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_png_of_16_bits__has_the_range_that_its_format_states(mode: str) -> None:
    deep = RAMP.astype(np.uint16) * 257
    if mode == "L":
        content = saved(deep, "png")
    else:  # PIL writes none
        import struct
        import zlib

        def chunk(name: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep[..., None].repeat(3, axis=2))
        header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
        parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
        content = b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    samples = decode_samples(content, 3)
    torch.testing.assert_close(samples, torch.from_numpy(RAMP / 255).float().expand(3, 16, 16), atol=1e-6, rtol=0)
    assert np.array_equal(np.asarray(decode_image(content))[..., 1], RAMP)


def test_values_far_outside_of_the_stated_range_and_infinite_ones__are_refused() -> None:
    with pytest.raises(DataError, match="has values from 0 to 255, far outside of the stated range 0 to 1"):
        decode_samples(saved(RAMP.astype(np.float32), "tiff"), 1, (0, 1))
    with pytest.raises(ValueError, match="not finite"):
        decode_samples(saved(np.where(RAMP > 9, np.nan, 1.0), "npy"), 1, (0, 1))
    with pytest.raises(ValueError, match="must rise from black to white"):
        open_images(Path(__file__).parent, value_range=(1, 0))


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_numpy_arrays__give_any_number_of_channels_in_either_layout(channels: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((channels, 16, 24)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", values.transpose(1, 2, 0))
    images = open_images(tmp_path, value_range=(0, 1))
    (batch,) = image_batches(images, info_of(channels))
    assert batch.images.shape == (2, channels, 16, 16)
    torch.testing.assert_close(batch.images[0], torch.from_numpy(values[..., 4:20]))
    torch.testing.assert_close(batch.images[0], batch.images[1])


def test_eight_bits__have_a_range_of_their_own(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    (plain,) = image_batches(open_images(tmp_path), info_of(3))
    (given,) = image_batches(open_images(tmp_path, value_range=(0, 10_000)), info_of(3))
    assert torch.equal(plain.images, given.images)


@pytest.mark.parametrize("channels", [3, 4, 13])
def test_tiff_of_several_deep_channels__is_read_by_tifffile(channels: int, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 10_000, (16, 16, channels), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, planarconfig="contig")
    tifffile.imwrite(tmp_path / "b.tif", values.transpose(2, 0, 1), photometric="minisblack")
    (batch,) = image_batches(open_images(tmp_path, value_range=(0, 10_000)), info_of(channels))
    for row in range(2):
        torch.testing.assert_close(batch.images[row], torch.from_numpy(values / 10_000).float().permute(2, 0, 1))
    with pytest.raises(DataError, match=r"image a\.tif is TIFF of uint16 .* state what is black and white"):
        next(image_batches(open_images(tmp_path), info_of(channels)))


def test_tiff_of_several_deep_channels__names_the_package_that_is_missing(tmp_path: Path, monkeypatch) -> None:
    pages = [Image.fromarray(RAMP.astype(np.int32)) for _ in range(4)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match=r"image a\.tif needs the package tifffile; pip install 'mto-analysis\[tiff\]'"):
        next(image_batches(open_images(tmp_path, value_range=(0, 255)), info_of(4)))


def test_tiff_of_several_pages__is_several_images(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((3, 8, 8), np.uint8), photometric="minisblack")
    with pytest.raises(ValueError, match="is several images"):
        decode_samples((tmp_path / "pages.tif").read_bytes(), 3)


def test_channels__are_those_of_the_model_or_refused(tmp_path: Path) -> None:
    Image.fromarray(np.stack([RAMP, RAMP, 255 - RAMP, RAMP], axis=2), "RGBA").save(tmp_path / "a.png")
    (four,) = image_batches(open_images(tmp_path), info_of(4))
    torch.testing.assert_close(four.images[0, 2], torch.from_numpy((255 - RAMP) / 255).float())
    (one,) = image_batches(open_images(tmp_path), info_of(1))
    luma = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    torch.testing.assert_close(one.images[0, 0], torch.from_numpy(luma / 255).float())
    reported: list[object] = []
    with pytest.raises(DataError, match=r"image a\.png has 4 channels, the model 2; give images of as many"):
        next(image_batches(open_images(tmp_path), info_of(2), on_broken=reported.append))
    assert not reported
    np.save(tmp_path / "odd.npy", np.zeros((3, 4, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"shape \[3, 4, 3\]: either the first or the last axis"):
        open_images(tmp_path / "odd.npy").open(0)


def test_eight_bit_arrays__equal_the_same_image_as_png(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for name in ("a.npy", "a.png"):
        assert np.array_equal(np.asarray(open_images(tmp_path / name).open(0)), pixels)


@pytest.mark.parametrize("size", [(8, 32), (32, 8)])
def test_image_batches__cover_an_input_that_is_not_square(size: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    values = np.asarray(Image.open(tmp_path / "a.png")).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    (eight,) = image_batches(open_images(tmp_path / "a.png"), info_of(3, size))
    (real,) = image_batches(open_images(tmp_path / "a.npy", value_range=(0, 255)), info_of(3, size))
    assert eight.images.shape == real.images.shape == (1, 3, *size)
    assert (eight.images - real.images).abs().max() < 0.02


@pytest.mark.parametrize("in_memory", [True, False])
def test_training__refuses_values_of_unknown_range(in_memory: bool, tmp_path: Path) -> None:
    for row in range(4):
        Image.fromarray((RAMP / 255).astype(np.float32)).save(tmp_path / f"{row}.tif")
    rule = MaskRule("random", 0.75, 4)
    for value_range in (None, (0, 1)):
        images = open_images(tmp_path, value_range=value_range)
        data = TrainingData(images, Augmentation(16, scale=(1, 1), ratio=(1, 1)), rule, 4, in_memory=in_memory)
        if value_range is None:
            with pytest.raises(DataError, match=r"image \d\.tif is TIFF of float32 with values from 0 to 1; state"):
                list(data.micro_batches(0, micro_batch=4))
        else:
            (batch,) = data.micro_batches(0, micro_batch=4)
            assert batch.images.std() > 1
