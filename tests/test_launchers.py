"""Real launchers: torchrun starts every command documented for it, and whichever process fails says why; kills at any
moment lose nothing, and neither does a full disk."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from image_files import write_images
from labelled_images import write_parquet
from pretraining_cases import SMALL_MAE, Stopped, contents, rows, run, same, small_recipe, stop_after
from typer.testing import CliRunner

from mto_analysis.training import RunSettings
from mto_analyze import app

if not torch.distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

pytestmark = pytest.mark.slow

NAMES = tuple(f"{number:02d}.png" for number in range(11))
WORKER = Path(__file__).with_name("pretraining_worker.py")
#: Makes one process fail, or die, in its second collective call.
SABOTAGE = """
import os
if os.environ.get("RANK") == os.environ["SABOTAGED"]:
    from mto_analysis.runtime.processes import Processes
    turns = iter(range(10**6))
    def sabotaged(call):
        def run(*arguments):
            if next(turns) == 1:
                if os.environ["SABOTAGE"] == "kill":
                    os.kill(os.getpid(), 9)
                raise OSError(5, "Input/output error", "its.parquet")
            return call(*arguments)
        return run
    Processes.exchange, Processes.sum = sabotaged(Processes.exchange), sabotaged(Processes.sum)
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


Done = subprocess.CompletedProcess[str]


