"""Batches from worker processes that die, hang, fail, or have no shared memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mto_analysis.errors import DataError, explained
from mto_analysis.images import loading
from mto_analysis.images.loading import Loader, usual_workers


class Stopping:
    """Stops the worker that sent it when it arrives, before the tensors of the same batch are handed over."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.kill, (os.getpid(), signal.SIGSTOP)


class Item(NamedTuple):
    name: object
    values: Tensor


class Numbers(Dataset[Item]):
    """Items; the one with number ``at`` does something else."""

    def __init__(self, what: str = "", at: int = 5) -> None:
        self.what, self.at = what, at

    def __len__(self) -> int:
        return 8

    def __getitem__(self, item: int) -> Item:
        if item == self.at:
            if self.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "hang":
                time.sleep(3600)
            if self.what == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.what == "fail":
                raise DataError("image 5.png cannot be read (it is empty)")
            if self.what == "cut off":  # as the thread does that hands over shared memory to a command that ended
                sys.excepthook(ConnectionResetError, ConnectionResetError("Connection reset by peer"), None)
            if self.what == "mistake":
                raise KeyError("x")
        if item == self.at and self.what == "stop while it hands over":
            return Item(Stopping(), torch.zeros(3))
        return Item(str(item), torch.full((3,), float(item)))


def read(loader: Loader) -> list[tuple[tuple[str, ...], list[list[float]]]]:
    return [(tuple(batch.name), batch.values.tolist()) for batch in loader]


def test_loader__gives_the_same_batches_with_workers_and_without() -> None:
    expected = read(Loader(Numbers(), num_workers=0, batch_size=3))
    assert len(expected) == 3
    assert read(Loader(Numbers(), num_workers=2, batch_size=3)) == expected


def refuse(tensor: Tensor) -> Tensor:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_loader__without_shared_memory_gives_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read(Loader(Numbers(), num_workers=0, batch_size=3))
    monkeypatch.setattr(Tensor, "share_memory_", refuse)
    assert read(Loader(Numbers(), num_workers=1, batch_size=3)) == expected


@pytest.fixture
def sockets_collected() -> Iterator[None]:
    """torch's signal handler may raise where a socket is about to be closed, which then is closed by collection."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        loading._end_all_workers()  # a loader that is collected waits five seconds for its workers
        gc.collect()


HANG = (
    r"^processes that decode images hang \(DataLoader timed out after 0.5 seconds\); "
    r"decode without workers \(num_workers 0\)$"
)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("die", r"^a process that decodes images ended \(.*\); often memory is short: use fewer workers$"),
        ("hang", HANG),
        ("stop", HANG),
        ("stop while it hands over", HANG),
        ("fail", r"^image 5.png cannot be read \(it is empty\)$"),
    ],
)
def test_loader__says_in_one_line_what_happened_to_a_worker(
    what: str, words: str, monkeypatch: pytest.MonkeyPatch, sockets_collected: None
) -> None:
    monkeypatch.setattr(loading, "_TIMEOUT", 60 if what in ("die", "fail") else 0.5)
    with pytest.raises((DataError, RuntimeError)) as failed:  # torch's signal handler raises wherever the program is
        read(Loader(Numbers(what), num_workers=1, batch_size=2))
    found = explained(failed.value)
    assert found is not None
    assert found[1] == DataError.exit_code
    assert re.search(words, found[0])
    assert not multiprocessing.active_children()


def test_loader__that_keeps_workers_begins_again_also_where_it_was_left_early(
    monkeypatch: pytest.MonkeyPatch, sockets_collected: None
) -> None:
    loader = Loader(Numbers(), num_workers=1, batch_size=2, persistent_workers=True)
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    batches.close()  # type: ignore[attr-defined]
    assert read(loader) == read(Loader(Numbers(), num_workers=0, batch_size=2))
    assert multiprocessing.active_children() == [worker]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)  # between two iterations
    with monkeypatch.context() as patch:
        patch.setattr(loading, "_TIMEOUT", 0.5)
        with pytest.raises((DataError, RuntimeError)) as failed:
            read(loader)
    found = explained(failed.value)
    assert found is not None
    assert re.search(HANG, found[0])
    assert read(loader) == read(Loader(Numbers(), num_workers=0, batch_size=2))  # with a new worker


def test_loader__a_worker_that_is_cut_off_says_nothing_itself(capfd: pytest.CaptureFixture[str]) -> None:
    assert len(read(Loader(Numbers("cut off"), num_workers=1, batch_size=4))) == 2
    assert capfd.readouterr().err == ""


def test_loader__does_not_hide_mistakes() -> None:
    with pytest.raises(KeyError):
        read(Loader(Numbers("mistake"), num_workers=1, batch_size=2))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs root to mount a small /dev/shm")
@pytest.mark.parametrize("command", ["heterogeneity", "knn", "finetune", "pretrain"])
def test_commands__end_with_too_little_shared_memory(command: str, checkpoints, tmp_path: Path) -> None:
    from labelled_images import write_parquet
    from pretraining_cases import SMALL_MAE

    images = write_parquet(tmp_path / "images.parquet", 256, side=32)
    both = ["--ckpt", checkpoints["mae"], "--train", images, "--test", images]
    arguments = {
        "heterogeneity": ["heterogeneity", "--ckpt", checkpoints["mae"], "--images", images, "--batch-size", 64],
        "knn": ["evaluate", "knn", "-k", 3, *both],
        "finetune": ["evaluate", "finetune", *both, "--set", "epochs=1", "--set", "warmup_epochs=0"],
        "pretrain": ["pretrain", "--recipe", "mae_cifar10", "--images", images, "--not-in-memory"],
    }[command]
    if command == "pretrain":
        arguments += [word for key, value in SMALL_MAE.items() for word in ("--set", f"{key}={value}")]
    words = [sys.executable, "-m", "mto_analyze", *arguments, "--num-workers", 1, "--out", tmp_path / "out"]
    # Room for the semaphores of all queues, and for no batch.
    script = 'mount -t tmpfs -o size=256k none /dev/shm && exec "$@"'
    isolated = ["unshare", "-m", "bash", "-c", script, "bash", *map(str, words)]
    done = subprocess.run(isolated, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_usual_workers__none_for_few_images_and_a_core_each(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(loading, "_IMAGES_PER_WORKER", 128)
    assert [usual_workers(count) for count in (0, 8, 127, 128, 600, 100_000)] == [0, 0, 0, 1, 4, 8]
    assert usual_workers(100_000, processes=4) == 2
    assert usual_workers(100_000, processes=16) == 0


@pytest.mark.slow
@pytest.mark.parametrize("last", ["pass", "raise SystemExit('error')"])
def test_loader__a_worker_that_is_stopped_after_the_last_batch_does_not_keep_the_program(last: str) -> None:
    script = f"""
import os, signal, torch
from mto_analysis.images.loading import Loader
loader = Loader(torch.utils.data.TensorDataset(torch.zeros(4)), num_workers=2, persistent_workers=True)
for _ in range(2):
    batches = list(loader)
os.kill(loader._loader._iterator._workers[1].pid, signal.SIGSTOP)
{last}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ("error" if "error" in last else "")
