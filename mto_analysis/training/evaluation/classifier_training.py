"""Training a classifier with augmentation, on one process or several; after a kill it goes on as if without one."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mto_analysis.errors import CheckpointError, NumericalError, OutputExistsError
from mto_analysis.models import MaskedImageModel
from mto_analysis.runtime.outputs import run_facts, write_atomically
from mto_analysis.runtime.precision import fast_float32
from mto_analysis.training.evaluation.augmented import (
    Share,
    augmented_batches,
)
from mto_analysis.training.evaluation.classifier import Classifier, build_classifier, build_optimizer
from mto_analysis.training.evaluation.classifier_settings import ClassifierSettings
from mto_analysis.training.evaluation.features import LabelledImages, check_classes, normalized, place
from mto_analysis.training.evaluation.protocols import Precision
from mto_analysis.training.methods.method import warmup_then_cosine
from mto_analysis.training.randomness import global_state_restored, seed_globally
from mto_analysis.training.shares import steps_in_epoch
from mto_analysis.training.state import RANDOMNESS, check_randomness, differences, read_checkpoint, write_checkpoint

__all__ = ["ClassifierEpoch", "TrainingMachine", "learning_rate", "train_classifier"]


@dataclass(frozen=True)
class ClassifierEpoch:
    """One epoch: mean training loss, rate at its end, and test accuracy in percent where it was measured."""

    epoch: int
    train_loss: float
    learning_rate: float
    top1: float | None
    top5: float | None
    seconds: float


@dataclass(frozen=True)
class TrainingMachine:
    """How a training is carried out; results do not depend on it but for rounding, and mixup's partners.

    Args:
        precision: Of the encoder: float32, or bfloat16 by autocast.
        micro_batch: Images per process and forward; by default the whole batch, divided over the processes.
        num_workers: Processes that decode and augment.
        test_every: Epochs between two measurements of test accuracy; the last epoch always has one.
    """

    precision: Precision = "float32"
    micro_batch: int | None = None
    num_workers: int = 0
    test_every: int = 1

    def share(self, settings: ClassifierSettings) -> Share:
        """The parts of a batch.

        Raises:
            ValueError: If the batch cannot be shared out, or mixup has no pairs.
        """
        process, processes = place()
        micro = self.micro_batch or settings.batch_size // processes
        if micro < 1 or settings.batch_size % (micro * processes):
            raise ValueError(
                f"a batch of {settings.batch_size} is no multiple of {processes} processes times {micro} images;"
                " change --micro-batch or --set batch_size=N"
            )
        if (settings.mixup or settings.cutmix) and micro % 2:
            raise ValueError(f"mixup and cutmix pair the images of a micro-batch, which must be even, got {micro}")
        return Share(micro, settings.batch_size // (micro * processes), process, processes)


def learning_rate(settings: ClassifierSettings, epoch: float) -> float:
    """The rate at a moment, epochs counted in fractions: linear warm-up from zero, then half a cosine to ``min_lr``.

    Source:
        facebookresearch/mae ``util/lr_sched.py``.
    """
    peak, end = settings.learning_rate, settings.min_lr
    return warmup_then_cosine(epoch, settings.epochs, warmup=settings.warmup_epochs, peak=peak, end=end)


def train_classifier(
    model: MaskedImageModel,
    train: LabelledImages,
    test: LabelledImages,
    settings: ClassifierSettings,
    folder: Path,
    *,
    seed: int = 0,
    machine: TrainingMachine | None = None,
    overwrite: bool = False,
) -> Iterator[ClassifierEpoch]:
    """Train a classifier on a copy of a model and yield a record per epoch, those of an earlier start included.

    ``folder`` gets ``last.pth`` after every epoch, from which a second call with the same settings goes on exactly,
    ``metrics.csv``, and in the end ``classifier.pth`` instead. Everything random is a function of the seed and the
    place in the run.

    Args:
        model: Pre-trained, on the device to train on; it is not changed.
        train: Training images.
        test: Test images.
        settings: From :mod:`mto_analysis.training.evaluation.classifier_settings`.
        folder: For the results.
        seed: Of the head, the order, augmentation, mixup and drop path.
        machine: How to carry it out.
        overwrite: Begin anew whatever the folder holds.

    Raises:
        CheckpointError: If what the folder holds is damaged, or of a version with other random numbers.
        DataError: If the model has no encoder that can be used, or the images do not fit together.
        NumericalError: If the loss is not finite; names epoch and step.
        OutputExistsError: If the folder holds a training with other settings or of another model.
    """
    machine = machine or TrainingMachine()
    num_classes = check_classes(train, test)
    share = machine.share(settings)
    steps_in_epoch(len(train.rows), share.global_batch, "training images")
    classifier = build_classifier(model, settings, num_classes, seed=seed)
    optimizer = build_optimizer(classifier, settings)
    identity = {
        "randomness": RANDOMNESS,
        "settings": settings.to_dict(),
        "seed": seed,
        "weights": _fingerprint(model),
    }
    rows = [] if overwrite else _resume(folder, classifier, optimizer, identity)
    yield from (ClassifierEpoch(**row) for row in rows)
    run = _Run(classifier, optimizer, train, test, settings, machine, share, seed)
    for epoch in range(len(rows), settings.epochs):
        record = run.epoch(epoch)
        rows.append(asdict(record))
        if share.process == 0:
            _save(folder, classifier, optimizer, identity, rows, finished=len(rows) == settings.epochs)
        yield record


class _Run:
    """What stays the same over the epochs of a training."""

    def __init__(
        self,
        classifier: Classifier,
        optimizer: torch.optim.Optimizer,
        train: LabelledImages,
        test: LabelledImages,
        settings: ClassifierSettings,
        machine: TrainingMachine,
        share: Share,
        seed: int,
    ) -> None:
        self.classifier, self.optimizer, self.train, self.test = classifier, optimizer, train, test
        self.settings, self.machine, self.share, self.seed = settings, machine, share, seed
        self.device = next(classifier.parameters()).device
        self.module: nn.Module = classifier
        if share.processes > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.module = DistributedDataParallel(classifier, device_ids=ids)
        self.mix = None
        self.num_classes = classifier.num_classes
        if settings.mixup or settings.cutmix:
            from timm.data import Mixup  # type: ignore[attr-defined]

            self.mix = Mixup(  # type: ignore[no-untyped-call]
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                label_smoothing=settings.smoothing,
                num_classes=self.num_classes,
            )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.machine.precision == "bfloat16")

    def epoch(self, epoch: int) -> ClassifierEpoch:
        start = time.perf_counter()
        settings, share = self.settings, self.share
        steps = steps_in_epoch(len(self.train.rows), share.global_batch)
        self.module.train()
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        with global_state_restored():
            batches = augmented_batches(
                self.train,
                self.classifier.encoder.info,
                settings,
                share,
                seed=self.seed,
                epoch=epoch,
                num_workers=self.machine.num_workers,
            )
            for step in range(steps):
                rate = learning_rate(settings, epoch + step / steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group["lr_scale"]
                total += self._step(batches, epoch, step)
        if share.processes > 1:
            torch.distributed.all_reduce(total)
        loss = float(total) / (steps * share.processes)
        top1 = top5 = None
        if (epoch + 1) % self.machine.test_every == 0 or epoch + 1 == settings.epochs:
            top1, top5 = self._accuracy()
        return ClassifierEpoch(epoch + 1, loss, rate, top1, top5, time.perf_counter() - start)

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]], epoch: int, step: int) -> Tensor:
        """One optimizer step; this process's mean loss."""
        share = self.share
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for part in range(share.accumulation):
            images, labels = (each.to(self.device, non_blocking=True) for each in next(batches))
            seed_globally(self.seed, epoch, "step", step, part, share.process)
            last = part + 1 == share.accumulation
            if isinstance(self.module, DistributedDataParallel):
                self.module.require_backward_grad_sync = last
            with fast_float32(self.device):
                loss = self._loss(images, labels) / share.accumulation
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if not math.isfinite(float(total)):
            raise NumericalError(
                f"the loss is not finite in epoch {epoch + 1}, step {step + 1}; try a lower --set base_lr=X"
            )
        if self.settings.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.classifier.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        return total

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.mix is not None:
            images, targets = self.mix(images, labels)
            with self.autocast():
                logits = self.module(images)
            return F.cross_entropy(logits.float(), targets)
        with self.autocast():
            logits = self.module(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.settings.smoothing)

    def _accuracy(self) -> tuple[float, float | None]:
        """Top-1 and, for more than five classes, top-5 accuracy on the test images, in percent."""
        self.classifier.eval()
        size, info = self.test.batch_size, self.classifier.encoder.info
        right = torch.zeros(2, dtype=torch.long, device=self.device)
        with torch.no_grad(), fast_float32(self.device), self.autocast():
            for number, images in self.test.batches(info, self.share.process, self.share.processes):
                labels = self.test.labels[number * size : (number + 1) * size].to(self.device)
                logits = self.classifier(normalized(images.to(self.device), info)).float()
                hits = logits.topk(min(5, self.num_classes), dim=1).indices == labels[:, None]
                right += torch.stack([hits[:, :1].sum(), hits.sum()])
        if self.share.processes > 1:
            torch.distributed.all_reduce(right)
        top1, top5 = (100.0 * int(count) / len(self.test.rows) for count in right)
        return top1, top5 if self.num_classes > 5 else None


