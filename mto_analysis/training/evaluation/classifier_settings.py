"""How a classifier is trained with augmentation: MAE's linear probe, and fine-tuning as each method's authors do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from mto_analysis.models import MaskedImageModel
from mto_analysis.runtime.settings import field_types, parse_value
from mto_analysis.training.evaluation.protocols import Feature, crop_pct_of, feature_of, is_small
from mto_analysis.training.methods import method_of
from mto_analysis.training.methods.method import Norm, Pooling

__all__ = ["ClassifierSettings", "finetune_settings", "linear_settings"]


@dataclass(frozen=True)
class ClassifierSettings:
    """Everything a training of a classifier depends on but the model, the images and the seed.

    Args:
        protocol: ``linear_mae`` (frozen encoder, BatchNorm and a linear layer, LARS) or ``finetune`` (AdamW).
        pooling: See :class:`~mto_analysis.training.evaluation.protocols.Feature`.
        layer: The same; by default the last block.
        norm: The same; by default the encoder's, and in fine-tuning on the mean of a ViT's patches a fresh norm that is
            trained.
        epochs: Length.
        batch_size: Effective: over all processes and accumulated micro-batches.
        base_lr: Learning rate for ``lr_batch`` images at a time; the rate is ``base_lr * batch_size / lr_batch``.
        lr_batch: See ``base_lr``.
        min_lr: Where the cosine ends.
        warmup_epochs: Of the linear warm-up from zero.
        weight_decay: Of weights; biases, norms, class token and position embedding have none.
        betas: Of AdamW.
        momentum: Of LARS.
        layer_decay: Learning rate of a layer over that of the next one.
        drop_path: Largest rate of dropped branches, growing linearly with the block.
        clip_grad: Largest norm of the gradient, or no clipping.
        crop_scale: Area of the random crop, as a fraction of the image.
        crop_pct: Side of the test images' centre crop over their resized shorter side.
        flip: Chance of a mirror image.
        auto_augment: Policy in timm's notation, or none.
        erasing: Chance that a rectangle is erased (filled with noise).
        smoothing: Of labels.
        mixup: Strength of mixup, 0 for none.
        cutmix: Strength of cutmix, 0 for none.
        source: Where these values come from.
    """

    protocol: str
    pooling: Pooling
    epochs: int
    batch_size: int
    base_lr: float
    lr_batch: int = 256
    min_lr: float = 0.0
    warmup_epochs: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    layer_decay: float = 1.0
    drop_path: float = 0.0
    clip_grad: float | None = None
    layer: int | None = None
    norm: Norm | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_pct: float = 1.0
    flip: float = 0.5
    auto_augment: str | None = None
    erasing: float = 0.0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.protocol not in ("linear_mae", "finetune"):
            raise ValueError(f"protocol must be linear_mae or finetune, got {self.protocol!r}")
        for name, kind in (("pooling", Pooling), ("norm", Norm)):
            if (value := getattr(self, name)) is not None and value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
        if min(self.epochs, self.batch_size, self.lr_batch) < 1:
            raise ValueError("epochs, batch_size and lr_batch must be at least 1")
        if not self.base_lr > 0 or min(self.min_lr, self.weight_decay, self.mixup, self.cutmix) < 0:
            raise ValueError("base_lr must be positive, min_lr, weight_decay, mixup and cutmix not negative")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(f"warmup_epochs must lie between 0 and {self.epochs} epochs, got {self.warmup_epochs}")
        for name in ("momentum", "drop_path", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("flip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad must be positive, got {self.clip_grad}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must rise within (0, 1], got {self.crop_scale}")

    @property
    def learning_rate(self) -> float:
        """The peak rate."""
        return self.base_lr * self.batch_size / self.lr_batch

    def feature(self, model: MaskedImageModel) -> Feature:
        """What the classifier reads of a model; in fine-tuning a fresh norm is trained.

        Raises:
            ValueError: If the model lacks it.
        """
        fresh = self.protocol == "finetune" and self.pooling == "patches" and model.encoder_prefix_tokens > 0
        layer = self.layer or len(model.encoder_blocks())
        return feature_of(model, self.pooling, layer, self.norm or ("fresh" if fresh else "encoder"))

    def with_options(self, options: Mapping[str, str]) -> ClassifierSettings:
        """These settings with some given as text, as ``--set`` has them.

        Raises:
            ValueError: If there is no such setting, or the text is not of its type.
        """
        types = {name: kind for name, kind in field_types(type(self)).items() if name not in ("protocol", "source")}
        changes: dict[str, Any] = {}
        for name, text in options.items():
            if name not in types:
                raise ValueError(f"there is no setting {name!r}; there are {', '.join(types)}")
            changes[name] = parse_value(name, types[name], text)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for ``run.json``."""
        return asdict(self)


def linear_settings(model: MaskedImageModel) -> ClassifierSettings:
    """MAE's linear probe, or the same for small images.

    Source:
        He et al. (CVPR 2022), appendix A.1; facebookresearch/mae ``FINETUNE.md``, ``main_linprobe.py``. For small
        images a batch of 16384 leaves three steps an epoch of CIFAR-10, so it is 1024, and crops are milder.
    """
    published = ClassifierSettings(
        protocol="linear_mae",
        **feature_of(model)._asdict(),
        crop_pct=crop_pct_of(model),
        epochs=90,
        batch_size=16384,
        base_lr=0.1,
        warmup_epochs=10,
        source="facebookresearch/mae FINETUNE.md",
    )
    if not is_small(model):
        return published
    return replace(published, batch_size=1024, crop_scale=(0.2, 1.0), source=f"{published.source}, for small images")


#: Common to all four methods' fine-tuning scripts.
_REGULARISED: dict[str, Any] = {
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
    BootMAE and ConMIM do not scale. Of ConMIM's five peak rates 4e-3 is that of its script. Regularisation (mixup,
    cutmix, RandAugment, erasing, smoothing, drop path) is the same in all four scripts; SimMIM clips gradients at 5.

    Source:
        Supplementary Tables 3-6; facebookresearch/mae ``FINETUNE.md``; microsoft/SimMIM ``config.py``; LightDXY/BootMAE
        ``scripts/finetune``; TencentARC/ConMIM ``README.md``.
    """
    method = method_of(model)
    values = dict(method.finetuning)
    if getattr(model.config, "dim", 768) >= 1024:
        values |= method.wide_finetuning
    if is_small(model):
        values |= {"batch_size": 256, "base_lr": 1e-3, "lr_batch": 256, "epochs": 50, "warmup_epochs": 5}
        values |= {"crop_scale": (0.5, 1.0), "source": f"{_PAPER}, for small images"}
    return ClassifierSettings(**{"source": _PAPER, "crop_pct": crop_pct_of(model), **_REGULARISED, **values})
