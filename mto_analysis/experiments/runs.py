"""The runs of an experiment, each in a folder of its own: which there are, which are finished, what they showed."""

from __future__ import annotations

import csv
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pandas as pd
import torch

from mto_analysis.errors import DataError, ExperimentError
from mto_analysis.experiments.spec import Arm, Choice, Experiment, Images, Variant
from mto_analysis.images import open_images
from mto_analysis.mto import MTOConfig
from mto_analysis.runtime.outputs import file_word
from mto_analysis.training import Recipe, RunFolder, RunSettings, pretrain
from mto_analysis.training.state import image_identity, run_differences

if TYPE_CHECKING:
    from mto_analysis.experiments.worker import Resources

# Bytes at the end of a file that hold its last row.
_MOST_OF_A_ROW = 8192


@dataclass(frozen=True)
class Run:
    """One pre-training with its evaluations.

    Args:
        stage: ``choose`` for a candidate's run, ``main`` for an arm's.
        variant: Label of the variant.
        arm: Name of the arm, or of the candidate.
        method: What curves call it.
        seed: Of everything.
        recipe: What is trained.
        settings: How; of a chosen arm the settings of MTO are filled in when they are chosen.
        waits: Whether the settings of MTO are still to be chosen.
        source: Images to train on.
        folder: For the engine's files.
    """

    stage: Literal["choose", "main"]
    variant: str
    arm: str
    method: str
    seed: int
    recipe: Recipe
    settings: RunSettings
    waits: bool
    source: str
    folder: Path

    @property
    def name(self) -> str:
        """What a user sees."""
        return f"{'choosing: ' if self.stage == 'choose' else ''}{self.method}, seed {self.seed}"

    def finished(self) -> bool:
        """Whether the engine says so."""
        return RunFolder(self.folder).finished()

    @property
    def on_cpu(self) -> bool:
        """Whether it needs no GPU."""
        return self.settings.device == "cpu"

    def in_use(self) -> bool:
        """Whether a process works on it."""
        return RunFolder(self.folder).in_use()

    def do(self, resources: Resources, note: Callable[[str], None]) -> None:
        """Train, from wherever it stopped."""
        torch.set_num_threads(resources.threads)
        settings = replace(self.settings, device=resources.device_for(self.settings.device))
        images = open_images(self.source, value_range=settings.value_range)
        for _ in pretrain(self.recipe, images, self.folder, settings, resume=True, on_note=note, source=self.source):
            pass

    def check(self) -> None:
        """Whether what its folder holds, if anything, is this run."""
        folder = RunFolder(self.folder)
        if not folder.metadata.exists():
            return
        stored = folder.stored_metadata().get("identity", {})
        settings = self.settings.metadata()
        evaluation = self.settings.evaluation
        now: dict[str, Any] = {
            "recipe": self.recipe.to_dict(),
            "seed": self.seed,
            "precision": settings["precision"],
            "evaluation": evaluation.settings() if evaluation else None,
            # All contents are compared where a run goes on.
            "images": {
                name: value
                for name, value in _image_identity(self.source, settings["value_range"]).items()
                if name != "contents" and name in stored.get("images", {})
            },
            **({} if self.waits else {"mto": settings["mto"]}),
        }
        known = {**stored, "images": {name: stored["images"][name] for name in now["images"]}}
        if other := run_differences({key: known.get(key) for key in now}, now):
            raise ExperimentError(
                f"{self.folder} holds another run: {'; '.join(other)}; use the same settings, or another --out"
            )


@functools.cache  # all runs of an experiment have the same images
def _image_identity(source: str, value_range: tuple[float, float] | None) -> dict[str, Any]:
    return image_identity(open_images(source, value_range=value_range), whole=False)


