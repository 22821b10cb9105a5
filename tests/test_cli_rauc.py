import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reference_rauc as slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mto_analyze import app

LOGS = Path(__file__).parent / "logs"
MAE = ([100, 200, 300, 400], [60.0, 66.0, 69.0, 70.0])
MTO = ([100, 200, 300, 400], [61.0, 68.0, 70.5, 71.0])


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def lines_of(*curves):
    return "".join(f"{name},{e},{s}\n" for name, curve in curves for e, s in zip(*curve, strict=True))


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "curves.csv"
    path.write_text("method,epoch,score\n" + lines_of(("MAE", MAE), ("MTO", MTO)))
    return path


@pytest.fixture
def seeds(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        (name, seed, epoch, score + luck)
        for seed in range(5)
        for luck in [rng.normal(0, 0.2)]
        for name, curve in (("MAE", MAE), ("MTO", MTO))
        for epoch, score in zip(*curve, strict=True)
    ]
    path = tmp_path / "seeds.csv"
    frame = pd.DataFrame(rows, columns=["method", "seed", "epoch", "score"])
    frame["score"] += rng.normal(0, 0.1, len(frame))
    frame.to_csv(path, index=False)
    return path


PAIR = ("--baseline", "MAE", "--target", "MTO")
WINDOW = ("--start", 100, "--end", 400)


def test_rauc__json_has_the_ratio_and_both_areas(log):
    result = json.loads(run("rauc", "--log", log, *PAIR, *WINDOW, "--json").stdout)[0]
    assert result["rauc"] == pytest.approx(slow.rauc(MAE, MTO, 100, 400))
    assert (result["numerator"], result["denominator"], result["reference"]) == (2450.0, 2000.0, 60.0)
    assert result["interval"]["text"] == "no interval: one seed"
    assert result["reason"] is None


def test_rauc__an_undefined_ratio_is_null_with_its_reason_and_no_failure(tmp_path):
    path = tmp_path / "flat.csv"
    path.write_text("method,epoch,score\n" + lines_of(("MAE", (MAE[0], [60.0] * 4)), ("MTO", MTO)))
    result = json.loads(run("rauc", "--log", path, *PAIR, *WINDOW, "--json").stdout)[0]
    assert result["rauc"] is None
    assert "not positive" in result["reason"]
    text = run("rauc", "--log", path, *PAIR, *WINDOW).stdout
    assert "undefined (MTO / MAE, 100 to 400): the baseline's gain is not positive" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such log"),
        ("", "is empty"),
        ("nonsense\nwithout end\n", "not a log of a known form"),
        ("method,epoch,score\nMAE,100,many\n", ":2: 'many'"),
        ("method,epoch,score\nMAE,100,1\nMAE,400,2\n", "no log has the method 'MTO'"),
    ],
)
def test_rauc__a_log_that_cannot_be_read_ends_with_4_and_one_line(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_text(content)
    result = run("rauc", "--log", path, *PAIR, *WINDOW, "--json", code=4)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_rauc__windows_beyond_or_between_logged_epochs_are_refused(log):
    assert "nothing is extrapolated" in run("rauc", "--log", log, *PAIR, "--start", 100, "--end", 500, code=4).stderr
    assert "ask for interpolation" in run("rauc", "--log", log, *PAIR, "--start", 150, "--end", 400, code=4).stderr
    result = run("rauc", "--log", log, *PAIR, "--start", 150, "--end", 400, "--interpolate", "--json")
    assert json.loads(result.stdout)[0]["rauc"] == pytest.approx(slow.rauc(MAE, MTO, 150, 400))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--start", 400, "--end", 100),
        ("--start", "nan", "--end", 100),
        ("--start", 100),
        (*WINDOW, "--confidence", 0),
        (*WINDOW, "--reference", "inf"),
        (*WINDOW, "--axis", "hours", "--per-epoch", "MAE=x"),
        ("--start", 100, "--start", 200, "--end", 300, "--end", 400, "--end", 400),
        (*WINDOW, "--baseline", "MAE", "--target", "MTO", "--target", "MTO"),
    ],
)
def test_rauc__wrong_usage_ends_with_2(log, arguments):
    run("rauc", "--log", log, *PAIR, *arguments, code=2)


