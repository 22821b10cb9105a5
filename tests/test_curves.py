from pathlib import Path

import numpy as np
import pytest

from mto_analysis.errors import DataError
from mto_analysis.rauc.curves import Source, on_axis, read_curves


@pytest.fixture
def table(tmp_path):
    def make(text, name="a.csv", **options):
        path = tmp_path / name
        path.write_text(text)
        return read_curves([path], **options)

    return make


def rows(text):
    return "method,epoch,score\n" + "".join(f"{row}\n" for row in text.split())


def findings(curves):
    return [str(one).rpartition("/")[2] for one in curves.findings]


def test_read_curves__gives_the_tidy_table(table):
    curves = table("method,epoch,score,seed,backbone\nMAE,2,60,1,ViT-B\nMAE,1,50,1,ViT-B\n", groups=["backbone"])
    assert curves.frame.columns.tolist() == ["method", "epoch", "score", "seed", "backbone"]
    assert curves.frame.values.tolist() == [["MAE", 1.0, 50.0, "1", "ViT-B"], ["MAE", 2.0, 60.0, "1", "ViT-B"]]
    assert findings(curves) == ["a.csv:3: 1 epochs out of order: sorted"]


def test_read_curves__decides_the_unit_per_file(table):
    fraction = table(rows("A,1,0.5 A,2,0.61"))
    assert fraction.fraction
    assert fraction.frame["score"].tolist() == [50.0, 61.0]
    assert "shown in percent" in findings(fraction)[0]
    assert table(rows("A,1,0.5 A,2,0.61"), unit="percent").frame["score"].tolist() == [0.5, 0.61]
    with pytest.raises(DataError, match=r"a.csv:4: 'B' never exceeds 1"):
        table(rows("A,1,50 A,2,61 B,1,0.5 B,2,0.6"))
    with pytest.raises(DataError, match=r"a.csv:3: score 8172 is outside 0 to 100"):
        table(rows("A,1,50 A,2,8172"))
    assert table(rows("A,1,50 A,2,8172"), unit="raw").frame["score"].tolist() == [50.0, 8172.0]
    assert any("a.csv:3: a score of at most 1" in one for one in findings(table(rows("A,1,50 A,2,0.6 A,3,62"))))


def test_read_curves__a_trainer_that_writes_percent_is_believed(tmp_path):
    (tmp_path / "log.txt").write_text(
        '{"epoch": 0, "train_loss": 7, "test_acc1": 0.1}\n{"epoch": 1, "train_loss": 6, "test_acc1": 0.4}\n'
    )
    curves = read_curves([tmp_path / "log.txt"])
    assert curves.frame["score"].tolist() == [0.1, 0.4]
    assert "read as percent" in str(curves.findings[0])


def test_read_curves__repeats_gaps_and_nan_are_named_by_line(table):
    curves = table(rows("A,1,50 A,2,55 A,3,nan A,4,60 A,5,62 A,6,61 A,6,63 A,7,65"))
    assert findings(curves) == [
        "a.csv:8: 1 epoch written again (6): the last score of each counts",
        "a.csv:4: left out: this epoch's score or loss is not finite",
        "a.csv:5: no score between epochs 2 and 4 (usual step 1)",
    ]
    assert curves.frame["score"].tolist() == [50.0, 55.0, 60.0, 62.0, 63.0, 65.0]


def test_read_curves__an_evaluation_without_training_is_no_epoch(table):
    curves = table(rows("A,1,50 A,2,55 A,3,60 A,3,61"))
    assert curves.frame["score"].tolist() == [50.0, 55.0, 60.0]
    assert findings(curves) == [
        "a.csv:5: evaluated again without training in between: the first score of the epoch counts"
    ]
    # The best model once more, and a run that was resumed and goes on.
    assert table(rows("A,1,50 A,2,55 A,3,52 A,2,57")).frame["score"].tolist() == [50.0, 55.0, 52.0]
    assert table(rows("A,1,50 A,2,55 A,3,60 A,2,56 A,3,61 A,4,62")).frame["score"].tolist() == [50.0, 56.0, 61.0, 62.0]
    # Values of training tell that an epoch was trained again, equal steps that it was not.
    trained = "epoch,train_loss,val_acc\n1,3,50\n2,2,55\n3,1,60\n3,1.1,61\n"
    assert table(trained).frame["score"].tolist() == [50.0, 55.0, 61.0]
    assert table(trained.replace("3,1.1,", "3,,")).frame["score"].tolist() == [50.0, 55.0, 60.0]
    steps = "epoch,step,train_loss,val_acc\n0,9,,50\n0,9,3,\n1,19,,55\n1,19,2,\n1,19,,56\n"
    assert table(steps).frame["score"].tolist() == [50.0, 55.0]
    with pytest.raises(DataError, match=r"a.csv:5: 'A' has a second score for epoch 1 and others"):
        table(rows("A,0,50 A,1,55 A,2,60 A,1,56 A,2,61"))


