"""A whole tiny experiment: runs, choice, tables, figures and page; stopped and taken up again."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pandas as pd
import pytest
from experiment_cases import TINY, write_experiment
from labelled_images import write_parquet
from typer.testing import CliRunner

from mto_analysis.errors import ExperimentError, OutputError, OutputExistsError, RunInUseError
from mto_analysis.experiments import ExperimentRuns, Run, RunFailedError, do_runs, load_experiment, running, runs
from mto_analysis.experiments.results import collect
from mto_analysis.experiments.running import Engine
from mto_analysis.experiments.runs import read_curve
from mto_analysis.experiments.summary import verdict
from mto_analysis.experiments.worker import Outcome, Resources, Task, _failure, attempt, perform
from mto_analysis.rauc import rauc
from mto_analysis.runtime.outputs import locked_folder
from mto_analysis.training import RunFolder
from mto_analyze import app
from mto_analyze.experiment import estimate

#: Columns that depend on how fast the machine is.
TIMING = ["seconds"]


def run(*arguments: object):
    return CliRunner().invoke(app, ["experiment", *map(str, arguments)])


def perform_here(task: Task, resources: Resources, begun: object) -> Outcome:
    """As :func:`perform`, but in this process, which need not import torch again."""
    notes: list[str] = []
    told = attempt(task, resources, notes.append)
    return Outcome(tuple(notes), **told)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished experiment."""
    folder = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as the processes that its tables are compared with
        patch.setattr(running, "perform", perform_here)
        result = run(write_experiment(folder), "--images", folder, "--out", folder / "out")
    assert result.exit_code == 0, result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("[")]) == 7
    assert "# tiny" in result.stdout
    return folder


def test_experiment__writes_tables_figures_and_a_page(done: Path) -> None:
    out = done / "out"
    files = {path.name for path in out.iterdir() if path.is_file()}
    figures = {f"{stem}.{kind}" for stem in ("curves", "rauc", "time", "heterogeneity") for kind in ("png", "pdf")}
    assert files == {
        "curves.csv",
        "rauc.csv",
        "heterogeneity.csv",
        "choice.csv",
        "terms.csv",
        "summary.md",
        "run.json",
        "run.toml",
        "methods.md",
        *figures,
    }
    methods = (out / "methods.md").read_text()
    assert "scored every 1 epochs" in methods
    assert "Arms no MTO and MTO were each run with the seeds 0 and 1, in fp32." in methods
    assert "Settings were chosen on separate runs: MAE small." in methods
    curves = pd.read_csv(out / "curves.csv")
    assert len(curves) == 2 * 2 * 3  # methods, seeds, epochs 0 to 2
    assert curves["method"].unique().tolist() == ["MAE", "MAE + MTO"]
    assert (curves.groupby(["method", "seed"])["seconds"].diff().dropna() > 0).all()
    layers = pd.read_csv(out / "heterogeneity.csv")
    assert len(layers) == 2 * 2 * 2 * 3  # methods, seeds, epochs, layer depths of the decoder
    assert (layers["heterogeneity"] >= 0).all()
    terms = pd.read_csv(out / "terms.csv")
    assert terms["mto_sparsity"].notna().tolist() == [False, True, False, True]
    assert terms["loss"].notna().all()
    metadata = json.loads((out / "run.json").read_text())
    assert metadata["chosen"]["MAE"] in ("small", "large")
    page = (out / "summary.md").read_text()
    for heading in ("Scores", "What it shows", "RAUC", "Equal time", "Losses at the end", "The choice", "Files"):
        assert f"\n## {heading}\n" in page


def test_experiment__random_encoders_of_a_seed_are_the_same(done: Path) -> None:
    curves = pd.read_csv(done / "out/curves.csv")
    start = curves[curves["epoch"] == 0].pivot_table(index="seed", columns="method", values="score")
    assert (start["MAE"] == start["MAE + MTO"]).all()


