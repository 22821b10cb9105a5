"""How the transformer blocks of a model in training run: compiled, checkpointed, and with the faster attention."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_RECOMPILE_LIMIT = 64


def transformer_blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of every stack: members of a list of modules that have an attention or an MLP."""
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for block in module:
                if hasattr(block, "attn") or hasattr(block, "mlp"):
                    yield block


def choose_attention(model: nn.Module, device: torch.device, precision: str) -> None:
    """On the CPU in half precision explicit attention is faster than torch's fused one (2.5 times), else slower."""
    for module in model.modules():
        if hasattr(module, "fused_attn") and device.type == "cpu" and precision != "fp32":
            module.fused_attn = False  # type: ignore[assignment]


def prepare_blocks(model: nn.Module, *, compiled: bool, checkpointing: bool) -> None:
    """Compile the blocks, recompute them in the backward pass, or both; where gradients are off they run as before.

    Only a block's ``forward`` is replaced, not the call: hooks stay outside, so they see each block once per forward,
    and tokens that have gradients. Names of weights stay too, and copies of the model are whole.
    """
    run: Callable[..., Any] = _plain
    if compiled:
        from torch._dynamo import config

        # Blocks differ in the rate of drop path, and each rate is compiled once.
        config.recompile_limit = max(config.recompile_limit, _RECOMPILE_LIMIT)
        run = torch.compile(_plain, dynamic=False)
    if not (compiled or checkpointing):
        return

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return _plain(block, *args, **kwargs)
        if checkpointing:
            return checkpoint(run, block, *args, use_reentrant=False, **kwargs)
        return run(block, *args, **kwargs)

    for block in transformer_blocks_of(model):
        # A bound method: a copy of the block runs the copy's weights.
        block.forward = types.MethodType(forward, block)


def _plain(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)
