"""The probe under a launcher: parts of the images put together are what one process measures; all fail together."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_images
from labelled_images import write_parquet
from typer.testing import CliRunner

from mto_analysis import load_checkpoint, open_images
from mto_analysis.errors import DataError
from mto_analysis.probe.definition_study import Definitions
from mto_analysis.probe.property_study import Properties
from mto_analysis.probe.quadrants import AffinityMaps
from mto_analysis.probe.request import Request, Settings
from mto_analysis.probe.sharing import Shared
from mto_analysis.probe.study import measure_checkpoints, together
from mto_analysis.runtime.processes import Processes, in_step, this_process
from mto_analyze import app, console

if not torch.distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

NAMES = tuple(f"{number:02d}.png" for number in range(11))


class Unheard(Exception):
    """Another process has not come to this point yet."""


class Recorded(Processes):
    """A process that hears, instead of the others, what they said when they ran before."""

    def __init__(self, rank: int, count: int, said: list[list[Any]]) -> None:
        super().__init__(rank, count)
        object.__setattr__(self, "said", said)
        object.__setattr__(self, "turn", iter(range(99)))

    def exchange(self, value):
        turn = next(self.turn)
        while len(self.said) <= turn:
            self.said.append([None] * self.count)
        self.said[turn][self.rank] = value
        if None in self.said[turn]:
            raise Unheard
        return list(self.said[turn])


def measured(sources, images, settings: Settings, processes: Processes | None = None):
    watched, seen, maps = Definitions(), Properties(), AffinityMaps()
    watch = together(watched.watch, seen.watch, lambda model, label: nullcontext((maps,)))
    study = measure_checkpoints(Request(sources, images, settings, processes=processes or Processes()), watch=watch)
    return study, watched.table(study), watched.attention_table(), seen.table(), maps.maps


def test_parts__put_together_are_what_one_process_measures(checkpoints, tmp_path: Path) -> None:
    images = open_images(write_images(tmp_path / "images", NAMES))
    settings = Settings(batch_size=2, masks_per_image=2, keep_masks=True)
    one = measured([checkpoints["mae"]], images, settings)
    said: list[list[Any]] = []
    for rank in range(3):  # the others have not said everything yet
        with suppress(Unheard):
            measured([checkpoints["mae"]], images, settings, Recorded(rank, 3, said))
    for rank in range(3):
        with suppress(Unheard):
            measured([checkpoints["mae"]], images, settings, Recorded(rank, 3, said))
    parts = [measured([checkpoints["mae"]], images, settings, Recorded(rank, 3, said)) for rank in range(3)]
    for study, definitions, attention, properties, maps in parts:
        pd.testing.assert_frame_equal(study.table, one[0].table, check_exact=True)
        pd.testing.assert_frame_equal(study.per_image, one[0].per_image, check_exact=True)
        pd.testing.assert_frame_equal(definitions, one[1], check_exact=True)
        pd.testing.assert_frame_equal(attention, one[2], rtol=1e-12, atol=1e-15)
        pd.testing.assert_frame_equal(properties, one[3], check_exact=True)
        assert study.mask_file("mae") == one[0].mask_file("mae")
        for mine, other in zip(maps, one[4], strict=True):
            assert mine[:6] == other[:6]
            torch.testing.assert_close(mine.values, other.values)


def test_share__is_whole_units_in_a_row() -> None:
    for total in (0, 1, 7, 64):
        for count in (1, 2, 3, 5):
            parts = [list(Processes(rank, count).share(range(total), unit=4)) for rank in range(count)]
            assert [item for part in parts for item in part] == list(range(total))
            assert all(not part or part[0] % 4 == 0 for part in parts)


def test_layer_measures__that_keep_something_can_be_put_together(checkpoints) -> None:
    model = load_checkpoint(checkpoints["mae"])
    with together(Definitions().watch, Properties().watch)(model, "mae") as measures:
        found = [type(each).__name__ for each in measures if isinstance(each, Shared)]
    assert found == ["AttentionWatch", "PropertyMeasure"]
    assert isinstance(AffinityMaps(), Shared)


def test_this_process__reads_what_launchers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_process() == Processes()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    assert this_process() == Processes(3, 4, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert this_process() == Processes(1, 2, 0)
    with pytest.raises(ValueError, match="rank must be from 0 to 1"):
        Processes(2, 2)


def test_launcher__is_refused_by_commands_that_share_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    result = CliRunner().invoke(app, ["tables", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "tables cannot share its work between 2 processes" in result.stderr
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(console, "_SECONDS_FOR_MAIN", 0.0)
    result = CliRunner().invoke(app, ["tables", "--out", str(tmp_path / "out")])
    assert (result.exit_code, result.output) == (2, "")


def meet(rank: int, port: int, case: str, answers) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
    try:
        with in_step(lambda error: (str(error), 4) if isinstance(error, DataError) else None) as processes:
            said = processes.exchange(rank)
            if case == "killed" and rank:
                os._exit(9)
            answers.put((rank, said))
            if case == "data" and rank:
                raise DataError("no such image")
            if case == "mistake" and rank:
                raise KeyError("x")
            if case == "main":
                processes.on_main(lambda: (_ for _ in ()).throw(DataError("the disk is full")))
            processes.exchange(rank)
            answers.put((rank, "never here"))
    except Exception as error:
        answers.put((rank, (type(error).__name__, str(error), getattr(error, "exit_code", None))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "of_main", "of_other"),
    [
        ("data", ("OtherProcessError", "process 1 of 2: no such image", 4), ("DataError", "no such image", 4)),
        ("mistake", ("OtherProcessError", "process 1 of 2: KeyError: 'x'", 1), ("KeyError", "'x'", None)),
        ("main", ("DataError", "the disk is full", 4), ("OtherProcessError", "process 0 of 2: the disk is full", 4)),
        (
            "killed",
            ("OtherProcessError", "another process ended without a word (killed, or out of memory?)", 1),
            None,
        ),
    ],
)
def test_in_step__a_failure_of_one_ends_all(case: str, of_main, of_other) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    port = free_port()
    workers = [context.Process(target=meet, args=(rank, port, case, answers)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found: dict[int, list[Any]] = {0: [], 1: []}
    for _ in range(2 if case == "killed" else 4):
        rank, said = answers.get(timeout=120)
        found[rank].append(said)
    for worker in workers:
        worker.join(timeout=60)
    assert found[0] == [[0, 1], of_main]
    assert found[1] == ([[0, 1], of_other] if of_other else [])


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def launch(count: int, *arguments: object, path: Path | str = "") -> subprocess.CompletedProcess[str]:
    """As the user does; the launcher's own report of a failure goes to stderr too."""
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "cli"), str(path)]),
        "OMP_NUM_THREADS": "1",
    }
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count))
    options = ("--master-port", str(free_port()), "-m", "mto_analyze")
    return subprocess.run(
        [*launcher, *options, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("command", ["heterogeneity", "affinity"])
def test_launcher__gives_the_files_of_one_process(command: str, checkpoints, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", NAMES)
    (images / "09.png").write_bytes(b"no image")
    arguments = [command, "--ckpt", checkpoints["mae"], "--ckpt", checkpoints["simmim"], "--images", images]
    arguments += ["--batch-size", 2, "--device", "cpu"]
    if command == "heterogeneity":
        arguments += ["--definitions", "all", "--controls", "--control-seeds", 1, "--properties", "--save-masks"]
    one = CliRunner().invoke(app, [str(each) for each in (*arguments, "--out", tmp_path / "one")])
    assert one.exit_code == 0
    many = launch(2, *arguments, "--out", tmp_path / "many")
    assert many.returncode == 0, many.stderr
    assert many.stdout == one.stdout
    assert many.stderr.count("skipped 09.png") == 1
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "many").iterdir())
    for name in files:
        first, second = tmp_path / "one" / name, tmp_path / "many" / name
        if name.endswith(".csv") and name != "attention.csv":
            assert first.read_bytes() == second.read_bytes(), name
        elif name == "attention.csv":
            pd.testing.assert_frame_equal(pd.read_csv(first), pd.read_csv(second), rtol=1e-12)
        elif name.endswith(".npz"):
            with np.load(first) as mine, np.load(second) as other:
                assert list(mine) == list(other)
                for key in mine:
                    if mine[key].dtype.kind == "f":
                        np.testing.assert_allclose(mine[key], other[key], rtol=1e-5, atol=1e-7)
                    else:
                        np.testing.assert_array_equal(mine[key], other[key])
    assert json.loads((tmp_path / "many/run.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_launcher__ends_with_one_line_of_ours(checkpoints, tmp_path: Path) -> None:
    names = tuple(f"{number:02d}.png" for number in range(20))
    images = write_images(tmp_path / "images", names)
    (images / "18.png").write_bytes(b"no image")  # beyond those that the first process checks a model with
    arguments = ["heterogeneity", "--ckpt", checkpoints["mae"], "--images", images, "--batch-size", 2, "--strict"]
    failed = launch(2, *arguments, "--device", "cpu", "--quiet", "--out", tmp_path / "out")
    assert failed.returncode != 0
    ours = [line for line in failed.stderr.splitlines() if line.startswith("mto-analyze")]
    assert len(ours) == 1
    assert "error: process 1 of 2: image 18.png cannot be read" in ours[0]
    assert "exitcode  : 4" in failed.stderr
    assert not (tmp_path / "out").exists()


def evaluation(tmp_path: Path, checkpoints: Mapping[str, Path]) -> list[object]:
    for part, seed in (("train", 0), ("test", 1)):
        write_parquet(tmp_path / f"{part}.parquet", 26, seed=seed, shuffled=True)
    images = ["--train", tmp_path / "train.parquet", "--test", tmp_path / "test.parquet"]
    return ["evaluate", "knn", "--ckpt", checkpoints["mae"], *images, "-k", 3, "--device", "cpu"]


def own_lines(failed: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in failed.stderr.splitlines() if line.startswith("mto-analyze: error")]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_launcher__evaluates_as_one_process_does(checkpoints, tmp_path: Path) -> None:
    arguments = evaluation(tmp_path, checkpoints)
    one = CliRunner().invoke(app, [str(each) for each in (*arguments, "--out", tmp_path / "one")])
    assert one.exit_code == 0, one.stderr
    many = launch(2, *arguments, "--out", tmp_path / "many")
    assert many.returncode == 0, many.stderr
    assert many.stdout == one.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plot", "rauc"])
def test_launcher__a_command_that_cannot_share_is_refused_by_the_main_process(name: str) -> None:
    failed = launch(2, name)
    assert len(own_lines(failed)) == 1
    expected = "cannot share its work between 2 processes; run it without the launcher"
    assert expected in own_lines(failed)[0]
    assert own_lines(failed)[0].endswith("(these can: heterogeneity, affinity, pretrain, evaluate)")


@pytest.mark.slow
def test_launcher__the_reason_is_not_lost_when_another_process_fails_first(checkpoints, tmp_path: Path) -> None:
    arguments = evaluation(tmp_path, checkpoints)
    fail = tmp_path / "sitecustomize.py"  # the second process alone cannot read its images
    fail.write_text(
        "import os, pyarrow.parquet as pq\n"
        "def fail(*a, **k): raise OSError(5, 'Input/output error', 'its.parquet')\n"
        "if os.environ.get('RANK') == '1': pq.ParquetFile = fail\n"
    )
    failed = launch(2, *arguments, "--out", tmp_path / "out", path=tmp_path)
    assert failed.returncode != 0
    assert any("process 1 of 2: " in line and "its.parquet" in line for line in own_lines(failed)), failed.stderr
