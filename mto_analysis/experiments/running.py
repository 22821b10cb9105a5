"""Doing the runs of an experiment, several at once, each in a process of its own, from wherever they stopped."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from mto_analysis.errors import MTOAnalysisError
from mto_analysis.experiments.runs import ExperimentRuns, Run
from mto_analysis.experiments.worker import Report, work

__all__ = ["Progress", "RunFailedError", "do_runs", "threads_for"]

# What the engine tells those who started it by itself; an experiment is taken up by its own command.
_ENGINE_ADVICE = re.compile(r"[;:] (?:(?:fix it and )?go on with --resume|restore it, then resume)")


class RunFailedError(MTOAnalysisError):
    """A run failed; the exit code is that of its error."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Progress(NamedTuple):
    """How far a run is, told whenever it reports.

    ``state`` is ``found`` (it was finished before), ``begun``, ``going``, ``note`` or ``done``.
    """

    run: Run
    state: str
    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    score: float | None = None
    words: str = ""


@dataclass
class _Worker:
    """A process, and the run it does."""

    process: Any
    connection: Connection
    run: Run | None = None
    reports: int = field(default=0)


def threads_for(jobs: int) -> int:
    """Threads of each of some processes, so that together they fill the cores; or what ``OMP_NUM_THREADS`` says."""
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // jobs)


def do_runs(
    runs: ExperimentRuns,
    *,
    jobs: int = 1,
    num_images: int,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Do all runs that are not finished.

    The first failure ends all: what they have done is on disk, and the next call goes on from there.

    Args:
        runs: Of the experiment.
        jobs: Runs at once.
        num_images: That are trained on, for the number of steps.
        tell: Takes progress.

    Raises:
        RunFailedError: If a run fails, or its process dies.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    queue = _Queue(runs)
    for run in runs.all:
        if run.finished():
            steps = total_steps(run, num_images)
            queue.found(run)
            tell(Progress(run, "found", steps, steps, run.recipe.epochs))
    if not queue.waiting:
        return
    count = min(jobs, len(queue.waiting))
    with _workers(count, deterministic=runs.experiment.deterministic) as workers:
        while True:
            for worker in workers:
                if worker.run is None and (ready := queue.next()) is not None:
                    ready.check()
                    worker.run = ready
                    worker.connection.send(ready)
                    tell(Progress(ready, "begun", 0, total_steps(ready, num_images)))
            busy = {worker.connection: worker for worker in workers if worker.run is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                _hear(worker, queue, num_images, tell)


def _hear(worker: _Worker, queue: _Queue, num_images: int, tell: Callable[[Progress], None]) -> None:
    run = worker.run
    if run is None:
        return
    try:
        report: Report = worker.connection.recv()
    except (EOFError, OSError) as error:
        worker.process.join(5)
        raise RunFailedError(
            f"{run.name}: its process died (exit code {worker.process.exitcode}; often memory is short: use fewer "
            "--jobs); run the same command again to go on",
            1,
        ) from error
    total = total_steps(run, num_images)
    if report.kind == "failed":
        if report.exit_code is None:
            raise RuntimeError(f"{run.name} failed:\n{report.words}")
        words = _ENGINE_ADVICE.sub("", report.words)
        raise RunFailedError(f"{run.name}: {words}; fix it and run the same command again", report.exit_code)
    if report.kind == "note":
        tell(Progress(run, "note", 0, total, words=report.words))
    elif report.kind == "done":
        worker.run = None
        queue.done(run)
        tell(Progress(run, "done", total, total, run.recipe.epochs))
    else:
        tell(Progress(run, "going", report.step, total, report.epoch, report.score))


def total_steps(run: Run, num_images: int) -> int:
    """Optimizer steps of a whole run."""
    return run.recipe.epochs * (num_images // run.recipe.batch_size)


class _Queue:
    """Runs in order; those whose settings are still to be chosen wait for the choice of their variant."""

    def __init__(self, runs: ExperimentRuns) -> None:
        self._runs = runs
        self.waiting = list(runs.all)
        self._undecided = {run.folder: run.variant for run in runs.choosing}

    def found(self, run: Run) -> None:
        """A run that was finished before."""
        self.waiting.remove(run)
        self.done(run)

    def done(self, run: Run) -> None:
        """A run that has just finished."""
        self._undecided.pop(run.folder, None)

    def next(self) -> Run | None:
        """The next run that can begin."""
        open_variants = set(self._undecided.values())
        for number, run in enumerate(self.waiting):
            if not run.waits or run.variant not in open_variants:
                del self.waiting[number]
                return self._runs.resolve(run)
        return None


@contextmanager
def _workers(count: int, *, deterministic: bool) -> Iterator[list[_Worker]]:
    """Processes, none of which outlives the block."""
    context = multiprocessing.get_context("spawn")
    threads = threads_for(count)
    workers: list[_Worker] = []
    try:
        variables = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        # Threads that wait by spinning take the cores from other runs: ten times as slow on a busy machine.
        variables["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
        if deterministic:  # or cuBLAS refuses to be
            variables["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        with _environment(**variables):
            for number in range(count):
                mine, theirs = context.Pipe()
                process = context.Process(target=work, args=(theirs, threads, _device(number)), name=f"run {number}")
                process.start()
                theirs.close()
                workers.append(_Worker(process, mine))
        yield workers
    finally:
        for worker in workers:
            worker.connection.close()
            if worker.run is not None:
                worker.process.terminate()
        for worker in workers:
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _device(number: int) -> str | None:
    """The GPU of a worker, where there are several."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if count > 1 else None


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
