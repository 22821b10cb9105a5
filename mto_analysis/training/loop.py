"""The engine: a run is checked, put together and restored, and then trained epoch by epoch and step by step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from mto_analysis.errors import DataError
from mto_analysis.images import EpochData, steps_in_epoch
from mto_analysis.runtime.outputs import run_metadata
from mto_analysis.runtime.processes import Processes, this_process
from mto_analysis.training.objective import Batch, Objective, TrainingSettings
from mto_analysis.training.recording import Recorder
from mto_analysis.training.scoring import Scorer
from mto_analysis.training.settings import EpochRecord, RunSettings, StepRecord
from mto_analysis.training.shares import micro_batch_size
from mto_analysis.training.showing import Show
from mto_analysis.training.state import ADVICE, RunFolder, differences, run_layout
from mto_analysis.training.stepping import Stepper


def open_processes(settings: RunSettings) -> Processes:
    """The processes of a run, each with its device."""
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    return this_process(settings.device)


def train(
    build: Callable[[bool], Objective],
    chosen: TrainingSettings,
    data: EpochData,
    scorer: Callable[[], Scorer],
    folder: RunFolder,
    settings: RunSettings,
    processes: Processes,
    *,
    identity: Mapping[str, Any],
    resume: bool,
    overwrite: bool,
    on_begin: Callable[[], None] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    show: Show | None = None,
    source: str | None = None,
) -> Iterator[EpochRecord]:
    """Carry out a run of any kind; as :func:`~mto_analysis.training.pretrain` but for what is listed here.

    Args:
        build: Makes what is trained; told whether the run begins with it, or with a checkpoint of its own.
        chosen: Its settings.
        data: Its images.
        scorer: Makes what scores it along the run.
        folder: For what the run leaves behind.
        settings: How it is run.
        processes: Its processes; all call this, and the first one writes.
        identity: What makes the run this run; a folder with another one is refused.
        resume: Go on from ``last.pth``, or begin where there is nothing yet.
        overwrite: Replace the run that the folder holds.
        on_begin: Called before the first step, when all that can fail at once has not.
        on_step: Called after each step, for a progress bar.
        on_note: Called with what a user should know, one line at a time.
        show: Draws and measures the model every ``settings.show_every`` epochs, on the process that writes.
        source: Where the images are, for ``run.json``.
    """
    note = on_note if on_note is not None and processes.main else _silent
    micro_batch = micro_batch_size(chosen.batch_size, processes=processes.count, accumulation=settings.accumulation)
    steps = steps_in_epoch(len(data), chosen.batch_size)
    layout = run_layout(settings, processes)
    with folder.locked() if processes.main else nullcontext():
        folder.check(identity, resume=resume, overwrite=overwrite)
        resume = resume and folder.holds_run()
        processes.wait()  # nobody writes before all have looked
        state = folder.read_last() if resume else None
        if resume and (changed := differences(folder.stored_metadata().get("layout", {}), layout)):
            note(f"not as before: {'; '.join(changed)}; the run continues, equal up to rounding")
        if resume and (folder.finished() or (state is not None and state["epoch"] >= chosen.epochs)):
            note(f"{folder.path} is complete ({chosen.epochs} epochs): nothing to do")
            for words in folder.lost_rows(state):
                note(words)
            stored = folder.stored_metadata()
            if processes.main and stored.get("state") != "complete":  # it was killed right after its last checkpoint
                folder.write_metadata({**stored, "state": "complete"})
            return

        scores = scorer()
        data.prepare()
        stepper = Stepper(build(state is None), settings, processes, steps, micro_batch)
        metadata = run_metadata(
            {},
            state="running",
            identity=identity,
            layout=layout,
            settings=settings.metadata(),
            images=source,
            skipped={**(folder.stored_metadata().get("skipped", {}) if resume else {}), **data.skipped},
        )
        recorder = Recorder(folder, stepper, scores, show, metadata)
        if state is not None:
            recorder.restore(state)
            note(f"resuming after step {recorder.step} (epoch {recorder.epochs:.2f})")
        elif resume:
            note(f"{folder.path} holds no checkpoint yet: starting from the beginning")
        # Only now, when all that can fail at once has not, is anything written.
        if on_begin is not None:
            on_begin()
        try:
            recorder.begin(resume=resume)
            for words in folder.lost_rows(state):
                note(words)
            yield from _epochs(data, stepper, recorder, micro_batch, on_step)
        finally:
            recorder.close()


def _epochs(
    data: EpochData,
    stepper: Stepper,
    recorder: Recorder,
    micro_batch: int,
    on_step: Callable[[StepRecord], None] | None,
) -> Iterator[EpochRecord]:
    """Train every epoch that is left; what is seen on the way goes to the recorder."""
    settings, steps, epochs = stepper.settings, stepper.steps_per_epoch, stepper.method.settings.epochs
    for epoch in range(recorder.step // steps, epochs):
        batches = _Timed(_batches(data, stepper, recorder, epoch, micro_batch))
        whole, lap = _Lap(recorder.step, batches), _Lap(recorder.step, batches)
        while recorder.step < (epoch + 1) * steps:
            number = recorder.step + 1
            ends = number == (epoch + 1) * steps
            logs = number % settings.log_every == 0 or ends or number == 1
            saves = settings.save_steps is not None and number % settings.save_steps == 0 and not ends
            result = stepper.step(batches, recorder.step, watch=logs)
            recorder.add(result, look=logs or saves)
            if logs:
                speed = lap.speed(number, stepper.method.settings.batch_size)
                recorder.log_step(result, {**speed, "seconds": recorder.seconds + whole.seconds()})
                lap = _Lap(number, batches)
            if saves:
                recorder.save(recorder.seconds + whole.seconds())
            if on_step is not None:
                on_step(StepRecord(epoch, number, epochs * steps, recorder.last_loss))
        speed = whole.speed(recorder.step, stepper.method.settings.batch_size)
        recorder.seconds += whole.seconds()
        batches.close()
        for each in stepper.processes.exchange(data.skipped):
            recorder.metadata["skipped"] |= each
        yield recorder.end_epoch(result.learning_rate, speed)


def _batches(data: EpochData, stepper: Stepper, recorder: Recorder, epoch: int, micro_batch: int) -> Iterator[Batch]:
    """This process's micro-batches of an epoch, from the step on where the run is."""
    try:
        yield from data.micro_batches(
            epoch,
            micro_batch=micro_batch,
            accumulation=stepper.settings.accumulation,
            process=stepper.processes.rank,
            processes=stepper.processes.count,
            skip_steps=recorder.step - epoch * stepper.steps_per_epoch,
        )
    except OSError as error:
        if isinstance(error, DataError):
            raise
        words = f"{error.filename or 'the images'} cannot be read any more ({error.strerror or error})"
        raise DataError(words, advice=f"{ADVICE}: {recorder.last_good()}") from error


class _Timed:
    """Batches, and how long they were waited for."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self.waited = batches, 0.0

    def __iter__(self) -> _Timed:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - start
        return batch

    def close(self) -> None:
        """Let the workers end."""
        if (close := getattr(self._batches, "close", None)) is not None:
            close()


class _Lap:
    """Time from a step on, and the part of it that batches were waited for."""

    def __init__(self, step: int, batches: _Timed) -> None:
        self._step, self._batches = step, batches
        self._start, self._waited = time.perf_counter(), batches.waited

    def seconds(self) -> float:
        """Since its start."""
        return time.perf_counter() - self._start

    def speed(self, step: int, batch_size: int) -> dict[str, float]:
        """Columns of a row that is written after ``step``."""
        seconds = self.seconds()
        return {
            "images_per_second": (step - self._step) * batch_size / seconds,
            "data_wait": (self._batches.waited - self._waited) / seconds,
        }


def _silent(message: str) -> None:
    pass
