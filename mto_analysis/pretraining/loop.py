"""Pre-training: the loop over epochs and steps, with what it logs, evaluates and saves on the way."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mto_analysis.data import TrainBatch, TrainingData
from mto_analysis.errors import DataError, NumericalError
from mto_analysis.models import MaskedImageModel
from mto_analysis.outputs import run_facts
from mto_analysis.pretraining.group import Group
from mto_analysis.pretraining.metrics import Averages, Boards, Table
from mto_analysis.pretraining.settings import EpochRecord, RunSettings
from mto_analysis.pretraining.state import RunFolder, differences, write_checkpoint
from mto_analysis.pretraining.stepping import Stepper

if TYPE_CHECKING:
    from mto_analysis.data import BrokenPicture, Pictures
    from mto_analysis.pretraining.recipes import Recipe

__all__ = ["StepRecord", "micro_batch_size", "pretrain"]

# Steps after which losses are looked at, at the latest: reading them waits for the device.
_LOOK_EVERY = 50


class StepRecord(NamedTuple):
    """Where a run is; ``loss`` is the last one that was looked at."""

    epoch: int
    step: int
    total_steps: int
    loss: float


def micro_batch_size(recipe: Recipe, *, processes: int, accumulation: int) -> int:
    """Pictures in one forward of one process.

    Raises:
        ValueError: If the effective batch cannot be shared out evenly.
    """
    parts = processes * accumulation
    if recipe.batch_size % parts:
        raise ValueError(
            f"the effective batch of {recipe.batch_size} pictures cannot be shared by {processes} processes x "
            f"{accumulation} accumulated micro-batches; change batch_size or the accumulation"
        )
    return recipe.batch_size // parts


def pretrain(
    recipe: Recipe,
    pictures: Pictures,
    folder: str | Path,
    settings: RunSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    evaluate: Callable[[MaskedImageModel], float] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_broken: Callable[[BrokenPicture], None] | None = None,
    strict: bool = False,
    source: str | None = None,
) -> Iterator[EpochRecord]:
    """Pre-train a model, and yield a record after each epoch, when all of that epoch is on disk.

    The run is a function of recipe, pictures, seed and settings: it does not depend on workers, nor on where it was
    stopped and resumed. With several processes (torchrun, accelerate launch) all call this, and the first one writes.

    Args:
        recipe: What is trained, and how.
        pictures: From :func:`mto_analysis.open_pictures`.
        folder: For ``run.json``, ``metrics.csv``, ``curves.csv``, ``last.pth`` and kept checkpoints.
        settings: How it is run.
        resume: Go on from ``last.pth``, or begin where there is nothing yet.
        overwrite: Replace the run that the folder holds.
        evaluate: Gives the model's score; by default what ``settings.evaluation`` says.
        on_step: Called after each step, for a progress bar.
        on_note: Called with what a user should know, one line at a time.
        on_broken: Called for each picture that cannot be decoded; another takes its place.
        strict: Make a broken picture an error.
        source: Where the pictures are, for ``run.json``.

    Raises:
        OutputExistsError: If the folder holds a run and neither ``resume`` nor ``overwrite`` is given.
        CheckpointError: If the run to resume is another one, or its checkpoint is damaged.
        DataError: If pictures are too few, broken or gone.
        NumericalError: If a loss is not finite; ``last.pth`` is from before.
        ValueError: If the batch cannot be shared out, or a setting does not fit the machine.
    """
    run = _Run(recipe, pictures, RunFolder(folder), settings or RunSettings(), on_note or _silent, on_broken, strict)
    if run.prepare(evaluate, resume=resume, overwrite=overwrite, source=source):
        try:
            yield from run.epochs(on_step)
        finally:
            run.boards.close()


class _Run:
    """A run while it is running."""

    def __init__(
        self,
        recipe: Recipe,
        pictures: Pictures,
        folder: RunFolder,
        settings: RunSettings,
        note: Callable[[str], None],
        on_broken: Callable[[BrokenPicture], None] | None,
        strict: bool,
    ) -> None:
        self.recipe, self.pictures, self.folder, self.settings = recipe, pictures, folder, settings
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
        self.group = Group(settings.device)
        self.note = note if self.group.main else _silent
        self.micro_batch = micro_batch_size(recipe, processes=self.group.count, accumulation=settings.accumulation)
        self.steps_per_epoch = len(pictures.names) // recipe.batch_size
        if not self.steps_per_epoch:
            raise DataError(
                f"{len(pictures.names)} pictures do not fill one batch of {recipe.batch_size}; use a smaller batch_size"
            )
        self.on_broken, self.strict = on_broken, strict
        self.step = 0
        self.seconds = 0.0
        self.window, self.epoch_means = Averages(), Averages()
        self.metrics, self.curves = Table(folder.metrics, "step"), Table(folder.curves, "epoch")
        self.pending: list[dict[str, Tensor]] = []
        self.last_loss = math.nan
        self.boards: Boards

    # Before the first step.

    def prepare(
        self,
        evaluate: Callable[[MaskedImageModel], float] | None,
        *,
        resume: bool,
        overwrite: bool,
        source: str | None,
    ) -> bool:
        """Check everything, build, restore; whether anything is left to do."""
        settings, group = self.settings, self.group
        identity = self._identity()
        self.folder.check(identity, resume=resume, overwrite=overwrite)
        resume = resume and self.folder.holds_run()
        group.wait()  # nobody writes before all have looked
        state = self.folder.read_last() if resume else None
        layout = self._layout()
        if resume:
            changed = differences(self.folder.stored_facts().get("layout", {}), layout)
            if changed:
                self.note(f"not as before: {'; '.join(changed)}; the run goes on, equal to rounding")
        self.facts = run_facts(
            {}, state="running", identity=identity, layout=layout, settings=settings.facts(), pictures=source
        )
        if state is not None and state["epoch"] >= self.recipe.epochs:
            self.note(f"{self.folder.path} is complete ({state['epoch']} epochs): nothing to do")
            return False
        self.evaluate = self._evaluation(evaluate)
        self.data = TrainingData(
            self.pictures,
            self.recipe.augmentation(),
            self.recipe.mask_rule,
            self.recipe.patch_size,
            seed=settings.seed,
            num_workers=settings.num_workers,
            device=group.device,
            on_broken=self.on_broken,
            in_memory=settings.in_memory,
            strict=self.strict,
        )
        self.data.prepare()
        self.stepper = Stepper(self.recipe, settings, group, self.steps_per_epoch, self.micro_batch)
        if state is not None:
            self._restore(state)
        elif resume:
            self.note(f"{self.folder.path} holds no checkpoint yet: starting from the beginning")
        # Only now, when all that can fail at once has not, is anything written.
        if group.main:
            self.folder.claim(self.facts, self.recipe.to_toml(), resume=resume)
            self.metrics.cut_back(self.step)
            self.curves.cut_back(self.step // self.steps_per_epoch if self.step else -1)
        self.boards = Boards(
            self.folder.path,
            tensorboard=settings.tensorboard and group.main,
            wandb=settings.wandb if group.main else None,
            step=self.step,
            config=identity,
        )
        if not self.step and settings.evaluate_start and self.evaluate is not None:
            self._score(0)
        return True

    def _identity(self) -> dict[str, Any]:
        """What makes the run this run, as plain values."""
        names = hashlib.blake2b("\n".join(self.pictures.names).encode(), digest_size=8).hexdigest()
        settings = self.settings.facts()
        return {
            "recipe": self.recipe.to_dict(),
            **{name: settings[name] for name in ("seed", "mto", "precision", "ema", "fsdp")},
            "pictures": {"count": len(self.pictures.names), "names": names},
            "evaluation": self.settings.evaluation.settings() if self.settings.evaluation else None,
        }

    def _layout(self) -> dict[str, Any]:
        """What a result depends on in its last digits."""
        return {
            "processes": self.group.count,
            "accumulation": self.settings.accumulation,
            "device": self.group.device.type,
            "threads": torch.get_num_threads(),
            **{name: getattr(self.settings, name) for name in ("compile", "gradient_checkpointing", "deterministic")},
            "torch": torch.__version__,
        }

    def _evaluation(self, given: Callable[[MaskedImageModel], float] | None) -> Callable[[], float] | None:
        if given is not None:
            return lambda: self._on_main(given)
        if self.settings.evaluation is None:
            return None
        from mto_analysis.evaluation import Evaluator

        evaluator = Evaluator(self.settings.evaluation, num_workers=self.settings.num_workers)
        if self.settings.fsdp:
            return lambda: self._on_main(evaluator.score)
        shared = self.group.count > 1
        return lambda: evaluator.score(self.stepper.method.student, shared=shared)

    def _on_main(self, score: Callable[[MaskedImageModel], float]) -> float:
        model = self.stepper.whole_student()
        return float(self.group.shared(score(model) if model is not None else 0.0))

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.stepper.load(state)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.window.load(state["window"])
        self.epoch_means.load(state["epoch_means"])
        self.note(f"resuming after step {self.step} (epoch {self.step / self.steps_per_epoch:.2f})")

    # The loop.

    def epochs(self, on_step: Callable[[StepRecord], None] | None) -> Iterator[EpochRecord]:
        """Every epoch that is left."""
        settings, total = self.settings, self.recipe.epochs * self.steps_per_epoch
        for epoch in range(self.step // self.steps_per_epoch, self.recipe.epochs):
            done = self.step - epoch * self.steps_per_epoch
            began, first = time.perf_counter(), self.step
            batches = _Timed(self._batches(epoch, done))
            lap_time, lap_wait, lap_step = began, 0.0, self.step
            while self.step < (epoch + 1) * self.steps_per_epoch:
                number = self.step + 1
                ends = number == (epoch + 1) * self.steps_per_epoch
                logs = number % settings.log_every == 0 or ends or number == 1
                result = self.stepper.step(batches, self.step, watch=logs)
                self.step = number
                self.pending.append(result.losses)
                saves = settings.save_steps is not None and number % settings.save_steps == 0 and not ends
                if logs or saves or len(self.pending) >= _LOOK_EVERY:
                    self._look()
                if logs:
                    now = time.perf_counter()
                    speed = self._speed(self.step - lap_step, now - lap_time, batches.waited - lap_wait)
                    speed["seconds"] = self.seconds + now - began
                    self._log_step(result.learning_rate, result.grad_norm, result.measured, speed)
                    lap_time, lap_wait, lap_step = now, batches.waited, self.step
                if saves:
                    self._save(began)
                if on_step is not None:
                    on_step(StepRecord(epoch, self.step, total, self.last_loss))
            spent = time.perf_counter() - began
            batches.close()
            self.seconds += spent
            speed = self._speed(self.step - first, spent, batches.waited)
            yield self._end_epoch(epoch + 1, result.learning_rate, {**speed, "seconds": self.seconds})

    def _batches(self, epoch: int, skip: int) -> Iterator[TrainBatch]:
        try:
            yield from self.data.micro_batches(
                epoch,
                micro_batch=self.micro_batch,
                accumulation=self.settings.accumulation,
                process=self.group.index,
                processes=self.group.count,
                skip_steps=skip,
            )
        except OSError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{error.filename or 'the pictures'} cannot be read any more ({error.strerror or error}); "
                f"mend it and go on with --resume: {self._last_good()}"
            ) from error

    def _speed(self, steps: int, seconds: float, waited: float) -> dict[str, float]:
        return {"images_per_second": steps * self.recipe.batch_size / seconds, "data_wait": waited / seconds}

    def _look(self) -> None:
        """Bring the losses of the last steps to the CPU, averaged over processes, and check them."""
        names = list(self.pending[0])
        values = self.group.mean(torch.stack([torch.stack(list(each.values())) for each in self.pending]))
        first = self.step - len(self.pending) + 1
        self.pending.clear()
        for step, row in enumerate(values.tolist(), start=first):
            for name, value in zip(names, row, strict=True):
                if not math.isfinite(value):
                    epoch = (step - 1) // self.steps_per_epoch
                    raise NumericalError(
                        f"the loss term {name} is {value} at step {step} (epoch {epoch}); {self._last_good()}"
                    )
            terms = dict(zip(names, row, strict=True))
            self.last_loss = sum(terms.values())
            self.window.add({"loss": self.last_loss, **terms})
            self.epoch_means.add({"loss": self.last_loss, **terms})

    def _last_good(self) -> str:
        if not self.folder.last.exists():
            return "no checkpoint was saved before"
        return f"the last good checkpoint is {self.folder.last}"

    # What is written.

    def _log_step(
        self, rate: float, norm: Tensor | None, measured: Mapping[str, float], speed: Mapping[str, float]
    ) -> None:
        names = list(measured)
        shown = torch.tensor([*measured.values(), math.nan if norm is None else float(norm)], dtype=torch.float64)
        *values, norm_mean = self.group.mean(shown).tolist()
        measured = dict(zip(names, values, strict=True))
        h = {name: value for name, value in measured.items() if "heterogeneity" in name}
        self.epoch_means.add(h)
        row = {**self.window.means(), **measured, "lr": rate, "grad_norm": norm_mean, **speed}
        self.window.clear()
        self._write_row("step", row)

    def _end_epoch(self, epoch: int, rate: float, speed: Mapping[str, float]) -> EpochRecord:
        means = self.epoch_means.means()
        self.epoch_means.clear()
        due = self.evaluate is not None and (epoch % self._every() == 0 or epoch == self.recipe.epochs)
        score = self._score(epoch) if due else None
        self._write_row("epoch", {**means, "lr": rate, **speed, "score": score})
        keep = self.settings.keep_every
        kept = (keep is not None and epoch % keep == 0) or epoch == self.recipe.epochs
        self._save(None, kept=kept, last=kept or epoch % self.settings.save_every == 0)
        if epoch == self.recipe.epochs and self.group.main:
            self.folder.write_facts({**self.facts, **run_facts({}), "state": "complete"})
        return EpochRecord(
            epoch=epoch,
            step=self.step,
            loss=means["loss"],
            terms={k: v for k, v in means.items() if k != "loss" and "heterogeneity" not in k},
            heterogeneity={k: v for k, v in means.items() if "heterogeneity" in k},
            learning_rate=rate,
            score=score,
            images_per_second=speed["images_per_second"],
            data_wait=speed["data_wait"],
            seconds=self.seconds,
        )

    def _every(self) -> int:
        return self.settings.evaluation.every if self.settings.evaluation is not None else 1

    def _score(self, epoch: int) -> float:
        """Evaluate, and write the point of the curve."""
        if self.evaluate is None:
            raise ValueError("the run has no evaluation")
        training = self.stepper.method.training
        devices = [self.group.device] if self.group.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            score = self.evaluate()
        self.stepper.method.train(training)
        protocol = self.settings.evaluation.protocol if self.settings.evaluation is not None else "own"
        row = {
            "method": self._method(),
            "epoch": epoch,
            "score": score,
            "seed": self.settings.seed,
            "protocol": protocol,
            "hours": self.seconds / 3600,
        }
        if self.group.main:
            self.curves.append(row, list(row))
        return score

    def _method(self) -> str:
        return self.recipe.name + ("+MTO" if self.settings.mto is not None else "")

    def _write_row(self, kind: str, row: Mapping[str, Any]) -> None:
        epochs = self.step / self.steps_per_epoch
        start: dict[str, Any] = {
            "method": self._method(),
            "seed": self.settings.seed,
            "kind": kind,
            "epoch": int(epochs) if epochs.is_integer() else epochs,
            "step": self.step,
        }
        row = {**start, **row}
        if self.group.main:
            self.metrics.append(row, list(dict.fromkeys([*row, "score"])))
            self.boards.add(row, self.step)

    def _save(self, began: float | None, *, kept: bool = False, last: bool = True) -> None:
        """Write ``last.pth``, and before it the checkpoint that is kept, if one is due."""
        if not (kept or last):
            return
        if not self.stepper.finite():
            raise NumericalError(f"weights are not finite after step {self.step}; {self._last_good()}")
        state = self.stepper.state()
        epoch = self.step // self.steps_per_epoch
        published = self.stepper.published(state)  # None but on the process that writes
        if published is not None:
            content = {**published, "epoch": epoch}
            if kept:
                write_checkpoint(self.folder.kept(epoch), content)
            seconds = self.seconds + (time.perf_counter() - began if began is not None else 0.0)
            resume = {
                **state,
                "epoch": epoch,
                "step": self.step,
                "seconds": seconds,
                "window": self.window.state(),
                "epoch_means": self.epoch_means.state(),
            }
            write_checkpoint(self.folder.last, {**content, "resume": resume})
        self.group.wait()


class _Timed:
    """Batches, and how long they were waited for."""

    def __init__(self, batches: Iterator[TrainBatch]) -> None:
        self._batches, self.waited = batches, 0.0

    def __iter__(self) -> _Timed:
        return self

    def __next__(self) -> TrainBatch:
        start = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - start
        return batch

    def close(self) -> None:
        """Let the workers end."""
        if (close := getattr(self._batches, "close", None)) is not None:
            close()


def _silent(message: str) -> None:
    pass
