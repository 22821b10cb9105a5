"""Models adapted without a change of their weights: dropped branches, key biases that stay zero, other head counts."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

from mto_analysis.models.attention import CrossAttention
from mto_analysis.models.interface import MaskedImageModel


def with_config(model: MaskedImageModel, config: Any) -> MaskedImageModel:
    """The same weights in an architecture whose shapes are the same, such as one of other numbers of heads."""
    with torch.device("meta"):
        changed = type(model)(config, model.info)
    changed.load_state_dict(model.state_dict(), strict=True, assign=True)
    like = next(model.parameters())
    return changed.to(like.device, like.dtype).eval()


def set_drop_path(model: MaskedImageModel, rate: float) -> None:
    """Drop branches of an image at random in training mode: not in the first block, at ``rate`` in the last.

    Args:
        model: With ``blocks`` of timm; changed in place.
        rate: Probability in the last block, between 0 and 1.
    """
    blocks = model.get_submodule("blocks")
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(f"a {model.info.family} model has no blocks whose branches can be dropped")
    for block, probability in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for name in ("drop_path1", "drop_path2"):
            branch = DropPath(probability) if probability > 0 else nn.Identity()
            setattr(block, name, branch.train(block.training))


def fix_key_biases(model: nn.Module) -> None:
    """Keep the biases of keys at zero in training, for models of the BEiT code base, whose files have none.

    A key bias shifts all logits of a query alike, so its gradient is zero but for rounding, which the optimizer would
    blow up to full steps.

    Args:
        model: Changed in place; names and shapes of its weights stay.
    """
    for module in list(model.modules()):
        qkv = getattr(module, "qkv", None)
        if isinstance(qkv, nn.Linear) and qkv.bias is not None and not isinstance(qkv, _WithoutKeyBias):
            module.qkv = _WithoutKeyBias(qkv)
        if isinstance(module, CrossAttention):
            module.k.bias.requires_grad_(False)


class _WithoutKeyBias(nn.Linear):
    """Query, key and value from one matrix; the key's third of the bias has no effect and no gradient."""

    keep: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        third = linear.out_features // 3
        keep = torch.ones(linear.out_features, device=linear.weight.device)
        keep[third : 2 * third] = 0
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """The linear map."""
        return F.linear(input, self.weight, self.bias * self.keep)
