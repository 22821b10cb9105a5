"""The engine: what a run writes, and that it goes on after any stop as if nothing had happened."""

import json

import pytest
import torch
from pretraining_cases import Stopped, contents, rows, run, same, small_recipe, some_images, stop_after

from mto_analysis import load_checkpoint
from mto_analysis.demo import DEMO_IMAGES
from mto_analysis.errors import CheckpointError, DataError, NumericalError, OutputExistsError, RunInUseError
from mto_analysis.mto import MTOConfig
from mto_analysis.rauc.logs import read_log
from mto_analysis.training import RunSettings, pretrain
from mto_analysis.training.evaluation import Evaluation

FULL = RunSettings(device="cpu", log_every=3, mto=MTOConfig(), ema=0.9, accumulation=2, save_steps=1, keep_every=1)


def score_of(model):
    """Stands for an evaluation: reads the weights, and draws random numbers as a sloppy one might."""
    torch.rand(3)
    return 50 + float(sum(p.detach().double().sum() for p in model.parameters())) % 1


def test_pretrain__writes_all_files_and_learns(tmp_path):
    records = run(tmp_path / "run", small_recipe(epochs="4", base_lr="0.02"), evaluate=score_of)
    assert [record.epoch for record in records] == [1, 2, 3, 4]
    assert records[-1].loss < records[0].loss
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "recipe.toml", "metrics.csv", "curves.csv", "last.pth", "checkpoint-0004.pth"}
    metadata = json.loads((tmp_path / "run" / "run.json").read_text())
    assert metadata["state"] == "complete"
    assert metadata["identity"]["images"]["count"] == 64


def test_pretrain__checkpoints_load_as_published_ones(tmp_path):
    run(tmp_path / "run")
    kept, last = (load_checkpoint(tmp_path / "run" / name) for name in ("checkpoint-0002.pth", "last.pth"))
    assert same(kept.state_dict(), last.state_dict())
    method = contents(tmp_path / "run" / "last.pth")["resume"]["method"]
    assert torch.equal(kept.mask_token, method["student.mask_token"])
    assert kept.info.mask_rule == small_recipe().mask_rule


def test_metrics__have_a_row_per_logged_step_and_epoch(tmp_path):
    run(tmp_path / "run", settings=RunSettings(device="cpu", log_every=3, mto=MTOConfig()), evaluate=score_of)
    table = rows(tmp_path / "run" / "metrics.csv")
    assert [(row["kind"], row["step"]) for row in table] == [
        ("step", "1"),
        ("step", "3"),
        ("step", "4"),
        ("epoch", "4"),
        ("step", "6"),
        ("step", "8"),
        ("epoch", "8"),
    ]
    for row in table:
        assert float(row["loss"]) == pytest.approx(float(row["pixels"]) + float(row["mto"]))
        assert row["heterogeneity_0"]
        assert row["heterogeneity_2"]
    steps = [float(row["loss"]) for row in table if row["kind"] == "step"]
    assert float(table[3]["loss"]) == pytest.approx((steps[0] + 2 * steps[1] + steps[2]) / 4)


def test_metrics_and_curves__are_read_by_the_log_reader(tmp_path):
    run(tmp_path / "run", evaluate=score_of)
    for name, form in (("metrics.csv", "table"), ("curves.csv", "mto-analyze curves")):
        log = read_log(tmp_path / "run" / name)
        assert log.form == form
        assert list(log.rows["epoch"]) == [1, 2]
        assert list(log.rows["method"]) == ["mae_cifar10"] * 2


@pytest.mark.parametrize("method", ["mae", "simmim"])
def test_resume__after_every_step_gives_the_same_run_bit_for_bit(tmp_path, method):
    recipe = small_recipe(method, clip_grad="1.0")
    run(tmp_path / "whole", recipe, FULL, evaluate=score_of)
    for step in range(1, 9):
        with pytest.raises(Stopped):
            run(tmp_path / "cut", recipe, FULL, evaluate=score_of, resume=True, on_step=stop_after(step))
    run(tmp_path / "cut", recipe, FULL, evaluate=score_of, resume=True)
    assert same(contents(tmp_path / "whole" / "last.pth"), contents(tmp_path / "cut" / "last.pth"))
    assert same(
        contents(tmp_path / "whole" / "checkpoint-0001.pth"), contents(tmp_path / "cut" / "checkpoint-0001.pth")
    )
    for name in ("metrics.csv", "curves.csv"):
        assert rows(tmp_path / "whole" / name) == rows(tmp_path / "cut" / name)


def test_resume__from_an_epoch_drops_what_came_after(tmp_path):
    run(tmp_path / "whole")
    settings = RunSettings(device="cpu", log_every=2, save_every=1)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", settings=settings, on_step=stop_after(7))
    with (tmp_path / "cut" / "metrics.csv").open("a") as file:
        file.write("mae_cifar10,0,step,1.9")  # cut off while it was written
    (tmp_path / "cut" / ".last.pth.abc.tmp").write_bytes(b"half")
    run(tmp_path / "cut", settings=settings, resume=True)
    assert rows(tmp_path / "whole" / "metrics.csv") == rows(tmp_path / "cut" / "metrics.csv")
    assert not list((tmp_path / "cut").glob(".*.tmp"))


