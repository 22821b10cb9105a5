"""What a run trains: a student with the terms of its loss, its optimizer and its schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mto_analysis.runtime.settings import Below1, Count, Fraction, NonNegative, Positive, Rising, Settings, Share


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """Settings of every training, of a model or of a classifier.

    Args:
        epochs: Length of the run.
        batch_size: Effective: over all processes and accumulated micro-batches.
        base_lr: Learning rate for ``lr_batch`` images at a time.
        lr_batch: The peak rate is ``base_lr * batch / lr_batch``; without it, ``base_lr``.
        min_lr: Where the cosine ends.
        warmup_lr: Where the warm-up starts.
        warmup_epochs: Length of the linear warm-up.
        weight_decay: Of weights; biases and whatever has one axis have none.
        betas: Of AdamW.
        clip_grad: Largest norm of the gradient, or no clipping.
        drop_path: Largest rate of dropped branches, growing linearly with the block.
        crop_scale: Area of the random crop, as a fraction of the image.
        flip: Chance of a mirror image.
    """

    epochs: Count
    batch_size: Count
    base_lr: Positive
    lr_batch: Count | None = None
    min_lr: NonNegative = 0.0
    warmup_lr: NonNegative = 0.0
    warmup_epochs: NonNegative
    weight_decay: NonNegative
    betas: tuple[Below1, Below1]
    clip_grad: Positive | None = None
    drop_path: Below1 = 0.0
    crop_scale: Annotated[tuple[Share, Share], Rising(strict=False)]
    flip: Fraction = 0.5

    def __post_init__(self) -> None:
        """Check what belongs together, too."""
        super().__post_init__()
        self._refuse(("warmup_epochs must lie between 0 and epochs", self.warmup_epochs > self.epochs))

    def lr_scale(self, global_batch: int) -> float:
        """What learning rates are multiplied by for a batch of so many images."""
        return 1.0 if self.lr_batch is None else global_batch / self.lr_batch

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


class Batch(Protocol):
    """A micro-batch on the device."""

    @property
    def images(self) -> Tensor:
        """Shape: batch channels height width."""

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Arguments of the objective's forward."""


class Objective(nn.Module, ABC):
    """What a run trains, by pre-training or as a classifier."""

    #: Whether the student sees masked images, whose H is measured along the run.
    masked: ClassVar[bool] = True
    #: Whether an image's loss depends on those beside it (batch norms): then micro-batches do not average exactly.
    depends_on_batch: ClassVar[bool] = False
    #: Whether gradients are clipped after each accumulated micro-batch, over all processes, or once a step.
    clips_micro_batches: bool = False
    #: What is trained, saved and probed, and what ``attach_mto`` is attached to.
    student: Any

    def __init__(self, student: nn.Module, settings: TrainingSettings, name: str) -> None:
        super().__init__()
        self.student, self.settings, self.name = student, settings, name
        #: Fraction of the run's optimizer steps that are done.
        self.progress = 0.0

    @abstractmethod
    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """The weighted terms of the loss, by name; their sum is the whole loss, a mean over images.

        Shapes:
            returns: scalars
        """

    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """With parameter groups, whose ``lr_scale`` multiplies the learning rate."""

    @abstractmethod
    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of an optimizer step, counted from 0 over the whole run."""

    @abstractmethod
    def noise(self, count: int, device: torch.device) -> Batch:
        """A batch of noise, to try a step out."""

    @abstractmethod
    def files(self) -> Mapping[str, str]:
        """Text files with the settings, by name, for the run's folder."""

    @abstractmethod
    def published(self, average: Any = None) -> dict[str, Any]:
        """What a checkpoint holds for others."""

    @property
    def probed(self) -> Any:
        """The model that is evaluated along a run; of methods that publish their momentum teacher, that."""
        return self.student

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
