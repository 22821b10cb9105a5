"""``mto-analyze pretrain``: options, one line for each failure, and a run that goes on by its folder alone."""

import contextlib
import importlib
import json
import re
import sys
import warnings

import pytest
from pretraining_cases import SMALL_MAE, Stopped, contents, rows, same, small_recipe, some_images, stop_after
from typer.testing import CliRunner

from mto_analysis.demo import DEMO_IMAGES
from mto_analysis.errors import DataError
from mto_analysis.images import open_images
from mto_analysis.mto import MTOConfig
from mto_analysis.training import RunSettings, load_recipe, pretrain
from mto_analyze import app

SETS = [part for key, value in SMALL_MAE.items() for part in ("--set", f"{key}={value}")]
START = ["pretrain", "--recipe", "mae_cifar10", "--device", "cpu", *SETS, "--set", "batch_size=64"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_pretrain__trains_with_mto_and_evaluates(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("mto_analyze.pretrain"), "SECONDS_BETWEEN_LINES", 0.0)
    options = ["--mto", "--set", "mto.ranking_weight=0", "--eval-every", 1, "--eval-test", DEMO_IMAGES, "--seed", 3]
    done = invoke(*START, "--images", DEMO_IMAGES, "--out", tmp_path / "run", *options)
    assert done.exit_code == 0, done.output
    assert "epoch 2/2  loss" in done.stderr
    assert done.stderr.splitlines()[0] == "recipe:     mae_cifar10 (mae), seed 3, with MTO"
    assert "training:   2 epochs x 4 steps of 64 images, base learning rate" in done.stderr
    assert "evaluation: knn every epoch on" in done.stderr
    assert len(re.findall(r"^step \d/8  epoch [12] loss [\d.]+  \d+ s left$", done.stderr, re.MULTILINE)) >= 5
    metadata = json.loads((tmp_path / "run" / "run.json").read_text())
    assert metadata["settings"]["mto"]["ranking_weight"] == 0
    assert metadata["identity"]["seed"] == 3
    curve = rows(tmp_path / "run" / "curves.csv")
    assert [(row["method"], row["epoch"], row["seed"], row["protocol"]) for row in curve] == [
        ("mae_cifar10+MTO", "1", "3", "knn"),
        ("mae_cifar10+MTO", "2", "3", "knn"),
    ]
    methods = (tmp_path / "run" / "methods.md").read_text()
    assert "pre-trained for 2 epochs on 256 images" in methods
    assert "0.01 (sparsity), 0.01 (embedding) and 0 (ranking), at all layers" in methods
    assert "The seed was 3; training ran in fp32 on 1 process (cpu)." in methods
    again = invoke("pretrain", "--config", tmp_path / "run" / "run.toml", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert [row["loss"] for row in rows(tmp_path / "again" / "metrics.csv")] == [
        row["loss"] for row in rows(tmp_path / "run" / "metrics.csv")
    ]
    read = invoke("inspect", tmp_path / "run" / "last.pth")
    assert "decoder_num_heads 2" in read.output


def test_pretrain__resumes_by_its_folder_alone(tmp_path):
    data = ["--images", DEMO_IMAGES]
    assert invoke(*START, *data, "--out", tmp_path / "whole", "--mto").exit_code == 0
    # As if it had been killed after its first epoch: the last write of that epoch is put back.
    cut = tmp_path / "cut"
    settings = RunSettings(device="cpu", mto=MTOConfig())
    with pytest.raises(Stopped):
        list(
            pretrain(
                small_recipe(batch_size="64"),
                open_images(DEMO_IMAGES),
                cut,
                settings,
                on_step=stop_after(6),
                source=str(DEMO_IMAGES),
            )
        )
    done = invoke("pretrain", "--out", cut, "--resume")
    assert done.exit_code == 0, done.output
    assert "resuming after step 4" in done.stderr
    one, other = (contents(tmp_path / name / "last.pth")["resume"] for name in ("whole", "cut"))
    assert same(one["method"], other["method"])
    again = invoke("pretrain", "--out", cut, "--resume")
    assert again.exit_code == 0
    assert "nothing to do" in again.stderr
    (cut / "recipe.toml").unlink()
    without = invoke("pretrain", "--out", cut, "--resume")
    assert without.exit_code == 2
    assert "recipe.toml is gone; give the recipe of the run with --recipe" in without.stderr


@pytest.mark.parametrize(
    ("after", "told"), [(1, "nothing half-written was left behind"), (5, "--resume continues from last.pth")]
)
def test_pretrain__interrupted_says_how_to_go_on(tmp_path, monkeypatch, after, told):
    def interrupt(record):
        if record.step == after:
            raise KeyboardInterrupt

    command = importlib.import_module("mto_analyze.pretrain")  # the package's attribute is the function
    monkeypatch.setattr(command, "_bar", lambda quiet: contextlib.nullcontext(interrupt))
    done = invoke(*START, "--images", DEMO_IMAGES, "--out", tmp_path / "run")
    assert done.exit_code == 130
    assert f"interrupted; {told}" in done.stderr.splitlines()[-1]


def test_dry_run__tells_and_writes_nothing(tmp_path):
    done = invoke(*START, "--images", DEMO_IMAGES, "--out", tmp_path / "run", "--dry-run", "--accumulation", 2)
    assert done.exit_code == 0, done.output
    assert "64 = 32 x 1 x 2" in done.stdout
    assert "8 = 2 x 4" in done.stdout
    assert "set for this run" in done.stdout
    assert "memory of a process" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--set", "epochs"], 2, "key=value"),
        (["--set", "depth=3"], 2, "no setting is called 'depth'"),
        (["--set", "epochs=many"], 2, "epochs must be a whole number"),
        (["--set", "mto.eps=1"], 2, "needs --mto"),
        (["--mto", "--set", "mto.sparse=1"], 2, "no setting is called 'mto.sparse'"),
        (["--mto", "--set", "mto.layers=0,9"], 2, "layers must be 0 to 2"),
        (["--accumulation", "3"], 2, "effective batch of 64"),
        (["--eval-every", "2"], 2, "--eval-test"),
        (["--recipe", "mae_cifar"], 2, "no recipe is called 'mae_cifar'"),
        (["--device", "cuda:7"], 2, "cuda:7"),
        (["--fsdp"], 2, "start several with torchrun"),
        (["--images", "nowhere"], 4, "nowhere"),
        (["--set", "batch_size=300"], 4, "256 images do not fill one batch of 300"),
        (["--eval-test", "nowhere"], 4, "nowhere"),
    ],
)
def test_pretrain__refuses_in_one_line_and_writes_nothing(tmp_path, options, code, told):
    done = invoke(*START, "--images", DEMO_IMAGES, "--out", tmp_path / "run", *options)
    assert done.exit_code == code, done.output
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_pretrain__does_not_write_over_a_run(tmp_path):
    arguments = [*START, "--images", DEMO_IMAGES, "--out", tmp_path / "run", "--set", "epochs=1"]
    assert invoke(*arguments).exit_code == 0
    before = contents(tmp_path / "run" / "last.pth")
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "--resume" in done.stderr
    done = invoke(*arguments, "--resume", "--seed", 5)
    assert done.exit_code == 3
    assert "seed was 0 and is now 5" in done.stderr
    assert same(before, contents(tmp_path / "run" / "last.pth"))


