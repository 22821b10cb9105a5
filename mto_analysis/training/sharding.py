"""Weights, gradients and optimizer state shared out over the processes (FSDP), for models too large for one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mto_analysis.training.blocks import transformer_blocks_of


def shard(method: nn.Module, device: torch.device) -> None:
    """Share a method's weights out, each block by itself and the rest together; in place, names stay."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError("fsdp shares weights over processes: start several with torchrun or accelerate launch")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in transformer_blocks_of(method):
        fully_shard(block, mesh=mesh)
    fully_shard(method, mesh=mesh)


def synchronize(method: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass adds the gradients of all processes."""
    method.set_requires_gradient_sync(wanted)  # type: ignore[operator]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a share."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's share, or the tensor itself."""
    share: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return share


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together from all shares; a collective call."""
    joined: Tensor = getattr(tensor, "full_tensor", lambda: tensor)()
    return joined


def whole_state(
    method: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """State of model and optimizer, put together on the main process's CPU where it is sharded."""
    if not sharded:
        return method.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(method, optimizer, options=options)


def load_whole_state(
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    model_state: Mapping[str, Any],
    optimizer_state: Mapping[str, Any],
    *,
    sharded: bool,
) -> None:
    """The reverse; every process gives the whole state."""
    if not sharded:
        method.load_state_dict(model_state)
        optimizer.load_state_dict(dict(optimizer_state))
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_state_dict(
        method,
        optimizer,
        model_state_dict=dict(model_state),
        optim_state_dict=dict(optimizer_state),
        options=options,
    )