def test_experiment__the_arm_takes_the_best_candidate(done: Path) -> None:
    choice = pd.read_csv(done / "out/choice.csv")
    assert choice["seed"].unique().tolist() == [100]
    assert choice["candidate"].tolist() == ["no MTO", "small", "large"]
    candidates = choice[choice["candidate"] != "no MTO"]
    best = candidates.loc[candidates["final"].idxmax(), "candidate"]
    metadata = json.loads((done / "out/run.json").read_text())
    assert metadata["chosen"] == {"MAE": best}
    stored = json.loads((done / "out/runs/mae-mto-seed1/run.json").read_text())["identity"]["mto"]
    assert stored["sparsity_weight"] == {"small": 0.01, "large": 0.5}[best]


def test_experiment__rauc_is_that_of_the_curves(done: Path) -> None:
    table = pd.read_csv(done / "out/rauc.csv")
    assert table["axis"].tolist() == ["epoch", "seconds"]
    curves = pd.read_csv(done / "out/curves.csv")
    means = curves.pivot_table(index="epoch", columns="method", values="score")
    expected = rauc(
        (means.index.to_numpy(), means["MAE"].to_numpy()), (means.index.to_numpy(), means["MAE + MTO"].to_numpy()), 0, 2
    )
    if expected.reason is None:
        assert table["rauc"][0] == pytest.approx(float(expected))
    assert table["numerator"][0] == pytest.approx(expected.numerator)
    assert table["denominator"][0] == pytest.approx(expected.denominator)


def test_experiment__again_finds_all_runs_finished(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "out/runs").rglob("*")}
    experiment = load_experiment(done / "tiny.toml")
    runs = ExperimentRuns(experiment, experiment.images.resolved(done), done / "out")
    told = []
    do_runs(runs, num_images=64, tell=told.append)
    assert [(each.run.folder, each.state) for each in told] == [(run.folder, "found") for run in runs.all]
    assert {path: path.stat().st_mtime_ns for path in (done / "out/runs").rglob("*")} == before
    result = run(done / "tiny.toml", "--images", done, "--out", done / "out", "--dry-run")
    assert "7 runs, 0 to do" in result.stdout


def test_experiment__refuses_another_one_in_its_folder(done: Path) -> None:
    result = run(done / "tiny.toml", "--images", done, "--out", done / "out", "--set", "batch_size=32")
    assert result.exit_code == 2
    assert "holds another run: recipe.batch_size was 16 and is now 32" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_experiment__refuses_files_of_another_command_in_its_folder(done: Path, tmp_path: Path) -> None:
    for content in (None, '{"experiment": {"name": "other"}}', "[]"):
        (tmp_path / "curves.csv").write_text("mine")
        if content is not None:
            (tmp_path / "run.json").write_text(content)
        result = run(done / "tiny.toml", "--images", done, "--out", tmp_path, "--dry-run")
        assert result.exit_code == 2
        assert f"{tmp_path} already holds curves.csv" in result.stderr


def test_collect__runs_of_settings_that_are_no_longer_chosen_are_refused(done: Path, monkeypatch) -> None:
    experiment = load_experiment(done / "tiny.toml")
    found = ExperimentRuns(experiment, experiment.images.resolved(done), done / "out")
    assert experiment.choice is not None
    chosen = runs.best_candidate(found.chosen_table(), "MAE", experiment.choice)
    other = next(each.name for each in experiment.choice.candidates if each.name != chosen)
    monkeypatch.setattr(runs, "best_candidate", lambda *_: other)
    with pytest.raises(ExperimentError, match="holds another run: mto"):
        collect(found)


