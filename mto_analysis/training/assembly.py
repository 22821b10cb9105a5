"""What a run trains, put together on every process: model, teachers, optimizer, MTO; how it is saved and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mto_analysis.checkpoints.publishing import published_facts, published_state
from mto_analysis.errors import CheckpointError
from mto_analysis.images import TrainBatch
from mto_analysis.models import MaskedImageModel
from mto_analysis.mto import attach_mto
from mto_analysis.runtime.group import Group
from mto_analysis.training import sharding
from mto_analysis.training.blocks import choose_attention, prepare_blocks
from mto_analysis.training.methods import Method, build_method
from mto_analysis.training.optimization import parameter_groups
from mto_analysis.training.randomness import noise_batch, step_randomness

if TYPE_CHECKING:
    from mto_analysis.training.recipes import Recipe
    from mto_analysis.training.settings import RunSettings

__all__ = ["Assembly", "build_optimizer"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Assembly:
    """The model with its teachers, optimizer, loss scaling, moving average and MTO, on this process.

    Args:
        recipe: The method's settings.
        settings: The run's.
        group: The processes of the run.
        steps_per_epoch: Optimizer steps.
        micro_batch: Images in a forward of one process.
    """

    def __init__(
        self, recipe: Recipe, settings: RunSettings, group: Group, steps_per_epoch: int, micro_batch: int
    ) -> None:
        self.recipe, self.settings, self.group = recipe, settings, group
        self.steps_per_epoch, self.total = steps_per_epoch, steps_per_epoch * recipe.epochs
        device = group.device
        self.method = build_method(recipe, seed=settings.seed).to(device).train()
        self.ema: Any = None
        if settings.ema is not None:
            from timm.utils.model_ema import ModelEmaV3

            self.ema = ModelEmaV3(self.method.student, decay=settings.ema)
        choose_attention(self.method, device, settings.precision)
        # MTO finds masked tokens by structure: before compiling, after copies (teachers, EMA) were made.
        self.mto = None if settings.mto is None else attach_mto(self.method.student, settings.mto)
        prepare_blocks(self.method.student, compiled=settings.compile, checkpointing=settings.gradient_checkpointing)
        if settings.fsdp:
            sharding.shard(self.method, device)
            self.wrapped: nn.Module = self.method
        else:
            self.wrapped = self.method if group.count == 1 else self._parallel(micro_batch)
        self.optimizer = build_optimizer(self.method, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self._whole: Method | None = None
        self.trained = [each for group in self.optimizer.param_groups for each in group["params"]]

    def _parallel(self, micro_batch: int) -> nn.Module:
        """The method on all processes, after a backward pass on noise.

        In its second forward torch puts the gradients that it adds up into another order, on which the last bit of a
        sum over more than two processes depends. With that behind it, a resumed run adds as the first one did.
        """
        batch = noise_batch(self.recipe, micro_batch, self.group.device)
        buffers = {name: buffer.clone() for name, buffer in self.method.named_buffers()}
        self.wrapped = self.method
        with step_randomness(self.settings.seed, -1, self.group.index, self.group.device), warnings.catch_warnings():
            # Of a 1 x 1 convolution (SimMIM's head), whose gradient may be laid out either way.
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            torch.stack([term.float() for term in self.losses(batch).values()]).sum().backward()  # type: ignore[no-untyped-call]
            unused = any(each.requires_grad and each.grad is None for each in self.method.parameters())
            self.wrapped = self.group.parallel(self.method, unused=unused)
            if not unused:
                torch.stack([term.float() for term in self.losses(batch).values()]).sum().backward()  # type: ignore[no-untyped-call]
        self.method.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in self.method.named_buffers():
                buffer.copy_(buffers[name])
        return self.wrapped

    def finite(self) -> bool:
        """Whether all weights are finite; a collective call where they are sharded."""
        norms = torch._foreach_norm([sharding.local(each.detach()) for each in self.trained])
        good = torch.isfinite(torch.stack(list(norms)).sum()).float()
        return bool(self.group.mean(good) == 1)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on; a collective call where weights are sharded."""
        model, optimizer = sharding.whole_state(self.method, self.optimizer, sharded=self.settings.fsdp)
        return {
            "method": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
        }

    def whole_student(self) -> MaskedImageModel | None:
        """The trained model with all its weights; ``None`` on processes that have only a share and need not write.

        A collective call where weights are sharded.
        """
        if not self.settings.fsdp:
            return self.method.student if self.group.main else None
        whole = self._whole_method(self.state())
        return None if whole is None else whole.student

    def _whole_method(self, state: Mapping[str, Any]) -> Method | None:
        """The method as a state has it, whole, on the process that writes."""
        if not self.group.main:
            return None
        if not self.settings.fsdp:
            return self.method
        if self._whole is None:
            self._whole = build_method(self.recipe, seed=self.settings.seed)
        self._whole.load_state_dict(state["method"])
        return self._whole

    def published(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a checkpoint holds in the layout of the original method; ``None`` on processes that do not write.

        Args:
            state: From :meth:`state`.
        """
        whole = self._whole_method(state)
        if whole is None:
            return None
        content: dict[str, Any] = {"model": published_state(whole.student), **published_facts(whole.student)}
        teacher = whole.teacher_state()
        if teacher is not None:
            content["model_ema"] = teacher  # the originals' name for it
        if self.ema is not None:
            content["model_average"] = published_state(self.ema.module)
        return content

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        """The terms of a batch, as a step computes them."""
        dtype = _DTYPES.get(self.settings.precision)
        with torch.autocast(self.group.device.type, dtype, enabled=dtype is not None):
            terms: dict[str, Tensor] = self.wrapped(batch.images, batch.mask, batch.second_images)
        return terms if self.mto is None else {**terms, "mto": self.mto.loss()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: If it is of another model.
        """
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


def build_optimizer(method: Method, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with the method's parameter groups, fused into one kernel where torch has it."""
    groups = parameter_groups(method, recipe)
    devices = {each.device.type for each in method.parameters()}
    fused = devices <= {"cpu", "cuda"} and not any(sharding.is_sharded(each) for each in method.parameters())
    return torch.optim.AdamW(groups, lr=recipe.base_lr, betas=recipe.betas, fused=fused)
