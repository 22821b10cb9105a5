"""What a run tells and leaves along its way: losses that are looked at, rows of its tables, scores, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mto_analysis.errors import NumericalError
from mto_analysis.runtime.outputs import run_metadata, write_atomically
from mto_analysis.training.metrics import Averages, Boards, Table
from mto_analysis.training.scoring import Scorer
from mto_analysis.training.settings import EpochRecord
from mto_analysis.training.showing import Show
from mto_analysis.training.state import RunFolder, write_checkpoint
from mto_analysis.training.stepping import Stepper, StepResult

# Steps after which losses are looked at, at the latest: reading them waits for the device.
_LOOK_EVERY = 50


class Recorder:
    """Keeps count of a run, and writes; all processes call it, and the main one writes."""

    def __init__(
        self, folder: RunFolder, stepper: Stepper, scorer: Scorer, show: Show | None, metadata: dict[str, Any]
    ) -> None:
        self.folder, self.stepper, self.scorer, self.metadata = folder, stepper, scorer, metadata
        self._draw = show
        self.method, self.settings, self.processes = stepper.method, stepper.settings, stepper.processes
        #: Optimizer steps that are done, and the seconds of training they took.
        self.step, self.seconds = 0, 0.0
        #: The loss of the last step that was looked at.
        self.last_loss = math.nan
        self._window, self._epoch_means = Averages(), Averages()
        self._metrics, self._curves = Table(folder.metrics, "step"), Table(folder.curves, "epoch")
        self._measures = Table(folder.measures, "epoch")
        self._pending: list[dict[str, Tensor]] = []
        self._boards: Boards | None = None

    @property
    def epochs(self) -> float:
        """Epochs that are done."""
        return self.step / self.stepper.steps_per_epoch

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the resume state of a checkpoint."""
        self.stepper.load(state)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self._window.load(state["window"])
        self._epoch_means.load(state["epoch_means"])

    def begin(self, *, resume: bool) -> None:
        """Claim the folder, and drop what its tables hold beyond this step; score random weights if asked for."""
        if self.processes.main:
            self.folder.claim(self.metadata, self.method.files(), resume=resume)
            self._metrics.cut_back(self.step)
            for table in (self._curves, self._measures):
                table.cut_back(self.step // self.stepper.steps_per_epoch if self.step else -1)
        self._boards = Boards(
            self.folder.path,
            tensorboard=self.settings.tensorboard and self.processes.main,
            wandb=self.settings.wandb if self.processes.main else None,
            step=self.step,
            config=self.metadata["identity"],
        )
        if not self.step and self.settings.evaluate_start and self.scorer.wanted:
            self._score(0)
        if not self.step:
            self._show(0)

    def close(self) -> None:
        """Write what boards hold back."""
        if self._boards is not None:
            self._boards.close()

    def add(self, result: StepResult, *, look: bool) -> None:
        """One more step, and its losses, which are looked at now or within the next ones."""
        self.step += 1
        self._pending.append(result.losses)
        if look or len(self._pending) >= _LOOK_EVERY:
            self._look()

    def _look(self) -> None:
        """Bring the losses of the last steps to the CPU, averaged over processes, and check them."""
        names = list(self._pending[0])
        values = self.processes.mean(torch.stack([torch.stack(list(each.values())) for each in self._pending]))
        first = self.step - len(self._pending) + 1
        self._pending.clear()
        for step, row in enumerate(values.tolist(), start=first):
            terms = dict(zip(names, row, strict=True))
            for name, value in terms.items():
                if not math.isfinite(value):
                    epoch = (step - 1) // self.stepper.steps_per_epoch
                    raise NumericalError(
                        f"the loss term {name} is {value} at step {step} (epoch {epoch}); {self.last_good()}"
                    )
            self.last_loss = sum(terms.values())
            self._window.add({"loss": self.last_loss, **terms})
            self._epoch_means.add({"loss": self.last_loss, **terms})

    def last_good(self) -> str:
        """Where the run can go on from, in words."""
        if not self.folder.last.exists():
            return "no checkpoint was saved before"
        return f"the last good checkpoint is {self.folder.last}"

    def log_step(self, result: StepResult, speed: Mapping[str, float]) -> None:
        """Write a row of ``metrics.csv``: means since the row before, and what was measured in this step."""
        norm = math.nan if result.grad_norm is None else float(result.grad_norm)
        shown = torch.tensor([*result.measured.values(), norm], dtype=torch.float64)
        *values, norm_mean = self.processes.mean(shown).tolist()
        measured = dict(zip(result.measured, values, strict=True))
        self._epoch_means.add({name: value for name, value in measured.items() if "heterogeneity" in name})
        row = {**self._window.means(), **measured, "lr": result.learning_rate, "grad_norm": norm_mean, **speed}
        self._window.clear()
        self._write_row("step", row)

    def end_epoch(self, rate: float, speed: Mapping[str, float]) -> EpochRecord:
        """Evaluate if it is due, write the epoch's rows and then its checkpoints."""
        epoch, epochs = self.step // self.stepper.steps_per_epoch, self.method.settings.epochs
        means = self._epoch_means.means()
        self._epoch_means.clear()
        scores = self._score(epoch) if self.scorer.due(epoch, epochs) else {}
        self._write_row("epoch", {**means, "lr": rate, **speed, "seconds": self.seconds, **scores})
        self._show(epoch)
        keep = self.settings.keep_every
        kept = (keep is not None and epoch % keep == 0) or epoch == epochs
        if kept or epoch % self.settings.save_every == 0:
            self.save(self.seconds, kept=kept)
        if epoch == epochs and self.processes.main:
            self.folder.write_metadata({**self.metadata, **run_metadata({}), "state": "complete"})
        return EpochRecord(
            epoch=epoch,
            step=self.step,
            loss=means["loss"],
            terms={k: v for k, v in means.items() if k != "loss" and "heterogeneity" not in k},
            heterogeneity={k: v for k, v in means.items() if "heterogeneity" in k},
            learning_rate=rate,
            score=scores.get("score"),
            top5=scores.get("top5"),
            images_per_second=speed["images_per_second"],
            data_wait=speed["data_wait"],
            seconds=self.seconds,
        )

    def save(self, seconds: float, *, kept: bool = False) -> None:
        """Write ``last.pth``, and before it the checkpoint that is kept, if one is due; a collective call."""
        if not self.stepper.finite():
            raise NumericalError(f"weights are not finite after step {self.step}; {self.last_good()}")
        state = self.stepper.state()
        epoch = self.step // self.stepper.steps_per_epoch
        complete = self.step == self.stepper.total
        published = self.stepper.published(state)  # None but on the process that writes
        if published is not None:
            content = {**published, "epoch": epoch}
            if kept:
                write_checkpoint(self.folder.kept(epoch, complete=complete), content)
            if complete and self.folder.final is not None:
                self.folder.last.unlink(missing_ok=True)
            else:
                resume = {
                    **state,
                    "epoch": epoch,
                    "step": self.step,
                    "seconds": seconds,
                    "window": self._window.state(),
                    "epoch_means": self._epoch_means.state(),
                    "rows": {each.path.name: each.rows for each in (self._metrics, self._curves, self._measures)},
                }
                write_checkpoint(self.folder.last, {**content, "resume": resume})
        self.processes.wait()

    def _score(self, epoch: int) -> Mapping[str, float | None]:
        """Evaluate, and write the point of the curve."""
        scores = self.scorer.score(self.stepper)
        row = {
            "method": self._name,
            "epoch": epoch,
            "score": scores["score"],
            "seed": self.settings.seed,
            "protocol": self.scorer.protocol,
            "hours": self.seconds / 3600,
        }
        if self.processes.main and self.scorer.protocol is not None:
            self._curves.append(row, list(row))
        return scores

    def _show(self, epoch: int) -> None:
        """Draw and measure if it is due, into the run's folder and on boards; a collective call where it is."""
        every, last = self.settings.show_every, self.method.settings.epochs
        if self._draw is None or every is None or (epoch % every and epoch != last):
            return
        with self.stepper.at_rest():
            model = self.stepper.whole_probed()  # None but on the process that writes
            shown = None if model is None else self._draw(model, epoch)
        if shown is None:
            return
        self.folder.shown.mkdir(exist_ok=True)
        for name, png in shown.figures.items():
            write_atomically(self.folder.shown / f"{name}-{epoch:04d}.png", png)
        key = {"method": self._name, "seed": self.settings.seed, "epoch": epoch}
        if rows := [{**key, **row} for row in shown.rows]:
            self._measures.extend(rows, list(rows[0]))
        if self._boards is not None:
            self._boards.show(shown.figures, self.step)

    @property
    def _name(self) -> str:
        return self.method.name + ("+MTO" if self.settings.mto is not None else "")

    def _write_row(self, kind: str, values: Mapping[str, Any]) -> None:
        epochs = self.epochs
        row: dict[str, Any] = {
            "method": self._name,
            "seed": self.settings.seed,
            "kind": kind,
            "epoch": int(epochs) if epochs.is_integer() else epochs,
            "step": self.step,
            **values,
        }
        if self.processes.main:
            self._metrics.append(row, list(dict.fromkeys([*row, *self.scorer.columns])))
            if self._boards is not None:
                self._boards.add(row, self.step)