def image_files(folder):
    folder.mkdir()
    images = some_images(64)
    for number in range(64):
        (folder / f"{number:02}.png").write_bytes(images.read(number))
    return folder


def test_broken_image__is_replaced_or_with_strict_an_error(tmp_path):
    folder = image_files(tmp_path / "images")
    (folder / "07.png").write_bytes(b"no image")
    (folder / "._07.png").write_bytes(b"")
    done = invoke(*START, "--images", folder, "--out", tmp_path / "run", "--set", "epochs=1")
    assert done.exit_code == 0, done.output
    assert "takes the place of 07.png" in done.stderr
    skipped = json.loads((tmp_path / "run" / "run.json").read_text())["skipped"]
    assert (list(skipped), skipped["hidden or system files"]) == (["hidden or system files", "07.png"], 1)
    (folder / "._07.png").unlink()
    done = invoke(*START, "--images", folder, "--out", tmp_path / "strict", "--set", "epochs=1", "--strict")
    assert done.exit_code == 4
    assert "07.png" in done.stderr
    assert not (tmp_path / "strict").exists()


def test_vanished_images__end_the_run_and_it_goes_on_when_they_are_back(tmp_path):
    folder = image_files(tmp_path / "images")

    def vanish(record):
        if record.step == 5:
            folder.rename(tmp_path / "elsewhere")

    settings = RunSettings(device="cpu", in_memory=False)
    with pytest.raises(DataError):
        list(
            pretrain(
                small_recipe(), open_images(folder), tmp_path / "run", settings, on_step=vanish, source=str(folder)
            )
        )
    assert contents(tmp_path / "run" / "last.pth")["resume"]["step"] == 4
    done = invoke("pretrain", "--resume", "--out", tmp_path / "run")
    assert done.exit_code == 4
    assert len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "elsewhere").rename(folder)
    assert invoke("pretrain", "--resume", "--out", tmp_path / "run").exit_code == 0
    assert contents(tmp_path / "run" / "last.pth")["resume"]["step"] == 8


