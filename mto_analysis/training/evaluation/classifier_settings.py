"""How a classifier is trained with augmentation: MAE's linear probe, and fine-tuning as each method's authors do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from mto_analysis.models import MaskedImageModel
from mto_analysis.runtime.settings import (
    Below1,
    Count,
    Fraction,
    NonNegative,
    Options,
    Reader,
    Rising,
    Share,
    Within,
)
from mto_analysis.training.evaluation.protocols import Feature, crop_pct_of, feature_of, is_small
from mto_analysis.training.methods import method_of
from mto_analysis.training.methods.method import Norm, Pooling
from mto_analysis.training.objective import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(TrainingSettings):
    """Everything a training of a classifier depends on but the model, the images and the seed.

    Beside the settings of every training (:class:`~mto_analysis.training.objective.TrainingSettings`):

    Args:
        protocol: ``linear_mae`` (frozen encoder, BatchNorm and a linear layer, LARS) or ``finetune`` (AdamW).
        pooling: See :class:`~mto_analysis.training.evaluation.protocols.Feature`.
        layer: The same; by default the last block.
        norm: The same; by default the encoder's, and in fine-tuning on the mean of a ViT's patches a fresh norm that is
            trained.
        schedule: The method whose :meth:`~mto_analysis.training.methods.Method.learning_rate` it follows.
        undecayed: Parts of the names of other parameters without.
        momentum: Of LARS.
        layer_decay: Learning rate of a layer over that of the next one.
        clip_micro_batches: Clip the sum after each accumulated micro-batch instead of once a step.
        ema: Decay of a moving average of the weights, whose accuracy is then the score; or none.
        freeze_positions: Whether an absolute position embedding stays as it is.
        clamp_crop: Cut the sides of a random crop to those of the image, as MAE's probe does; by default a crop that
            does not fit is sampled again, as torchvision does.
        crop_pct: Side of the test images' centre crop over their resized shorter side.
        auto_augment: Policy in timm's notation, or none.
        erasing: Chance that a rectangle is erased (filled with noise).
        smoothing: Of labels.
        mixup: Strength of mixup, 0 for none.
        cutmix: Strength of cutmix, 0 for none.
        source: Where these values come from.
    """

    protocol: Literal["linear_mae", "finetune"]
    pooling: Pooling
    lr_batch: Count | None = 256
    warmup_epochs: NonNegative = 0.0
    schedule: Literal["mae", "simmim", "bootmae", "conmim"] = "mae"
    weight_decay: NonNegative = 0.0
    undecayed: tuple[str, ...] = ("cls_token", "pos_embed")
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    momentum: Below1 = 0.9
    layer_decay: Share = 1.0
    clip_micro_batches: bool = False
    ema: Annotated[float, Within("(0, 1)")] | None = None
    freeze_positions: bool = False
    layer: Count | None = None
    norm: Norm | None = None
    crop_scale: Annotated[tuple[Share, Share], Rising(strict=False)] = (0.08, 1.0)
    clamp_crop: bool = False
    crop_pct: Share = 1.0
    auto_augment: str | None = None
    erasing: Fraction = 0.0
    smoothing: Below1 = 0.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    source: str = ""

    @property
    def learning_rate(self) -> float:
        """The peak rate."""
        return self.base_lr * self.lr_scale(self.batch_size)

    def feature(self, model: MaskedImageModel) -> Feature:
        """What the classifier reads of a model; in fine-tuning a fresh norm is trained."""
        fresh = self.protocol == "finetune" and self.pooling == "patches" and model.encoder_prefix_tokens > 0
        layer = self.layer or len(model.encoder_blocks())
        return feature_of(model, self.pooling, layer, self.norm or ("fresh" if fresh else "encoder"))

    def with_options(self, options: Mapping[str, str]) -> ClassifierSettings:
        """These settings with some given as text, as ``--set`` has them; ``source`` says which.

        Raises:
            ValueError: If there is no such setting, or the text is not of its type.
        """
        reader = Reader("--set", {}, Options(options))
        source = f"{self.source}; for this run: {', '.join(options)}" if options else self.source
        return reader.read(ClassifierSettings, self, protocol=self.protocol, source=source)


def linear_settings(model: MaskedImageModel) -> ClassifierSettings:
    """MAE's linear probe, or the same for small images.

    Source:
        He et al. (CVPR 2022), appendix A.1; facebookresearch/mae ``FINETUNE.md``, ``main_linprobe.py``. For small
        images a batch of 16384 leaves three steps an epoch of CIFAR-10, so it is 1024, and crops are milder.
    """
    wide = method_of(model).wide_probing if _is_wide(model) else {}
    published = ClassifierSettings(
        protocol="linear_mae",
        **feature_of(model)._asdict(),
        crop_pct=crop_pct_of(model),
        warmup_epochs=10,
        batch_size=16384,
        clamp_crop=True,
        **{"epochs": 90, "base_lr": 0.1, "source": "facebookresearch/mae FINETUNE.md", **wide},
    )
    if not is_small(model):
        return published
    return replace(published, batch_size=1024, crop_scale=(0.2, 1.0), source=f"{published.source}, for small images")


def _is_wide(model: MaskedImageModel) -> bool:
    """Whether it is a ViT-L or larger."""
    return getattr(model.config, "dim", 768) >= 1024


#: Common to all four methods' fine-tuning scripts.
_REGULARIZED: dict[str, Any] = {
    "protocol": "finetune",
    "pooling": "patches",
    "epochs": 100,
    "weight_decay": 0.05,
    "drop_path": 0.1,
    "min_lr": 1e-6,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "erasing": 0.25,
    "smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
}
_PAPER = "supplementary Tables 3-6 of the paper"


def finetune_settings(model: MaskedImageModel) -> ClassifierSettings:
    """Fine-tuning as the paper's supplementary tables have it, or the same for small images.

    Learning rate, batch, layer decay, warm-up and length are the paper's. It is silent on how its base rates scale; the
    method's own code decides: MAE per 256 images, SimMIM's 5e-3 is the rate at its batch of 2048 (1.25e-3 per 512),
    BootMAE and ConMIM do not scale. Of ConMIM's five peak rates 4e-3 is that of its script. Regularization (mixup,
    cutmix, RandAugment, erasing, smoothing, drop path) is the same in all four scripts; SimMIM clips gradients at 5.

    Source:
        Supplementary Tables 3-6; facebookresearch/mae ``FINETUNE.md``; microsoft/SimMIM ``config.py``; LightDXY/BootMAE
        ``scripts/finetune``; TencentARC/ConMIM ``README.md``.
    """
    method = method_of(model)
    values = dict(method.finetuning)
    if _is_wide(model):
        values |= method.wide_finetuning
    if is_small(model):
        values |= {"batch_size": 256, "base_lr": 1e-3, "lr_batch": 256, "epochs": 50, "warmup_epochs": 5}
        values |= {"crop_scale": (0.5, 1.0), "ema": None, "source": f"{_PAPER}, for small images"}
    values |= {"undecayed": method.undecayed(model), "crop_pct": crop_pct_of(model)}
    return ClassifierSettings(**{"source": _PAPER, **_REGULARIZED, **values})
