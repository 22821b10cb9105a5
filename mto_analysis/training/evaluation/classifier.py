"""An encoder with a head for classes, and the groups in which its parameters learn."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from timm.layers import DropPath  # type: ignore[attr-defined]
from timm.optim import Lars  # type: ignore[attr-defined]
from torch import Tensor, nn

from mto_analysis.errors import DataError
from mto_analysis.models import InpaintingViT, MaskedImageModel
from mto_analysis.models.interface import height_and_width
from mto_analysis.training.evaluation.classifier_settings import ClassifierSettings
from mto_analysis.training.evaluation.features import feature_vectors

_EPS = 1e-6


class Classifier(nn.Module):
    """Features of an encoder through a head; with ``frozen``, the encoder stays in eval mode without gradients.

    Fine-tuning averages patch tokens before the final norm and normalizes the mean with a norm that is trained, as MAE
    and BEiT do; a class token, and Swin's patches, keep the encoder's own norm.
    """

    def __init__(self, model: MaskedImageModel, settings: ClassifierSettings, num_classes: int, seed: int) -> None:
        super().__init__()
        self.encoder = model
        self.frozen = settings.protocol == "linear_mae"
        self.num_classes = num_classes
        self.crop_pct = settings.crop_pct
        feature = settings.feature(model)
        trained_norm = not self.frozen and feature.norm == "fresh"
        self.feature = feature._replace(norm="off") if trained_norm else feature
        image = _black_image(model)
        with torch.no_grad():
            dim = feature_vectors(model, image, self.feature)[0].shape[1]
        first: nn.Module = nn.Identity()
        if self.frozen:
            first = nn.BatchNorm1d(dim, affine=False, eps=_EPS)
        elif trained_norm:
            first = nn.LayerNorm(dim, eps=_EPS)
        with torch.random.fork_rng(devices=[]):  # a layer's own initialization samples from the global state
            linear = nn.Linear(dim, num_classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            # timm's trunc_normal_ cuts at an absolute 2, far outside: a plain normal.
            linear.weight.normal_(0, 0.01 if self.frozen else 2e-5, generator=generator)
            linear.bias.zero_()
        self.head = nn.Sequential(first, linear).to(image.device)
        if self.frozen:
            for parameter in model.parameters():
                parameter.requires_grad = False

    def train(self, mode: bool = True) -> Classifier:
        """Training mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Shapes:
            images: batch channels height width
            returns: batch num_classes
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            (vectors,) = feature_vectors(self.encoder, images, self.feature)
        return self.head(vectors)  # type: ignore[no-any-return]


def build_classifier(
    model: MaskedImageModel, settings: ClassifierSettings, num_classes: int, *, seed: int = 0
) -> Classifier:
    """A classifier on a copy of a model, with drop path, in which nothing learns that no logit depends on.

    A position bias that all blocks share becomes one per block, and a sin-cos table learns unless it is to be frozen.
    """
    model = copy.deepcopy(model)
    try:
        blocks = model.encoder_blocks()
    except ValueError as error:
        raise DataError(str(error)) from None
    if settings.protocol == "finetune":
        if isinstance(model, InpaintingViT) and model.config.position_bias == "shared":
            model.config = replace(model.config, position_bias="per_block")
            model.position_biases = nn.ModuleList(copy.deepcopy(model.position_biases[0]) for _ in blocks)
        for number, block in enumerate(blocks):
            rate = settings.drop_path * number / max(len(blocks) - 1, 1)
            for module in block.modules():
                for name in ("drop_path1", "drop_path2"):
                    if hasattr(module, name):
                        setattr(module, name, DropPath(rate) if rate else nn.Identity())
        for name, parameter in model.named_parameters():
            if name == "pos_embed":
                parameter.requires_grad = not settings.freeze_positions
    model.eval()  # drop path would sample random numbers below
    classifier = Classifier(model, settings, num_classes, seed)
    _freeze_unused(classifier)
    return classifier


def _black_image(model: MaskedImageModel) -> Tensor:
    """Zeros for an image, to try the model out.

    Shapes:
        returns: 1 channels height width
    """
    like = next(model.parameters())
    return like.new_zeros(1, model.info.channels, *height_and_width(model.info.image_size))


def _freeze_unused(classifier: Classifier) -> None:
    """Decoders and mask tokens do not learn; found by asking which parameters the logits depend on."""
    if classifier.frozen:
        return
    mode = classifier.training
    learning = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        logits = classifier.eval()(_black_image(classifier.encoder))
        gradients = torch.autograd.grad(logits.sum(), learning, allow_unused=True)
    for parameter, gradient in zip(learning, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad = False
    classifier.train(mode)


def layer_of(classifier: Classifier, name: str) -> int:
    """Where a parameter stands in the order of layers: 0 for embeddings, l for block l, depth + 1 for what follows.

    Source:
        Clark et al., "ELECTRA" (ICLR 2020); facebookresearch/mae ``util/lr_decay.py``; microsoft/SimMIM
        ``optimizer.py``, whose Swin puts what merges patches with the last block before it.
    """
    encoder = classifier.encoder
    blocks = encoder.encoder_blocks()
    last: int = len(blocks) + 1
    parameter = classifier.get_parameter(name)
    for number, block in enumerate(blocks, start=1):
        if any(parameter is own for own in block.parameters()):
            return number
    for number, bias in enumerate(getattr(encoder, "position_biases", ()), start=1):
        if any(parameter is own for own in bias.parameters()):
            return number if len(encoder.position_biases) > 1 else last  # type: ignore[arg-type]
    passed: int = 0
    for merge, depth in zip(getattr(encoder, "merges", ()), getattr(encoder.config, "depths", ()), strict=False):
        passed += depth
        if any(parameter is own for own in merge.parameters()):
            return passed
    if name.startswith(("head.", "encoder.norm.")):
        return last
    return 0


def build_optimizer(classifier: Classifier, settings: ClassifierSettings) -> torch.optim.Optimizer:
    """LARS for the linear probe, AdamW with layer-wise rates for fine-tuning; a group's ``lr_scale`` is on its rate.

    MAE's LARS adapts the rate of weights and not of biases, with or without weight decay.
    """
    named = [(name, parameter) for name, parameter in classifier.named_parameters() if parameter.requires_grad]
    groups: dict[Any, dict[str, Any]] = {}
    if classifier.frozen:
        for _, parameter in named:
            vector = parameter.ndim == 1
            group = {"params": [], "lr_scale": 1.0, "always_adapt": not vector}
            group["weight_decay"] = 0.0 if vector else settings.weight_decay
            groups.setdefault(vector, group)["params"].append(parameter)
        return Lars(list(groups.values()), lr=settings.learning_rate, momentum=settings.momentum)
    depth = len(classifier.encoder.encoder_blocks())
    for name, parameter in named:
        layer = layer_of(classifier, name)
        plain = parameter.ndim == 1 or name.endswith(".bias") or any(part in name for part in settings.undecayed)
        scale = settings.layer_decay ** (depth + 1 - layer)
        group = {"params": [], "lr_scale": scale, "weight_decay": 0.0 if plain else settings.weight_decay}
        groups.setdefault((layer, plain), group)["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=settings.learning_rate, betas=settings.betas)