def test_pretrain__ends_with_a_figure_also_when_there_is_nothing_left_to_do(tmp_path):
    limits = ["--eval-test", DEMO_IMAGES, "--eval-train-limit", 32, "--eval-test-limit", 16, "--eval-start"]
    start = [
        "pretrain",
        "--recipe",
        "mae_cifar10_tiny",
        "--device",
        "cpu",
        "--set",
        "epochs=1",
        "--images",
        DEMO_IMAGES,
    ]
    done = invoke(*start, "--mto", *limits, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "wrote run.png, run.pdf" in done.stderr
    assert [row["epoch"] for row in rows(tmp_path / "run" / "curves.csv")] == ["0", "1"]
    metadata = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (metadata["settings"]["evaluation"]["limit"], metadata["settings"]["evaluation"]["test_limit"]) == (32, 16)
    (tmp_path / "run" / "run.png").unlink()
    assert invoke("pretrain", "--resume", "--out", tmp_path / "run").exit_code == 0
    assert (tmp_path / "run" / "run.png").is_file()


def test_pretrain__replaces_no_file_of_another(tmp_path):
    mine = tmp_path / "metrics.csv"
    mine.write_text("mine\n")
    for more in ([], ["--resume"]):
        done = invoke(*START, "--images", DEMO_IMAGES, "--out", tmp_path, *more)
        assert (done.exit_code, mine.read_text()) == (2, "mine\n")
        assert "contains metrics.csv, not written by a run" in done.stderr
    recipe = tmp_path / "other" / "recipe.toml"
    recipe.parent.mkdir()
    recipe.write_text(load_recipe("mae_cifar10").to_toml() + "# mine\n")
    done = invoke("pretrain", "--recipe", recipe, "--images", DEMO_IMAGES, "--out", recipe.parent)
    assert done.exit_code == 2
    assert recipe.read_text().endswith("# mine\n")


def test_resume__says_that_the_folder_is_of_another_command(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    done = invoke("pretrain", "--resume", "--out", tmp_path)
    assert done.exit_code == 3
    assert "run.json is of another command" in done.stderr
    both = invoke("pretrain", "--resume", "--overwrite", "--out", tmp_path)
    assert both.exit_code == 2
    assert "give one of them" in both.stderr


@pytest.mark.parametrize(("option", "package"), [(["--tensorboard"], "tensorboard"), (["--wandb", "x"], "wandb")])
def test_boards__that_are_not_installed_are_named_before_anything_is_written(tmp_path, monkeypatch, option, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    done = invoke(*START, "--images", DEMO_IMAGES, "--out", tmp_path / "run", *option)
    assert done.exit_code == 2
    assert f"pip install {package}" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("always")
def test_warnings__are_one_line_without_code(monkeypatch):
    before = warnings.formatwarning

    def warn(*_, **__):
        warnings.warn("two\n lines", stacklevel=1)
        raise DataError("and an error")

    monkeypatch.setattr("mto_analysis.images.open_images", warn)
    with warnings.catch_warnings():  # as outside of pytest, which records them
        warnings.showwarning = lambda *given: sys.stderr.write(warnings.formatwarning(*given))
        done = invoke(*START, "--images", DEMO_IMAGES, "--out", "run")
    assert done.stderr == "mto-analyze: warning: two lines\nmto-analyze: error: and an error\n"
    assert warnings.formatwarning is before
