"""A process that does one run after the other; it imports, and reads the images, once."""

from __future__ import annotations

import os
import signal
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from mto_analysis.errors import MTOAnalysisError

if TYPE_CHECKING:
    from mto_analysis.experiments.runs import Run
    from mto_analysis.images import Images
    from mto_analysis.training.evaluation import Evaluator

__all__ = ["Report", "work"]

# Seconds between two reports of progress; with each the process also learns whether its parent is still there.
_REPORT_EVERY = 0.5


class Report(NamedTuple):
    """What a worker says: ``progress``, ``note``, ``done`` or ``failed``.

    ``exit_code`` is ``None`` where the failure is a mistake in the program; ``words`` is then its traceback.
    """

    kind: str
    step: int = 0
    epoch: int = 0
    score: float | None = None
    words: str = ""
    exit_code: int | None = None


def work(connection: Connection, threads: int, device: str | None) -> None:
    """Do the runs that come through the connection until it closes.

    Args:
        connection: Runs come in, reports go out.
        threads: Of this process on the CPU.
        device: Instead of the run's own, where several GPUs are shared out.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its children
    import torch

    torch.set_num_threads(threads)
    warnings.showwarning = lambda message, *rest: connection.send(Report("note", words=str(message)))
    worker = _Worker(connection, device)
    while True:
        try:
            run = connection.recv()
        except (EOFError, OSError):
            return
        try:
            worker.do(run)
            connection.send(Report("done"))
        except (BrokenPipeError, ConnectionError):
            os._exit(1)  # the parent is gone: everything up to the last epoch is on disk
        except Exception as error:
            connection.send(_failure(error))


def _failure(error: Exception) -> Report:
    if isinstance(error, MTOAnalysisError):
        return Report("failed", words=str(error), exit_code=error.exit_code)
    if isinstance(error, ValueError):
        return Report("failed", words=str(error), exit_code=2)
    if isinstance(error, OSError):
        return Report("failed", words=f"{error.strerror or error}: {error.filename or ''}", exit_code=2)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower()):
        return Report("failed", words="out of memory; use fewer --jobs or a smaller batch_size", exit_code=2)
    return Report("failed", words=traceback.format_exc())


class _Worker:
    def __init__(self, connection: Connection, device: str | None) -> None:
        self._connection, self._device = connection, device
        self._images: dict[str, Images] = {}
        self._evaluators: dict[Any, Evaluator] = {}
        self._said = 0.0

    def do(self, run: Run) -> None:
        from dataclasses import replace

        from mto_analysis.training import StepRecord, pretrain

        settings = run.settings if self._device is None else replace(run.settings, device=self._device)
        source = run.source
        score: float | None = None

        def on_step(record: StepRecord) -> None:
            now = time.monotonic()
            if now - self._said >= _REPORT_EVERY:
                self._said = now
                self._connection.send(Report("progress", record.step, record.epoch, score))

        for record in pretrain(
            run.recipe,
            self._opened(source),
            run.folder,
            settings,
            resume=True,
            evaluate=self._evaluator(run).score,
            on_step=on_step,
            on_note=lambda words: self._connection.send(Report("note", words=words)),
            source=source,
        ):
            score = record.score if record.score is not None else score
            self._connection.send(Report("progress", record.step, record.epoch, score))

    def _opened(self, source: str) -> Images:
        if source not in self._images:
            from mto_analysis.images import open_images

            self._images[source] = open_images(source)
        return self._images[source]

    def _evaluator(self, run: Run) -> Evaluator:
        """Decoded images are kept; of two runs with the same evaluation the second finds them there."""
        from mto_analysis.training.evaluation import Evaluator

        evaluation = run.settings.evaluation
        if evaluation is None:
            raise ValueError(f"{run.name} has no evaluation")
        key = tuple(sorted((name, str(value)) for name, value in evaluation.settings().items()))
        if key not in self._evaluators:
            self._evaluators[key] = Evaluator(evaluation, num_workers=run.settings.num_workers)
        return self._evaluators[key]
