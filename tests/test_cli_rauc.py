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

from mto_analysis.figures.methods import methods_paragraph
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


def test_rauc__help_shows_the_options_of_a_log(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run("rauc", "--help").stdout
    for each in ("FILE[score=...]:", "epoch,", "run,", "unit,", "steps-per-epoch,", "first-epoch."):
        assert each in text


def test_rauc__json_has_the_ratio_and_both_areas(log):
    result = json.loads(run("rauc", "--log", log, *PAIR, *WINDOW, "--json").stdout)[0]
    assert result["rauc"] == pytest.approx(slow.rauc(MAE, MTO, 100, 400))
    assert (result["numerator"], result["denominator"], result["reference"]) == (2450.0, 2000.0, 60.0)
    assert result["interval"]["text"] == "no interval: one seed"
    versions = dict.fromkeys(("mto-analysis", "torch", "timm"), "1")
    metadata = {"comparisons": [result], "logs": [{"file": "a.csv"}], "versions": versions, "python": "3"}
    assert "MTO (1 run) was compared with MAE (1 run)" in (text := methods_paragraph("rauc", metadata))
    assert "; no 95 % interval: one seed." in text
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
        ("method,epoch,score\nMAE,100,1\nMAE,400,2\n", "unknown methods: 'MTO'. Found in bad.csv: 'MAE'"),
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
        (*WINDOW, "--confidence", 2),
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
        "curves.csv", "methods.md", "rauc.csv", "rauc.json", "rauc.pdf", "rauc.png",
        "rauc_windows.csv", "rauc_windows.pdf", "rauc_windows.png", "run.json", "run.toml",
    ]  # fmt: skip
    written = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".csv"}
    run("rauc", "--config", out / "run.toml", "--out", tmp_path / "again")
    assert written == {name: (tmp_path / "again" / name).read_bytes() for name in written}
    methods = (out / "methods.md").read_text()
    interval = json.loads((out / "rauc.json").read_text())[0]["interval"]["method"]
    for fact in (f"interval is by {interval}", "Eq. 6", "epoch 100 to 400"):
        assert fact in methods
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


