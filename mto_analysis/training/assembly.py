"""What a run trains, put together on every process: model, teachers, optimizer, MTO; how it is saved and loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from mto_analysis.errors import CheckpointError
from mto_analysis.mto import attach_mto
from mto_analysis.runtime.precision import DTYPES
from mto_analysis.runtime.processes import Processes
from mto_analysis.training import sharding
from mto_analysis.training.blocks import choose_attention, prepare_blocks
from mto_analysis.training.objective import Batch, Objective
from mto_analysis.training.randomness import step_randomness
from mto_analysis.training.settings import RunSettings


def total_loss(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of all terms in float32."""
    return torch.stack([term.float() for term in terms.values()]).sum()


class Assembly:
    """The model with its teachers, optimizer, loss scaling, moving average and MTO, on this process."""

    def __init__(
        self, method: Objective, settings: RunSettings, processes: Processes, steps_per_epoch: int, micro_batch: int
    ) -> None:
        self.settings, self.processes = settings, processes
        self.steps_per_epoch, self.total = steps_per_epoch, steps_per_epoch * method.settings.epochs
        device = processes.device
        # Of sharded weights the process that writes puts the whole together in a copy.
        self._whole = copy.deepcopy(method) if settings.fsdp and processes.main else method
        self.method = method.to(device).train()
        self.ema: Any = None
        if settings.ema is not None:
            self.ema = ModelEmaV3(self.method.student, decay=settings.ema)
        choose_attention(self.method, device, settings.precision)
        # MTO finds masked tokens by structure: before compiling, after copies (teachers, EMA) were made.
        self.mto = None if settings.mto is None else attach_mto(self.method.student, settings.mto)
        prepare_blocks(self.method.student, compiled=settings.compile, checkpointing=settings.gradient_checkpointing)
        if settings.fsdp:
            processes.connect()
            sharding.shard(self.method, device)
            self.wrapped: nn.Module = self.method
        else:
            self.wrapped = self.method if processes.count == 1 else self._parallel(micro_batch)
        self.optimizer = self.method.optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.trained = [each for group in self.optimizer.param_groups for each in group["params"]]

    def _parallel(self, micro_batch: int) -> nn.Module:
        """The method on all processes, after a backward pass on noise.

        In its second forward torch puts the gradients that it adds up into another order, on which the last bit of a
        sum over more than two processes depends. With that behind it, a resumed run adds as the first one did.
        """
        batch = self.method.noise(micro_batch, self.processes.device)
        buffers = {name: buffer.clone() for name, buffer in self.method.named_buffers()}
        self.wrapped = self.method
        with (
            step_randomness(self.settings.seed, -1, self.processes.rank, self.processes.device),
            warnings.catch_warnings(),
        ):
            # Of a 1 x 1 convolution (SimMIM's head), whose gradient may be laid out either way.
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            total_loss(self.losses(batch)).backward()  # type: ignore[no-untyped-call]
            unused = any(each.requires_grad and each.grad is None for each in self.method.parameters())
            self.wrapped = self.processes.parallel(self.method, unused=unused)
            if not unused:
                total_loss(self.losses(batch)).backward()  # type: ignore[no-untyped-call]
        self.method.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in self.method.named_buffers():
                buffer.copy_(buffers[name])
        return self.wrapped

    def finite(self) -> bool:
        """Whether all weights are finite; a collective call where they are sharded."""
        norms = torch._foreach_norm([sharding.local(each.detach()) for each in self.trained])
        good = torch.isfinite(torch.stack(list(norms)).sum()).float()
        return bool(self.processes.mean(good) == 1)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on; a collective call where weights are sharded."""
        model, optimizer = sharding.whole_state(self.method, self.optimizer, sharded=self.settings.fsdp)
        return {
            "method": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
        }

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Look at the model inside: modes and random state are afterwards as before."""
        training = self.method.training
        devices = [self.processes.device] if self.processes.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield
        self.method.train(training)

    def whole_probed(self) -> Any:
        """The model to evaluate with all its weights; ``None`` on processes that have only a share and need not write.

        A collective call where weights are sharded.
        """
        whole = self._whole_method(self.state() if self.settings.fsdp else {})
        return None if whole is None else whole.probed

    def _whole_method(self, state: Mapping[str, Any]) -> Objective | None:
        """The method as a state has it, whole, on the process that writes."""
        if not self.processes.main:
            return None
        if self.settings.fsdp:
            self._whole.load_state_dict(state["method"])
        return self._whole

    def published(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a checkpoint holds for others, by the method; ``None`` on processes that do not write."""
        whole = self._whole_method(state)
        return None if whole is None else whole.published(None if self.ema is None else self.ema.module)

    def autocast(self) -> torch.autocast:
        """The number format of the forward."""
        half = self.settings.precision != "fp32"
        dtype = DTYPES[self.settings.precision] if half else None
        return torch.autocast(self.processes.device.type, dtype, enabled=half)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of a batch, as a step computes them."""
        with self.autocast():
            terms: dict[str, Tensor] = self.wrapped(*batch.inputs)
        return terms if self.mto is None else {**terms, "mto": self.mto.loss()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        try:
            sharding.load_whole_state(
                self.method, self.optimizer, state["method"], state["optimizer"], sharded=self.settings.fsdp
            )
            self.scaler.load_state_dict(dict(state["scaler"]))
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
        except (KeyError, RuntimeError, ValueError) as error:
            line = " ".join(str(error).split())[:200]
            raise CheckpointError(f"last.pth does not fit this run's model and optimizer ({line})") from error
