"""Evaluation along a run: when what is trained is scored, on which processes, with no trace in its training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from mto_analysis.models import MaskedImageModel
from mto_analysis.runtime.processes import Processes
from mto_analysis.training.settings import RunSettings

if TYPE_CHECKING:
    from mto_analysis.training.assembly import Assembly


class Scorer(ABC):
    """Scores what is trained, every so many epochs and at the end."""

    #: What a score gives, for the columns of ``metrics.csv``; ``score`` is the first.
    columns: ClassVar[tuple[str, ...]] = ("score",)
    #: In ``curves.csv``; ``None`` for runs that are no curve of pre-training.
    protocol: str | None = None
    every: int = 1

    @property
    def wanted(self) -> bool:
        """Whether the run is evaluated at all."""
        return True

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether to evaluate after ``epoch`` of ``epochs``: every so many, and the last."""
        return self.wanted and (epoch % self.every == 0 or epoch == epochs)

    @abstractmethod
    def score(self, trained: Assembly) -> Mapping[str, float | None]:
        """Percent by column; a collective call. Modes and random state are afterwards as before."""


class EvaluationScorer(Scorer):
    """Scores what pre-training publishes (the student, or its momentum teacher) by features of its encoder.

    Args:
        settings: The run's; its evaluation is used where no other is given. Images are opened at once.
        processes: The processes of the run.
        given: Another evaluation: the model's score.
    """

    def __init__(
        self, settings: RunSettings, processes: Processes, given: Callable[[MaskedImageModel], float] | None = None
    ) -> None:
        evaluation = settings.evaluation
        self.protocol = evaluation.protocol if evaluation is not None else "own"
        self.every = evaluation.every if evaluation is not None else 1
        self._processes, self._score, self._shared = processes, given, False
        if given is None and evaluation is not None:
            from mto_analysis.training.evaluation import Evaluator

            self._evaluator = Evaluator(evaluation, num_workers=settings.num_workers)
            self._score = self._evaluator.score
            self._shared = processes.count > 1 and not settings.fsdp

    @property
    def wanted(self) -> bool:
        """Whether the run is evaluated at all."""
        return self._score is not None

    def score(self, trained: Assembly) -> Mapping[str, float | None]:
        """Top-1 percent."""
        if self._score is None:
            raise ValueError("the run has no evaluation")
        with trained.at_rest():
            if self._shared:
                score = self._evaluator.score(trained.method.probed, processes=self._processes)
            else:
                model = trained.whole_probed()
                score = float(self._processes.shared(self._score(model) if model is not None else 0.0))
        return {"score": score}
