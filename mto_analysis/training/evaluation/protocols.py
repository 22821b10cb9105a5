"""What an evaluation is: its protocol, its images, the features it reads, and all else that the score depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from mto_analysis.checkpoints.reading import Weights
from mto_analysis.models import MaskedImageModel
from mto_analysis.models.interface import height_and_width
from mto_analysis.runtime.settings import Count, Positive, Rising, Settings, Share
from mto_analysis.training.methods import method_of
from mto_analysis.training.methods.method import Norm, Pooling

Protocol = Literal["knn", "linear_cached"]
Precision = Literal["fp32", "bf16"]

_SMALL = 64  # pixels


class Feature(NamedTuple):
    """One vector per image: which block's tokens, how they are pooled, and what normalizes them.

    Attributes:
        pooling: The ``class`` token, the mean of the ``patches``, ``concat``, one beside the other, or ``attentive``, a
            mean weighted by attention, see :func:`~mto_analysis.training.evaluation.features.attentive_mean`.
        layer: The block, counted from 1; 0 is what enters the first one.
        norm: ``encoder``: the encoder's final norm, of every token; ``fresh``: layer normalization of the pooled vector
            without weights, as of a norm that was never trained; ``off``: nothing.
    """

    pooling: Pooling
    layer: int
    norm: Norm


def feature_of(
    model: MaskedImageModel, pooling: Pooling | None = None, layer: int | None = None, norm: Norm | None = None
) -> Feature:
    """The feature that a probe reads: what is given, and for the rest what the authors of the model's family publish.

    ====================  ===============================  ==============================  =========
    family                pooling                          layer                           norm
    ====================  ===============================  ==============================  =========
    MAE and relatives     class token                      last                            encoder's
    SimMIM                mean of patches                  last                            encoder's
    BootMAE               mean of patches                  10 of 12, 18 of 24, else 5/6    fresh
    ConMIM, BEiT, others  class token and mean of patches  last (BEiT reports the best)    off
    ====================  ===============================  ==============================  =========

    Args:
        model: With an encoder that sees whole images; without a class token (Swin), its patches are averaged.
        pooling: In place of the family's.
        layer: In place of the family's.
        norm: In place of the family's.

    Source:
        facebookresearch/mae ``FINETUNE.md`` (``--cls_token``); LightDXY/BootMAE ``scripts/linear`` (``--global_pool``,
        ``--depth``); microsoft/unilm BEiT ``run_linear_eval.py``, from whose code base ConMIM is; microsoft/SimMIM
        publishes no probe, and averages patches in fine-tuning (``USE_MEAN_POOLING``).
    """
    method, depth = method_of(model), len(model.encoder_blocks())
    default: Pooling = method.probe_pooling if model.encoder_prefix_tokens else "patches"
    chosen = Feature(pooling or default, layer or method.probe_layer(depth), norm or method.probe_norm)
    if chosen.pooling in ("class", "concat") and not model.encoder_prefix_tokens:
        raise ValueError(f"a {model.info.family} model has no class token; take the mean of its patches")
    if not 1 <= chosen.layer <= depth:
        raise ValueError(f"layer must lie between 1 and {depth}, the number of blocks, got {chosen.layer}")
    return chosen


def weights_of(model: MaskedImageModel) -> Weights:
    """Which of a checkpoint's weights the authors of the model's family evaluate: ConMIM's its slow branch.

    Source:
        TencentARC/ConMIM ``README.md`` (``checkpoint_copy-799.pth``); LightDXY/BootMAE ``scripts/linear``,
        ``scripts/finetune`` (``--model_key model``).
    """
    method = method_of(model)
    return method.probe_weights if model.info.family in (method.family, *method.relatives) else "model"


def is_small(model: MaskedImageModel) -> bool:
    """Whether images have at most 64 px a side: settings are then for small data, and test images are not cropped."""
    return max(height_and_width(model.info.image_size)) <= _SMALL


def crop_pct_of(model: MaskedImageModel) -> float:
    """Side of the centre crop of test images, over the shorter side that they are resized to.

    224 of 256 in all the originals; MAE above 224 px and the BEiT code base from 384 px on do not crop, nor do we up to
    64 px, where a border is a large part of the object.

    Source:
        facebookresearch/mae ``util/datasets.py``, ``main_linprobe.py``; microsoft/SimMIM ``data_finetune.py``;
        LightDXY/BootMAE, TencentARC/ConMIM ``datasets.py``; facebookresearch/dino ``eval_knn.py``.
    """
    side, uncropped = max(height_and_width(model.info.image_size)), method_of(model).uncropped_from
    return 1.0 if is_small(model) or (uncropped is not None and side >= uncropped) else 224 / 256


@dataclass(frozen=True)
class Evaluation(Settings):
    """A protocol on features of a frozen encoder, cheap enough to be repeated along a run.

    Args:
        protocol: ``knn``, the weighted vote of the nearest training images, or ``linear_cached``, a linear classifier
            on features without augmentation; ``linear`` is taken for the latter. What is trained with augmentation (the
            linear probe of MAE, fine-tuning) is in :mod:`mto_analysis.training.evaluation.classifier_training`.
        train: Labelled training images, as for :func:`mto_analysis.open_images`.
        test: Labelled test images.
        every: Pre-training epochs between two scores along a run.
        pooling: See :class:`Feature`; ``None`` for what the family's authors probe (:func:`feature_of`).
        layer: See :class:`Feature`; the same.
        norm: See :class:`Feature`; the same.
        crop_pct: Side of the centre crop over the resized shorter side; ``None`` as in the original
            (:func:`crop_pct_of`), 1 for no crop.
        neighbours: Of kNN, k.
        temperature: Of kNN's weights, exp(cosine / temperature).
        penalty: Of the linear classifier, on half the squared norm of its weights.
        tolerance: Of the linear classifier: how far its objective may lie above the minimum.
        iterations: Most Newton steps to get there.
        limit: Use so many training images, spread evenly; all by default. Along a run on a CPU the encoder
            takes nearly all of the time, so this determines the cost.
        test_limit: The same for test images.
        precision: Autocast precision of the encoder; ``bf16`` moves scores by a few hundredths of a point.
        batch_size: Images at once through the encoder; the last digits of features depend on it, so it is fixed.
        value_range: Values of black and white, of images that are not in eight bits and do not state them.

    Source:
        kNN: facebookresearch/dino ``eval_knn.py`` (temperature 0.07, 20 neighbours the best of 10, 20, 100, 200).

    Example:
        >>> Evaluation("linear", "train.parquet", "test.parquet").protocol
        'linear_cached'
    """

    protocol: Protocol | Literal["linear"]
    train: str | Path
    test: str | Path
    every: Count = 10
    pooling: Pooling | None = None
    layer: Count | None = None
    norm: Norm | None = None
    crop_pct: Share | None = None
    neighbours: Count = 20
    temperature: Positive = 0.07
    penalty: Positive = 1e-5
    tolerance: Positive = 1e-8
    iterations: Count = 100
    limit: Count | None = None
    test_limit: Count | None = None
    precision: Precision = "fp32"
    batch_size: Count = 256
    value_range: Annotated[tuple[float, float], Rising()] | None = None

    def __post_init__(self) -> None:
        """Bring the values to one form, and check them."""
        if self.protocol == "linear":
            object.__setattr__(self, "protocol", "linear_cached")
        for name in ("train", "test"):
            object.__setattr__(self, name, str(getattr(self, name)))
        super().__post_init__()

    def settings(self) -> dict[str, Any]:
        """What a score depends on, for ``run.json``: a curve must not mix two settings."""
        own = ("penalty", "tolerance", "iterations")
        left_out = ("every", *(own if self.protocol == "knn" else ("neighbours", "temperature")))
        return {name: value for name, value in asdict(self).items() if name not in left_out}