def test_dry_run__counts_runs_and_writes_nothing(tmp_path: Path) -> None:
    file = write_experiment(tmp_path)
    result = run(file, "--images", tmp_path, "--out", tmp_path / "out", "--dry-run", "--set", "seeds=0,1,2")
    assert result.exit_code == 0, result.stderr
    assert "MAE + MTO, seed 2: 2 epochs, 8 steps" in result.stdout
    assert re.search(
        r"9 runs, 9 to do. Estimate: \d+ (s|min) of training .* \+ \d+ (s|min) of evaluation", result.stdout
    )
    assert "in all with --jobs 1." in result.stdout
    assert estimate(469_200, 67_200, 4) == (
        "Estimate: 130 h (5.4 days) of training (from a few timed steps) + 18.7 h of evaluation (from one of an "
        "untrained model); 37.2 h in all with --jobs 4, if runs do not slow each other."
    )
    assert not (tmp_path / "out").exists()


def test_verify_data__and_the_range_of_values_are_those_of_every_run(tmp_path: Path, monkeypatch) -> None:
    begun: list[Run] = []
    monkeypatch.setattr("mto_analysis.experiments.do_runs", lambda runs, **_: begun.extend(runs.all))
    options = ("--images", tmp_path, "--out", tmp_path / "out", "--verify-data", "--value-range", 0, 4095)
    result = run(write_experiment(tmp_path), *options)
    assert result.exit_code == 0, result.stderr
    assert {each.settings.verify_data for each in begun} == {True}
    assert {each.settings.value_range for each in begun} == {(0, 4095)}
    assert {each.settings.evaluation.value_range for each in begun} == {(0, 4095)}


def test_check__refuses_runs_of_other_images_and_files_of_something_else(done: Path, tmp_path: Path) -> None:
    file = write_experiment(tmp_path)
    write_parquet(tmp_path / "train.parquet", 65, side=32)
    experiment = load_experiment(file)
    with pytest.raises(ExperimentError, match=r"images\.count was 64 and is now 65"):
        ExperimentRuns(experiment, experiment.images.resolved(tmp_path), done / "out").check()
    (tmp_path / "project/runs/Nov30_host").mkdir(parents=True)
    (tmp_path / "project/curves.csv").write_text("mine")
    result = run(file, "--images", tmp_path, "--out", tmp_path / "project", "--dry-run")
    assert result.exit_code == OutputExistsError.exit_code
    assert "already holds curves.csv of something else" in result.stderr


