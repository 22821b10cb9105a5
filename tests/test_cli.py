"""The command: every option, exit codes with one line on stderr, interrupted runs, what ``--help`` costs."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from golden_files import GOLDEN
from image_files import write_images
from PIL import Image
from tiny_models import make_mae, make_simmim
from typer.testing import CliRunner

import mto_analysis
import mto_analysis.__main__
from mto_analysis import (
    MaskRule,
    image_batches,
    load_checkpoint,
    load_masks,
    mask_keys,
    open_images,
    save_checkpoint,
    save_masks,
)
from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
from mto_analysis.probe import masks_from_rule, probe
from mto_analysis.runtime.outputs import locked_folder
from mto_analysis.training import RunSettings
from mto_analysis.training.evaluation import Evaluation
from mto_analyze import app, console, measuring

RECORD = {"run.json", "run.toml", "methods.md"}
FILES = {"heterogeneity.csv", "heterogeneity_per_image.csv", "heterogeneity.png", "heterogeneity.pdf", *RECORD}
MAE_FILE = GOLDEN / "mae" / "checkpoint.pth"
SIMMIM_FILE = GOLDEN / "simmim_vit" / "checkpoint.pth"
ROOT = Path(__file__).parents[1]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: object):
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr or result.exception
    return result


def fails(code: int, *arguments: object) -> str:
    """The one line on stderr of a failing run."""
    result = run(*arguments)
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("mto-analyze: error: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return lines[0]


# A shell lets what it runs in the background ignore interrupts, and children inherit that.
HEARING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from mto_analyze import app; app()"


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """A real process, in its own group, as a shell starts it; it hears Ctrl-C also where these tests run unheard."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", HEARING, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def csv(folder: Path, name: str = "heterogeneity.csv") -> pd.DataFrame:
    return pd.read_csv(folder / name)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# heterogeneity.


@pytest.mark.rendered
def test_heterogeneity__writes_tables_figures_and_metadata(checkpoints, image_folder: Path, out: Path) -> None:
    result = ok("heterogeneity", "--ckpt", checkpoints["mae"], "--images", image_folder, "--out", out)
    assert set(contents(out)) == FILES
    table, per_image = csv(out), csv(out, "heterogeneity_per_image.csv")
    needed = "model stack layer_depth heterogeneity heterogeneity_std ci_low ci_high normalized num_visible num_images"
    assert set(needed.split()) <= set(table.columns)
    model = load_checkpoint(checkpoints["mae"])
    expected = probe(model, image_batches(open_images(image_folder), model.info), masks_from_rule(model.info))
    np.testing.assert_allclose(table["heterogeneity"], expected.summary()["heterogeneity"], rtol=1e-9)
    np.testing.assert_allclose(per_image["heterogeneity"], expected.to_frame()["heterogeneity"], rtol=1e-9)
    assert per_image["image"].tolist() == expected.to_frame()["image"].tolist()
    with Image.open(out / "heterogeneity.png") as image:
        image.load()
        assert len(image.convert("L").getcolors(1 << 20)) > 10  # something is drawn
    assert (out / "heterogeneity.pdf").read_bytes().rstrip().endswith(b"%%EOF")
    metadata = json.loads((out / "run.json").read_text())
    assert metadata["arguments"]["seed"] == 0
    assert metadata["arguments"]["ckpt"] == [str(checkpoints["mae"])]
    assert metadata["models"][0]["model"] == "mae"
    assert len(metadata["models"][0]["sha256"]) == 64
    assert metadata["skipped"] == {}
    # The table on stdout, everything else on stderr.
    lines = result.stdout.splitlines()
    assert lines[0].split()[:4] == ["model", "stack", "layer_depth", "heterogeneity"]
    assert len(lines) == 1 + len(table)
    assert f"{table['heterogeneity'][2]:.6g}" in lines[3]
    assert "wrote" in result.stderr


@pytest.mark.rendered
@pytest.mark.parametrize("name", ["mae", "simmim_vit", "hf_vitmae"])
def test_heterogeneity__equals_the_original_code(name: str, golden_of, tmp_path: Path, monkeypatch) -> None:
    # Golden images are stored after preprocessing, so they take its place.
    golden = golden_of(name)
    names = write_images(tmp_path / "p", ("0.png", "1.png"))
    monkeypatch.setattr(
        "mto_analysis.images.batches.preprocessing",
        lambda info: lambda image: golden.images[image.getpixel((0, 0))[0]],
    )
    for row in range(2):
        Image.new("RGB", (4, 4), (row, 0, 0)).save(names / f"{row}.png")
    save_masks(tmp_path / "masks.npz", golden.mask[:, None].numpy(), ["0.png", "1.png"])
    heads = [f"--{key.replace('_', '-')}={value}" for key, value in golden.heads.items()]
    ok(
        *("heterogeneity", "--ckpt", golden.source, "--images", names, "--masks", tmp_path / "masks.npz"),
        *("--out", tmp_path / "out", *heads),
    )
    values = csv(tmp_path / "out", "heterogeneity_per_image.csv").pivot(
        index="layer_depth", columns="image", values="heterogeneity"
    )
    np.testing.assert_allclose(values, golden.expected["heterogeneity"], atol=5e-5)


# For each option of each command: what shows that it is heard. A new option without a case here fails below.