def _fingerprint(model: MaskedImageModel) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _learned(classifier: Classifier) -> dict[str, Tensor]:
    """What training changes: parameters that learn, and the running statistics of a BatchNorm."""
    names = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    state = classifier.state_dict()
    return {name: value for name, value in state.items() if name in names or name.startswith("head.")}


def _resume(
    folder: Path, classifier: Classifier, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of the epochs done before; weights and optimizer as they were after the last of them."""
    for name in ("classifier.pth", "last.pth"):
        path = folder / name
        saved = read_checkpoint(path)
        if saved is None:
            continue
        if not isinstance(saved.get("identity"), dict):
            raise CheckpointError(f"{path} holds no training of a classifier that could go on; remove it")
        check_randomness(path, saved["identity"], saved)
        if changed := differences(saved["identity"], identity):
            raise OutputExistsError(
                f"{path} is of another model, seed or settings ({'; '.join(changed)}); choose another --out or pass "
                "--overwrite"
            )
        classifier.load_state_dict(saved["classifier"], strict=False)
        if "optimizer" in saved:
            optimizer.load_state_dict(saved["optimizer"])
        rows: list[dict[str, Any]] = saved["rows"]
        return rows
    return []


def _save(
    folder: Path,
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    rows: list[dict[str, Any]],
    *,
    finished: bool,
) -> None:
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    versions = run_facts({})["versions"]
    content = {"classifier": _learned(classifier), "rows": rows, "identity": identity, "versions": versions}
    if not finished:
        content["optimizer"] = optimizer.state_dict()
    write_checkpoint(folder / ("classifier.pth" if finished else "last.pth"), content)
    write_atomically(folder / "metrics.csv", pd.DataFrame(rows).to_csv(index=False, lineterminator="\n").encode())
    if finished:
        (folder / "last.pth").unlink(missing_ok=True)
