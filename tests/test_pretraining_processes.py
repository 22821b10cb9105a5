"""Real processes: two of them share a run, kills at any moment lose nothing, and neither does a full disk."""

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

import pytest
import torch
from pretraining_cases import Stopped, contents, rows, run, same, small_recipe, stop_after

from mto_analysis.training import RunSettings

WORKER = Path(__file__).with_name("pretraining_worker.py")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


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
        _, told = process.communicate(timeout=300)
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


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills__twenty_at_random_moments_change_no_bit(tmp_path, processes):
    finish(launch(tmp_path / "whole", processes, **OPTIONS))
    reached = kill_at_random(tmp_path / "killed", processes, 20, seed=processes, **OPTIONS)
    assert len(set(reached)) >= 8  # the kills met the run at different places
    equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_kill__with_drop_path_on_two_processes_changes_no_bit(tmp_path):
    options = {"method": "simmim", "accumulation": 2, "save_steps": 1}
    finish(launch(tmp_path / "whole", 2, **options))
    kill_at_random(tmp_path / "killed", 2, 2, seed=5, **options)
    equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bootmae", "conmim"])
def test_fsdp__shares_out_slow_branches_too_and_resumes_exactly(tmp_path, method):
    options = {"method": method, "recipe": {"epochs": "3"}}
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


@pytest.mark.slow
def test_launchers__start_the_command(tmp_path):
    from mto_analysis.demo import DEMO_IMAGES

    arguments = ["-m", "mto_analyze", "pretrain", "--recipe", "mae_cifar10", "--data", str(DEMO_IMAGES)]
    arguments += ["--device", "cpu", "--set", "model.depth=1", "--set", "epochs=1", "--set", "batch_size=64"]
    # On CPUs accelerate starts one process only, unless there is MPI; on GPUs it is torchrun.
    for name, count, start in (
        ("torchrun", 2, ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]),
        ("accelerate", 1, ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]),
    ):
        done = subprocess.run(
            [sys.executable, "-m", *start, *arguments, "--out", str(tmp_path / name)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("epoch 1/1") == 1
        assert json.loads((tmp_path / name / "run.json").read_text())["layout"]["processes"] == count


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
        timeout=300,
    )


@pytest.mark.slow
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