def option_limit(path, images, ckpt):
    ok("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path, "--limit", 2)
    assert set(csv(path, "heterogeneity_per_image.csv")["image"]) == {"A.png", "b/x.png"}
    assert (csv(path)["num_images"] == 2).all()


def option_mask_ratio(path, images, ckpt):
    ok("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path, "--mask-ratio", 0.5)
    assert (csv(path)["num_visible"] == 8).all()


def option_mask_unit(path, images, ckpt):
    ok("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path, "--mask-unit", 8)
    assert json.loads((path / "run.json").read_text())["models"][0]["mask_rule"]["kind"] == "block"


def option_masks(path, images, ckpt):
    names = list(open_images(images).names)
    mask = torch.zeros(len(names), 1, 16, dtype=torch.bool)
    for row in range(len(names)):
        mask[row, 0, : row + 3] = True  # ragged
    save_masks(path.parent / "masks.npz", mask.numpy(), names)
    ok("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path, "--masks", path.parent / "masks.npz")
    per_image = csv(path, "heterogeneity_per_image.csv")
    assert dict(zip(per_image["image"], per_image["num_masked"], strict=True)) == {
        n: i + 3 for i, n in enumerate(names)
    }
    table = csv(path)
    assert (table["num_visible"] == 10.5).all()
    assert (table["num_visible_min"] == 8).all()
    assert (table["num_visible_max"] == 13).all()


def option_masks_per_image(path, images, ckpt):
    ok("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path, "--masks-per-image", 3,
       "--measures", "attention", "--definitions", "all")  # fmt: skip
    assert (csv(path, "measures.csv")["num_images"] == csv(path)["num_images"].iloc[0]).all()
    assert sorted(set(csv(path, "heterogeneity_per_image.csv")["mask"])) == [0, 1, 2]
    assert (csv(path)["num_masks"] == 3).all()


def option_seed(path, images, ckpt):
    for seed in (0, 1):
        ok("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path / str(seed), "--seed", seed)
    ok("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path / "again", "--seed", 1)
    values = {name: csv(path / name)["heterogeneity"].tolist() for name in ("0", "1", "again")}
    assert values["1"] == values["again"] != values["0"]


def sizes_and_workers(*arguments: object) -> tuple[list[int], set[int]]:
    """The batches that a run probes, and the worker processes that it asks for."""
    from mto_analysis.probe import request, sharing

    sizes: list[int] = []
    workers: set[int] = set()
    probe_batches, load_batches = sharing.run_measures, request.image_batches

    def watched_probe(model, batches, *positional, **options):
        batches = list(batches)
        sizes.extend(len(batch.names) for batch in batches)
        return probe_batches(model, batches, *positional, **options)

    def watched_batches(*positional, **options):
        workers.add(options["num_workers"])
        return load_batches(*positional, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "run_measures", watched_probe)
        patch.setattr(request, "image_batches", watched_batches)
        ok(*arguments)
    return sizes, workers


def option_batch_size(path, images, ckpt):
    for size, expected in ((1, [1] * 6), (4, [4, 2])):
        arguments = ("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path / str(size))
        assert sizes_and_workers(*arguments, "--batch-size", size)[0] == expected
    one, four = (csv(path / name) for name in ("1", "4"))
    np.testing.assert_allclose(one["heterogeneity"], four["heterogeneity"], atol=2e-5)
    assert json.loads((path / "4/run.json").read_text())["arguments"]["batch_size"] == 4


def option_device(path, images, ckpt):
    ok("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path, "--device", "cpu")
    line = fails(2, "heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path / "x", "--device", "tpu9")
    assert "device tpu9 cannot be used" in line


def option_precision(path, images, ckpt):
    for name in ("fp32", "fp64", "bf16"):
        ok("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path / name, "--precision", name)
    full, double, half = (csv(path / d)["heterogeneity"].to_numpy() for d in ("fp32", "fp64", "bf16"))
    assert 0 < np.abs(full - double).max() < 1e-4 < np.abs(half - double).max()
    assert (
        run("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path / "x", "--precision", "int8").exit_code
        == 2
    )


def option_num_workers(path, images, ckpt):
    for count in (0, 2):
        arguments = ("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path / str(count))
        assert count in sizes_and_workers(*arguments, "--num-workers", count)[1]
    assert csv(path / "0").equals(csv(path / "2"))


def option_label(path, images, ckpt):
    ok("heterogeneity", "--ckpt", ckpt, "--label", "epoch 800", "--images", images, "--out", path)
    assert set(csv(path)["model"]) == {"epoch 800"}


def option_strict(path, images, ckpt):
    (images / "broken.png").write_bytes(b"junk")
    arguments = ("heterogeneity", "--ckpt", ckpt, "--images", images)
    result = ok(*arguments, "--out", path)
    assert [line for line in result.stderr.splitlines() if line.startswith("skipped broken.png: ")]
    assert (csv(path)["num_skipped"] == 1).all()
    told = json.loads((path / "run.json").read_text())
    assert list(told["skipped"]) == ["broken.png"]
    assert told["models"][0]["num_images"] == csv(path)["num_images"].iloc[0]
    result = run(*arguments, "--out", path / "strict", "--strict", "--quiet")
    assert result.exit_code == 4
    assert "image broken.png cannot be read" in result.stderr.splitlines()[-1]
    assert not (path / "strict").exists()
    (images / "broken.png").rename(images / "._broken.png")
    result = ok(*arguments, "--out", path / "hidden")
    assert "skipped 1 hidden or system files" in result.stderr
    assert json.loads((path / "hidden/run.json").read_text())["skipped"] == {"hidden or system files": 1}
    line = fails(4, *arguments, "--out", path / "strict", "--strict", "--quiet")
    assert "skipped 1 hidden or system files beside the images; move them away" in line


def option_quiet(path, images, ckpt):
    ckpt = DEMO_CHECKPOINTS["MAE"]
    for quiet in ("--quiet", "-q"):
        result = ok("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path / quiet.strip("-"), quiet)
        assert "masks:" not in result.stderr
        assert "wrote" not in result.stderr
        assert result.stdout.startswith(" ") or result.stdout.startswith("model")


def option_overwrite(path, images, ckpt):
    arguments = ("heterogeneity", "--ckpt", ckpt, "--images", images, "--out", path)
    ok(*arguments)
    before = contents(path)
    (path / "notes.txt").write_text("mine")
    ok(*arguments, "--seed", 5, "--overwrite")
    after = contents(path)
    assert after.pop("notes.txt") == b"mine"
    assert set(after) == set(before) == FILES
    assert after["heterogeneity.csv"] != before["heterogeneity.csv"]


def option_num_heads(path, images, ckpt):
    write_images(images)
    arguments = ("heterogeneity", "--ckpt", MAE_FILE, "--images", images)
    told = "give it as num_heads=... (--num-heads on the command line), or auto to compare losses on the images"
    assert told in fails(3, *arguments, "--out", path)
    assert "or auto" not in fails(3, "checkpoints", "convert", MAE_FILE, "--out", path / "own.safetensors")
    ok(*arguments, "--num-heads", 4, "--decoder-num-heads", 2, "--out", path)
    config = json.loads((path / "run.json").read_text())["models"][0]["config"]
    assert (config["num_heads"], config["decoder_num_heads"]) == (4, 2)


def option_save_masks(path, images, ckpt):
    arguments = ("heterogeneity", "--ckpt", ckpt, "--images", images, "--masks-per-image", 2)
    ok(
        *arguments,
        "--label",
        "MAE, 800 epochs",
        "--batch-size",
        4,
        "--seed",
        3,
        "--save-masks",
        "--out",
        path / "first",
    )
    assert set(contents(path / "first")) == FILES | {"masks-MAE-800-epochs.npz"}
    masks = load_masks(path / "first/masks-MAE-800-epochs.npz")
    info, names = load_checkpoint(ckpt).info, list(open_images(images).names)
    for k in range(2):
        drawn = info.mask_rule.sample(mask_keys(names, k=k, seed=3), info.grid, 4)
        assert torch.equal(torch.stack([masks[name][k] for name in names]), drawn)
    ok(*arguments, "--masks", path / "first/masks-MAE-800-epochs.npz", "--out", path / "second")
    np.testing.assert_allclose(csv(path / "first")["heterogeneity"], csv(path / "second")["heterogeneity"], rtol=1e-5)
    assert "masks-" not in " ".join(contents(path / "second"))


def option_image_size(path, images, ckpt):
    for size, grid in ((32, 64), ("16x32", 32)):
        arguments = ("--ckpt", ckpt, "--images", images, "--image-size", size)
        result = ok("heterogeneity", *arguments, "--out", path / str(size))
        assert "assumed that" in result.stderr
        assert "resized" in result.stderr
        assert (csv(path / str(size))["num_visible"] == grid / 4).all()
    for command in ("reconstruct", "affinity", "report"):
        ok(command, *arguments, "--out", path / command)
    result = run("heterogeneity", "--ckpt", ckpt, "--images", images, "--image-size", "4x4x4", "--out", path / "x")
    assert result.exit_code == 2
    assert "'4x4x4' is neither a side in pixels nor HEIGHTxWIDTH" in result.stderr


def option_mean(path, images, ckpt):
    arguments = ("heterogeneity", "--ckpt", ckpt, "--images", images, "--out")
    ok(*arguments, path / "own")
    result = ok(*arguments, path / "given", "--mean", "0.5,0.5,0.5", "--std", ".5,.5,.5")
    assert "mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5) (given)" in result.stderr
    assert csv(path / "own")["heterogeneity"].tolist() != csv(path / "given")["heterogeneity"].tolist()
    assert "mean (given) has 2 values, the model 3 channels" in fails(
        3, *arguments, path / "x", "--mean", ".5,.5", "-q"
    )
    assert "is not a list of numbers" in run(*arguments, path / "x", "--std", "none").stderr


def option_weights(path, images, ckpt):
    assert "holds no moving average" in fails(
        3, "heterogeneity", "--ckpt", MAE_FILE, "--images", images, "--weights", "model_ema", "--out", path, "-q"
    )


def option_value_range(path, images, ckpt):
    for row, file in enumerate(sorted(images.rglob("*.*"))):
        pixels = np.asarray(Image.open(file).convert("L"))
        (images.parent / "real").mkdir(exist_ok=True)
        (images.parent / "eight").mkdir(exist_ok=True)
        Image.fromarray((pixels / 255).astype(np.float32)).save(images.parent / "real" / f"{row}.tif")
        Image.fromarray(pixels).save(images.parent / "eight" / f"{row}.tif")  # masks depend on names
    arguments = ("--ckpt", ckpt, "--images", images.parent / "real")
    for command in ("heterogeneity", "affinity", "reconstruct", "report"):
        line = fails(4, command, *arguments, "--out", path / "x", "-q")
        assert "image 0.tif is TIFF of float32 with values from" in line
    result = ok("heterogeneity", *arguments, "--value-range", 0, 1, "--out", path / "real")
    assert "image 0.tif: TIFF of float32, black at 0, white at 1 (as given)" in result.stderr
    ok("heterogeneity", "--ckpt", ckpt, "--images", images.parent / "eight", "--out", path / "eight")
    real, eight = (csv(path / name)["heterogeneity"] for name in ("real", "eight"))
    np.testing.assert_allclose(real, eight, atol=2e-3)


HETEROGENEITY_OPTIONS: dict[str, Callable[[Path, Path, Path], None]] = {
    "limit": option_limit,
    "mask_ratio": option_mask_ratio,
    "mask_unit": option_mask_unit,
    "masks": option_masks,
    "save_masks": option_save_masks,
    "masks_per_image": option_masks_per_image,
    "seed": option_seed,
    "batch_size": option_batch_size,
    "device": option_device,
    "precision": option_precision,
    "num_workers": option_num_workers,
    "label": option_label,
    "strict": option_strict,
    "quiet": option_quiet,
    "overwrite": option_overwrite,
    "num_heads": option_num_heads,
    "decoder_num_heads": option_num_heads,
    "image_size": option_image_size,
    "mean": option_mean,
    "std": option_mean,
    "weights": option_weights,
    "value_range": option_value_range,
}


@pytest.mark.parametrize("option", [name for name in HETEROGENEITY_OPTIONS if name not in ("decoder_num_heads", "std")])
def test_heterogeneity__hears_each_option(option: str, checkpoints, image_folder: Path, out: Path) -> None:
    HETEROGENEITY_OPTIONS[option](out, image_folder, checkpoints["mae"])


def test_commands__have_no_untested_option() -> None:
    commands = typer.main.get_command(app).commands
    options = {name: {parameter.name for parameter in command.params} for name, command in commands.items()}
    everywhere = {"ckpt", "images", "out", "help", "offline"}  # used in nearly every test; offline in test_fetching
    assert all("config" in {each.name for each in command.params} for command in COMMANDS.values())
    drawing = {"style", "figure_format", "width"}  # in the tests of figures
    options = {name: names - {"config"} - drawing for name, names in options.items()}  # config: in test_cli_repeating
    further = {
        "definitions",
        "controls",
        "control_seeds",
        "properties",
        "match_visible",
        "difference",
        "measures",
        "model",
    }  # in test_studies_* and test_probe_live_source
    assert options["heterogeneity"] - everywhere - further == set(HETEROGENEITY_OPTIONS)
    loading = {"num_heads", "decoder_num_heads", "image_size", "mask_ratio", "mean", "std", "weights", "offline"}
    assert options["inspect"] == {"ckpt", "as_json", *loading}
    assert options["demo"] == {"out", "limit", "overwrite", "quiet"}
    assert options["plot"] == {"tables", "title", "out", "overwrite", "quiet"}
    # A command that comes later brings its own test module.
    assert {"demo", "inspect", "heterogeneity", "plot"} <= set(options)
    for name, command in commands.items():
        assert all(getattr(parameter, "help", None) for parameter in command.params if parameter.name != "help"), name


def test_heterogeneity__compares_checkpoints_and_epochs(checkpoints, image_folder: Path, out: Path) -> None:
    both = [argument for name in ("simmim", "simmim_early") for argument in ("--ckpt", checkpoints[name])]
    ok("heterogeneity", *both, "--images", image_folder, "--out", out / "1")
    assert csv(out / "1")["model"].unique().tolist() == ["simmim", "simmim_early"]
    labels = ("--label", "epoch 800", "--label", "epoch 10")
    ok("heterogeneity", *both, *labels, "--images", image_folder, "--out", out / "2")
    assert csv(out / "2")["model"].unique().tolist() == ["epoch 800", "epoch 10"]
    one, two = (csv(out / name).drop(columns="model") for name in "12")
    pd.testing.assert_frame_equal(one, two)
    for name in ("simmim", "simmim_early"):
        ok("heterogeneity", "--ckpt", checkpoints[name], "--images", image_folder, "--out", out / name)
        alone = csv(out / name)
        together = csv(out / "1")
        pd.testing.assert_frame_equal(together[together["model"] == name].reset_index(drop=True), alone)
    line = fails(2, "heterogeneity", *both, "--label", "one", "--images", image_folder, "--out", out / "3")
    assert "give one different label per checkpoint" in line


def test_heterogeneity__masks_of_a_file_give_the_same_numbers(checkpoints, image_folder: Path, out: Path) -> None:
    # Drawn by rule, written to a file, read by another laboratory: the same table.
    info = load_checkpoint(checkpoints["simmim"]).info
    names = list(open_images(image_folder).names)
    drawn = torch.stack([info.mask_rule.sample(mask_keys(names, k=k, seed=9), info.grid, 4) for k in range(2)], dim=1)
    save_masks(out.parent / "masks.npz", drawn.numpy(), names)
    assert torch.equal(load_masks(out.parent / "masks.npz")["c.png"], drawn[names.index("c.png")])
    arguments = ("heterogeneity", "--ckpt", checkpoints["simmim"], "--images", image_folder, "--masks-per-image", 2)
    ok(*arguments, "--seed", 9, "--out", out / "rule")
    ok(*arguments, "--masks", out.parent / "masks.npz", "--out", out / "file")
    ok(*arguments, "--seed", 8, "--out", out / "other")
    rule, file, other = (csv(out / name) for name in ("rule", "file", "other"))
    pd.testing.assert_frame_equal(rule, file)
    assert not rule["heterogeneity"].equals(other["heterogeneity"])


def test_heterogeneity__doubts_masks_of_the_other_convention_and_one_colour(out: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (32, 32), "white").save(tmp_path / "images" / f"{name}.png")
    drawn = MaskRule("random", 0.75, 4).sample(mask_keys(["a.png", "b.png"]), (8, 8), 4)
    save_masks(tmp_path / "masks.npz", ~drawn[:, None].numpy(), ["a.png", "b.png"])
    options = ("--images", tmp_path / "images", "--masks", tmp_path / "masks.npz")
    result = ok("heterogeneity", "--ckpt", DEMO_CHECKPOINTS["MAE"], *options, "--out", out)
    assert "masks: from the mask file, 25% masked" in result.stderr
    assert "masks 25% of the patches, the model's own rule 75%: True means masked there" in result.stderr
    assert "the images are of one colour, so it tells nothing" in result.stderr


def test_heterogeneity__says_where_masks_and_images_come_from(out: Path, image_folder: Path) -> None:
    result = ok("heterogeneity", "--ckpt", SIMMIM_FILE, "--limit", 2, "--out", out / "1")
    assert "no --images: measuring on 256 bundled CIFAR-10 images" in result.stderr
    assert "masks: 0.6 of units of 16 px (file), seed 0" in result.stderr
    result = ok(
        "heterogeneity", "--ckpt", SIMMIM_FILE, "--images", image_folder, "--mask-ratio", 0.5, "--out", out / "2"
    )
    assert "masks: 0.5 of units of 16 px (as asked for)" in result.stderr
    assert "reconstruction loss" in result.stderr
    assert "predicting the mean" in result.stderr


def test_save_masks__writes_one_file_per_checkpoint_whatever_its_label(
    checkpoints, image_folder: Path, out: Path
) -> None:
    both = [argument for name in ("mae", "simmim") for argument in ("--ckpt", checkpoints[name])]
    ok("heterogeneity", *both, "--images", image_folder, "--save-masks", "--out", out / "1")
    assert set(contents(out / "1")) == FILES | {"masks-mae.npz", "masks-simmim.npz"}
    counts = {name: int(load_masks(out / "1" / f"masks-{name}.npz")["A.png"].sum()) for name in ("mae", "simmim")}
    assert counts == {"mae": 12, "simmim": 8}
    labels = ("--label", "../a b", "--label", "../a/b")  # the same once they are file names
    ok("heterogeneity", *both, *labels, "--images", image_folder, "--save-masks", "--out", out / "2")
    assert set(contents(out / "2")) >= {"masks-..-a-b.npz", "masks-..-a-b-2.npz"}
    masks = load_masks(out / "2" / "masks-..-a-b-2.npz")
    assert int(masks["A.png"].sum()) == counts["simmim"]


# Exit codes.


def test_second_run__without_overwrite_exits_2_and_changes_nothing(checkpoints, image_folder: Path, out: Path) -> None:
    arguments = ("heterogeneity", "--ckpt", checkpoints["mae"], "--images", image_folder, "--out", out)
    ok(*arguments)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    assert "choose another --out or pass --overwrite" in fails(2, *arguments, "--seed", 3)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    # One file is enough, and it is seen before a model is loaded.
    for name in FILES - RECORD:
        (out / name).unlink()
    fails(2, "heterogeneity", "--ckpt", "nowhere.pth", "--images", image_folder, "--out", out)


def test_exit_2__for_values_out_of_range(checkpoints, image_folder: Path, out: Path) -> None:
    arguments = ("heterogeneity", "--ckpt", checkpoints["mae"], "--images", image_folder, "--out", out, "--quiet")
    assert "mask_ratio must lie between 0 and 1, got 1.5" in fails(2, *arguments, "--mask-ratio", 1.5)
    assert "not a multiple of the patch" in fails(2, *arguments, "--mask-unit", 6)
    assert "a checkpoint is given twice" in fails(2, *arguments, "--ckpt", checkpoints["mae"])
    assert not out.exists()


def test_exit_3__for_checkpoints(tmp_path: Path, image_folder: Path, out: Path) -> None:
    (tmp_path / "notes.pth").write_text("just notes\n")
    (tmp_path / "cut.pth").write_bytes(SIMMIM_FILE.read_bytes()[:5000])
    for path, message in {
        tmp_path / "none.pth": "no checkpoint at",
        tmp_path / "notes.pth": "is a text file, not weights",
        tmp_path / "cut.pth": "truncated",
        MAE_FILE: "--num-heads on the command line",
    }.items():
        for arguments in (
            ["heterogeneity", "--ckpt", path, "--images", image_folder, "--out", out],
            ["inspect", path],
        ):
            if path == MAE_FILE and arguments[0] == "inspect":
                continue  # it lists them
            line = fails(3, *arguments)
            assert message in line
            assert path.name in line
    assert not out.exists()


def test_exit_4__for_data(checkpoints, tmp_path: Path, image_folder: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "masks.npz").write_text("no masks")
    save_masks(tmp_path / "other.npz", np.array([[[True] * 8 + [False] * 8]]), ["someone.png"])
    arguments = ("heterogeneity", "--ckpt", checkpoints["simmim"], "--out", out, "--quiet")
    assert "no images at" in fails(4, *arguments, "--images", tmp_path / "none")
    assert "holds no images" in fails(4, *arguments, "--images", tmp_path / "empty")
    for masks, message in (("masks.npz", "is not a mask file"), ("none.npz", "no mask file at")):
        assert message in fails(4, *arguments, "--images", image_folder, "--masks", tmp_path / masks)
    line = fails(4, *arguments, "--images", image_folder, "--masks", tmp_path / "other.npz")
    assert "no mask for image A.png" in line
    assert "no table at" in fails(4, "plot", tmp_path / "none.csv", "--out", out)
    assert not out.exists()


def test_exit_5__for_numbers_that_are_not_finite(tmp_path: Path, image_folder: Path, out: Path) -> None:
    model = make_simmim()
    model.blocks[1].mlp.fc2.weight.data *= 1e38  # finite, but what it makes is not
    model.blocks[1].mlp.fc2.weight.data.clamp_(-3e38, 3e38)
    save_checkpoint(model, tmp_path / "huge.safetensors")
    result = run("heterogeneity", "--ckpt", tmp_path / "huge.safetensors", "--images", image_folder, "--out", out, "-q")
    assert result.exit_code == 5
    line = result.stderr.splitlines()[-1]
    assert line.startswith(
        "mto-analyze: error: heterogeneity is not finite in stack encoder at layer depth 2 for image "
    )
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_exit_130__when_interrupted(checkpoints, image_folder: Path, out: Path, monkeypatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    for place in (
        "mto_analysis.probe.sharing.run_measures",
        "mto_analysis.figures.plots.heterogeneity.draw_heterogeneity",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            result = run("heterogeneity", "--ckpt", checkpoints["mae"], "--images", image_folder, "--out", out, "-q")
        assert result.exit_code == 130
        assert result.stderr.splitlines()[-1] == "mto-analyze: error: interrupted; nothing half-written was left behind"
    assert not [path for path in contents(out.parent) if path.endswith(".tmp")]


def test_exit_130__when_interrupted_before_the_command_runs(monkeypatch, capsys) -> None:
    class Importing:
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "mto_analyze", Importing())
    with pytest.raises(SystemExit, match="130"):
        mto_analysis.__main__.main()
    assert capsys.readouterr().err == "mto-analyze: error: interrupted; nothing half-written was left behind\n"


def test_usage_errors__have_one_format(monkeypatch) -> None:
    for arguments, message in (
        (["--bogus"], "No such option: --bogus; see `mto-analyze --help`"),
        (["nosuch"], "No such command 'nosuch'; see `mto-analyze --help`"),
        (["plot", "--title"], "Option '--title' requires an argument; see `mto-analyze plot --help`"),
        (["heterogeneity"], "give a checkpoint with --ckpt CKPT"),
        (["heterogeneity", "--ckpt", "x", "--unknown"], "No such option: --unknown"),
        (["heterogeneity", "--ckpt", "x", "--limit", "0"], "Invalid value for '--limit'"),
        (["heterogeneity", "--ckpt", "x", "--batch-size", "none"], "Invalid value for '--batch-size'"),
        (["heterogeneity", "--ckpt", "x", "--num-workers", "-1"], "Invalid value for '--num-workers'"),
        (["heterogeneity", "--ckpt", "x", "--precision", "int8"], "Invalid value for '--precision'"),
        (["inspect"], "Missing argument 'CKPT'"),
        (["plot"], "Missing argument 'TABLE'"),
        (["demo", "--limit", "0"], "Invalid value for '--limit': must be greater than or equal to 1; see"),
        (["tables", "--format", "x"], "Invalid value for '--format': 'x' is not one of 'text', 'csv', 'markdown',"),
        (["pretrain", "--out", ""], "Invalid value for --out: is empty; give a path (. is the current folder); see"),
        (["tables", "--config", ""], "Invalid value for --config: is empty"),
        (
            ["heterogeneity", "--model", "a:b", "--weights", "model_ema"],
            "--weights model_ema is for checkpoints (--ckpt)",
        ),
        (["heterogeneity", "--ckpt", "a.pth", "--label", "_a"], "the label '_a' begins with _"),
        (
            ["evaluate", "linear", "--cached", "--accumulation", "2", "--ckpt", "a", "--train", "b", "--test", "c"],
            "--accumulation is for classifiers that are trained",
        ),
        (
            ["pretrain", "--recipe", "mae_cifar10", "--images", str(DEMO_IMAGES), "--eval-start", "--out", "x"],
            "--eval-start is for --eval-test IMAGES",
        ),
        (["inspect", ""], "Invalid value for ckpt: is empty; give a path"),
    ):
        assert f"mto-analyze: error: {message}" in fails(2, *arguments)
    for name in ("", "checkpoints", "evaluate"):  # a group by itself prints its help
        alone = run(*name.split())
        assert (alone.exit_code, alone.stderr) == (2, "")
        assert alone.stdout.startswith(f"Usage: mto-analyze {name}".strip())


def test_out_of_memory__is_one_line(checkpoints, image_folder: Path, out: Path, monkeypatch) -> None:
    on_cpu = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate\nmany GiB"), RuntimeError(on_cpu)):

        def fail(*arguments: object, error=error, **options: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("mto_analysis.probe.study.measure_checkpoints", fail)
            line = fails(2, "heterogeneity", "--ckpt", checkpoints["mae"], "--images", image_folder, "--out", out)
        assert "out of memory; use a smaller --batch-size" in line


def test_exit_codes__are_documented() -> None:
    text = " ".join(ok("--help").stdout.split())
    codes = "0 success, 2 usage or output exists, 3 checkpoint, 4 data, 5 numerical, 130 interrupted."
    assert f"Exit codes: {codes}" in text


def test_disk_errors__are_one_line_and_leave_nothing(checkpoints, image_folder: Path, out: Path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", "heterogeneity.csv")

    monkeypatch.setattr(os, "fsync", full)
    result = run("heterogeneity", "--ckpt", checkpoints["mae"], "--images", image_folder, "--out", out, "-q")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "mto-analyze: error: No space left on device: heterogeneity.csv"
    assert contents(out) == {}


def test_training_commands__say_what_is_skipped(checkpoints, tmp_path: Path) -> None:
    for row in range(8):
        write_images(tmp_path / f"images/class{row % 2}", (f"{row}.png",))
    write_images(tmp_path / "images/.ipynb_checkpoints", ("0.png",))
    images = tmp_path / "images"
    knn = ("evaluate", "knn", "--ckpt", checkpoints["mae"], "--train", images, "--test", images, "-k", 1)
    assert f"{images}: skipped 1 hidden or system folders" in ok(*knn, "--out", tmp_path / "knn").stderr
    counted = {"hidden or system folders": 1}
    metadata = json.loads((tmp_path / "knn" / "run.json").read_text())
    assert metadata["skipped"] == {"train": counted, "test": counted}
    line = fails(4, *knn, "--out", tmp_path / "strict", "--strict", "-q")
    assert "skipped 1 hidden or system folders beside the images; move them away" in line
    with locked_folder(tmp_path / "knn"):
        assert "is in use by another process" in fails(2, *knn, "--out", tmp_path / "knn", "-q")
    arguments = ("pretrain", "--recipe", "mae_cifar10_tiny", "--images", images, "--dry-run", "--out", tmp_path / "run")
    assert "skipped 1 hidden or system folders" in ok(*arguments, "--set", "batch_size=8").stderr
    line = fails(4, *arguments, "--set", "batch_size=8", "--strict", "-q")
    assert "skipped 1 hidden or system folders beside the images; move them away" in line


# Other channels than those of a colour image.


@pytest.mark.parametrize("channels", [1, pytest.param(2, marks=pytest.mark.slow), 13])
def test_measuring_commands__take_any_number_of_channels(channels: int, tmp_path: Path, image_folder: Path) -> None:
    from watched_models import small_mae

    model = small_mae()
    config = replace(model.config, channels=channels)
    info = replace(model.info, channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels)
    save_checkpoint(type(model)(config, info), tmp_path / "m.safetensors")
    size = info.image_size
    (tmp_path / "arrays").mkdir()
    for name in "ab":
        values = np.random.default_rng(ord(name)).random((channels, size, size + 8)).astype(np.float32)
        np.save(tmp_path / f"arrays/{name}.npy", values)
    text = ok("inspect", tmp_path / "m.safetensors").stdout
    assert f"{channels} channel" in text
    arguments = ("--ckpt", tmp_path / "m.safetensors", "--images", tmp_path / "arrays", "--value-range", 0, 1, "--out")
    for command in ("heterogeneity", "affinity", "reconstruct", "report"):
        ok(command, *arguments, tmp_path / command)
    assert (csv(tmp_path / "heterogeneity")["num_images"] == 2).all()
    if channels > 1:
        for command in ("heterogeneity", "affinity", "reconstruct", "report"):
            others = ("--ckpt", tmp_path / "m.safetensors", "--images", image_folder, "--out", tmp_path / "x", "-q")
            assert f"has 3 channels, the model {channels}; give images of as many" in fails(4, command, *others)


# Each checkpoint is resolved and opened once, and read at most twice: for its hash, and to load it.


@pytest.mark.parametrize(
    "arguments",
    [
        ("heterogeneity", "--controls", "--control-seeds", 1, "--match-visible", "--save-masks", "--out"),
        ("affinity", "--out"),
        ("reconstruct", "--out"),
        ("report", "--show", 2, "--out"),
    ],
)
def test_measuring_commands__open_each_checkpoint_once(
    arguments: tuple[object, ...], checkpoints, image_folder: Path, out: Path, monkeypatch
) -> None:
    from mto_analysis.checkpoints import loading, reading

    done: list[tuple[str, str]] = []

    def counted(module, name: str) -> None:
        call = getattr(module, name)

        def watch(path, *positional, **options):
            done.append((name, Path(path).name))
            return call(path, *positional, **options)

        monkeypatch.setattr(module, name, watch)

    for module, name in ((loading, "resolve"), (loading, "read_checkpoint"), (reading, "checkpoint_sha256")):
        counted(module, name)
    counted(reading, "_read_safetensors")
    sources = [argument for name in ("mae", "simmim") for argument in ("--ckpt", checkpoints[name])]
    ok(arguments[0], *sources, "--images", image_folder, *arguments[1:], out, "-q")
    for name in ("mae", "simmim"):
        mine = [what for what, file in done if file == f"{name}.safetensors"]
        assert sorted(mine) == ["_read_safetensors", "checkpoint_sha256", "read_checkpoint", "resolve"]


# Terminals.


@pytest.mark.parametrize("option", ["--out", "--images", "--ckpt"])
def test_empty_paths__are_refused_and_not_the_current_folder(option: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ((option, ""), (f"{option}=",)):
        line = fails(2, "heterogeneity", "--ckpt", MAE_FILE, *given)
        assert f"Invalid value for {option}: is empty; give a path" in line
    assert not list(tmp_path.iterdir())


def test_notes__are_not_glued_to_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    for number in console.progress(range(3), 3, "measuring"):
        console.note(f"note {number} [of] 3")
    monkeypatch.undo()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())  # without the terminal's own words
    for number in range(3):
        assert re.search(rf"(^|[\r\n])note {number} \[of\] 3\r?\n", text), text
    assert "measuring" in text
    assert not console._shown


def test_closed_streams__do_not_cost_results(tmp_path: Path) -> None:
    columns = "model,stack,layer_depth,heterogeneity,normalized,num_visible,normalized_ci_low,normalized_ci_high"
    (tmp_path / "h.csv").write_text(f"{columns},ci_low,ci_high\nm,e,0,1,.5,9,.4,.6,.9,1.1\n")
    command = f"{sys.executable} -m mto_analyze"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")])}
    script = f"""
        {command} plot h.csv --out drawn 2>&- | true; echo ${{PIPESTATUS[0]}}
        {command} tables | true; echo ${{PIPESTATUS[0]}}
    """
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    assert done.stderr == ""
    drawn, listed = done.stdout.split()
    assert drawn == "0"
    assert listed in ("0", "141")
    assert (tmp_path / "drawn/heterogeneity.png").stat().st_size > 0
    assert (tmp_path / "drawn/run.json").exists()


# inspect.


def test_inspect__says_what_a_file_is() -> None:
    text = ok("inspect", SIMMIM_FILE).stdout
    rows = {line[:15].strip(" :"): line[15:] for line in text.splitlines()}
    assert rows["file"] == str(SIMMIM_FILE)
    assert rows["family"] == "simmim_vit (microsoft/SimMIM ViT)"
    assert "num_heads 3" in rows["architecture"]
    assert "dim 48" in rows["architecture"]
    assert rows["masked tokens"] == "inpainting-style, in encoder (layer depths 0 to 4)"
    assert rows["image"] == "64 px, patches of 8 px, 64 patches, 3 channels"
    assert rows["masks"] == "0.6 of units of 16 px (file)"
    assert rows["target"] == "pixels"
    assert "relative_position_index" in rows["left out"]
    assert rows["missing"] == "nothing"


def test_inspect__lists_what_must_be_given() -> None:
    text = ok("inspect", MAE_FILE).stdout
    assert "num_heads ?" in text
    assert text.splitlines()[-1].split(":")[1].strip() == "--num-heads, --decoder-num-heads"
    text = ok("inspect", MAE_FILE, "--num-heads", 4, "--decoder-num-heads", 2).stdout
    assert text.splitlines()[-1].split(":")[1].strip() == "nothing"


def test_inspect__prints_json() -> None:
    report = json.loads(ok("inspect", MAE_FILE, "--json", "--num-heads", 4).stdout)
    assert report["info"]["family"] == "mae"
    assert report["info"]["style"] == "decoder"
    assert report["depths"] == {"decoder": 4}
    assert report["needed"] == ["decoder_num_heads"]
    assert report["config"]["num_heads"] == 4
    assert report["config"]["decoder_num_heads"] is None


# plot.


@pytest.fixture
def measured(checkpoints, image_folder: Path, tmp_path: Path) -> Path:
    for name in ("mae", "simmim"):
        ok("heterogeneity", "--ckpt", checkpoints[name], "--images", image_folder, "--out", tmp_path / "runs" / name)
    return tmp_path / "runs"


def test_plot__redraws_the_same_figure_from_the_table(
    checkpoints, image_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    ok("heterogeneity", "--ckpt", checkpoints["mae"], "--images", image_folder, "--out", tmp_path / "run")
    monkeypatch.setattr("mto_analysis.checkpoints.load_checkpoint", None)  # no model is needed
    ok("plot", tmp_path / "run" / "heterogeneity.csv", "--out", tmp_path / "plot")
    run_files, plot_files = contents(tmp_path / "run"), contents(tmp_path / "plot")
    assert set(plot_files) == {"heterogeneity.csv", "heterogeneity.png", "heterogeneity.pdf", "run.json", "run.toml"}
    for name in ("heterogeneity.csv", "heterogeneity.png", "heterogeneity.pdf"):
        assert plot_files[name] == run_files[name], name


@pytest.mark.rendered
def test_plot__draws_in_the_style_format_and_width_that_are_asked_for(tmp_path: Path) -> None:
    table, out = Path(__file__).parents[1] / "figures/fig1a.csv", tmp_path / "plot"
    ok("plot", table, "--style", "paper", "--figure-format", "svg", "--width", "86mm", "--out", out, "--quiet")
    assert {path.suffix for path in out.glob("heterogeneity.*")} == {".csv", ".svg"}
    width = re.search(r'<svg [^>]*width="([\d.]+)pt"', (out / "heterogeneity.svg").read_text(encoding="utf-8"))
    assert width is not None
    assert float(width[1]) / 72 == pytest.approx(86 / 25.4, abs=1e-3)
    assert "images" in (out / "captions.md").read_text(encoding="utf-8")
    for option, value, words in (
        ("--width", "wide", "must be a length such as 3.4in"),
        ("--width", "1mm", "is not from 1 to 40 inches"),
        ("--figure-format", "gif", "is not a list of png, pdf, svg"),
    ):
        assert words in fails(2, "plot", table, option, value, "--out", tmp_path / "no")


def test_plot__compares_tables(measured: Path, tmp_path: Path, monkeypatch) -> None:
    drawn = []
    from mto_analysis.figures.plots import heterogeneity as module

    real = module.draw_heterogeneity

    def watched(table, *, title=None):
        figure = real(table, title=title)
        drawn.append(figure)
        return figure

    monkeypatch.setattr(module, "draw_heterogeneity", watched)
    tables = [measured / name / "heterogeneity.csv" for name in ("mae", "simmim")]
    ok("plot", *tables, "--title", "Fig. 1a", "--out", tmp_path / "plot", "--quiet")
    (figure,) = drawn
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mae", "simmim"]
    assert figure.get_suptitle().startswith("Fig. 1a\n")
    assert csv(tmp_path / "plot")["model"].unique().tolist() == ["mae", "simmim"]


def test_plot__never_overwrites_by_itself(measured: Path, tmp_path: Path) -> None:
    table = measured / "mae" / "heterogeneity.csv"
    assert "not from an earlier run of this command" in fails(2, "plot", table, "--out", measured / "mae")
    ok("plot", table, "--out", tmp_path / "plot")
    before = contents(tmp_path / "plot")
    fails(2, "plot", table, "--out", tmp_path / "plot")
    assert contents(tmp_path / "plot") == before
    result = ok("plot", table, "--out", tmp_path / "plot", "--overwrite", "--quiet")
    assert (result.stdout, result.stderr) == ("", "")


def test_plot__refuses_other_tables(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    line = fails(4, "plot", tmp_path / "other.csv", "--out", tmp_path / "plot")
    assert "is not a heterogeneity table: it lacks model, stack" in line


# demo.


def test_demo__writes_figures_and_tables_and_says_what_they_show(out: Path) -> None:
    result = ok("demo", "--limit", 8, "--out", out)
    figures = {f"{figure}.{kind}" for figure in ("fig1a", "fig1b") for kind in ("png", "pdf", "csv")}
    maps = {f"fig2-{model}.{kind}" for model in ("mae", "simmim") for kind in ("png", "pdf")}
    names = figures | maps | {"fig2.csv", "report.html"}
    assert set(contents(out)) == names | RECORD
    said = result.stderr.splitlines()
    assert all(name in said[-2] for name in names | RECORD)
    assert said[-2].endswith(f"to {out}; open {out / 'report.html'} in a browser")
    assert said[-1].startswith("next: mto-analyze heterogeneity --ckpt ")
    last = result.stdout.splitlines()[-3:]
    assert last[0].startswith("After the last block the affinity of a masked token is spread over effectively 1.")
    assert last[2].endswith("does not show that a model has converged.")
    assert "no better than the mean" not in result.stderr  # the early checkpoints are so on purpose
    assert csv(out, "fig1a.csv")["model"].unique().tolist() == ["MAE", "SimMIM"]
    assert csv(out, "fig1b.csv")["model"].nunique() == 4
    assert (csv(out, "fig1b.csv")["num_images"] == 8).all()
    before = contents(out)
    assert "pass --overwrite" in fails(2, "demo", "--out", out)
    assert contents(out) == before


def test_demo__is_quiet_and_overwrites_when_asked(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("figures.report.render_report", "figures.report_contents.demo_report"):  # seen in the test above
        monkeypatch.setattr(f"mto_analysis.{name}", lambda *_, **__: "page")
    out.mkdir()
    (out / "fig1a.csv").write_text("old")
    result = ok("demo", "--limit", 2, "--out", out, "--quiet", "--overwrite")
    assert result.stderr == ""
    assert (csv(out, "fig1a.csv")["num_images"] == 2).all()


# Real processes.


def test_help_and_registry__import_nothing_heavy() -> None:
    code = """
import sys
from mto_analyze import app
helps = [[*command, "--help"] for command in ([], ["heterogeneity"], ["demo"], ["inspect"], ["plot"])]
for command in (*helps, ["checkpoints", "list"], ["checkpoints", "info", "mae_vit_base_full"]):
    try:
        app(command)
    except SystemExit as stop:
        assert not stop.code, command
heavy = {"torch", "torchvision", "timm", "matplotlib", "pandas", "numpy", "seaborn", "scipy", "pyarrow", "PIL"}
print("HEAVY", sorted(heavy & set(sys.modules)))
import mto_analysis
print("LIBRARY", sorted(heavy & set(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "HEAVY []" in done.stdout
    assert "LIBRARY []" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        pytest.param(["inspect", "none.pth"], 3, marks=pytest.mark.slow),
        (["rauc", "--log", "none.csv", "--baseline", "a", "--target", "b"], 4),
        (["--help"], 0),
    ],
)
def test_process__ends_with_its_exit_code_and_one_line(arguments: list[str], code: int, tmp_path: Path) -> None:
    process = start(*arguments, cwd=tmp_path)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    if code:
        assert len(stderr.splitlines()) == 1
        assert stdout == ""
    else:
        assert "heterogeneity" in stdout
        assert stderr == ""


LONG = ("--masks-per-image", 100000, "--batch-size", 2)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_process__interrupted_ends_with_130_and_leaves_nothing(
    checkpoints, image_folder: Path, out: Path, num_workers: int
) -> None:
    process = start(
        *("heterogeneity", "--ckpt", checkpoints["mae"], "--images", image_folder, "--out", out, *LONG),
        *("--num-workers", num_workers),
    )
    assert "masks:" in process.stderr.readline()  # the model is loaded
    assert "reconstruction loss" in process.stderr.readline()
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C: to the workers too
    try:
        stdout, stderr = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, stderr
    assert stderr == "mto-analyze: error: interrupted; nothing half-written was left behind\n"
    assert stdout == ""
    assert not out.exists()


def whole(path: Path) -> bool:
    content = path.read_bytes()
    if path.suffix == ".csv":
        return content.endswith(b"\n") and len(pd.read_csv(path)) > 0
    if path.suffix == ".json":
        return bool(json.loads(content))
    if path.suffix == ".png":
        return content.endswith(b"IEND\xaeB`\x82")
    if path.suffix == ".html":
        return content.rstrip().endswith(b"</html>")
    if path.suffix == ".toml":
        return bool(tomllib.loads(content.decode()))
    if path.suffix == ".md":
        return content.endswith(b"\n")
    return content.rstrip().endswith(b"%%EOF")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_process__killed_at_any_moment_leaves_only_whole_files(
    checkpoints, image_folder: Path, out: Path, kind
) -> None:
    arguments = ("heterogeneity", "--ckpt", checkpoints["mae"], "--images", image_folder, "--out", out, "--overwrite")
    started = time.monotonic()
    process = start(*arguments)
    process.communicate(timeout=120)
    assert process.returncode == 0
    duration = time.monotonic() - started
    moments = random.Random(0)
    cut_short = 0
    for number in range(20):
        process = start(*arguments, "--seed", number)
        # Half of the kills fall into the last third, where files are written.
        time.sleep(duration * (moments.uniform(0.6, 1.05) if number % 2 else moments.uniform(0.1, 1.0)))
        if process.poll() is None:
            cut_short += 1
            os.killpg(process.pid, kind)
        _, stderr = process.communicate(timeout=60)
        if kind == signal.SIGINT:
            assert process.returncode in (0, 130, -signal.SIGINT), stderr
            leftovers = [path for path in contents(out) if path.startswith(".")]
            assert not leftovers
        names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
        assert names == FILES  # the old ones or new ones, none missing
        assert all(whole(out / name) for name in FILES)
    assert cut_short >= 5


@pytest.mark.slow
def test_heterogeneity__measures_a_vit_b_in_the_official_layout(tmp_path: Path, out: Path) -> None:
    # What the documents promise of mae_pretrain_vit_base_full.pth: no option is needed.
    model = make_mae(
        image_size=224,
        patch_size=16,
        dim=768,
        depth=12,
        num_heads=12,
        mlp_dim=3072,
        decoder_dim=512,
        decoder_depth=8,
        decoder_num_heads=16,
        decoder_mlp_dim=2048,
    )
    for parameter in model.parameters():
        parameter.data *= 0.1
    torch.save({"model": model.state_dict()}, tmp_path / "mae_pretrain_vit_base_full.pth")
    images = write_images(tmp_path / "images")
    ok("heterogeneity", "--ckpt", tmp_path / "mae_pretrain_vit_base_full.pth", "--images", images, "--out", out)
    table = csv(out)
    assert table["layer_depth"].tolist() == list(range(9))
    assert (table["num_visible"] == 49).all()
    assert (table["model"] == "mae_pretrain_vit_base_full").all()


def leaves(group: typer.core.TyperGroup, name: str = "") -> dict[str, typer.core.TyperCommand]:
    """All commands by their words, those of groups included."""
    found: dict[str, typer.core.TyperCommand] = {}
    for key, command in group.commands.items():
        inner = hasattr(command, "commands")
        found |= leaves(command, f"{name}{key} ") if inner else {f"{name}{key}": command}
    return found


COMMANDS = leaves(typer.main.get_command(app))


@pytest.mark.parametrize("name", ["", "checkpoints", "evaluate", *COMMANDS])
def test_help__fits_80_columns_and_ends_with_an_example_that_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = ok(*name.split(), "--help").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 80
    assert "picture" not in text.lower()
    if name not in COMMANDS:
        return
    example = text.partition("\nExample:\n")[2].replace("\\\n", "").strip()
    assert example.startswith(f"mto-analyze {name}")
    COMMANDS[name].make_context(name, shlex.split(example.removeprefix(f"mto-analyze {name}")))


def test_help__says_what_a_training_takes_by_default() -> None:
    """The options themselves have none, so that --resume takes those of the run."""
    given = {each.name: each for each in COMMANDS["pretrain"].params}
    defaults = RunSettings()
    assert all(
        each.default in (None, False) for name, each in given.items() if name in RunSettings.__dataclass_fields__
    )
    for name in RunSettings.__dataclass_fields__:
        value = getattr(defaults, name)
        if name in given and value not in (None, False):
            assert f"by default {value}" in given[name].help, name
    assert f"by default {Evaluation('knn', '', '').every}" in given["eval_every"].help


def test_help__has_its_options_in_panels() -> None:
    for name in ("heterogeneity", "affinity", "report", "reconstruct"):
        lines = ok(name, "--help").stdout.splitlines()
        headings = [line.rstrip(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
        lacking = {"report": "Figures", "reconstruct": "Method"}.get(name)
        panels = ("Input", "Masks", "Model", "Method", "Output", "Figures", "Advanced", "Example")
        assert headings == [each for each in panels if each != lacking], name
    assert "hf://owner/name[@revision]" in ok("inspect", "--help").stdout  # brackets are no markup


def test_help__of_every_command_that_draws_has_the_drawing_options() -> None:
    evaluations = [("evaluate", protocol) for protocol in ("knn", "linear", "finetune")]
    names = ("affinity", "demo", "experiment", "figures", "heterogeneity", "intervene", "plot", "pretrain", "rauc")
    for arguments in (*((name,) for name in (*names, "reconstruct", "relate")), *evaluations):
        text = ok(*arguments, "--help").stdout
        assert all(option in text for option in ("--style", "--figure-format", "--width")), arguments


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help__has_a_short_name_in_every_command(flag: str) -> None:
    for arguments in ([], ["heterogeneity"], ["evaluate", "knn"], ["checkpoints", "list"]):
        shown = CliRunner().invoke(app, [*arguments, flag], prog_name="mto-analyze")
        assert shown.exit_code == 0, shown.output
        assert " ".join(["mto-analyze", *arguments]) in shown.output


def test_version__is_that_of_the_distribution_and_imports_no_torch() -> None:
    program = "import runpy, sys; sys.argv[1:] = ['--version']; runpy.run_module('mto_analysis', run_name='__main__')"
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith(
        f"mto-analyze {mto_analysis.__version__} (torch {torch.__version__.partition('+')[0]}"
    )
    assert "mto_analyze" in shown.stderr
    assert not any(line.rpartition("|")[2].strip() == "torch" for line in shown.stderr.splitlines())


def test_measuring__imports_without_garbage_collection_and_turns_it_on_again(monkeypatch):
    during = []
    monkeypatch.delitem(sys.modules, "torch")  # as before the first import; all that it would import is there
    monkeypatch.setattr(gc, "freeze", lambda: during.append(gc.isenabled()))
    monkeypatch.setattr(gc, "get_freeze_count", lambda: len(during))
    measuring._import_libraries()
    assert during == [False]
    assert gc.isenabled()
    measuring._import_libraries()
    assert during == [False]  # freezing garbage at every command of a notebook would keep it for ever
