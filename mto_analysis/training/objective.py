"""What a run minimises: a student with the terms of its loss, and what follows each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

__all__ = ["Objective"]


class Objective(nn.Module, ABC):
    """What a run trains, by pre-training or as a classifier: a student, the terms of its loss, what follows a step.

    Args:
        student: The model that is trained.
    """

    #: Whether the student sees masked images, whose H is measured along the run.
    masked: ClassVar[bool] = True
    #: Whether an image's loss depends on those beside it (batch norms): then micro-batches do not average exactly.
    depends_on_batch: ClassVar[bool] = False
    #: What is trained, saved and probed, and what ``attach_mto`` is attached to.
    student: Any

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        #: Fraction of the run's optimizer steps that are done.
        self.progress = 0.0

    @abstractmethod
    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """The weighted terms of the loss, by name; their sum is the whole loss, a mean over images.

        Shapes:
            returns: scalars
        """

    @abstractmethod
    def published(self, average: Any = None) -> dict[str, Any]:
        """What a checkpoint holds for others.

        Args:
            average: Moving average of the student, where there is one.
        """

    def after_step(self, progress: float) -> None:
        """Follow the student after an optimizer step.

        Args:
            progress: Fraction of the run's optimizer steps that are done, this one counted: the first call of a run of
                100 steps gets 0.01, the last one 1.
        """
        self.progress = progress

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run needs beside tensors."""
        return {"progress": self.progress}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The opposite of :meth:`get_extra_state`."""
        self.progress = float(state["progress"])