def test_resume__of_a_complete_run_does_nothing(tmp_path):
    run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    notes = []
    assert run(tmp_path / "run", resume=True, on_note=notes.append) == []
    assert "complete" in notes[0]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}


def test_resume__of_a_run_killed_after_its_last_checkpoint_marks_it_complete(tmp_path):
    run(tmp_path / "run")
    metadata = tmp_path / "run" / "run.json"
    finished = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**finished, "state": "running"}))
    assert run(tmp_path / "run", resume=True) == []
    assert json.loads(metadata.read_text()) == finished


def test_resume__of_another_run_says_what_differs(tmp_path):
    run(tmp_path / "run")
    for recipe, settings, images, told in (
        (small_recipe(epochs="3"), None, None, r"recipe.epochs was 2 and is now 3"),
        (None, RunSettings(seed=5, device="cpu"), None, r"seed was 0 and is now 5"),
        (None, RunSettings(mto=MTOConfig(), device="cpu"), None, r"mto"),
        (None, None, some_images(48), r"images.count was 64 and is now 48"),
    ):
        with pytest.raises(CheckpointError, match=told):
            run(tmp_path / "run", recipe, settings, images=images, resume=True)


@pytest.mark.parametrize("written", [None, 1])
def test_resume__of_an_older_version_names_it(tmp_path, written):
    run(tmp_path / "run")
    metadata = tmp_path / "run" / "run.json"
    stored = json.loads(metadata.read_text())
    stored["versions"]["mto-analysis"] = "0.0.7"
    stored["identity"].pop("randomness")
    if written is not None:
        stored["identity"]["randomness"] = written
    metadata.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"mto-analysis 0\.0\.7.*other random numbers \(revision 1"):
        run(tmp_path / "run", resume=True)
    assert json.loads(metadata.read_text()) == stored


def test_resume__takes_settings_given_in_another_order(tmp_path):
    run(tmp_path / "run", small_recipe().with_options({"epochs": "2", "base_lr": "0.01"}))
    other = small_recipe().with_options({"base_lr": "0.01"}).with_options({"epochs": "2"})
    assert other.sources != small_recipe().with_options({"epochs": "2", "base_lr": "0.01"}).sources
    assert run(tmp_path / "run", other, resume=True) == []  # the same run, and complete


