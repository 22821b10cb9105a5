"""Runs as curves: which checkpoints there are, what is scored already, and the command end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from labelled_images import write_parquet
from tiny_models import make_mae, make_simmim
from typer.testing import CliRunner

from mto_analysis import load_checkpoint, open_images, save_checkpoint
from mto_analysis.checkpoints.publishing import published_metadata, published_state
from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
from mto_analysis.errors import CheckpointError, CheckpointNotFoundError, DataError, OutputExistsError
from mto_analysis.figures.plots.evaluation import draw_accuracy
from mto_analysis.training.evaluation.checkpoint_scores import (
    CurveFile,
    RunCheckpoint,
    find_checkpoints,
    load_encoder,
    named_checkpoints,
    score_checkpoints,
)
from mto_analysis.training.evaluation.evaluator import Score
from mto_analysis.training.evaluation.protocols import Feature
from mto_analysis.training.methods import build_method
from mto_analysis.training.methods.conmim import ConMIMMethod
from mto_analysis.training.recipes import load_recipe
from mto_analyze import app

IMAGES = open_images(DEMO_IMAGES)


def write_run(folder: Path, epochs: tuple[int, ...] = (2, 10), *, method: str | None = None, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    for epoch in epochs:
        model = make_simmim(seed=epoch + seed)
        for block in model.blocks:
            block.attn.qkv.bias.data[24:48] = 0  # the original has no bias of keys
        torch.save({"model": published_state(model), "epoch": epoch}, folder / f"checkpoint-{epoch:04d}.pth")
    if method is not None:
        (folder / "metrics.csv").write_text(f"method,seed,kind,epoch\n{method},{seed},epoch,1\n")
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    train, test = write_parquet(tmp_path / "train.parquet", 36, 6), write_parquet(tmp_path / "test.parquet", 12, 6)
    return ["--train", str(train), "--test", str(test)]


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def score_of(value: float) -> Score:
    return Score(value, None, Feature("class", 2, "encoder"), 3, 0.1, 1.0)


def test_checkpoint__folders_of_two_methods_differ() -> None:
    names = ("MAE", "MAE 基线", "MAE 方法", "MAE + MTO", "MAE+MTO", "基线")
    stems = [RunCheckpoint("a.pth", name, 0, 100).stem for name in names]
    assert stems[0] == "MAE-seed0-0100"
    assert len(set(stems)) == len(names)


def test_find_checkpoints__are_in_the_order_of_their_numbers(tmp_path) -> None:
    run = write_run(tmp_path / "run", (100, 20, 3))
    (run / "last.pth").write_bytes(b"")
    assert [found.epoch for found in find_checkpoints(str(run), "a", 1)] == [3, 20, 100]
    assert find_checkpoints(str(run / "checkpoint-0020.pth"), "a", 1)[0].epoch == 20


def test_find_checkpoints__refuses_a_folder_without_any(tmp_path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint-\*\.pth"):
        find_checkpoints(str(tmp_path), "a", 0)


def test_named_checkpoints__take_method_and_seed_from_the_run(tmp_path) -> None:
    run = write_run(tmp_path / "somewhere", (1,), method="simmim_tiny+MTO", seed=7)
    plain = write_run(tmp_path / "plain", (1,))
    found = named_checkpoints([str(run), str(plain)])
    assert [(one.method, one.seed) for one in found] == [("simmim_tiny+MTO", 7), ("plain", 0)]
    assert named_checkpoints([str(run)], ["mine"], [3])[0].key == ("mine", 3, 1)


def test_named_checkpoints__refuse_two_for_one_row(tmp_path) -> None:
    runs = [str(write_run(tmp_path / name, (1,))) for name in ("a", "b")]
    with pytest.raises(DataError, match="are both 'm', seed 0, epoch 1"):
        named_checkpoints(runs, ["m", "m"])
    assert len(named_checkpoints(runs, ["m", "m"], [0, 1])) == 2
    with pytest.raises(ValueError, match="one --label per --ckpt"):
        named_checkpoints(runs, ["m"])


def test_score_checkpoints__goes_on_where_it_stopped(tmp_path) -> None:
    checkpoints = [RunCheckpoint(f"c{epoch}", "m", 0, epoch) for epoch in (1, 2, 3)]
    scored: list[int | None] = []

    def score(checkpoint: RunCheckpoint) -> Score:
        if checkpoint.epoch == 3 and len(scored) < 3:
            scored.append(None)
            raise KeyboardInterrupt
        scored.append(checkpoint.epoch)
        return score_of(10.0 * (checkpoint.epoch or 0))

    with pytest.raises(KeyboardInterrupt):
        list(score_checkpoints(checkpoints, CurveFile(tmp_path, {"k": 1}), score, "knn"))
    list(score_checkpoints(checkpoints, CurveFile(tmp_path, {"k": 1}), score, "knn"))
    assert scored == [1, 2, None, 3]
    table = pd.read_csv(tmp_path / "curves.csv")
    assert table["score"].tolist() == [10, 20, 30]
    assert table.columns.tolist()[:5] == ["method", "epoch", "score", "seed", "protocol"]


def test_curve_file__refuses_other_settings(tmp_path) -> None:
    CurveFile(tmp_path, {"k": 1}).add(RunCheckpoint("c", "m", 0, 1), score_of(5.0), "knn")
    with pytest.raises(OutputExistsError, match="begun with k = 1, not 2"):
        CurveFile(tmp_path, {"k": 2})
    assert CurveFile(tmp_path, {"k": 2}, overwrite=True).rows == []


def test_curve_file__refuses_another_file_for_a_row(tmp_path) -> None:
    file = tmp_path / "final.safetensors"
    file.write_bytes(b"one")
    checkpoint = RunCheckpoint(str(file), "0400", 0, None)
    CurveFile(tmp_path / "out", {"k": 1}).add(checkpoint, score_of(5.0), "knn")
    again = CurveFile(tmp_path / "out", {"k": 1})
    assert again.holds(checkpoint)  # 0400 has not become a number
    file.write_bytes(b"two")
    with pytest.raises(OutputExistsError, match=r"has a score of 0400, seed 0, of another file than .*; give --label"):
        again.holds(checkpoint)


@pytest.mark.parametrize("digits", ["12e4567890123456", "0012345678901234"])
def test_curve_file__a_hash_that_looks_like_a_number_stays_as_it_is(digits: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(RunCheckpoint, "sha256", digits)
    checkpoint = RunCheckpoint("a.pth", "m", 0, 1)
    CurveFile(tmp_path, {"k": 1}).add(checkpoint, score_of(5.0), "knn")
    assert CurveFile(tmp_path, {"k": 1}).holds(checkpoint)


def test_curve_file__does_not_touch_what_is_none_of_ours(tmp_path) -> None:
    (tmp_path / "curves.csv").write_text("method,epoch,score\na,1,2\n")
    with pytest.raises(OutputExistsError, match="no curve of ours"):
        CurveFile(tmp_path, {"k": 1})
    assert (tmp_path / "curves.csv").read_text().startswith("method,epoch,score\n")


def test_curve_file__changes_nothing_before_its_first_row(tmp_path) -> None:
    curve = CurveFile(tmp_path / "new", {"k": 1})
    assert not (tmp_path / "new").exists()
    curve.add(RunCheckpoint("c", "m", 0, 1), score_of(5.0), "knn")
    before = (tmp_path / "new" / "curves.csv").read_bytes()
    again = CurveFile(tmp_path / "new", {"k": 2}, overwrite=True)
    assert (tmp_path / "new" / "curves.csv").read_bytes() == before
    again.add(RunCheckpoint("c", "m", 0, 2), score_of(6.0), "knn")
    assert pd.read_csv(tmp_path / "new" / "curves.csv")["epoch"].tolist() == [2]
    (tmp_path / "new" / "curves.csv").unlink()  # as if killed between the settings and the first row
    assert CurveFile(tmp_path / "new", {"k": 2}).rows == []


def test_curve_file__refuses_folders_of_other_commands_and_files(tmp_path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(OutputExistsError, match=r"already holds run\.json"):
        CurveFile(tmp_path, {"k": 1})
    (tmp_path / "last.pth").write_bytes(b"a run's")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="holds a run, whose files would be replaced"):
            CurveFile(tmp_path, {"k": 1}, overwrite=overwrite)
    with pytest.raises(OutputExistsError, match="is a file"):
        CurveFile(tmp_path / "run.json", {"k": 1})


def test_draw_accuracy__has_a_line_per_method_and_the_random_encoder() -> None:
    rows = [
        {"method": method, "epoch": epoch, "score": epoch + seed, "seed": seed, "protocol": "knn"}
        for method in ("a", "b")
        for seed in (0, 1)
        for epoch in (1, 2)
    ]
    (ax,) = draw_accuracy(pd.DataFrame(rows), {"a": 0.5, "b": 0.5}).axes
    uneven = pd.DataFrame([("a", e, e, s, "knn") for s in (0, 1) for e in range(3 - s)],
                          columns=["method", "epoch", "score", "seed", "protocol"])  # fmt: skip
    mean = next(line for line in draw_accuracy(uneven).axes[0].lines if line.get_label() == "a")
    assert mean.get_xdata().tolist() == [0, 1]  # where all seeds have been scored
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "random encoder", "b"]
    assert ax.get_ylabel() == "kNN accuracy (%)"
    means = [line for line in ax.get_lines() if line.get_label() == "a"]
    assert means[0].get_ydata().tolist() == [1.5, 2.5]


@pytest.fixture
def conmim() -> ConMIMMethod:
    """Its slow branch unlike its student."""
    chosen = {"model.dim": "24", "model.depth": "2", "model.num_heads": "3", "model.mlp_dim": "40"}
    chosen |= {"model.projector_dim": "20", "model.projection_dim": "8"}
    method = build_method(load_recipe("conmim_cifar10").with_options(chosen), seed=0)
    with torch.no_grad():
        method.teacher.patch_embed.proj.bias.fill_(0.5)
    return method


def bias_of(source: Path, weights: Any = None) -> tuple[float, str]:
    encoder = load_encoder(str(source), IMAGES, weights=weights)
    return float(encoder.model.patch_embed.proj.bias[0].detach()), encoder.weights


def test_load_encoder__takes_conmims_slow_branch_by_default(conmim, tmp_path) -> None:
    path = tmp_path / "checkpoint-0001.pth"
    torch.save(conmim.published(), path)
    assert bias_of(path) == (0.5, "model_ema")
    assert bias_of(path, "model") == (0.0, "model")
    assert conmim.probed is conmim.teacher
    assert load_encoder(str(path), IMAGES).note == ""


def test_load_encoder__finds_the_slow_branch_in_a_file_of_its_own(conmim, tmp_path) -> None:
    content = conmim.published()
    teacher = content.pop("model_ema")
    path, copy = (tmp_path / f"checkpoint{name}-799.pth" for name in ("", "_copy"))
    torch.save(content, path)
    assert bias_of(path) == (0.0, "model")
    assert "holds no model_ema, which the authors of conmim evaluate" in load_encoder(str(path), IMAGES).note
    with pytest.raises(CheckpointError, match="holds no moving average"):
        load_encoder(str(path), IMAGES, weights="model_ema")
    torch.save({**content, "model": teacher}, copy)
    assert bias_of(path) == bias_of(path, "model_ema") == bias_of(copy) == (0.5, "model_ema")
    assert bias_of(path, "model") == (0.0, "model")
    assert [found.epoch for found in find_checkpoints(str(tmp_path), "a", 0)] == [799]
    assert find_checkpoints(str(copy), "a", 0)[0].epoch == 799


def test_load_encoder__takes_the_trained_weights_of_other_methods(tmp_path) -> None:
    model = make_simmim()
    model.blocks.requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv.bias.data[24:48] = 0
    state = published_state(model)
    average = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save({"model": state, "model_average": average, **published_metadata(model)}, tmp_path / "a.pth")
    own, kind = bias_of(tmp_path / "a.pth")
    assert kind == "model"
    assert bias_of(tmp_path / "a.pth", "model_ema") == (pytest.approx(own + 1), "model_ema")


def test_evaluate__says_what_it_reads_of_which_weights(conmim, tmp_path, sources) -> None:
    run = tmp_path / "run"
    run.mkdir()
    torch.save(conmim.published(), run / "checkpoint-0001.pth")
    options = ["--set", "penalty=0.01", "--random-baseline"]
    result = invoke("linear", "--cached", "--ckpt", run, *sources, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    names = ["pooling", "layer", "norm", "weights"]
    table, chance = (pd.read_csv(tmp_path / "out" / name) for name in ("curves.csv", "random.csv"))
    assert table.loc[0, names].tolist() == ["concat", 2, "off", "model_ema"]
    assert chance.loc[0, names].tolist() == ["concat", 2, "off", "random"]
    assert "model_ema" in result.output
    other = invoke(
        "linear", "--cached", "--ckpt", run, *sources, "--out", tmp_path / "out", *options, "--weights", "model"
    )
    assert other.exit_code == OutputExistsError.exit_code
    assert "was begun with weights = None, not model" in other.output


@pytest.mark.usefixtures("few_compared")
def test_evaluate_knn__takes_the_options_of_measuring_commands(tmp_path: Path) -> None:
    path, out = tmp_path / "mae.pth", tmp_path / "out"
    settings = {"mask_ratio": "high"}  # of no use here
    torch.save({"model": load_checkpoint(DEMO_CHECKPOINTS["MAE"]).state_dict(), "args": settings}, path)
    limits = ("--train-limit", 32, "--test-limit", 4, "-k", 3)
    arguments = ("knn", "--ckpt", path, "--train", DEMO_IMAGES, "--test", DEMO_IMAGES, *limits, "--out")
    chosen = invoke(*arguments, out, "--num-heads", "auto")
    assert chosen.exit_code == 0, chosen.output
    assert "mae: compared head counts: num_heads 4 and decoder_num_heads 4, own loss" in chosen.output
    right = invoke(*arguments, tmp_path / "right", "--num-heads", 4, "-q")
    assert right.exit_code == 0, right.output
    assert "own loss is lower" not in right.output
    assert pd.read_csv(out / "curves.csv")["score"].equals(pd.read_csv(tmp_path / "right" / "curves.csv")["score"])
    wrong = invoke(*arguments, tmp_path / "wrong", "--num-heads", 8, "--mean", "0.5,0.5,0.5", "-q")
    assert "mae: own loss is lower with num_heads 4" in wrong.output
    assert "give --num-heads 4\n" in wrong.output
    told = json.loads((tmp_path / "wrong" / "settings.json").read_text())
    assert (told["num_heads"], told["mean"], told["std"], told["value_range"]) == (8, [0.5] * 3, None, None)
    other = invoke(*arguments, tmp_path / "wrong", "--num-heads", 8)
    assert "was begun with mean = [0.5, 0.5, 0.5], not None" in other.output
    assert "is neither a number from 1 nor auto" in invoke(*arguments, out, "--num-heads", "x").output


def test_evaluate_knn__writes_a_curve_that_rauc_reads(tmp_path, sources) -> None:
    base = write_run(tmp_path / "base", (1, 2, 3), method="base")
    with_mto = write_run(tmp_path / "mto", (1, 2, 3), method="base+MTO", seed=0)
    out = tmp_path / "out"
    arguments = ["knn", "--ckpt", base, "--ckpt", with_mto, *sources, "--out", out, "-k", 3, "--random-baseline"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    names = ["curves.csv", "curves.pdf", "curves.png", "methods.md", "random.csv", "run.json", "run.toml"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "settings.json"]
    score, chance = pd.read_csv(out / "curves.csv")["score"].iloc[2], pd.read_csv(out / "random.csv")["score"].iloc[0]
    assert re.search(
        rf"^base at epoch 3: {score:.2f} %, .* random weights \({chance:.2f} %; ", result.stdout, re.MULTILINE
    )
    methods = (out / "methods.md").read_text()
    assert "k was 3 and the temperature of the weights 0.07" in methods
    assert "random weights were scored for comparison" in methods
    table = pd.read_csv(out / "curves.csv")
    assert table["method"].tolist() == ["base"] * 3 + ["base+MTO"] * 3
    assert table["epoch"].tolist() == [1, 2, 3] * 2
    assert (table["top5"] >= table["score"]).all()
    assert json.loads((out / "run.json").read_text())["protocol"] == "knn"
    again = invoke(*arguments)
    assert "6 of 6 checkpoints are in" in again.output
    # Scores of toys are all alike, so that a gain is written in.
    gains = table.assign(score=10.0 * table["epoch"] + (table["method"] == "base+MTO") * table["epoch"])
    gains.loc[gains["method"] == "base+MTO", "weights"] = "model_ema"  # a row is a score, whichever weights it is of
    gains.to_csv(out / "curves.csv", index=False)
    ratio = CliRunner().invoke(app, ["rauc", "--log", str(out / "curves.csv"), "--baseline", "base", "--json"])
    assert ratio.exit_code == 0, ratio.output
    assert json.loads(ratio.stdout)[0]["rauc"] == pytest.approx(1.2)


def test_evaluate_linear__is_quick_on_cached_features(tmp_path, sources) -> None:
    checkpoint = tmp_path / "model.safetensors"
    save_checkpoint(make_mae(), checkpoint)
    arguments = ["linear", "--cached", "--ckpt", checkpoint, *sources, "--out", tmp_path / "out"]
    result = invoke(*arguments, "--set", "iterations=30", "--pooling", "patches")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "out" / "curves.csv")
    assert table["protocol"].tolist() == ["linear_cached"]
    assert table["score"].tolist() == [100]
    assert table["epoch"].isna().all()
    assert table.loc[0, ["pooling", "layer", "norm", "crop_pct", "weights"]].tolist() == [
        "patches",
        2,
        "encoder",
        1,
        "model",
    ]
    assert 0 < table.loc[0, "iterations"] < 30
    assert not (tmp_path / "out" / "curves.png").exists()
    assert invoke(*arguments, "--set", "epochs=3").exit_code == 2


@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_evaluate__trains_a_classifier_per_checkpoint(tmp_path, sources, protocol) -> None:
    run = write_run(tmp_path / "run", method="m", seed=4)
    options = ["--set", "epochs=1", "--set", "warmup_epochs=0", "--set", "batch_size=12", "--accumulation", 2]
    result = invoke(protocol, "--ckpt", run, *sources, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    for epoch in (2, 10):
        folder = tmp_path / "out" / f"m-seed4-{epoch:04d}"
        names = ["classifier.pth", "metrics.csv", "run.json", "settings.json"]
        assert sorted(path.name for path in folder.iterdir()) == names
        assert json.loads((folder / "settings.json").read_text())["batch_size"] == 12
    assert pd.read_csv(tmp_path / "out" / "curves.csv")["seed"].tolist() == [4, 4]
    for name in ("curves.csv", "curves.png", "curves.pdf", "run.json"):
        (tmp_path / "out" / name).unlink()  # as if killed before the first score was in the curve
    again = invoke(protocol, "--ckpt", run, *sources, "--out", tmp_path / "out", *options)
    assert again.exit_code == 0, again.output
    assert "m-seed4-0002 is complete (1 epochs): nothing to do" in again.output
    assert len(pd.read_csv(tmp_path / "out" / "curves.csv")) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--train", "nowhere"], 4, "no images at nowhere"),
        (["--ckpt", "nowhere.pth"], 3, "nowhere.pth"),
        (["--device", "cuda:77"], 2, "cannot be used"),
        (["--temperature", "0"], 2, "temperature must be above 0"),
    ],
)
def test_evaluate__says_what_is_wrong_in_one_line(tmp_path, sources, arguments, code, message) -> None:
    run = write_run(tmp_path / "run", (1,))
    given = ["knn", "--ckpt", run, *sources, "--out", tmp_path / "out", *arguments]
    if "--ckpt" in arguments:
        given = ["knn", *sources, "--out", tmp_path / "out", *arguments]
    result = invoke(*given)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_curve__on_a_full_disk_keeps_the_one_that_was_to_be_replaced(tmp_path, monkeypatch):
    from mto_analysis.runtime import outputs

    score = score_of(50.0)
    first = CurveFile(tmp_path, {"k": 1})
    first.add(RunCheckpoint("a.pth", "MAE", 0, 1), score, "knn")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = CurveFile(tmp_path, {"k": 2}, overwrite=True)
    fsync = outputs.os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        second.add(RunCheckpoint("a.pth", "MAE", 0, 1), score, "knn")
    monkeypatch.setattr(outputs.os, "fsync", fsync)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