def test_rauc__takes_a_reference(log):
    result = json.loads(run("rauc", "--log", log, *PAIR, *WINDOW, "--reference", 50, "--json").stdout)[0]
    assert (result["rauc"], result["reference"]) == (pytest.approx(slow.rauc(MAE, MTO, 100, 400, 50)), 50.0)


def test_rauc__a_reference_beside_fractions_is_a_fraction(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("method,epoch,score\nMAE,400,0.574\nMAE,800,0.639\nMTO,400,0.636\nMTO,800,0.648\n")
    window = ("--start", 400, "--end", 800, "--json")
    assert json.loads(run("rauc", "--log", path, *PAIR, *window).stdout)[0]["rauc"] == pytest.approx(2.0923, abs=1e-4)
    again = json.loads(run("rauc", "--log", path, *PAIR, *window, "--reference", 0.4522).stdout)[0]
    assert again["rauc"] == pytest.approx(1.23, abs=1e-3)


PAIRING_WORDS = {"none": "none (requested)", "auto": "none (equal names only)"}


def test_rauc__intervals_over_seeds(seeds):
    options = ("--confidence", 0.9, "--pairing", "seed", "--json")
    result = json.loads(run("rauc", "--log", seeds, *PAIR, *WINDOW, *options).stdout)[0]
    assert result["interval"]["low"] < result["rauc"] < result["interval"]["high"]
    assert result["interval"]["method"] == "Fieller, paired by seed"
    assert result["share_saved_interval"]["low"] < result["share_saved"] < result["share_saved_interval"]["high"]
    assert (result["interval"]["confidence"], result["interval"]["runs"]) == (0.9, 5)
    assert result["bootstrap"]["kind"] == "bounded"
    for pairing in ("none", "auto"):
        result = json.loads(run("rauc", "--log", seeds, *PAIR, *WINDOW, "--pairing", pairing, "--json").stdout)[0]
        assert (result["paired"], result["pairing"]) == (False, PAIRING_WORDS[pairing])


def test_rauc__several_windows_and_pairs_give_a_table_like_table_1(seeds):
    window = ("--start", 100, "--start", 200, "--end", 400)
    text = run("rauc", "--log", seeds, *PAIR, "--baseline", "MTO", "--target", "MAE", *window).stdout.splitlines()
    assert text[1].split() == ["S1", "S2", "(100,", "400)", "(200,", "400)"]
    assert len(text) >= 4
    results = json.loads(run("rauc", "--log", seeds, *PAIR, *window, "--json").stdout)
    assert [(one["start"], one["end"]) for one in results] == [(100.0, 400.0), (200.0, 400.0)]


def test_rauc__one_log_per_run_and_per_seed(tmp_path):
    for seed in (0, 1, 2):
        for name, (epochs, scores) in (("MAE", MAE), ("MTO", MTO)):
            lines = [
                {"epoch": e - 1, "train_loss": 1.0, "test_acc1": s + seed / 10}
                for e, s in zip(epochs, scores, strict=True)
            ]
            (tmp_path / f"{name}{seed}.txt").write_text("\n".join(map(json.dumps, lines)))
    logs = [
        part
        for s in (0, 1, 2)
        for name in ("MAE", "MTO")
        for part in ("--log", f"{name}@{s}={tmp_path / f'{name}{s}.txt'}")
    ]
    result = json.loads(run("rauc", *logs, *PAIR, "--start", 99, "--end", 399, "--json").stdout)[0]
    assert result["rauc"] == pytest.approx(slow.rauc(MAE, MTO, 100, 400))
    assert result["seeds_baseline"] == ["0", "1", "2"]
    completed = json.loads(run("rauc", *logs, *PAIR, *WINDOW, "--epochs", "completed", "--json").stdout)[0]
    assert completed["share_saved"] == pytest.approx(result["share_saved"])


def test_rauc__trainers_logs_are_called_by_their_files(tmp_path):
    result = run(
        "rauc", "--log", LOGS / "mae_finetune_log.txt", "--log", LOGS / "resumed_log.txt",
        "--baseline", "resumed_log", "--target", "mae_finetune_log", "--start", 0, "--end", 14, "--json",
    )  # fmt: skip
    record = json.loads(result.stdout)[0]
    assert record["rauc"] == pytest.approx(1, abs=0.01)
    assert any("resumed_log.txt:11: 3 epochs written again" in note for note in record["notes"])


def test_rauc__hours_and_images_are_other_axes(log):
    options = ("--axis", "hours", "--per-epoch", "MAE=1", "--per-epoch", "MTO=1.25")
    result = json.loads(
        run("rauc", "--log", log, *PAIR, *options, "--start", 125, "--end", 400, "--interpolate", "--json").stdout
    )[0]
    slower = ([1.25 * epoch for epoch in MTO[0]], MTO[1])
    assert result["rauc"] == pytest.approx(slow.rauc(MAE, slower, 125, 400))
    assert result["axis"] == "hours"
    same = run(
        "rauc", "--log", log, *PAIR, "--axis", "images", "--per-epoch", 1000, "--start", 1e5, "--end", 4e5, "--json"
    )
    assert json.loads(same.stdout)[0]["rauc"] == pytest.approx(slow.rauc(MAE, MTO, 100, 400))
    assert "no column 'hours'" in run("rauc", "--log", log, *PAIR, "--axis", "hours", code=4).stderr


def test_rauc__other_columns_by_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Model,Ep,Acc\n" + lines_of(("MAE", MAE), ("MTO", MTO)))
    names = ("--method-column", "Model", "--epoch-column", "Ep", "--score-column", "Acc")
    assert json.loads(run("rauc", "--log", path, *PAIR, *WINDOW, *names, "--json").stdout)[0]["rauc"] > 1


def test_rauc__out_holds_tables_and_figures_and_is_not_overwritten(seeds, tmp_path):
    out = tmp_path / "out"
    arguments = ("rauc", "--log", seeds, *PAIR, *WINDOW, "--out", out)
    run(*arguments)
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.csv", "rauc.csv", "rauc.json", "rauc.pdf", "rauc.png",
        "rauc_windows.csv", "rauc_windows.pdf", "rauc_windows.png", "run.json",
    ]  # fmt: skip
    assert pd.read_csv(out / "rauc.csv")["rauc"].item() == json.loads((out / "rauc.json").read_text())[0]["rauc"]
    columns = ["start", "end", "rauc", "low", "high", "gain", "comparison"]
    assert pd.read_csv(out / "rauc_windows.csv").columns.tolist() == columns
    assert "already holds" in run(*arguments, code=2).stderr
    run(*arguments, "--overwrite")