def test_read_curves__a_second_run_is_never_merged(table):
    text = rows("A,0,50 A,1,55 A,2,60 A,0,51 A,1,56")
    with pytest.raises(DataError, match=r"a.csv:5: 'A' starts over at epoch 0"):
        table(text)
    assert table(text, run=1).frame["score"].tolist() == [50.0, 55.0, 60.0]
    assert table(text, run=-1).frame["score"].tolist() == [51.0, 56.0]
    with pytest.raises(DataError, match="there is no run 3"):
        table(text, run=3)


def test_read_curves__another_model_in_the_file_is_another_run(tmp_path):
    line = '{{"epoch": {}, "train_loss": 1, "test_acc1": {}, "n_parameters": {}}}\n'
    text = "".join(line.format(*values) for values in [(0, 50, 7), (1, 60, 7), (2, 40, 8), (3, 45, 8)])
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(DataError, match=r"log.txt:3: .* more than one run"):
        read_curves([tmp_path / "log.txt"])


def test_read_curves__seeds_without_a_column_are_refused(table):
    with pytest.raises(DataError, match="a column that tells its curves apart is missing"):
        table(rows("A,1,50 A,1,51 A,2,60 A,2,61"))


def test_read_curves__negative_epochs_and_missing_groups_are_refused(table):
    with pytest.raises(DataError, match="epoch -1 is negative"):
        table(rows("A,-1,50 A,2,60"))
    with pytest.raises(DataError, match="no column 'backbone' to group by"):
        table(rows("A,1,50 A,2,60"), groups=["backbone"])
    with pytest.raises(DataError, match="no score is finite"):
        table(rows("A,1,nan A,2,inf"))


def test_read_curves__numbers_that_are_no_measurements_are_refused(table):
    with pytest.raises(DataError, match=r"a.csv:3: score 1e\+308 is no measurement"):
        table(rows("A,1,50 A,2,1e308"), unit="raw")


def test_read_curves__checks_only_the_methods_that_are_wanted(table):
    assert table(rows("A,1,50 A,2,60 B,1,5 B,1,6"), methods=["A"]).methods == ["A"]
    with pytest.raises(DataError, match=r"unknown methods: 'C'. Found in a.csv: 'A', 'B'"):
        table(rows("A,1,50 A,2,60 B,1,5 B,1,6"), methods=["A", "C"])


def test_read_curves__files_that_count_differently_are_not_mixed(tmp_path):
    (tmp_path / "mae.txt").write_text(
        '{"epoch": 0, "train_loss": 7, "test_acc1": 40}\n{"epoch": 1, "train_loss": 6, "test_acc1": 50}\n'
    )
    (tmp_path / "hf.json").write_text(
        '{"log_history": [{"epoch": 1.0, "eval_accuracy": 0.4}, {"epoch": 2.0, "eval_accuracy": 0.5}]}'
    )
    both = [tmp_path / "mae.txt", tmp_path / "hf.json"]
    with pytest.raises(DataError, match="pass --epochs completed"):
        read_curves(both)
    curves = read_curves(both, epochs="completed")
    assert {name: next(iter(curves.runs(name).values())).epochs.tolist() for name in curves.methods} == {
        "mae": [1.0, 2.0],
        "hf": [1.0, 2.0],
    }
    assert read_curves(both[:1]).origin == -1.0


def test_source__names_methods_and_seeds(tmp_path):
    assert Source.parse("MAE=runs/log.txt") == Source(Source.parse("runs/log.txt").path, "MAE")
    assert Source.parse("MAE@3=log.txt").seed == "3"
    assert Source.parse("runs/mae/log.txt").name() == "mae"
    assert Source.parse("runs/mae.csv").name() == "mae"
    assert Source.parse("runs/mae.csv").name(["mae.csv"]) == "mae.csv"
    odd = tmp_path / "a=b.csv"
    odd.write_text("x")
    assert Source.parse(str(odd)).method is None


def test_read_curves__seeds_come_from_the_sources(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"{seed}.csv").write_text(f"epoch,top1\n1,{50 + seed}\n2,60\n")
    sources = [Source(tmp_path / f"{seed}.csv", "MAE", str(seed)) for seed in (0, 1)]
    assert list(read_curves(sources).runs("MAE")) == ["0", "1"]
    with pytest.raises(DataError, match="name seeds with NAME@SEED=FILE"):
        read_curves([Source(tmp_path / f"{seed}.csv", "MAE", "0") for seed in (0, 1)])


def test_read_curves__a_name_for_a_file_of_several_methods_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text(rows("A,1,50 B,1,60"))
    with pytest.raises(DataError, match="holds 2 methods"):
        read_curves([Source(tmp_path / "a.csv", "MAE")])


def test_on_axis__the_cost_of_an_epoch_is_for_curves_over_epochs(table):
    steps = "method,step,score\nA,1251,40\nA,2502,41\n"
    with pytest.raises(DataError, match="the logs count step, not epochs"):
        on_axis(table(steps), "hours", 0.5)
    assert on_axis(table(steps, steps_per_epoch=1251), "hours", 0.5).frame["epoch"].tolist() == [0.5, 1.0]