def test_experiment__a_failing_run_ends_it_with_one_line(tmp_path: Path) -> None:
    file = write_experiment(tmp_path, TINY.replace("batch_size = 16", "batch_size = 128"))
    result = run(file, "--images", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 4
    line = result.stderr.splitlines()[-1]
    assert "choosing: MAE, seed 100: 64 images do not fill one batch of 128" in line
    assert "run the same command again" in line


class Killing:
    """Kills processes of runs when they have begun."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, run: Run, resources: Resources, begun=None) -> Outcome:
        def kill(process) -> bool:
            assert begun is None or begun(process)
            if self.times:
                self.times -= 1
                process.kill()
            return True

        return perform(run, resources, kill)


@pytest.fixture
def tiny_runs(tmp_path: Path) -> ExperimentRuns:
    experiment = load_experiment(write_experiment(tmp_path))
    return ExperimentRuns(experiment, experiment.images.resolved(tmp_path), tmp_path / "out")


@pytest.mark.slow
def test_do_runs__starts_a_run_again_whose_process_dies(
    tiny_runs: ExperimentRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tiny_runs.all[:1]
    monkeypatch.setattr(running, "perform", Killing(3))
    with pytest.raises(RunFailedError, match=r"^choosing: MAE, seed 100: its process died \(exit code -9; often"):
        do_runs(tiny_runs, num_images=64, part=first)
    monkeypatch.setattr(running, "perform", Killing(2))
    do_runs(tiny_runs, num_images=64, part=first)
    assert first[0].finished()


class Pretended(Engine):
    """Ends every run at once; those whose name holds a word fail."""

    def __init__(self, failing: str, tmp_path: Path) -> None:
        self.failing, self.done, self._folder = failing, [], tmp_path

    def submit(self, run: Run) -> Future[Outcome]:
        ended: Future[Outcome] = Future()
        failed = self.failing in run.name
        if not failed:
            self.done.append(run.name)
            run.folder.mkdir(parents=True)
            identity = {"recipe": run.recipe.to_dict(), "seed": run.seed}
            RunFolder(run.folder).write_metadata({"state": "complete", "identity": identity})
        ended.set_result(Outcome(("a note",), "the disk is full", 4) if failed else Outcome())
        return ended

    def __exit__(self, *_: object) -> None:
        pass


def test_experiment__refuses_a_folder_in_which_another_one_works(tiny_runs: ExperimentRuns, tmp_path: Path) -> None:
    engine = Pretended("none", tmp_path)
    with locked_folder(tiny_runs.folder), pytest.raises(RunInUseError, match="is in use by another process") as refused:
        do_runs(tiny_runs, num_images=64, engine=engine)
    assert refused.value.exit_code == 2
    assert not engine.done
    do_runs(tiny_runs, num_images=64, engine=engine, part=tiny_runs.only(1))  # parts share it
    assert engine.done


def test_keep_going__does_the_others_and_reports_at_the_end(tiny_runs: ExperimentRuns, tmp_path: Path) -> None:
    engine = Pretended("choosing: MAE + large", tmp_path)
    words = (
        "choosing: MAE + large, seed 100: the disk is full; not begun, as their settings could not be chosen: "
        "MAE + MTO, seed 0, MAE + MTO, seed 1; fix it and run the same command again"
    )
    told = []
    with pytest.raises(RunFailedError) as failed:
        do_runs(tiny_runs, num_images=64, engine=engine, keep_going=True, tell=told.append)
    assert (str(failed.value), failed.value.exit_code) == (words, 4)
    assert engine.done == ["choosing: MAE, seed 100", "choosing: MAE + small, seed 100", "MAE, seed 0", "MAE, seed 1"]
    assert [each.state for each in told] == ["done", "done", "note", "failed", "done", "done"]
    with pytest.raises(RunFailedError, match=r"^choosing: MAE \+ large, seed 100: the disk is full; fix it and run"):
        do_runs(tiny_runs, num_images=64, engine=Pretended("large", tmp_path))


def test_list__numbers_all_runs_and_says_how_far_they_are(done: Path, tmp_path: Path) -> None:
    arguments = [done / "tiny.toml", "--images", done, "--list", "--out"]
    fresh = run(*arguments, tmp_path / "out").stdout.splitlines()
    assert [line.split()[0] for line in fresh] == [str(number) for number in range(1, 8)]
    assert re.fullmatch(r"  1  choosing: MAE, seed 100 +not begun", fresh[0])
    assert fresh[4].endswith("waits for runs 1, 2, 3")
    assert not (tmp_path / "out").exists()
    finished = run(*arguments, done / "out").stdout.splitlines()
    assert all(line.endswith("finished") for line in finished)
    assert [line[:36] for line in finished] == [line[:36] for line in fresh]


def test_only__does_one_run_and_a_finished_one_is_no_error(done: Path, tmp_path: Path) -> None:
    arguments = [done / "tiny.toml", "--images", done, "--out"]
    again = run(*arguments, done / "out", "--only", 5)
    assert again.exit_code == 0, again.stderr
    for number, words in ((0, "--only"), (8, "runs are numbered from 1 to 7, got 8"), (5, "waits for runs 1, 2, 3")):
        refused = run(*arguments, tmp_path / "out", "--only", number)
        assert refused.exit_code == 2
        assert words in refused.stderr.splitlines()[-1]
    both = run(*arguments, tmp_path / "out", "--only", 1, "--shard", "1/2")
    assert "give one of them" in both.stderr
    for shard in ("3/2", "0/2", "half"):
        assert run(*arguments, tmp_path / "out", "--shard", shard).exit_code == 2
    assert "add --engine ray" in run(*arguments, tmp_path / "out", "--gpus", 0.5).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
def test_shards__equal_the_whole(done: Path, tmp_path: Path, together: bool) -> None:
    started = []
    for shard in ("1/2", "2/2"):
        started.append(start(done, tmp_path / "out", "--shard", shard))
        if not together:
            started[-1].communicate(timeout=1800)
    for process in started:
        process.communicate(timeout=1800)
        assert process.returncode == 0
    assert_equal_tables(tmp_path / "out", done / "out")


@pytest.mark.slow
def test_kills__twenty_at_random_moments_give_equal_tables(done: Path, tmp_path: Path) -> None:
    chance = random.Random(1)
    kills, number, finished = 0, 0, False
    while kills < 20 or not finished:
        process = start(done, tmp_path / str(number), "--jobs", "2")
        try:
            _, stderr = process.communicate(timeout=chance.uniform(3, 20) if kills < 20 else 1800)
            assert process.returncode == 0, stderr
            assert_equal_tables(tmp_path / str(number), done / "out")
            number, finished = number + 1, True  # where it was faster than the kills: another one
        except subprocess.TimeoutExpired:
            process.kill()  # the children must see to it themselves
            process.communicate(timeout=60)
            kills, finished = kills + 1, False


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_ray__two_nodes_of_which_one_is_killed_give_equal_tables(done: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "cli")]), "OMP_NUM_THREADS": "1"}
    program = Path(__file__).with_name("ray_cluster.py")
    command = [sys.executable, program, done / "tiny.toml", done, tmp_path / "out"]
    ended = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stderr
    assert "killed the node of one of" in ended.stdout
    assert_equal_tables(tmp_path / "out", done / "out")


def test_ray__is_named_where_it_is_missing(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    refused = run(done / "tiny.toml", "--images", done, "--out", tmp_path / "out", "--engine", "ray")
    assert refused.exit_code == 2
    assert "pip install 'mto-analysis[cluster]'" in refused.stderr


class Node:
    """Says what nodes of a cluster have; nothing is started on it."""

    def __init__(self, **resources: float) -> None:
        self.resources = resources

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": True, "Resources": self.resources}]

    def remote(self, **options: object):
        return lambda call: options


def test_ray__shares_out_the_smallest_node_and_refuses_what_no_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from mto_analysis.experiments.cluster import RayEngine

    monkeypatch.setitem(sys.modules, "ray", Node(CPU=16.0, GPU=2.0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert RayEngine(jobs=1)._task == {"max_retries": 2, "num_cpus": 2, "num_gpus": 1.0}
    assert RayEngine(jobs=8, threads=4, retries=0)._task == {"max_retries": 0, "num_cpus": 4, "num_gpus": 0.25}
    with pytest.raises(ValueError, match="a run needs 32 CPUs, and no node of the cluster has more than 16"):
        RayEngine(threads=32)
    with pytest.raises(ValueError, match="a run needs 4 GPUs, and no node of the cluster has more than 2"):
        RayEngine(gpus=4)


def start(done: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """The experiment as a process of its own."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "cli")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mto_analyze", "experiment", done / "tiny.toml", "--images", done, "--out", out]
    return subprocess.Popen([*map(str, command), *options], env=environment, stderr=subprocess.PIPE, text=True)