def test_commands_on_tables__import_nothing_that_they_do_not_need(log, seeds, tmp_path):
    table = [("model", "stack", "layer_depth", "heterogeneity", "normalized", "num_visible"), *(
        (name, "e", 0, h, h / 4, 9) for name, h in (("a", 1), ("b", 2), ("c", 1.5))
    )]  # fmt: skip
    (tmp_path / "h.csv").write_text("\n".join(",".join(map(str, row)) for row in table))
    (tmp_path / "scores.csv").write_text("model,score\na,10\nb,20\nc,15\n")
    steps = [
        # Runs are resampled by scipy.stats, whose import takes a second; one run a method is not resampled.
        (["rauc", "--log", str(log), "--baseline", "MAE"], {"torch", "matplotlib", "tensorboard", "scipy.stats"}),
        (["rauc", "--log", str(seeds), "--baseline", "MAE"], {"torch", "matplotlib", "tensorboard"}),
        (["rauc", "--log", str(log), "--baseline", "MAE", "--out", "rauc"], {"torch"}),
        (["plot", "h.csv", "--out", "plot"], {"torch"}),
        (["relate", "--measures", "h.csv", "--scores", "scores.csv", "--out", "relate"], {"torch"}),
        (["tables", "--out", "tables"], {"torch"}),
    ]
    code = (
        "import sys; from typer.testing import CliRunner; from mto_analyze import app\n"
        f"for command, absent in {steps!r}:\n"
        "    done = CliRunner().invoke(app, command)\n"
        "    assert done.exit_code == 0, done.output\n"
        "    assert not absent & set(sys.modules), (command, absent & set(sys.modules))\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "MPLBACKEND": "Agg"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)


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


def kept_scores(content, name):
    """The score of each epoch: of the last training of it, that is of a run that goes on beyond its last epoch."""
    rows = [line.split(",") for line in content.split("\n")[1:]]
    points = [(float(epoch), float(score)) for method, epoch, score in rows if method == name]
    kept = {}
    for at, (epoch, score) in enumerate(points):
        goes_on = max(later for later, _ in points[at:]) > max((before for before, _ in points[:at]), default=-1)
        if epoch not in kept or goes_on:
            kept[epoch] = score
    return kept


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
    for read in record["logs"]:  # every number comes from a column that is named; a wide table has one per epoch
        assert read["format"] == "wide table" or read["column"].split("/")[-1].encode() in path.read_bytes()
        assert read["points"] >= 2
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
        kept = {name: kept_scores(content, name) for name in ("MAE", "MTO")}
        scale = 100 if max(score for curve in kept.values() for score in curve.values()) <= 1 else 1
        one, two = (([*kept[name]], [scale * score for score in kept[name].values()]) for name in names)
        expected = slow.rauc(one, two, record["start"], record["end"])
        assert record["rauc"] == pytest.approx(expected, rel=1e-6)


#: Bytes that no program wrote, and beginnings of formats followed by anything.
BEGINNINGS = (
    *(
        b"",
        b"\x1f\x8b\x08",
        b"PK\x03\x04",
        b"\xff\xfe",
        b'{"log_history": [',
        b"[{",
        b'{"epoch": [',
        b"epoch,val_acc\n",
    ),
    *(b"* Acc@1 ", b"sep=;\n", b'"Step","a - acc"\n', b"method;1;2\n", b"Epoch(val) [1]", b"1683000000000 1 ", b"#"),
    *(b"Name,State\n", b"epoch val_acc\n1 2\n"),
)
beginnings = st.sampled_from(BEGINNINGS)
junk = st.tuples(beginnings, st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode))).map(b"".join)
hostile = given(st.one_of(tables, sensible, spoilt(), junk), st.sampled_from([None, None, 3, 6]))
calm = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=20, **calm)
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
    *comparisons, found = json.loads(run(*given, "--json").stdout, parse_constant=pytest.fail)
    assert [one["kind"] for one in comparisons] == ["comparison"] * 3
    assert found["estimates"][0]["baseline"] is None
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


def pair_of(folder, name, text_of):
    """Two logs A and B of one kind, B with more points of accuracy."""
    for method, more in (("A", 0), ("B", 2)):
        (folder / f"{method}{name}").write_text(text_of(more))
    return ("--log", f"A={folder / f'A{name}'}", "--log", f"B={folder / f'B{name}'}", "--baseline", "A")


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def ratio(*arguments):
    return json.loads(run("rauc", *arguments, "--json").stdout)[0]


RISING = [40 + 5 * epoch for epoch in range(6)]
FASTER = slow.rauc((range(6), RISING), (range(6), [score + 2 for score in RISING]), 0, 5)


def test_rauc__validation_is_read_beside_training(tmp_path):
    logs = pair_of(tmp_path, ".csv", lambda d: "epoch,acc,valid_acc\n" + "".join(
        f"{e},{90 + e},{score + d}\n" for e, score in enumerate(RISING)
    ))  # fmt: skip
    result = ratio(*logs)
    assert result["rauc"] == pytest.approx(FASTER)
    assert [(read["column"], read["kind"], read["split"]) for read in result["logs"]] == [
        ("valid_acc", "accuracy", "val")
    ] * 2


def test_rauc__two_files_are_compared_by_the_metric_that_both_have(tmp_path):
    rows = [{"epoch": e, "val_acc1": 60 + 2 * e} for e in range(6)]
    (tmp_path / "a.txt").write_text(json_lines(rows))
    (tmp_path / "b.txt").write_text(json_lines({**row, "test_acc1": 20 + 5 * row["epoch"]} for row in rows))
    assert ratio("--log", tmp_path / "a.txt", "--log", tmp_path / "b.txt", "--baseline", "a")["rauc"] == 1.0


