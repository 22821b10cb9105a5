"""What the engine trains: a method with its optimizer and its schedule, on batches of its own kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from mto_analysis.training.objective import Objective

__all__ = ["Batch", "Task", "TaskData"]

ObjectiveT = TypeVar("ObjectiveT", bound=Objective)


class Batch(Protocol):
    """A micro-batch on the device."""

    @property
    def images(self) -> Tensor:
        """Shape: batch channels height width."""

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Arguments of the method's forward."""


class TaskData(Protocol):
    """Training images in batches that depend on seed, epoch and step alone."""

    def __len__(self) -> int:
        """Number of images."""

    def prepare(self) -> object:
        """Read what is held in memory; called once, before anything is written."""

    def micro_batches(
        self, epoch: int, *, micro_batch: int, accumulation: int, process: int, processes: int, skip_steps: int
    ) -> Iterator[Batch]:
        """The micro-batches of one process in one epoch, as of :class:`~mto_analysis.images.TrainingData`."""


class Task(ABC, Generic[ObjectiveT]):
    """Pre-training by a recipe, or a classifier: what differs between the runs that the engine carries out.

    Args:
        settings: With ``epochs``, ``batch_size`` (over all processes and micro-batches) and ``clip_grad``.
        name: In the column ``method`` of tables.
    """

    #: What messages call the training images.
    images: ClassVar[str] = "images"

    def __init__(self, settings: Any, name: str) -> None:
        self.name = name
        self.epochs: int = settings.epochs
        self.batch_size: int = settings.batch_size
        self.clip_grad: float | None = settings.clip_grad

    @abstractmethod
    def build(self, seed: int) -> ObjectiveT:
        """The method before its first step, in training mode; the global random state stays as it is."""

    @abstractmethod
    def optimizer(self, method: ObjectiveT) -> torch.optim.Optimizer:
        """With parameter groups, whose ``lr_scale`` multiplies the learning rate."""

    @abstractmethod
    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Of an optimizer step, counted from 0 over the whole run."""

    @abstractmethod
    def noise(self, count: int, device: torch.device) -> Batch:
        """A batch of noise, to try a step out."""

    @abstractmethod
    def files(self) -> Mapping[str, str]:
        """Text files with the settings, by name, for the run's folder."""
