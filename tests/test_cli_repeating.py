"""``--config`` and ``run.toml``: what is read, what is refused, and that a run's own file repeats it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from image_files import write_images
from typer.testing import CliRunner

from mto_analysis.demo import DEMO_CHECKPOINTS
from mto_analysis.figures.methods import methods_paragraph
from mto_analyze import app
from mto_analyze.repeating import _FIRST_LINE, _absolute

MAE = DEMO_CHECKPOINTS["MAE"]


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_run_file__repeats_its_run_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    # A text, a number, a pair, a list, one of several words, a flag, a repeated option, and text that is a number.
    options = [
        "--mask-ratio",
        0.5,
        "--seed",
        7,
        "--value-range",
        0,
        255,
        "--mean",
        "0.5,0.5,0.5",
        "--precision",
        "fp64",
    ]
    options += [
        "--save-masks",
        "--ckpt",
        MAE,
        "--ckpt",
        DEMO_CHECKPOINTS["SimMIM"],
        "--label",
        "07",
        "--label",
        'a "b"',
    ]
    run("heterogeneity", "--images", "images", *options, "--out", "one", "-q")
    stored = tomllib.loads((tmp_path / "one" / "run.toml").read_text())
    assert stored["command"] == "heterogeneity"
    assert stored["images"] == str(tmp_path / "images")
    assert (stored["seed"], stored["value-range"], stored["label"]) == (7, [0, 255], ["07", 'a "b"'])

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run("heterogeneity", "--config", "../one/run.toml", "--out", "two")
    tables = [
        name
        for name in (path.name for path in (tmp_path / "one").iterdir())
        if not name.startswith(("run.", "methods"))
    ]
    assert {name.partition(".")[0] for name in tables} >= {"heterogeneity_per_image", "masks-07", "masks-a-b"}
    for name in tables:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "elsewhere/two" / name).read_bytes(), name
    assert tomllib.loads((tmp_path / "elsewhere/two/run.toml").read_text()) == stored | {"out": "two"}
    # What is given on the command line takes precedence.
    run("heterogeneity", "--config", "../one/run.toml", "--out", "three", "--seed", 8, "--label", "x", "--label", "y")
    given = json.loads((tmp_path / "elsewhere/three/run.json").read_text())["arguments"]
    assert (given["seed"], given["label"], given["mask_ratio"]) == (8, ["x", "y"], 0.5)


def test_methods__say_what_was_measured(tmp_path: Path) -> None:
    run(
        "heterogeneity",
        "--ckpt",
        MAE,
        "--limit",
        2,
        "--masks-per-image",
        2,
        "--mask-ratio",
        0.5,
        "--measures",
        "cosine,rank",
        "--out",
        tmp_path,
        "-q",
    )
    text = (tmp_path / "methods.md").read_text()
    metadata = json.loads((tmp_path / "run.json").read_text())
    for fact in (
        *(
            "2 of the bundled CIFAR-10 test images",
            "32 x 32 pixels",
            "0.5 of random patches of 4 px (as asked for), seed 0",
        ),
        *(
            "fp32 on cpu",
            "In the same pass these were measured: rank and cosine.",
            "95 % intervals (Student's t) are over images, of 2 masks each",
            metadata["models"][0]["sha256"][:12],
        ),
        *(f"mto-analysis {metadata['versions']['mto-analysis']}", f"PyTorch {metadata['versions']['torch']}"),
    ):
        assert fact in text, fact
    assert methods_paragraph("plot", metadata) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limt = 3", "`heterogeneity` has no option 'limt'; did you mean limit?"),
        ('command = "affinity"', "is of `mto-analyze affinity`, not of `mto-analyze heterogeneity`"),
        ("limit = ", "is not TOML"),
        ("limit = true", "limit must be a value, not true or false"),
        ('strict = "yes"', "strict must be true or false"),
        ("limit = [1, 2]", "limit must be one value, got [1, 2]"),
        ("value-range = [1]", "value-range must have 2 values"),
        ("limit = 0", "Invalid value for '--limit'"),
        ('images = ""', "Invalid value for --images: is empty"),
    ],
)
def test_config__is_refused_where_it_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    result = run("heterogeneity", "--ckpt", MAE, "--config", tmp_path / "c.toml", "--out", tmp_path / "out", code=2)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_config__takes_underscores_and_arguments(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f'ckpt = "{MAE}"\nnum_heads = 4\njson = true')
    assert json.loads(run("inspect", "--config", tmp_path / "c.toml").stdout)["info"]["family"] == "mae"


def test_run_file__of_the_user_is_not_replaced(tmp_path: Path) -> None:
    own = tmp_path / "run.toml"
    own.write_text(f'ckpt = "{MAE}"\nlimit = 2\n')
    result = run("heterogeneity", "--config", own, "--out", tmp_path, code=2)
    assert "run.toml is not from an earlier run of this command; choose another --out" in result.stderr
    assert own.read_text().startswith("ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
    own.write_text(f"{_FIRST_LINE} affinity --config run.toml\n")
    assert "is not from an earlier run of this command" in run("tables", "--out", tmp_path, code=2).stderr


def test_paths__are_absolute_whatever_they_contain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "mae_cifar10").mkdir()
    many, file = SimpleNamespace(metavar="CKPT"), SimpleNamespace(metavar="NAME|FILE")
    assert _absolute(("lr=0.1", "x=mae_cifar10"), many) == [f"{tmp_path}/lr=0.1", f"x={tmp_path}/mae_cifar10"]
    assert _absolute("mae_cifar10", file) == "mae_cifar10"
    (tmp_path / "own.toml").touch()
    assert _absolute("own.toml", file) == f"{tmp_path}/own.toml"