def test_resume__of_a_damaged_checkpoint_is_refused(tmp_path):
    run(tmp_path / "run")
    last = tmp_path / "run" / "last.pth"
    last.write_bytes(last.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged"):
        run(tmp_path / "run", resume=True)


def test_pretrain__replaces_a_run_only_when_told(tmp_path):
    run(tmp_path / "run", evaluate=score_of)
    with pytest.raises(OutputExistsError, match="--resume"):
        run(tmp_path / "run")
    run(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "curves.csv").exists()
    assert len(rows(tmp_path / "run" / "metrics.csv")) == 7


def test_pretrain__leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run(tmp_path / "run", small_recipe("simmim"), evaluate=score_of)
    assert torch.equal(torch.rand(4), expected)


def test_accumulation__gives_the_same_run_to_rounding(tmp_path):
    run(tmp_path / "one", settings=RunSettings(device="cpu", log_every=1))
    run(tmp_path / "four", settings=RunSettings(device="cpu", log_every=1, accumulation=4))
    for one, four in zip(rows(tmp_path / "one" / "metrics.csv"), rows(tmp_path / "four" / "metrics.csv"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(four["loss"]), rel=1e-4)


@pytest.mark.parametrize("setting", ["gradient_checkpointing", pytest.param("compile", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile looks at it
def test_checkpointing_and_compiling__change_nothing_but_rounding(tmp_path, setting):
    recipe = small_recipe("simmim")
    plain = RunSettings(device="cpu", log_every=1, mto=MTOConfig())
    run(tmp_path / "plain", recipe, plain)
    run(tmp_path / "other", recipe, RunSettings(device="cpu", log_every=1, mto=MTOConfig(), **{setting: True}))
    for one, other in zip(
        rows(tmp_path / "plain" / "metrics.csv"), rows(tmp_path / "other" / "metrics.csv"), strict=True
    ):
        for column in ("loss", "mto", "heterogeneity_0", "heterogeneity_2"):
            assert float(one[column]) == pytest.approx(float(other[column]), rel=1e-5)


def test_batch__must_be_shared_out_evenly(tmp_path):
    with pytest.raises(ValueError, match="effective batch of 16"):
        run(tmp_path / "run", settings=RunSettings(device="cpu", accumulation=3))
    with pytest.raises(DataError, match="do not fill one batch"):
        run(tmp_path / "run", small_recipe(batch_size="65"))
    assert not (tmp_path / "run").exists()


def test_loss__not_finite_stops_with_term_step_and_checkpoint(tmp_path, monkeypatch):
    from mto_analysis.training.methods.mae import MAEMethod

    forward = MAEMethod.forward
    calls = []

    def broken(self, *args):
        calls.append(1)
        terms = forward(self, *args)
        return {**terms, "other": terms["pixels"] * (float("nan") if len(calls) == 6 else 0.0)}

    monkeypatch.setattr(MAEMethod, "forward", broken)
    with pytest.raises(NumericalError, match=r"term other is nan at step 6 .*last.pth"):
        run(tmp_path / "run")
    assert contents(tmp_path / "run" / "last.pth")["resume"]["step"] == 4


def test_evaluation__is_run_every_so_many_epochs_and_at_the_end(tmp_path):
    evaluation = Evaluation("knn", str(DEMO_IMAGES), str(DEMO_IMAGES), every=2)
    settings = RunSettings(device="cpu", evaluation=evaluation, evaluate_start=True)
    records = run(tmp_path / "run", small_recipe(epochs="3"), settings)
    assert [record.score is None for record in records] == [True, False, False]
    table = rows(tmp_path / "run" / "curves.csv")
    assert [row["epoch"] for row in table] == ["0", "2", "3"]
    assert [float(row["score"]) for row in table[1:]] == [record.score for record in records[1:]]


def test_record__comes_when_the_epoch_is_on_disk(tmp_path):
    for record in pretrain(small_recipe(), some_images(), tmp_path / "run", RunSettings(device="cpu")):
        assert contents(tmp_path / "run" / "last.pth")["resume"]["step"] == record.step
        assert rows(tmp_path / "run" / "metrics.csv")[-1]["step"] == str(record.step)


def test_resume__a_complete_run_stays_complete_without_its_last_checkpoint(tmp_path):
    run(tmp_path)
    (tmp_path / "last.pth").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    notes = []
    assert run(tmp_path, resume=True, on_note=notes.append) == []
    assert notes == [f"{tmp_path} is complete (2 epochs): nothing to do"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "last.pth").write_bytes(b"truncated")
    with pytest.raises(CheckpointError, match=r"last.pth is damaged .*; delete it: the run is complete without it"):
        run(tmp_path, resume=True)


def test_resume__a_run_that_lost_its_last_checkpoint_does_not_begin_anew(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, small_recipe(epochs="4"), on_step=stop_after(11))
    (tmp_path / "last.pth").unlink()
    before = (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(CheckpointError, match=r"last.pth is gone after 2 epochs; restore it, or delete .* to"):
        run(tmp_path, small_recipe(epochs="4"), resume=True)
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_resume__says_which_rows_were_lost(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, on_step=stop_after(6))
    metrics, notes = tmp_path / "metrics.csv", []
    metrics.write_bytes(
        b"".join(line for row, line in enumerate(metrics.read_bytes().splitlines(keepends=True)) if row != 2)
    )
    run(tmp_path, resume=True, on_note=notes.append)
    assert notes[-1] == f"{metrics} has lost 1 of 4 rows, which figures and tables lack"
    metrics.unlink()
    run(tmp_path, resume=True, on_note=notes.append)
    assert notes[-1] == f"{metrics} has lost 6 of 6 rows, which figures and tables lack"


def test_run__is_refused_while_another_process_works_on_it(tmp_path):
    epochs = pretrain(small_recipe(), some_images(), tmp_path, RunSettings(device="cpu", log_every=2))
    next(epochs)
    before = (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(RunInUseError, match="is in use by another process"):
        run(tmp_path, resume=True)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert [record.epoch for record in epochs] == [2]
    assert not (tmp_path / ".lock").exists()


def copied_images(folder, replaced=()):
    """Images as files, some of which hold another image under the same name."""
    from mto_analysis import open_images

    folder.mkdir(exist_ok=True)
    source = some_images(200)
    for number in range(120):
        content = source.read(number + 60 if number in replaced else number)
        (folder / f"{number:03d}.png").write_bytes(content)
    return open_images(folder)


@pytest.mark.parametrize("verify", [False, True])
def test_resume__notices_that_images_were_replaced_under_the_same_names(tmp_path, verify):
    settings = RunSettings(device="cpu", log_every=2, verify_data=verify)
    with pytest.raises(Stopped):
        run(tmp_path / "run", settings=settings, images=copied_images(tmp_path / "images"), on_step=stop_after(9))
    one = copied_images(tmp_path / "images", replaced={42})  # not of the sample
    others = copied_images(tmp_path / "others", replaced=range(120))
    with pytest.raises(CheckpointError, match="images have other contents under the same names"):
        run(tmp_path / "run", settings=settings, images=others, resume=True)
    if verify:
        with pytest.raises(CheckpointError, match="images have other contents under the same names"):
            run(tmp_path / "run", settings=settings, images=one, resume=True)
        unverified = RunSettings(device="cpu", log_every=2)
        assert run(tmp_path / "run", settings=unverified, images=one, resume=True)  # of a sample nothing is replaced
    else:
        verified = RunSettings(device="cpu", log_every=2, verify_data=True)
        with pytest.raises(CheckpointError, match="began without --verify-data, so only a sample"):
            run(tmp_path / "run", settings=verified, images=one, resume=True)