def assert_equal_tables(out: Path, expected: Path) -> None:
    for name in ("curves.csv", "heterogeneity.csv", "choice.csv", "terms.csv"):
        pd.testing.assert_frame_equal(without_timing(out / name), without_timing(expected / name), check_exact=True)
    names, wanted = ({path.name for path in folder.iterdir()} for folder in (out, expected))
    assert names == wanted


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OutputError("last.pth cannot be written", advice="fix it and continue with --resume"),
            "last.pth cannot be written",
        ),
        (MemoryError(), "out of memory; use fewer --jobs or a smaller batch_size"),
        (ValueError("k is 0"), "k is 0"),
    ],
)
def test_failure__gives_the_advice_of_an_experiment_only(error: Exception, words: str) -> None:
    assert _failure(error)["failure"] == words
    assert _failure(KeyError("x"))["exit_code"] is None


def without_timing(path: Path) -> pd.DataFrame:
    return pd.read_csv(path).drop(columns=TIMING, errors="ignore")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_experiment__killed_and_started_again_ends_as_if_nothing_had_happened(done: Path, tmp_path: Path, kind) -> None:
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "cli")])}
    # It hears interrupts also where these tests run in a shell's background, which ignores them.
    hearing = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from mto_analyze import app; app()"
    )
    command = [sys.executable, "-c", hearing, "experiment", done / "tiny.toml", "--images", done, "--jobs", "2"]
    command += ["--out", tmp_path / "out"]
    kills = 0
    for wait in (6.0, 8.0, 10.0, 12.0, 60.0, 1800.0):
        process = subprocess.Popen(
            [*map(str, command)], env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
        )
        try:
            process.communicate(timeout=wait)
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            if kind is signal.SIGKILL:
                process.kill()  # the parent alone: its children must see to it themselves
            else:
                os.killpg(process.pid, kind)
            _, stderr = process.communicate(timeout=60)
            # Python itself ends by the signal, a shell's 130, where the interrupt came amid an import.
            assert kind is signal.SIGKILL or process.returncode in (130, -kind), stderr
            assert kind is signal.SIGKILL or "error: interrupted" in stderr.splitlines()[-1]
            deadline = time.monotonic() + 30
            while alive(process.pid) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert not alive(process.pid), "a child outlived its parent"
            kills += 1
    assert process.returncode == 0
    assert kills
    for name in ("curves.csv", "heterogeneity.csv", "choice.csv"):
        pd.testing.assert_frame_equal(without_timing(tmp_path / "out" / name), without_timing(done / "out" / name))