def test_rauc__two_metrics_of_a_chart_are_never_merged(tmp_path):
    columns = [f"{run} - {metric}" for run in "ab" for metric in ("train/acc", "val/acc")]
    rows = [
        ("50", "20", "", "21", ""),
        ("100", "", "60", "", "66"),
        ("150", "30", "", "31", ""),
        ("200", "", "70", "", "76"),
    ]
    path = tmp_path / "c.csv"
    path.write_text("\n".join(",".join(row) for row in [("Step", *columns), *rows]))
    assert "'train/acc', 'val/acc', and nothing tells" in run("rauc", "--log", path, "--baseline", "a", code=4).stderr
    result = ratio("--log", path, "--baseline", "a", "--score-column", "val/acc")
    assert (result["final_baseline"], result["axis"], result["start"]) == (70.0, "step", 100.0)
    refused = run("rauc", "--log", path, "--baseline", "a", "--score-column", "a - val/acc", code=4).stderr
    assert "'a - val/acc' is of one run; --score-column 'val/acc' takes it of all runs" in refused
    one = ("--log", f"A={path}[score=a - val/acc]", "--log", f"B={path}[score=b - val/acc]", "--baseline", "A")
    assert ratio(*one)["rauc"] == result["rauc"]


def test_rauc__a_final_test_is_no_epoch(tmp_path):
    def text(more):
        lines = [
            f"EPOCH {e} training takes 0:01:00\n * Acc@1 {s + more:.3f} Acc@5 90.0\n" for e, s in enumerate(RISING)
        ]
        return "".join(lines) + "Multiple views test starting!\n * Acc@1 95.000 Acc@5 99.0\n" * bool(more)

    result = ratio(*pair_of(tmp_path, ".txt", text))
    assert result["rauc"] == pytest.approx(FASTER)
    assert any("evaluated again without training in between" in note for note in result["notes"])


def test_rauc__the_best_model_evaluated_after_training_is_no_epoch(tmp_path):
    def text(more):
        history = [
            {"epoch": float(e), "eval_accuracy": s, "step": 100 * e} for e, s in enumerate([0.5, 0.7, 0.8, 0.7], 1)
        ]
        return json.dumps({"log_history": history + [{**history[-1], "eval_accuracy": 0.8}] * bool(more)})

    assert ratio(*pair_of(tmp_path, ".json", text))["rauc"] == 1.0


def test_rauc__curves_counted_from_0_and_from_1_are_counted_alike_on_request(tmp_path):
    logs = pair_of(tmp_path, ".csv", lambda d: "epoch,val_acc\n" + "".join(
        f"{e + d // 2},{score}\n" for e, score in enumerate(RISING)
    ))  # fmt: skip
    assert "pass --epochs completed" in run("rauc", *logs, code=4).stderr
    result = ratio(*logs, "--epochs", "completed")
    assert (result["rauc"], result["start"], result["end"]) == (1.0, 1.0, 6.0)
    assert [read["first_epoch"] for read in result["logs"]] == [0, 1]
    told = [f"{text}[first-epoch={int(text[0] == 'B')}]" if "=" in text else text for text in logs]
    assert ratio(*told)["rauc"] == 1.0


def test_rauc__steps_become_epochs_only_where_a_log_counts_steps(tmp_path):
    chart = tmp_path / "a.csv"
    chart.write_text('"Step","a - val/acc"\n' + "".join(f'"{100 * e}","{55 + 5 * e}"\n' for e in (1, 2, 3)))
    lines = tmp_path / "b.txt"
    lines.write_text(json_lines({"epoch": e, "test_acc1": 60 + 5 * e} for e in (1, 2, 3)))
    logs = ("--log", f"a={chart}", "--log", f"b={lines}", "--baseline", "a")
    assert "--steps-per-epoch turns steps into epochs" in run("rauc", *logs, code=4).stderr
    result = ratio(*logs, "--steps-per-epoch", 100)
    assert (result["start"], result["end"], result["axis"]) == (1.0, 3.0, "epoch")