def test_rauc__without_a_window_takes_the_longest(log):
    result = json.loads(run("rauc", "--log", log, "--baseline", "MAE", "--json").stdout)[0]
    assert (result["target"], result["start"], result["end"]) == ("MTO", 100.0, 400.0)
    results = json.loads(run("rauc", "--log", log, "--baseline", "MAE", "--end", 300, "--end", 400, "--json").stdout)
    assert [(one["start"], one["end"]) for one in results] == [(100.0, 300.0), (100.0, 400.0)]


def test_rauc__json_is_a_list_with_a_version_and_what_was_read(log):
    (result,) = json.loads(run("rauc", "--log", log, *PAIR, *WINDOW, "--json").stdout)
    assert result["schema_version"] == 1
    (read,) = result["logs"]
    assert (read["format"], read["column"], read["unit"], read["axis"]) == ("table", "score", "percent", "epochs")
    assert (read["points"], read["runs"], read["methods"]) == (8, 2, ["MAE", "MTO"])
    assert (read["first"], read["last"]) == ([100.0, 60.0], [400.0, 70.0])
    assert read["sha256"] == hashlib.sha256(log.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", ["csv", "markdown", "latex"])
def test_rauc__writes_other_forms(seeds, form):
    assert "MTO" in run("rauc", "--log", seeds, *PAIR, *WINDOW, "--format", form, "--quiet").stdout


def test_tables__prints_the_audit():
    text = run("tables").stdout
    for number in ("2.36", "2.09", "1.20", "1.23", "56.35", "45.22", "16.70", "1.47", "83.5", "44.1", "41.5"):
        assert number in text
    assert "Supplementary Table 6" in text
    assert run("tables", "--table", 2, "--format", "csv").stdout.startswith("S1,S2,backbone")
    assert "table must be one of" in run("tables", "--table", 9, code=2).stderr


def test_tables__go_into_a_folder(tmp_path):
    run("tables", "--format", "latex", "--out", tmp_path / "t")
    assert (tmp_path / "t" / "table_supp2.tex").read_text().startswith("% needs")
    run("tables", "--format", "latex", "--out", tmp_path / "t", code=2)


@pytest.mark.parametrize(("name", "absent"), [("seeds", ""), ("log", "scipy.stats")])
def test_rauc__imports_nothing_that_it_does_not_need(request, name, absent):
    # Runs are resampled by scipy.stats, whose import takes a second; one run a method is not resampled.
    path, methods = request.getfixturevalue(name), ["--baseline", "MAE"]
    code = (
        "import sys; from typer.testing import CliRunner; from mto_analyze import app;"
        f"r = CliRunner().invoke(app, ['rauc', '--log', {str(path)!r}, *{methods!r}]);"
        "assert r.exit_code == 0, r.output;"
        f"bad = {{'torch', {absent!r}, 'matplotlib', 'tensorboard'}} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


cells = st.one_of(
    st.integers(-3, 12).map(str),
    st.floats(0, 100).map(lambda x: f"{x:.3g}"),
    st.sampled_from(
        ["", "nan", "inf", "-inf", "None", "0.5", "1e400", "epoch", "x", '"', "1,5", "٣", "1_0", "0x1F", "true"]
    ),
)
tables = st.lists(
    st.tuples(st.sampled_from(["MAE", "MTO", "", " MAE"]), cells, cells, st.sampled_from(["0", "1", ""])), max_size=14
).map(lambda rows: "method,epoch,score,seed\n" + "\n".join(",".join(row) for row in rows))
sensible = st.lists(
    st.tuples(st.sampled_from(["MAE", "MTO"]), st.integers(0, 6), st.floats(0, 100).map(lambda x: round(x, 2))),
    max_size=24,
).map(lambda rows: "method,epoch,score\n" + "\n".join(",".join(map(str, row)) for row in rows))


@st.composite
def spoilt(draw):
    """A trainer's log with bytes cut out, lines repeated, moved or foreign."""
    name = draw(st.sampled_from([path.name for path in sorted(LOGS.iterdir()) if path.is_file()]))
    chance = random.Random(draw(st.integers(0, 2**32)))
    lines = (LOGS / name).read_bytes().split(b"\n")
    for _ in range(draw(st.integers(0, 4))):
        at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
        trick = chance.randrange(5)
        if trick == 0:
            lines[at] = lines[at][: chance.randrange(len(lines[at]) + 1)]
        elif trick == 1:
            lines.insert(at, lines[other])
        elif trick == 2:
            lines[at], lines[other] = lines[other], lines[at]
        elif trick == 3:
            lines.insert(
                at, chance.choice([b"{}", b"[1]", b"null", b'{"epoch": {}}', b"\xff\xfe", b"Killed", b"{" * 40])
            )
        else:
            digits = [i for i, c in enumerate(lines[at]) if 48 <= c < 58]
            if digits:
                spot = chance.choice(digits)
                lines[at] = lines[at][:spot] + chance.choice([b"-", b"e", b"99", b"."]) + lines[at][spot + 1 :]
    return b"\n".join(lines)


def check_hostile(folder, content, end):
    path = folder / "log.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    names = ("MAE", "MTO") if not isinstance(content, bytes) else ("a", "a")
    logs = ["--log", str(path)] if not isinstance(content, bytes) else ["--log", f"a={path}"]
    window = [] if end is None else ["--start", "0", "--end", str(end)]
    result = CliRunner().invoke(app, ["rauc", *logs, "--baseline", names[0], "--target", names[1], *window, "--json"])
    assert result.exit_code in (0, 4), (result.output, result.exception)
    if result.exit_code == 4:
        assert result.stderr.startswith("mto-analyze: error: ")
        assert result.stderr.count("\n") == 1
        return
    record = json.loads(result.stdout, parse_constant=pytest.fail)[0]  # no bare NaN or Infinity
    assert 0 <= record["reference"] <= 100
    assert 0 <= record["final_baseline"] <= 100
    assert abs(record["mean_lead"]) <= 100
    if record["rauc"] is None:
        assert record["reason"]
        return
    assert record["denominator"] > 0
    assert record["rauc"] == pytest.approx(record["numerator"] / record["denominator"])
    assert abs(record["rauc"]) <= 1000
    if names == ("a", "a"):
        assert record["rauc"] == 1.0
    elif "seed" not in str(content).split("\n")[0]:
        kept = {}
        for method, epoch, score in (line.split(",") for line in str(content).split("\n")[1:]):
            kept.setdefault(method, {})[float(epoch)] = float(score)
        scale = 100 if max(score for curve in kept.values() for score in curve.values()) <= 1 else 1
        one, two = (([*kept[name]], [scale * score for score in kept[name].values()]) for name in names)
        expected = slow.rauc(one, two, record["start"], record["end"])
        assert record["rauc"] == pytest.approx(expected, rel=1e-6)


hostile = given(st.one_of(tables, sensible, spoilt()), st.sampled_from([None, None, 3, 6]))
calm = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=100, **calm)
@hostile
def test_rauc__finds_neither_crash_nor_nonsense_in_hostile_logs(tmp_path, content, end):
    check_hostile(tmp_path, content, end)


@pytest.mark.slow
@settings(max_examples=10_000, **calm)
@hostile
def test_rauc__finds_neither_crash_nor_nonsense_in_ten_thousand_hostile_logs(tmp_path, content, end):
    check_hostile(tmp_path, content, end)


def test_rauc__several_groups_are_also_compared_over_all_of_them(tmp_path):
    rng = np.random.default_rng(0)
    epochs = np.arange(0, 101, 20)
    lines = ["method,task,seed,epoch,score"]
    for base, task in ((50, "cars"), (60, "food"), (70, "pets")):
        for method, pace in (("MAE", 60), ("MTO", 30)):
            for seed in range(3):
                curve = base + rng.normal(0, 0.3) + 20 * (1 - np.exp(-epochs / pace))
                lines += [f"{method},{task},{seed},{e},{s:.3f}" for e, s in zip(epochs, curve, strict=True)]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    given = ("rauc", "--log", tmp_path / "log.csv", *PAIR, "--group", "task")
    result = run(*given, "--out", tmp_path / "out").stdout
    assert "Over 3 tasks, epoch 0 to 100" in result
    assert "probability of improvement over MAE" in result
    *comparisons, found = json.loads(run(*given, "--json").stdout)
    assert [one["kind"] for one in comparisons] == ["comparison"] * 3
    assert (found["kind"], found["tasks"], found["schema_version"]) == ("aggregate", ["cars", "food", "pets"], 1)
    (mean,) = [
        one
        for one in found["estimates"]
        if (one["measure"], one["statistic"], one["method"]) == ("RAUC", "mean", "MTO")
    ]
    assert mean["value"] == pytest.approx(np.mean([one["rauc"] for one in comparisons]))
    assert mean["interval"]["low"] < mean["value"] < mean["interval"]["high"]
    scores = pd.read_csv(tmp_path / "out" / "tasks_scores.csv")
    assert len(scores) == 18
    assert {path.name for path in (tmp_path / "out").glob("tasks*")} == {
        "tasks.pdf", "tasks.png", "tasks_scores.csv", "tasks_estimates.csv", "tasks_profiles.csv",
        "tasks_efficiency.csv",
    }  # fmt: skip