def alive(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_verdict__claims_nothing_that_the_interval_does_not_say(done: Path) -> None:
    from dataclasses import replace

    experiment = load_experiment(done / "tiny.toml")
    results = collect(ExperimentRuns(experiment, experiment.images.resolved(done), done / "out"))
    one = results.comparisons[0]
    bounded = replace(one.interval, kind="bounded", low=0.9, high=1.2)
    assert "no difference is shown" in verdict(replace(one, rauc=1.05, interval=bounded))
    assert "learned faster" in verdict(replace(one, rauc=1.1, interval=replace(bounded, low=1.01)))
    assert "learned more slowly" in verdict(replace(one, rauc=0.9, interval=replace(bounded, high=0.99)))
    assert "no finding" in verdict(replace(one, rauc=1.1, interval=replace(bounded, kind="none", low=None, high=None)))
    assert "undefined" in verdict(replace(one, rauc=None, reason="no gain"))


def test_read_curve__of_a_run_that_has_not_begun_is_empty(tmp_path: Path) -> None:
    experiment = load_experiment(write_experiment(tmp_path))
    runs = ExperimentRuns(experiment, experiment.images.resolved(tmp_path), tmp_path / "out")
    assert read_curve(runs.main[0]).empty
    assert not runs.main[0].finished()


def test_last_row__is_read_from_the_end_of_a_file_that_is_being_written(tmp_path):
    path = tmp_path / "metrics.csv"
    assert runs._last_row(path) is None
    for text, step in (("step,loss\n", None), ("1,0.5\n", "1"), ("2,0", "1"), (".25\n", "2")):
        with path.open("a") as file:
            file.write(text)
        row = runs._last_row(path)
        assert (row and row["step"]) == step
    path.write_text("step,loss\n" + "".join(f"{step},0.25\n" for step in range(10_000)) + "10000,")
    assert runs._last_row(path) == {"step": "9999", "loss": "0.25"}
