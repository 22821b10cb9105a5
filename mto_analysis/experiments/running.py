"""Doing the runs of an experiment, several at once, each in a process of its own, from wherever they stopped."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import torch

from mto_analysis.errors import MTOAnalysisError
from mto_analysis.experiments.runs import ExperimentRuns, Run, read_progress
from mto_analysis.experiments.worker import Outcome, Resources, Task, perform
from mto_analysis.runtime.outputs import locked_folder

# Seconds between two looks at how far runs are.
_LOOK_EVERY = 0.5


class RunFailedError(MTOAnalysisError):
    """A run failed; the exit code is that of its error."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Progress(NamedTuple):
    """How far a run is.

    ``state`` is ``found`` (it was finished before), ``going``, ``note``, ``failed`` or ``done``.
    """

    run: Run
    state: str
    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    score: float | None = None
    words: str = ""


class Engine(AbstractContextManager["Engine"], Protocol):
    """Does tasks when it gets to them; at its end none goes on."""

    def submit(self, task: Task) -> Future[Outcome]:
        """Do a task."""


class LocalEngine(Engine):
    """Threads of this process, each of which waits for one subprocess.

    Args:
        jobs: Tasks at once.
        threads: Of each task on the CPU; by default the cores are shared out.
        retries: How often a task is started again whose process dies.
    """

    def __init__(self, jobs: int = 1, *, threads: int | None = None, retries: int = 2) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        self._resources = Resources(threads or threads_for(jobs), retries=retries)
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="task")
        self._places: SimpleQueue[int] = SimpleQueue()
        for place in range(jobs):
            self._places.put(place)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._ended, self._lock = False, threading.Lock()

    def submit(self, task: Task) -> Future[Outcome]:
        """Do a task as soon as a thread is free."""
        return self._pool.submit(self._perform, task)

    def _perform(self, task: Task) -> Outcome:
        place = self._places.get()
        try:
            return perform(task, self._resources._replace(device=_device(place)), self._begun)
        finally:
            self._places.put(place)

    def _begun(self, process: subprocess.Popen[bytes]) -> bool:
        with self._lock:
            self._processes = {each for each in self._processes if each.poll() is None} | {process}
            return not self._ended

    def __exit__(self, *_: object) -> None:
        """End what goes on: up to its last checkpoint it is on disk."""
        with self._lock:
            self._ended = True
            for process in self._processes:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)


def threads_for(jobs: int, cores: int | None = None) -> int:
    """Threads of each of some processes, so that together they fill the cores; or what ``OMP_NUM_THREADS`` says."""
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, (cores or here) // jobs)


def _device(place: int) -> str | None:
    """The GPU of a thread, where there are several."""
    count = torch.cuda.device_count()
    return f"cuda:{place % count}" if count > 1 else None


