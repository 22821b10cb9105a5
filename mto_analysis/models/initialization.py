"""Random weights as training begins with them: what a model's curve looks like before it has learned anything."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mto_analysis.models.interface import MaskedImageModel

__all__ = ["initialization_of", "mask_token_names", "random_weights", "with_mask_token"]

_STD = 0.02

_Draw = Callable[[torch.Size], Tensor]


def initialization_of(model: MaskedImageModel) -> str:
    """In words, how :func:`random_weights` draws the weights of a model's family."""
    if model.info.family == "mae":
        return "MAE's: xavier-uniform linear layers and patch embedding, tokens normal with deviation 0.02"
    if model.info.family == "simmim_vit":
        return "SimMIM's: normal with deviation 0.02, cut off there; branch outputs / sqrt(2 x block)"
    return "normal with deviation 0.02, cut off at two deviations (the family's own is not known here)"


def random_weights(model: MaskedImageModel, seed: int) -> MaskedImageModel:
    """A copy of a model with the weights its pre-training starts from; fixed position tables and buffers stay.

    MAE's and SimMIM's own initialisation; other families get truncated normals of deviation 0.02. The global random
    state is not touched.

    Args:
        model: The architecture.
        seed: Of the weights; drawn on the CPU, so equal on every device.

    Source:
        facebookresearch/mae, microsoft/SimMIM.
    """
    fresh = copy.deepcopy(model)
    mae = model.info.family == "mae"
    # SimMIM's ViT cuts tokens and layers off at one deviation.
    cut = 1.0 if model.info.family == "simmim_vit" else 2.0
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> Tensor:
        return torch.empty(shape).normal_(0, _STD, generator=generator)

    def truncated(shape: torch.Size) -> Tensor:
        # By the inverse of the normal distribution function, from a uniform number between the two cuts.
        low = 0.5 * (1 + math.erf(-cut / math.sqrt(2)))
        uniform = torch.empty(shape, dtype=torch.float64).uniform_(2 * low - 1, 1 - 2 * low, generator=generator)
        return (torch.erfinv(uniform) * (_STD * math.sqrt(2))).float()

    def xavier(shape: torch.Size) -> Tensor:
        fan_out, fan_in = shape[0], math.prod(shape[1:])
        bound = math.sqrt(6 / (fan_in + fan_out))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    layer, token = (xavier, normal) if mae else (truncated, truncated)
    with torch.no_grad():
        for module in fresh.modules():
            own = dict(module.named_parameters(recurse=False))
            for name, parameter in own.items():
                if not parameter.requires_grad:
                    continue
                parameter.copy_(_drawn(module, name, parameter, layer, token))
        if model.info.family == "simmim_vit":
            for stack in fresh.stacks:
                for number, block in enumerate(fresh.stack_blocks(stack), start=1):
                    for weight in (block.attn.proj.weight, block.mlp.fc2.weight):  # type: ignore[union-attr]
                        weight.div_(math.sqrt(2.0 * number))  # type: ignore[operator]
    return fresh


def _drawn(module: nn.Module, name: str, parameter: Tensor, layer: _Draw, token: _Draw) -> Tensor:
    """What a parameter starts from, by the module it belongs to."""
    if isinstance(module, nn.LayerNorm):
        return torch.ones_like(parameter) if name == "weight" else torch.zeros_like(parameter)
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return layer(parameter.shape) if name == "weight" else torch.zeros_like(parameter)
    if name == "gamma":  # layer scale: as it was set for the architecture
        return torch.full_like(parameter, float(getattr(module, "init_values", 0.1)))
    if "bias_table" in name:
        return torch.zeros_like(parameter)
    return token(parameter.shape)


def mask_token_names(model: MaskedImageModel) -> list[str]:
    """Names of the parameters that are mask tokens."""
    return [name for name, _ in model.named_parameters() if "mask_token" in name]


def with_mask_token(model: MaskedImageModel, seed: int | None) -> MaskedImageModel:
    """A copy of a model whose mask token is a random vector of the same norm, or zero.

    Args:
        model: Trained; all but the mask token stays.
        seed: Of the direction; ``None`` for zero.
    """
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        for name in mask_token_names(model):
            parameter = changed.get_parameter(name)
            if seed is None:
                parameter.zero_()
            else:
                direction = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.copy_(direction * (parameter.norm() / direction.norm()))
    return changed