def test_on_axis__takes_a_column_or_a_cost_per_epoch(table):
    text = "method,epoch,score,hours\nA,1,50,1.5\nA,2,60,3\nB,1,51,2\nB,2,61,4\n"
    by_column = on_axis(table(text, axis_column="hours"), "hours")
    assert by_column.runs("B")[next(iter(by_column.runs("B")))].epochs.tolist() == [2.0, 4.0]
    by_cost = on_axis(table(text), "hours", {"A": 1.5, "B": 2.0})
    assert np.allclose(by_cost.frame["epoch"], by_column.frame["epoch"])
    assert on_axis(table(text), "images", 100.0).frame["epoch"].tolist() == [100.0, 200.0, 100.0, 200.0]
    with pytest.raises(DataError, match="not given"):
        on_axis(table(text), "hours", {"A": 1.5})
    with pytest.raises(DataError, match="no column 'images'"):
        on_axis(table(text), "images")
    with pytest.raises(DataError, match="does not rise"):
        on_axis(table(text.replace("A,2,60,3", "A,2,60,1"), axis_column="hours"), "hours")


def test_runs__names_what_is_there(table):
    with pytest.raises(DataError, match="no log has the method 'X'; found: 'A'"):
        table(rows("A,1,50 A,2,60")).runs("X")


def test_read_curves__protocols_of_our_own_curves_are_not_mixed(tmp_path):
    for name, method, protocol in (("a", "MAE", "knn"), ("b", "MAE + MTO", "linear_cached")):
        (tmp_path / f"{name}.csv").write_text(
            f"method,epoch,score,seed,protocol\n{method},1,40,0,{protocol}\n{method},2,41,0,{protocol}\n"
        )
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    with pytest.raises(DataError, match=r"scores are of knn \(.*a\.csv\) and linear_cached \(.*b\.csv\)"):
        read_curves(files)
    assert read_curves(files, groups=["protocol"]).groups == ("protocol",)
    assert read_curves(files, methods=["MAE"]).methods == ["MAE"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"file": "log.txt", "unit": "percents"},
            "list: unit must be one of percent, fraction, raw or none, got 'percents'",
        ),
        ({"file": "log.txt", "units": "raw"}, "list: no setting is called 'units'; known are file, method, seed"),
        ({"file": "log.txt", "first-epoch": 2}, r"list: first_epoch must lie in \[0, 1\], got 2"),
        ({"file": "log.txt", "steps-per-epoch": "-1"}, "list: steps_per_epoch must be above 0, got -1.0"),
        ({"method": "MAE"}, "list: lacks file"),
    ],
)
def test_source__options_are_checked(options, message) -> None:
    with pytest.raises(DataError, match=message):
        Source.of(options, "list")


def test_source__of_a_list_has_typed_values() -> None:
    found = Source.of({"file": "log.txt", "seed": 3, "steps-per-epoch": 12, "first-epoch": 1}, "list")
    assert (found.path, found.seed, found.steps_per_epoch, found.first_epoch) == (Path("log.txt"), "3", 12.0, 1)


def test_read_curves__a_run_that_is_asked_for_must_be_there(tmp_path):
    (tmp_path / "a.csv").write_text("epoch,val_acc\n1,50\n2,60\n")
    assert len(read_curves([Source(tmp_path / "a.csv", run="-1")]).frame) == 2
    assert len(read_curves([tmp_path / "a.csv"], run=2).frame) == 2  # for files that hold several
    for run in ("2", "0"):
        with pytest.raises(DataError, match=f"there is no run {run}; runs are counted from 1"):
            read_curves([Source(tmp_path / "a.csv", run=run)])
    (tmp_path / "b.csv").write_text(rows("A,1,50 A,2,60 B,1,51 B,2,61 ,1,70 ,2,71"))
    table = read_curves([Source(tmp_path / "b.csv", "MTO", run="B")])
    assert (table.methods, table.frame["score"].tolist()) == (["MTO"], [51.0, 61.0])
    assert any("a row without a method" in str(one) for one in read_curves([tmp_path / "b.csv"]).findings)
    with pytest.raises(DataError, match="there is no run 'C'; it has A, B"):
        read_curves([Source(tmp_path / "b.csv", run="C")])


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_read_curves__completed_epochs_do_not_depend_on_the_order_of_logs(tmp_path, order):
    epochs = {"a": range(100), "b": range(101), "c": range(1, 101)}
    for name, places in epochs.items():
        (tmp_path / f"{name}.csv").write_text(rows(" ".join(f"{name},{place},{60 + place / 100}" for place in places)))
    logs = [Source.parse(f"{tmp_path / name}.csv" + ("[first-epoch=0]" if name == "c" else "")) for name in order]
    curves = read_curves(logs).frame.groupby("method", observed=True)["epoch"]
    assert {name: (of.min(), of.max()) for name, of in curves} == {"a": (1, 100), "b": (1, 101), "c": (2, 101)}