def torchrun(count: int, *arguments: object, path: Path | str = "", **variables: str) -> Done:
    """As the user does; the launcher's own report of a failure goes to stderr too."""
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "cli"), str(path)]),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count))
    options = ("--master-port", str(free_port()), "-m", "mto_analyze")
    return subprocess.run(
        [*launcher, *options, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=1800
    )


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
    many = torchrun(2, *arguments, "--out", tmp_path / "many")
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


def own_lines(failed: Done) -> list[str]:
    return [line for line in failed.stderr.splitlines() if line.startswith("mto-analyze: error")]


#: Every command that is documented for torchrun, made small.
COMMANDS: dict[str, list[object]] = {
    "heterogeneity": ["heterogeneity", "--ckpt", "MAE", "--images", "train.parquet", "--batch-size", 2],
    "affinity": ["affinity", "--ckpt", "MAE", "--images", "train.parquet", "--batch-size", 2],
    "knn": ["evaluate", "knn", "-k", 3],
    "cached": ["evaluate", "linear", "--cached"],
    "linear": ["evaluate", "linear", "--set", "epochs=2", "--set", "batch_size=8", "--set", "warmup_epochs=1"],
    "finetune": ["evaluate", "finetune", "--set", "epochs=2", "--set", "batch_size=8", "--set", "warmup_epochs=1"],
    "pretrain": ["pretrain", "--recipe", "mae_cifar10", "--images", "train.parquet"],
}
for name in ("knn", "cached", "linear", "finetune"):
    COMMANDS[name] += ["--ckpt", "MAE", "--train", "train.parquet", "--test", "test.parquet"]
for key, value in SMALL_MAE.items():
    COMMANDS["pretrain"] += ["--set", f"{key}={value}"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    for part, seed in (("train", 0), ("test", 1)):
        write_parquet(folder / f"{part}.parquet", 32, seed=seed, shuffled=True)
    return folder


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest, labelled: Path, checkpoints: Any) -> list[object]:
    files = {
        "MAE": checkpoints["mae"],
        **{f"{part}.parquet": labelled / f"{part}.parquet" for part in ("train", "test")},
    }
    return [*(files.get(str(each), each) for each in COMMANDS[request.param]), "--device", "cpu", "--quiet"]


def numbers(folder: Path) -> dict[str, pd.DataFrame]:
    """All tables of a folder without columns that depend on the machine."""
    timing = ["seconds", "hours", "images_per_second", "data_wait"]
    tables = {str(path.relative_to(folder)): pd.read_csv(path) for path in sorted(folder.rglob("*.csv"))}
    return {name: table.drop(columns=timing, errors="ignore") for name, table in tables.items()}


@pytest.mark.usefixtures("one_thread")
def test_torchrun__runs_every_command_as_one_process_does(command: list[object], tmp_path: Path) -> None:
    one = CliRunner().invoke(app, [str(each) for each in (*command, "--out", tmp_path / "one")])
    assert one.exit_code == 0, one.stderr
    many = torchrun(2, *command, "--out", tmp_path / "many")
    assert many.returncode == 0, many.stderr
    assert not own_lines(many)
    expected, found = numbers(tmp_path / "one"), numbers(tmp_path / "many")
    assert expected.keys() == found.keys()
    trained = set(command) & {"linear", "finetune", "pretrain"} and "--cached" not in command
    for name, table in expected.items():
        if trained:  # batch norms and H see one process's images
            kept = [column for column in table if column in ("method", "seed", "kind", "epoch", "step", "loss", "lr")]
            table, found[name] = table[kept], found[name][kept]
        pd.testing.assert_frame_equal(found[name], table, rtol=1e-2 if trained else 1e-9)


@pytest.mark.parametrize(("sabotage", "who"), [("raise", 0), ("raise", 1), ("kill", 1)])
def test_torchrun__ends_with_the_reason_of_the_process_that_fails_first(
    command: list[object], sabotage: str, who: int, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    failed = torchrun(2, *command, "--out", tmp_path / "out", path=tmp_path, SABOTAGED=str(who), SABOTAGE=sabotage)
    assert failed.returncode != 0
    assert "Traceback" not in failed.stderr.partition("failed (exitcode")[0]  # what follows is the launcher's own
    if sabotage == "kill":  # the launcher names the process; another one may notice its end before it is ended too
        assert "Signal 9 (SIGKILL)" in failed.stderr
        assert all("another process ended without a word" in line for line in own_lines(failed))
    else:
        whose = "" if who == 0 else f"process {who} of 2: "
        assert own_lines(failed) == [f"mto-analyze: error: {whose}Input/output error: its.parquet"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rauc"], "rauc cannot share its work between 2 processes; run it without the launcher (these can: "),
        (["heterogeneity", "--ckpt", "no.pth"], "no checkpoint at no.pth"),
        (["pretrain", "--no-such-option"], "No such option: --no-such-option"),
    ],
)
def test_torchrun__says_once_what_all_processes_fail_with(arguments: list[str], words: str, tmp_path: Path) -> None:
    failed = torchrun(2, *arguments, path=tmp_path)
    assert failed.returncode != 0
    assert len(own_lines(failed)) == 1
    assert words in own_lines(failed)[0]


def test_torchrun__an_image_that_one_process_cannot_read_is_named(checkpoints: Any, tmp_path: Path) -> None:
    names = tuple(f"{number:02d}.png" for number in range(20))
    images = write_images(tmp_path / "images", names)
    (images / "18.png").write_bytes(b"no image")  # beyond those that the first process checks a model with
    arguments = ["heterogeneity", "--ckpt", checkpoints["mae"], "--images", images, "--batch-size", 2, "--strict"]
    failed = torchrun(2, *arguments, "--device", "cpu", "--quiet", "--out", tmp_path / "out")
    assert len(own_lines(failed)) == 1
    assert "error: process 1 of 2: image 18.png cannot be read" in own_lines(failed)[0]
    assert "exitcode  : 4" in failed.stderr
    assert not (tmp_path / "out").exists()


def test_accelerate__starts_the_command(labelled: Path, tmp_path: Path) -> None:
    # On CPUs accelerate starts one process only, unless there is MPI; on GPUs it is torchrun.
    start = ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    arguments = [str(labelled / "train.parquet") if each == "train.parquet" else each for each in COMMANDS["pretrain"]]
    done = subprocess.run(
        [sys.executable, "-m", *start, "-m", "mto_analyze", *map(str, arguments), "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["layout"]["processes"] == 1


def launch(folder, processes=1, **options):
    """Processes of one run, as torchrun would start them."""
    port = str(free_port())
    started = []
    for rank in range(processes):
        several = {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        several |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(processes)}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(several if processes > 1 else {})}
        command = [sys.executable, str(WORKER), str(folder), json.dumps(options)]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return started


def finish(started):
    for process in started:
        _, told = process.communicate(timeout=1800)
        assert process.returncode == 0, told


def equal_runs(one, other):
    assert same(contents(one / "last.pth"), contents(other / "last.pth"))
    assert rows(one / "metrics.csv") == rows(other / "metrics.csv")


def kill_at_random(folder, processes, kills, seed, **options):
    """Start, kill, start again ..., then let it end; how far the kills came."""
    chance = random.Random(seed)
    reached = []
    for _ in range(kills):
        started = launch(folder, processes, **options)
        # Until the first new step, or as long as it takes to start: a kill during the start proves little.
        begun, before = time.monotonic(), size_of(folder / "metrics.csv")
        while size_of(folder / "metrics.csv") == before and time.monotonic() - begun < 120:
            if started[0].poll() is not None:
                break
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.25))
        for process in started:
            process.send_signal(signal.SIGKILL)
        for process in started:
            process.communicate()
        reached.append(len(rows(folder / "metrics.csv")) if (folder / "metrics.csv").exists() else 0)
    finish(launch(folder, processes, **options))
    return reached


def size_of(path):
    return path.stat().st_size if path.exists() else 0


OPTIONS = {"mto": True, "ema": 0.9, "save_steps": 1, "recipe": {"epochs": "60", "clip_grad": "1.0"}}


@pytest.mark.parametrize("processes", [1, 2])
def test_kills__twenty_at_random_moments_change_no_bit(tmp_path, processes):
    finish(launch(tmp_path / "whole", processes, **OPTIONS))
    reached = kill_at_random(tmp_path / "killed", processes, 20, seed=processes, **OPTIONS)
    assert len(set(reached)) >= 8  # the kills met the run at different places
    equal_runs(tmp_path / "whole", tmp_path / "killed")


def test_kill__with_drop_path_on_two_processes_changes_no_bit(tmp_path):
    options = {"method": "simmim", "accumulation": 2, "save_steps": 1}
    finish(launch(tmp_path / "whole", 2, **options))
    kill_at_random(tmp_path / "killed", 2, 2, seed=5, **options)
    equal_runs(tmp_path / "whole", tmp_path / "killed")


def test_two_processes__give_the_curve_of_one_with_twice_the_batch(tmp_path):
    options = {"mto": True, "recipe": {"epochs": "4"}}
    finish(launch(tmp_path / "one", 1, **options))
    finish(launch(tmp_path / "two", 2, **options))
    one, two = (rows(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert float(first["pixels"]) == pytest.approx(float(second["pixels"]), rel=2e-5)
        assert float(first["mto"]) == pytest.approx(float(second["mto"]), rel=2e-4)
        assert float(first["heterogeneity_0"]) == pytest.approx(float(second["heterogeneity_0"]), rel=0.2)


def test_fsdp__trains_with_mto_as_one_process_and_resumes_exactly(tmp_path):
    options = {"mto": True, "recipe": {"epochs": "3"}}
    finish(launch(tmp_path / "one", 1, **options))
    finish(launch(tmp_path / "whole", 2, fsdp=True, save_steps=1, **options))
    for first, second in zip(*(rows(tmp_path / name / "metrics.csv") for name in ("one", "whole")), strict=True):
        assert float(first["pixels"]) == pytest.approx(float(second["pixels"]), rel=2e-5)
        assert float(first["mto"]) == pytest.approx(float(second["mto"]), rel=2e-4)
    kill_at_random(tmp_path / "killed", 2, 1, seed=3, fsdp=True, save_steps=1, **options)
    equal_runs(tmp_path / "whole", tmp_path / "killed")
    one, other = (contents(tmp_path / name / "last.pth")["model"] for name in ("one", "whole"))
    assert one.keys() == other.keys()
    assert all(one[name].shape == other[name].shape for name in one)


@pytest.mark.parametrize("method", ["bootmae", "conmim"])
def test_fsdp__shares_out_slow_branches_too_and_resumes_exactly(tmp_path, method):
    # Small steps: the order in which processes add gradients differs, and a contrast multiplies what that rounds.
    options = {"method": method, "recipe": {"epochs": "3", "base_lr": "1e-4"}}
    finish(launch(tmp_path / "copies", 2, **options))  # batch norms of ConMIM see one process's images: not as one
    finish(launch(tmp_path / "whole", 2, fsdp=True, save_steps=1, **options))
    for first, second in zip(*(rows(tmp_path / name / "metrics.csv") for name in ("copies", "whole")), strict=True):
        assert float(first["loss"]) == pytest.approx(float(second["loss"]), rel=2e-5)
    kill_at_random(tmp_path / "killed", 2, 1, seed=4, fsdp=True, save_steps=1, **options)
    equal_runs(tmp_path / "whole", tmp_path / "killed")
    copies, whole = (contents(tmp_path / name / "last.pth")["model_ema"] for name in ("copies", "whole"))
    assert copies.keys() == whole.keys()
    for name, weight in copies.items():
        torch.testing.assert_close(weight, whole[name], rtol=1e-4, atol=1e-5)


def limited(folder, size, **options):
    """A run that may write files of at most ``size`` bytes, as on a full disk."""
    return subprocess.run(
        [sys.executable, str(WORKER), str(folder), json.dumps(options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        ),
        capture_output=True,
        text=True,
        timeout=1800,
    )


def test_full_disk__says_so_and_loses_nothing(tmp_path, one_thread):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(launch(whole, recipe={"epochs": "3"}))
    size = (whole / "last.pth").stat().st_size
    assert limited(cut, size // 2, recipe={"epochs": "3"}).returncode == 2
    finish(launch(cut, recipe={"epochs": "3"}))
    equal_runs(whole, cut)
    # The disk fills up in the middle of a run: the checkpoint before stays.
    late = tmp_path / "late"
    with pytest.raises(Stopped):
        run(late, small_recipe(epochs="3"), RunSettings(device="cpu", log_every=2), on_step=stop_after(6))
    before = (late / "last.pth").read_bytes()
    done = limited(late, size // 2, recipe={"epochs": "3"})
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) <= 3
    assert "last.pth cannot be written (File too large)" in done.stderr
    assert (late / "last.pth").read_bytes() == before
    assert not list(late.glob(".*.tmp"))
    finish(launch(late, recipe={"epochs": "3"}))
    equal_runs(whole, late)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_slurm_script__resumes_what_has_begun_and_waits_for_its_end(tmp_path: Path) -> None:
    """With a launcher that takes a moment to end, as torchrun does."""
    launcher = tmp_path / "torchrun"
    launcher.write_text(
        f"#!{sys.executable}\n"
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(0.5)\n"
        "    sys.exit(print('ended', flush=True))\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print(*sys.argv, flush=True)\n"
        "time.sleep(60)\n"
    )
    launcher.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path), "HOME": str(tmp_path)}
    for options in ("--recipe mae_vit_base", "--resume"):
        script = Path(__file__).parents[1] / "docs" / "slurm.sh"
        job = subprocess.Popen(["bash", str(script)], stdout=subprocess.PIPE, text=True, env=os.environ | variables)
        assert job.stdout is not None
        assert f"pretrain --out {tmp_path} {options}" in job.stdout.readline()
        (tmp_path / "run.json").touch()  # it has begun, and has no checkpoint yet
        job.send_signal(signal.SIGUSR1)
        told, _ = job.communicate(timeout=60)
        assert told == "ended\n"