def test_rauc__a_loss_is_read_on_request(tmp_path):
    logs = pair_of(
        tmp_path, ".txt", lambda d: json_lines({"train_loss": 1 - 0.1 * e - d / 100, "epoch": e} for e in range(5))
    )
    named = (*logs, "--score-column", "train_loss")
    assert "say --lower-is-better" in run("rauc", *named, code=4).stderr
    assert ratio(*named, "--unit", "raw")["rauc"] is None
    better = ratio(*named, "--lower-is-better")
    assert better["rauc"] == pytest.approx(1.1)
    assert better["final_baseline"] == pytest.approx(-0.6)
    assert ratio(*named, "--lower-is-better", "--reference", 1)["rauc"] == pytest.approx(better["rauc"])


def test_rauc__one_logs_model_against_anothers_moving_average(tmp_path):
    for name, column in (("A", "test_acc1"), ("B", "ema_test_acc1")):
        (tmp_path / f"{name}.txt").write_text(json_lines({"epoch": e, column: 60 + 5 * e} for e in (1, 2, 3)))
    logs = [f"{name}={tmp_path / name}.txt" for name in "AB"]
    text = run("rauc", "--log", logs[0], "--log", logs[1], "--baseline", "A", code=4).stderr
    assert "these are different metrics" in text
    result = ratio(
        "--log", f"{logs[0]}[score=test_acc1]", "--log", f"{logs[1]}[score=ema_test_acc1]", "--baseline", "A"
    )
    assert (result["rauc"], [read["weights"] for read in result["logs"]]) == (1.0, ["model", "EMA"])


def test_rauc__takes_a_list_of_logs(tmp_path):
    (tmp_path / "runs").mkdir()
    for name, column in (("A", "acc"), ("B", "ema_acc")):
        (tmp_path / "runs" / f"{name}.csv").write_text(f"epoch,{column}\n1,50\n2,60\n")
    listed = tmp_path / "logs.toml"
    listed.write_text(
        '[[log]]\nfile = "runs/A.csv"\nmethod = "MAE"\nseed = 0\n\n'
        '[[log]]\nfile = "runs/B.csv"\nmethod = "MTO"\nseed = 0\nscore = "ema_acc"\n'
    )
    result = ratio("--log", listed, "--baseline", "MAE")
    assert (result["rauc"], result["target"], result["seeds_target"]) == (1.0, "MTO", ["0"])
    listed.write_text('[[log]]\nfile = "runs/A.csv"\nscores = "acc"\n')
    assert "log 1: no setting is called 'scores'" in run("rauc", "--log", listed, "--baseline", "MAE", code=4).stderr
    listed.write_text("[[log]\n")
    assert "the list of logs cannot be read" in run("rauc", "--log", listed, "--baseline", "MAE", code=4).stderr


