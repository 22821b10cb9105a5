"""Random weights as training begins with them: what a model's curve looks like before it has learned anything."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mto_analysis.models.interface import MaskedImageModel
from mto_analysis.models.live import LiveModel

_STD = 0.02

#: Families of the BEiT code base: their own deviation cuts everything off, and branches shrink with the block.
_BEIT_CODE = ("simmim_vit", "conmim", "beit")


def initialization_of(model: MaskedImageModel) -> str:
    """In words, how :func:`random_weights` samples the weights of a model's family."""
    family = model.info.family
    if isinstance(model, LiveModel):
        return "its factory starts them"
    if family == "mae":
        return "MAE's: xavier-uniform linear layers and patch embedding, tokens normal with deviation 0.02"
    if family == "bootmae":
        return "BootMAE's: xavier-uniform layers, mask tokens normal with deviation 0.02, cut off there"
    if family in _BEIT_CODE:
        name = {"simmim_vit": "SimMIM", "conmim": "ConMIM", "beit": "BEiT"}[family]
        return f"{name}'s: normal with deviation 0.02, cut off there; branch outputs / sqrt(2 x block)"
    return "normal with deviation 0.02, cut off at two deviations (the family's own is not known here)"


def random_weights(model: MaskedImageModel, seed: int) -> MaskedImageModel:
    """A copy of a model with the weights its pre-training starts from; fixed position tables and buffers stay."""
    if isinstance(model, LiveModel):
        return model.with_new_weights(seed)
    fresh = copy.deepcopy(model)
    initialize(fresh, seed)
    return fresh


@torch.no_grad()
def initialize(model: MaskedImageModel, seed: int) -> None:
    """Give a model the weights its pre-training starts from; what does not train, such as position tables, stays.

    The own initialization of MAE, SimMIM's ViT, BootMAE, ConMIM and BEiT; other families get truncated normals of
    deviation 0.02. The global random state is not touched.

    Args:
        model: Changed in place.
        seed: Of the weights; sampled on the CPU, so equal on every device.

    Source:
        facebookresearch/mae, microsoft/SimMIM, LightDXY/BootMAE, TencentARC/ConMIM, microsoft/unilm. Layers that their
        own rules leave out (MAE's patch embedding's bias, SimMIM's and BootMAE's pixel heads) start as PyTorch's do.
    """
    family = model.info.family
    sampler = _Sampler(torch.Generator().manual_seed(seed))
    sample = {"mae": _sample_mae, "bootmae": _sample_bootmae}.get(
        family, _sample_beit if family in _BEIT_CODE else _sample_other
    )
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                value = _constant(module, name, parameter)
                parameter.copy_(sample(sampler, path, module, name, parameter.shape) if value is None else value)
    if family in _BEIT_CODE:
        for stack in model.stacks:
            for number, block in enumerate(model.stack_blocks(stack), start=1):
                for weight in (block.attn.proj.weight, block.mlp.fc2.weight):  # type: ignore[union-attr]
                    weight.div_(math.sqrt(2.0 * number))  # type: ignore[operator]


class _Sampler:
    """Random tensors, all from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def normal(self, shape: torch.Size, std: float = _STD) -> Tensor:
        return torch.empty(shape).normal_(0, std, generator=self.generator)

    def truncated(self, shape: torch.Size, cut: float) -> Tensor:
        """Normal, cut off at so many deviations: the inverse of its distribution function, between the two cuts."""
        low = 0.5 * (1 + math.erf(-cut / math.sqrt(2)))
        uniform = torch.empty(shape, dtype=torch.float64).uniform_(2 * low - 1, 1 - 2 * low, generator=self.generator)
        return (torch.erfinv(uniform) * (_STD * math.sqrt(2))).float()

    def uniform(self, shape: torch.Size, bound: float) -> Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=self.generator)

    def xavier(self, shape: torch.Size, fans: int | None = None) -> Tensor:
        """Uniform in a bound from the sum of inputs and outputs."""
        return self.uniform(shape, math.sqrt(6 / (fans or shape[0] + math.prod(shape[1:]))))

    def as_torch(self, shape: torch.Size, module: nn.Module) -> Tensor:
        """As PyTorch starts a convolution, weight or bias: uniform in 1 / sqrt(fan in)."""
        return self.uniform(shape, 1 / math.sqrt(math.prod(module.get_parameter("weight").shape[1:])))


_Draw = Callable[[_Sampler, str, nn.Module, str, torch.Size], Tensor]


def _constant(module: nn.Module, name: str, parameter: Tensor) -> Tensor | None:
    """What starts from the same value in every family."""
    if isinstance(module, (nn.LayerNorm, nn.BatchNorm1d)):
        return torch.ones_like(parameter) if name == "weight" else torch.zeros_like(parameter)
    if isinstance(module, nn.Linear) and name == "bias":
        return torch.zeros_like(parameter)
    if name == "gamma":  # layer scale: as it was set for the architecture
        return torch.full_like(parameter, float(getattr(module, "init_values", 0.1)))
    return torch.zeros_like(parameter) if "bias_table" in name else None


def _sample_mae(sampler: _Sampler, path: str, module: nn.Module, name: str, shape: torch.Size) -> Tensor:
    if isinstance(module, nn.Conv2d) and name == "bias":
        return sampler.as_torch(shape, module)
    return sampler.xavier(shape) if isinstance(module, (nn.Linear, nn.Conv2d)) else sampler.normal(shape)


def _sample_beit(sampler: _Sampler, path: str, module: nn.Module, name: str, shape: torch.Size) -> Tensor:
    if isinstance(module, nn.Conv2d) and path == "decoder":
        return sampler.as_torch(shape, module)
    if isinstance(module, nn.Conv2d) and name == "bias":
        return torch.zeros(shape)
    return sampler.truncated(shape, cut=1.0)


def _sample_bootmae(sampler: _Sampler, path: str, module: nn.Module, name: str, shape: torch.Size) -> Tensor:
    if isinstance(module, nn.ConvTranspose2d):
        return sampler.as_torch(shape, module)
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        if name == "bias":
            return torch.zeros(shape)
        # Query, key and value count apart in self-attention; key and value together where others are attended to.
        if path.endswith(".attn.qkv"):
            return sampler.xavier(shape, shape[0] // 3 + shape[1])
        if path.endswith((".c_attn.k", ".c_attn.v")):
            return sampler.xavier(shape, 2 * shape[0] + shape[1])
        return sampler.xavier(shape)
    return sampler.normal(shape, std=1e-6) if name == "cls_token" else sampler.truncated(shape, cut=1.0)


def _sample_other(sampler: _Sampler, path: str, module: nn.Module, name: str, shape: torch.Size) -> Tensor:
    if isinstance(module, nn.Conv2d) and name == "bias":
        return torch.zeros(shape)
    return sampler.truncated(shape, cut=2.0)


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