def total_steps(run: Run, num_images: int) -> int:
    """Optimizer steps of a whole run."""
    return run.recipe.epochs * (num_images // run.recipe.batch_size)


def do_runs(
    runs: ExperimentRuns,
    *,
    num_images: int,
    engine: Engine | None = None,
    part: Sequence[Run] | None = None,
    keep_going: bool = False,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Do all runs that are not finished, or a part of them.

    The first failure ends all: what they have done is on disk, and the next call goes on from there. Of a part, runs
    that choose settings may be shared with processes that do other parts: those that another process is doing are
    waited for, and those that nobody does are done here.

    Args:
        runs: Of the experiment.
        num_images: That are trained on, for the number of steps.
        engine: Does them; by default one at a time.
        part: Only these, and those that they wait for.
        keep_going: Do the other runs when one fails, and report at the end.
        tell: Takes progress.

    Raises:
        RunFailedError: If a run fails, or its process dies again and again.
        RunInUseError: If another start of the whole experiment works in the folder.
    """
    # A part shares the folder with other parts; a second start of the whole would train beside this one.
    lock = locked_folder(runs.folder) if part is None else nullcontext()
    with lock, engine or LocalEngine() as begun:
        _Doing(runs, begun, num_images, tell, shared=part is not None, keep_going=keep_going).do(part or runs.all)


class _Doing:
    def __init__(
        self,
        runs: ExperimentRuns,
        engine: Engine,
        num_images: int,
        tell: Callable[[Progress], None],
        *,
        shared: bool,
        keep_going: bool,
    ) -> None:
        self._runs, self._engine, self._num_images, self._tell = runs, engine, num_images, tell
        self._shared, self._keep_going = shared, keep_going
        self._left: list[Run] = []
        self._going: dict[Future[Outcome], Run] = {}
        self._failed: list[tuple[str, int]] = []
        self._seen: dict[str, int] = {}

    def do(self, part: Sequence[Run]) -> None:
        needed = [each for each in self._runs.choosing if any(each in self._runs.needed(run) for run in part)]
        self._left = list({run.folder: run for run in (*needed, *part)}.values())
        self._drop_finished()
        while self._left or self._going:
            self._submit()
            if not self._going:
                if not any(each.stage == "choose" for each in self._left):
                    break  # what they wait for has failed
                time.sleep(_LOOK_EVERY)  # another process is at it
                self._drop_finished()
                continue
            done, _ = wait(self._going, timeout=_LOOK_EVERY, return_when=FIRST_COMPLETED)
            for future in [each for each in self._going if each in done]:  # in the order of the runs
                self._end(self._going.pop(future), future.result())
            for run in self._going.values():
                self._look(run)
        self._report()

    def _drop_finished(self) -> None:
        for run in [each for each in self._left if each.finished()]:
            self._left.remove(run)
            self._say(run, "found", self._steps(run), run.recipe.epochs)

    def _submit(self) -> None:
        for run in [each for each in self._left if self._runs.ready(each)]:
            if not (self._waited_for(run) and run.in_use()):
                self._left.remove(run)
                ready = self._runs.resolve(run)
                ready.check()
                self._going[self._engine.submit(ready)] = ready

    def _waited_for(self, run: Run) -> bool:
        """Whether other processes may do it as well."""
        return self._shared and run.stage == "choose"

    def _end(self, run: Run, outcome: Outcome) -> None:
        for words in outcome.notes:
            self._tell(Progress(run, "note", words=words))
        if not outcome.failure:
            self._say(run, "done", self._steps(run), run.recipe.epochs)
        elif outcome.in_use and self._waited_for(run):
            self._left.append(run)
        elif outcome.exit_code is None:
            raise RuntimeError(f"{run.name} failed:\n{outcome.failure}")
        else:
            self._failed.append((f"{run.name}: {outcome.failure}", outcome.exit_code))
            if not self._keep_going:
                self._report()
            self._tell(Progress(run, "failed", words=outcome.failure))

    def _report(self) -> None:
        if not self._failed:
            return
        failures = [words for words, _ in self._failed]
        if len(failures) > 1:
            failures.insert(0, f"{len(failures)} runs failed")
        if self._keep_going and self._left:
            names = ", ".join(run.name for run in self._left)
            failures.append(f"not begun, as their settings could not be chosen: {names}")
        raise RunFailedError(f"{'; '.join(failures)}; fix it and run the same command again", self._failed[0][1])

    def _look(self, run: Run) -> None:
        """Tell how far a run is, if that is news."""
        progress = read_progress(run)
        if progress is not None and self._seen.get(run.name) != progress.step:
            self._seen[run.name] = progress.step
            self._tell(Progress(run, "going", progress.step, self._steps(run), progress.epoch, progress.score))

    def _say(self, run: Run, state: str, step: int, epoch: int) -> None:
        self._tell(Progress(run, state, step, self._steps(run), epoch))

    def _steps(self, run: Run) -> int:
        return total_steps(run, self._num_images)
