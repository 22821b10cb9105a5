"""What an evaluation is: its protocol, its images, and the settings that the score depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mto_analysis.models import MaskedImageModel
from mto_analysis.training.methods import method_of

__all__ = ["Evaluation", "Pooling", "Precision", "Protocol", "pooling_of"]

Protocol = Literal["knn", "linear_cached"]
Pooling = Literal["class", "patches"]
Precision = Literal["float32", "bfloat16"]


def pooling_of(model: MaskedImageModel) -> Pooling:
    """What the authors of a model's family make of its tokens when they probe it.

    The class token for MAE and what is built on it; the mean of the patch tokens for BootMAE and for encoders that hold
    masked tokens (BEiT's evaluation code, which SimMIM and ConMIM share), and where there is no class token.

    Source:
        facebookresearch/mae ``FINETUNE.md`` (``--cls_token``); LightDXY/BootMAE ``scripts/linear`` (``--global_pool``);
        microsoft/SimMIM ``USE_MEAN_POOLING``; microsoft/unilm, BEiT.
    """
    return method_of(model).probe_pooling if model.encoder_prefix_tokens else "patches"


@dataclass(frozen=True)
class Evaluation:
    """A protocol on features of a frozen encoder, cheap enough to be repeated along a run.

    Args:
        protocol: ``knn``, the weighted vote of the nearest training images, or ``linear_cached``, a linear classifier
            on features without augmentation; ``linear`` is taken for the latter. What is trained with augmentation (the
            linear probe of MAE, fine-tuning) is in :mod:`mto_analysis.training.evaluation.classifier_training`.
        train: Labelled training images, as for :func:`mto_analysis.open_images`.
        test: Labelled test images.
        every: Pre-training epochs between two scores along a run.
        pooling: The ``class`` token or the mean of the ``patches``; ``None`` for what the family's authors probe.
        neighbours: Of kNN, k.
        temperature: Of kNN's weights, exp(cosine / temperature).
        penalty: Of the linear classifier, on half the squared norm of its weights.
        iterations: At most so many steps of L-BFGS.
        limit: Use so many training images, spread evenly; all by default. Along a run on a CPU the encoder
            takes nearly all of the time, so this sets the price.
        test_limit: The same for test images.
        precision: Of the encoder: float32, or bfloat16 by autocast, which moves scores by a few hundredths of a point.
        batch_size: Images at once through the encoder; the last digits of features depend on it, so it is fixed.

    Source:
        kNN: facebookresearch/dino ``eval_knn.py`` (temperature 0.07, 20 neighbours the best of 10, 20, 100, 200).

    Example:
        >>> Evaluation("linear", "train.parquet", "test.parquet").protocol
        'linear_cached'
    """

    protocol: Protocol | Literal["linear"]
    train: str | Path
    test: str | Path
    every: int = 10
    pooling: Pooling | None = None
    neighbours: int = 20
    temperature: float = 0.07
    penalty: float = 1e-5
    iterations: int = 200
    limit: int | None = None
    test_limit: int | None = None
    precision: Precision = "float32"
    batch_size: int = 256

    def __post_init__(self) -> None:
        """Check the values."""
        if self.protocol == "linear":
            object.__setattr__(self, "protocol", "linear_cached")
        if self.protocol not in ("knn", "linear_cached"):
            raise ValueError(f"protocol must be knn or linear along a run, got {self.protocol!r}")
        for name in ("train", "test"):
            object.__setattr__(self, name, str(getattr(self, name)))
        if self.pooling not in (None, "class", "patches"):
            raise ValueError(f"pooling must be class or patches, got {self.pooling!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16, got {self.precision!r}")
        counts = (self.every, self.neighbours, self.iterations, self.batch_size, self.limit, self.test_limit)
        if any(count is not None and count < 1 for count in counts):
            raise ValueError("every, neighbours, iterations, batch_size and limits must be at least 1")
        if not self.temperature > 0 or not self.penalty >= 0:
            raise ValueError(
                f"temperature must be positive and penalty not negative, got {self.temperature} and {self.penalty}"
            )

    def settings(self) -> dict[str, Any]:
        """What a score depends on, for ``run.json``: a curve must not mix two settings."""
        shared = ("protocol", "train", "test", "pooling", "limit", "test_limit", "precision", "batch_size")
        own = ("neighbours", "temperature") if self.protocol == "knn" else ("penalty", "iterations")
        return {name: value for name, value in asdict(self).items() if name in (*shared, *own)}