@pytest.mark.parametrize("option", ["scoer=acc", "unit=points", "steps-per-epoch=0", "first-epoch=2"])
def test_rauc__an_option_of_a_log_must_be_known(log, option):
    assert f"{option.partition('=')[0]}" in run("rauc", "--log", f"{log}[{option}]", *PAIR, code=4).stderr


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("all_results.json", json.dumps({"eval_accuracy": 0.9, "epoch": 3.0}, indent=2), "one evaluation, no curve"),
        ("runs.csv", "Name,State,epoch,val_acc\na,finished,80,61\nb,finished,90,62\n", "table of runs"),
        ("wide.csv", f"epoch,{'x' * 200_000}\n1,2\n", "the header is broken"),
        ("deep.json", '{"a":' * 100_000, "the JSON document is broken"),
        ("open.csv", 'epoch,val_acc,note\n1,2,"open\n2,3,\n', "the table is broken"),
    ],
)
def test_rauc__what_holds_no_curve_ends_with_4(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    result = run("rauc", "--log", f"A={tmp_path / name}", "--log", f"B={tmp_path / name}", "--baseline", "A", code=4)
    assert message in result.stderr
    assert f"{tmp_path / name}:" in result.stderr


def test_rauc__text_and_files_say_what_was_read(log, tmp_path):
    text = run("rauc", "--log", log, *PAIR, *WINDOW, "--out", tmp_path / "out").stdout
    assert f"read {log}: table, 'score' (score, percent) over epochs from 1 ('epoch'), 8 points of 2 runs" in text
    (metadata,) = json.loads((tmp_path / "out" / "run.json").read_text())["logs"]
    assert (metadata["column"], metadata["points"], len(metadata["sha256"])) == ("score", 8, 64)
    assert "read " not in run("rauc", "--log", log, *PAIR, *WINDOW, "--format", "csv").stdout


WORDS = (
    *("acc", "accuracy", "top1", "acc1", "prec1", "acc5", "loss", "err1", "score", "gain", "lr", "best_acc", "max_acc"),
    *("knn_acc", "acc_step", "acc_epoch"),
)
words = st.sampled_from(WORDS)
splits = st.sampled_from(("", "train_", "val_", "valid/", "validation/", "test_", "eval_", "ema_", "ema_test_"))
headers = st.lists(st.builds(str.__add__, splits, words), min_size=1, max_size=5, unique=True)
writers = st.sampled_from(["csv", "tsv", "semicolons", "lines", "array", "lists"])


def log_of(names, kind, epochs=(1, 2, 3)):
    """A log whose values tell their column: 10 and more for the first, 20 and more for the second ..."""
    rows = [{"epoch": e, **{name: 10 * at + e + 0.5 for at, name in enumerate(names, 1)}} for e in epochs]
    if kind == "lines":
        return json_lines(rows)
    if kind == "array":
        return json.dumps(rows)
    if kind == "lists":
        return json.dumps({key: [row[key] for row in rows] for key in rows[0]})
    mark = {"csv": ",", "tsv": "\t", "semicolons": ";"}[kind]
    text = "\n".join(mark.join(map(str, row)) for row in [rows[0], *(row.values() for row in rows)]) + "\n"
    return text.replace(".5", ",5") if kind == "semicolons" else text


def check_column(folder, names, others, kind):
    for file, columns in (("a", names), ("b", others)):
        (folder / file).write_text(log_of(columns, kind))
    logs = ("--log", f"A={folder / 'a'}", "--log", f"B={folder / 'b'}", "--baseline", "A", "--json")
    result = CliRunner().invoke(app, ["rauc", *logs])
    assert result.exit_code in (0, 4), (result.output, result.exception)
    if result.exit_code == 4:
        assert result.stderr.count("\n") == 1
        return
    for read, columns in zip(json.loads(result.stdout)[0]["logs"], (names, others), strict=True):
        at = columns.index(read["column"]) + 1
        assert (read["first"], read["last"]) == ([1.0, 10 * at + 1.5], [3.0, 10 * at + 3.5])
        assert read["kind"] in ("accuracy", "score")
        assert read["split"] != "train"
        assert not any(word in read["column"] for word in ("train", "best", "max", "acc5", "loss", "err", "lr", "gain"))


@settings(max_examples=15, **calm)
@given(headers, headers, writers)
def test_rauc__takes_no_number_from_a_column_that_it_does_not_name(tmp_path, names, others, kind):
    check_column(tmp_path, names, others, kind)


@pytest.mark.slow
@settings(max_examples=5_000, **calm)
@given(headers, headers, writers)
def test_rauc__takes_no_number_from_a_column_that_it_does_not_name_in_thousands_of_logs(tmp_path, names, others, kind):
    check_column(tmp_path, names, others, kind)