class ExperimentRuns:
    """All runs of an experiment.

    Args:
        experiment: What is run.
        images: With absolute paths.
        folder: Of the whole experiment.

    Raises:
        ExperimentError: If two runs would share a folder, or a folder holds another run.
    """

    def __init__(self, experiment: Experiment, images: Images, folder: Path) -> None:
        self.experiment, self.images, self.folder = experiment, images, folder
        self.choosing = tuple(self._choosing())
        self.main = tuple(self._main())
        folders: dict[Path, str] = {}
        for run in self.all:
            if run.folder in folders:
                raise ExperimentError(
                    f"{folders[run.folder]!r} and {run.name!r} would share the folder {run.folder.name}; rename one"
                )
            folders[run.folder] = run.name

    @property
    def all(self) -> tuple[Run, ...]:
        """In the order in which they begin."""
        return (*self.choosing, *self.main)

    def check(self) -> None:
        """Whether what the folder holds belongs to this experiment."""
        for run in self.all:
            run.check()

    def _settings(self, recipe: Recipe, seed: int, mto: MTOConfig | None) -> RunSettings:
        experiment, images = self.experiment, self.images
        evaluation = replace(
            experiment.evaluation,
            train=images.eval_train or images.train,
            test=images.eval_test,
            every=max(1, recipe.epochs // experiment.points),
            value_range=experiment.value_range,
        )
        return RunSettings(
            seed=seed,
            mto=mto,
            precision=experiment.precision,
            deterministic=experiment.deterministic,
            num_workers=experiment.num_workers,
            log_every=experiment.log_every,
            verify_data=experiment.verify_data,
            value_range=experiment.value_range,
            device=experiment.device,
            evaluation=evaluation,
            evaluate_start=True,
        )

    def _choosing(self) -> Iterator[Run]:
        """The candidates' runs, and beside them the baseline's: the best of some may still be worse than none."""
        choice, baseline = self.experiment.choice, self.experiment.baseline
        if choice is None:
            return
        candidates = [(f" + {each.name}", each.name, each.mto) for each in choice.candidates]
        plain = [("", baseline.name, None)] if baseline is not None else []
        for seed in choice.seeds:
            for variant in self.experiment.variants:
                recipe = variant.recipe.shortened(choice.share)
                for ending, name, mto in (*plain, *candidates):
                    method = variant.label + ending
                    settings = self._settings(recipe, seed, mto)
                    folder = self.folder / "choose" / f"{file_word(method).lower()}-seed{seed}"
                    names = (variant.label, name, method)
                    yield Run("choose", *names, seed, recipe, settings, False, self.images.train, folder)

    def _main(self) -> Iterator[Run]:
        for seed in self.experiment.seeds:
            for variant in self.experiment.variants:
                for arm in self.experiment.arms:
                    yield self._arm_run(variant, arm, seed)

    def _arm_run(self, variant: Variant, arm: Arm, seed: int) -> Run:
        method = self.experiment.method(variant, arm)
        settings = self._settings(variant.recipe, seed, arm.mto)
        folder = self.folder / "runs" / f"{file_word(method).lower()}-seed{seed}"
        names = (variant.label, arm.name, method)
        return Run("main", *names, seed, variant.recipe, settings, arm.chosen, self.images.train, folder)

    def needed(self, run: Run) -> tuple[Run, ...]:
        """The runs that choose the settings of one that waits."""
        return tuple(each for each in self.choosing if run.waits and each.variant == run.variant)

    def ready(self, run: Run) -> bool:
        """Whether a run can begin."""
        return all(each.finished() for each in self.needed(run))

    def only(self, number: int) -> tuple[Run, ...]:
        """One run by its number, from 1 on."""
        if not 1 <= number <= len(self.all):
            raise ExperimentError(f"runs are numbered from 1 to {len(self.all)}, got {number}; see --list")
        run = self.all[number - 1]
        if not self.ready(run):
            raise ExperimentError(f"run {number} ({run.name}) {self._awaited(run)}: do these first")
        return (run,)

    def shard(self, index: int, count: int) -> tuple[Run, ...]:
        """Every ``count``-th run, from the ``index``-th on (from 1)."""
        if not 1 <= index <= count:
            raise ValueError(f"a shard is I/N with I from 1 to N, got {index}/{count}")
        return self.all[index - 1 :: count]

    def listing(self) -> str:
        """All runs by number, with how far they are."""
        names = [run.name for run in self.all]
        width = max(map(len, names))
        return "\n".join(f"{n:>3}  {run.name:<{width}}  {self._state(run)}" for n, run in enumerate(self.all, start=1))

    def _state(self, run: Run) -> str:
        if run.finished():
            return "finished"
        progress, epochs = read_progress(run), run.recipe.epochs
        done = "not begun" if progress is None else f"epoch {progress.epoch} of {epochs}"
        if run.in_use():
            return f"running, {done}"
        return done if self.ready(run) else self._awaited(run)

    def _awaited(self, run: Run) -> str:
        needed = self.needed(run)
        numbers = [n for n, each in enumerate(self.choosing, start=1) if each in needed]
        return f"waits for runs {', '.join(map(str, numbers))}"

    def chosen_table(self) -> pd.DataFrame:
        """Scores of all candidates and of the baseline so far: ``variant candidate seed final mean``."""
        rows = []
        for run in self.choosing:
            curve = read_curve(run)
            scores = curve.loc[curve["epoch"] > 0, "score"]
            if len(scores) and int(curve["epoch"].iloc[-1]) == run.recipe.epochs:
                rows.append((run.variant, run.arm, run.seed, float(scores.iloc[-1]), float(scores.mean())))
        return pd.DataFrame(rows, columns=["variant", "candidate", "seed", "final", "mean"])

    def resolve(self, run: Run) -> Run:
        """A waiting run with the settings that were chosen for its variant."""
        choice = self.experiment.choice
        if not run.waits or choice is None:
            return run
        name = best_candidate(self.chosen_table(), run.variant, choice)
        mto = next(each.mto for each in choice.candidates if each.name == name)
        return replace(run, settings=replace(run.settings, mto=mto), waits=False)


def best_candidate(table: pd.DataFrame, variant: str, choice: Choice) -> str:
    """The candidate with the greatest mean over seeds; of equals the first. The baseline is none.

    Example:
        >>> import pandas as pd
        >>> from mto_analysis.experiments.spec import Candidate
        >>> rows = [("MAE", "no MTO", 1, 42.0, 31.0), ("MAE", "a", 1, 40.0, 30.0), ("MAE", "b", 1, 41.0, 29.0)]
        >>> table = pd.DataFrame(rows, columns=["variant", "candidate", "seed", "final", "mean"])
        >>> candidates = Candidate("a", MTOConfig()), Candidate("b", MTOConfig())
        >>> [best_candidate(table, "MAE", Choice(candidates, (1,), by=by)) for by in ("final", "mean")]
        ['b', 'a']
    """
    names = [each.name for each in choice.candidates]
    rows = table[(table["variant"] == variant) & table["candidate"].isin(names)]
    groups = rows.groupby("candidate", sort=False)[choice.by]
    if groups.ngroups < len(names) or int(groups.size().min()) < len(choice.seeds):
        raise DataError(f"the choice for {variant} is not finished: run the experiment again")
    return str(groups.mean().idxmax())


class RunProgress(NamedTuple):
    """How far a run is: whole epochs, and the last score."""

    step: int
    epoch: int
    score: float | None


def read_progress(run: Run) -> RunProgress | None:
    """What the engine wrote last; ``None`` before the first row.

    Read from the run's folder, so it does not matter where the run is done.
    """
    folder = RunFolder(run.folder)
    row, scored = _last_row(folder.metrics), _last_row(folder.curves)
    if row is None:
        return None
    return RunProgress(int(row["step"]), int(float(row["epoch"])), None if scored is None else float(scored["score"]))


def _last_row(path: Path) -> dict[str, str] | None:
    """The last whole row of a CSV file with short rows, without reading those before; ``None`` where there is none."""
    try:
        with path.open("rb") as file:
            names = file.readline()
            file.seek(max(file.tell(), file.seek(0, os.SEEK_END) - _MOST_OF_A_ROW))
            whole, newline, _ = file.read().rpartition(b"\n")  # a row may be being written
    except OSError:  # not there yet
        return None
    last = whole.rpartition(b"\n")[2]
    return next(csv.DictReader([names.decode(), last.decode()]), None) if newline else None


def read_curve(run: Run) -> pd.DataFrame:
    """What the engine wrote of a run's scores; empty before the first.

    Columns: ``epoch score protocol``.
    """
    path = RunFolder(run.folder).curves
    if not path.exists():
        return pd.DataFrame({"epoch": [], "score": [], "protocol": []})
    return pd.read_csv(path)[["epoch", "score", "protocol"]]
