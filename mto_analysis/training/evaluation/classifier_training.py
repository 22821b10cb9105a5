"""Classifiers as a task of the training engine: their loss, their test accuracy, and a run from model to accuracy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from mto_analysis.images import choose_images
from mto_analysis.models import MaskedImageModel
from mto_analysis.models.interface import height_and_width
from mto_analysis.runtime.precision import fast_float32
from mto_analysis.training.assembly import Assembly
from mto_analysis.training.evaluation.augmented import AugmentedData, LabelledBatch
from mto_analysis.training.evaluation.classifier import Classifier, build_classifier, build_optimizer
from mto_analysis.training.evaluation.classifier_settings import ClassifierSettings
from mto_analysis.training.evaluation.features import LabelledImages, check_classes, normalized
from mto_analysis.training.loop import open_processes, train
from mto_analysis.training.methods import METHODS
from mto_analysis.training.objective import Objective
from mto_analysis.training.scoring import Scorer
from mto_analysis.training.settings import EpochRecord, RunSettings, StepRecord
from mto_analysis.training.shares import micro_batch_size
from mto_analysis.training.state import RunFolder, run_identity


class ClassifierObjective(Objective):
    """Cross-entropy of a classifier."""

    masked = False
    student: Classifier

    def __init__(self, student: Classifier, settings: ClassifierSettings) -> None:
        super().__init__(student, settings, settings.protocol)
        self.chosen = settings
        self.clips_micro_batches = settings.clip_micro_batches

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """One term, ``cross_entropy``; probabilities, as mixup gives them, are smoothed already.

        Shapes:
            images: batch channels height width
            targets: batch (class indices) or batch num_classes (probabilities)
        """
        logits = self.student(images)
        smoothing = 0.0 if targets.is_floating_point() else self.chosen.smoothing
        with torch.autocast(images.device.type, enabled=False):
            return {"cross_entropy": F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)}

    def optimizer(self) -> torch.optim.Optimizer:
        """LARS for the linear probe, AdamW with layer-wise rates for fine-tuning."""
        return build_optimizer(self.student, self.chosen)

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """A linear warm-up, then half a cosine, in the way of the method that ``schedule`` names."""
        chosen = self.chosen
        rate_of = METHODS[chosen.schedule].learning_rate
        return rate_of(chosen, step, steps_per_epoch, chosen.learning_rate, chosen.warmup_lr, chosen.min_lr)

    def noise(self, count: int, device: torch.device) -> LabelledBatch:
        """Noise, all of the first class."""
        info = self.student.encoder.info
        shape = (count, info.channels, *height_and_width(info.image_size))
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return LabelledBatch(images.to(device), torch.zeros(count, dtype=torch.long, device=device))

    def files(self) -> Mapping[str, str]:
        """The settings."""
        return {"settings.json": json.dumps(self.chosen.to_dict(), indent=2) + "\n"}

    def published(self, average: Classifier | None = None) -> dict[str, Any]:
        """What training changes: parameters that learn, and the running statistics of a batch norm."""
        content = {"classifier": _learned(self.student)}
        return content if average is None else {**content, "classifier_average": _learned(average)}


def _learned(classifier: Classifier) -> dict[str, Tensor]:
    names = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    state = classifier.state_dict()
    return {name: value for name, value in state.items() if name in names or name.startswith("head.")}


class TestAccuracy(Scorer):
    """Top-1 and, for more than five classes, top-5 accuracy on test images, in percent.

    Args:
        test: Images with labels.
        every: Epochs between two measurements; the last epoch always has one.
    """

    __test__ = False  # no test of pytest
    columns = ("score", "top5")

    def __init__(self, test: LabelledImages, every: int) -> None:
        self._test, self.every = test, every

    def score(self, trained: Assembly) -> Mapping[str, float | None]:
        """The accuracy of the classifier, or of its moving average where there is one."""
        classifier, processes, labels = trained.method.student, trained.processes, self._test.labels
        if trained.ema is not None:
            classifier = trained.ema.module
        for buffer in classifier.buffers():  # statistics of a batch norm are each process's own
            processes.spread(buffer)
        size, info, num_classes = self._test.batch_size, classifier.encoder.info, classifier.num_classes
        crop_pct = classifier.crop_pct
        right = torch.zeros(2, dtype=torch.float64)
        training = trained.method.training
        trained.method.eval()
        with torch.no_grad(), fast_float32(processes.device.type), trained.autocast():
            for number, images in self._test.batches(info, processes.rank, processes.count, crop_pct=crop_pct):
                batch = labels[number * size : (number + 1) * size, None].to(processes.device)
                logits = classifier(normalized(images.to(processes.device), info)).float()
                hits = logits.topk(min(5, num_classes), dim=1).indices == batch
                right += torch.stack([hits[:, :1].sum(), hits.sum()]).cpu()
        trained.method.train(training)
        top1, top5 = (processes.mean(right) * processes.count * 100 / len(labels)).tolist()
        return {"score": top1, "top5": top5 if num_classes > 5 else None}


def train_classifier(
    model: MaskedImageModel,
    train_images: LabelledImages,
    test_images: LabelledImages,
    settings: ClassifierSettings,
    folder: str | Path,
    run: RunSettings | None = None,
    *,
    test_every: int = 1,
    overwrite: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Iterator[EpochRecord]:
    """Train a classifier on a copy of a model, and yield a record after each epoch, when all of it is on disk.

    ``folder`` gets ``run.json``, ``settings.json``, ``metrics.csv``, and ``last.pth`` after every epoch, from which a
    second call with the same settings goes on exactly; in the end ``classifier.pth`` takes its place. Everything random
    is a function of the seed and the place in the run.

    Args:
        model: Pre-trained; it is not changed.
        train_images: To train on.
        test_images: To measure accuracy on.
        settings: From :mod:`mto_analysis.training.evaluation.classifier_settings`.
        folder: For the results.
        run: Seed (of the head, the order, augmentation, mixup and drop path), precision, accumulation, device, workers.
        test_every: Epochs between two measurements of test accuracy; the last epoch always has one.
        overwrite: Begin anew whatever the folder holds.
        on_step: Called after each step, for a progress bar.
        on_note: Called with what a user should know, one line at a time.
    """
    run = run or RunSettings()
    processes = open_processes(run)
    num_classes = check_classes(train_images, test_images)
    run = replace(run, ema=settings.ema)
    micro_batch = micro_batch_size(settings.batch_size, processes=processes.count, accumulation=run.accumulation)
    if (settings.mixup or settings.cutmix) and micro_batch % 2:
        raise ValueError(f"mixup and cutmix pair the images of a micro-batch, which must be even, got {micro_batch}")
    data = AugmentedData(
        train_images,
        model.info,
        settings,
        num_classes,
        seed=run.seed,
        num_workers=run.num_workers,
        device=processes.device,
    )
    chosen = choose_images(train_images.images, [train_images.images.names[row] for row in train_images.rows])
    yield from train(
        lambda begins: ClassifierObjective(build_classifier(model, settings, num_classes, seed=run.seed), settings),
        settings,
        data,
        lambda: TestAccuracy(test_images, test_every),
        RunFolder(folder, final="classifier.pth"),
        run,
        processes,
        identity=run_identity(run, chosen, classifier=settings.to_dict(), weights=_fingerprint(model)),
        resume=not overwrite,
        overwrite=overwrite,
        on_step=on_step,
        on_note=on_note,
        source=train_images.source,
    )


def classifier_score(folder: str | Path) -> tuple[float, float | None, float]:
    """Top-1 and, for more than five classes, top-5 accuracy of a complete run, in percent, and the seconds it took."""
    rows = pd.read_csv(RunFolder(folder).metrics)
    last = rows[rows["kind"] == "epoch"].iloc[-1]
    return float(last["score"]), None if pd.isna(last["top5"]) else float(last["top5"]), float(last["seconds"])


def _fingerprint(model: MaskedImageModel) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
