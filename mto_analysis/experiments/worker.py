"""One task in a process of its own: it comes in on stdin, and what a user should know goes out as lines of JSON."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mto_analysis.errors import MTOAnalysisError, RunInUseError, explained

_PROGRAM = "from mto_analysis.experiments.worker import main; main()"


class Resources(NamedTuple):
    """What a task gets.

    Attributes:
        threads: On the CPU.
        device: One of several GPUs that are shared out.
        retries: How often it is started again when its process dies.
        patience: Seconds that it waits for another process on the same task: one that is being ended, on a machine that
            was lost.
    """

    threads: int = 1
    device: str | None = None
    retries: int = 2
    patience: float = 10.0

    def device_for(self, asked: str) -> str:
        """Where a task runs that asked for a device: a GPU of several that are shared out, unless it names one.

        Example:
            >>> [Resources(device="cuda:1").device_for(asked) for asked in ("auto", "cuda", "cuda:0", "cpu")]
            ['cuda:1', 'cuda:1', 'cuda:0', 'cpu']
        """
        return self.device if self.device and asked in ("auto", "cuda") else asked


class Task(Protocol):
    """A piece of work for a process of its own, which can be pickled and taken up again where it stopped."""

    @property
    def on_cpu(self) -> bool:
        """Whether it needs no GPU."""

    def in_use(self) -> bool:
        """Whether another process works on it."""

    def do(self, resources: Resources, note: Callable[[str], None]) -> None:
        """Do it, and give notes for the user."""


class Outcome(NamedTuple):
    """How a task ended.

    Attributes:
        notes: What a user should know.
        failure: Why it failed; empty where it did not.
        exit_code: Of the failure; ``None`` where it is a mistake in the program, and ``failure`` its traceback.
        in_use: Whether it was refused, as another process works on it.
    """

    notes: tuple[str, ...] = ()
    failure: str = ""
    exit_code: int | None = 0
    in_use: bool = False


def perform(
    task: Task, resources: Resources, begun: Callable[[subprocess.Popen[bytes]], bool] | None = None
) -> Outcome:
    """Do a task in a process of its own, and start that again if it dies: it goes on from what is on disk."""
    notes: list[str] = []
    until = time.monotonic() + resources.patience
    for _ in range(resources.retries + 1):
        while task.in_use() and time.monotonic() < until:
            time.sleep(0.2)
        with tempfile.TemporaryFile() as errors, _started(task, resources, errors) as process:
            wanted = begun is None or begun(process)
            if wanted and (outcome := _heard(process, notes)) is not None:
                return outcome
            if not wanted:
                process.kill()
            code = process.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()[-1:]
        if not wanted:
            break
    words = "; ".join(["often memory is short: use fewer --jobs", *said])
    return Outcome(tuple(notes), f"its process died (exit code {code}; {words})", 1)


def _started(task: Task, resources: Resources, errors: Any) -> subprocess.Popen[bytes]:
    threads = str(resources.threads)
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    # Threads that wait by spinning take the cores from other tasks: ten times as slow on a busy machine.
    variables["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    variables["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={**os.environ, **variables},
    )
    if process.stdin is not None:
        with suppress(BrokenPipeError):  # it died at once, which is found out below
            pickle.dump((task, resources), process.stdin)
            process.stdin.flush()  # and stays open: its end tells the process that this one is gone
    return process


def _heard(process: subprocess.Popen[bytes], notes: list[str]) -> Outcome | None:
    """What the process says until it ends; ``None`` if it ends without its last word."""
    for line in process.stdout or ():
        if not line.endswith(b"\n"):
            break  # it was killed while it wrote
        told = json.loads(line)
        if "note" not in told:
            return Outcome(tuple(notes), **told)
        if told["note"] not in notes:
            notes.append(told["note"])
    return None


def main() -> None:
    """Do the task that comes in on stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, and ends it
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no report

    def report(**told: Any) -> None:
        with suppress(BrokenPipeError):
            print(json.dumps(told), file=reports, flush=True)

    task, resources = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.showwarning = lambda message, *rest: report(note=str(message))
    report(**attempt(task, resources, lambda words: report(note=words)))


def attempt(task: Task, resources: Resources, note: Callable[[str], None]) -> dict[str, Any]:
    """Do a task in this process: how it ended, as fields of an :class:`Outcome`."""
    try:
        task.do(resources, note)
    except Exception as error:
        return _failure(error)
    return {"failure": ""}


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the other end is closed
    os._exit(1)  # everything up to the last checkpoint is on disk


def _failure(error: Exception) -> dict[str, Any]:
    found = explained(error)
    if found is None:
        return {"failure": traceback.format_exc(), "exit_code": None}
    words, code = found
    if isinstance(error, MTOAnalysisError):
        words = error.message
    elif words == "out of memory":
        words += "; use fewer --jobs or a smaller batch_size"
    return {"failure": words, "exit_code": code, "in_use": isinstance(error, RunInUseError)}
