"""One optimizer step: learning rate, micro-batches, one backward pass each on the sum of all losses, teachers, EMA."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mto_analysis.checkpoints.publishing import published_facts, published_state
from mto_analysis.data import TrainBatch
from mto_analysis.errors import CheckpointError
from mto_analysis.masking import mask_keys
from mto_analysis.models import MaskedImageModel
from mto_analysis.pretraining import sharding
from mto_analysis.pretraining.blocks import choose_attention, prepare_blocks
from mto_analysis.pretraining.group import Group
from mto_analysis.pretraining.methods import Method, build_method
from mto_analysis.pretraining.optimization import learning_rate, parameter_groups
from mto_analysis.training import attach_mto, watch_mto

if TYPE_CHECKING:
    from mto_analysis.pretraining.recipes import Recipe
    from mto_analysis.pretraining.settings import RunSettings

__all__ = ["StepResult", "Stepper", "build_optimizer", "noise_batch", "step_randomness"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class StepResult(NamedTuple):
    """What a step gave; tensors stay on the device, so that nothing waits for it.

    Attributes:
        losses: Each weighted term, mean over the micro-batches of this process.
        learning_rate: That was used.
        grad_norm: Before clipping, where it was asked for or needed.
        measured: H by layer, and the terms of MTO, of the last micro-batch of a watched step.
    """

    losses: dict[str, Tensor]
    learning_rate: float
    grad_norm: Tensor | None
    measured: dict[str, float]


class Stepper:
    """The model with its teachers, optimizer, loss scaling, moving average and MTO, and how they take a step.

    Args:
        recipe: The method's settings.
        settings: The run's.
        group: The processes of the run.
        steps_per_epoch: Optimizer steps.
        micro_batch: Pictures in a forward of one process.
    """

    def __init__(
        self, recipe: Recipe, settings: RunSettings, group: Group, steps_per_epoch: int, micro_batch: int
    ) -> None:
        self._recipe, self._settings, self._group = recipe, settings, group
        self._steps_per_epoch, self._total = steps_per_epoch, steps_per_epoch * recipe.epochs
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
            self._wrapped: nn.Module = self.method
        else:
            self._wrapped = self.method if group.count == 1 else self._parallel(micro_batch)
        self.optimizer = build_optimizer(self.method, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self._whole: MaskedImageModel | None = None
        self._trained = [each for group in self.optimizer.param_groups for each in group["params"]]

    def _parallel(self, micro_batch: int) -> nn.Module:
        """The method on all processes, after a backward pass on noise.

        In its second forward torch puts the gradients that it adds up into another order, on which the last bit of a
        sum over more than two processes depends. With that behind it, a resumed run adds as the first one did.
        """
        batch = noise_batch(self._recipe, micro_batch, self._group.device)
        buffers = {name: buffer.clone() for name, buffer in self.method.named_buffers()}
        self._wrapped = self.method
        with step_randomness(self._settings.seed, -1, self._group.index, self._group.device), warnings.catch_warnings():
            # Of a 1 x 1 convolution (SimMIM's head), whose gradient may be laid out either way.
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            torch.stack([term.float() for term in self.losses(batch).values()]).sum().backward()  # type: ignore[no-untyped-call]
            unused = any(each.requires_grad and each.grad is None for each in self.method.parameters())
            self._wrapped = self._group.parallel(self.method, unused=unused)
            if not unused:
                torch.stack([term.float() for term in self.losses(batch).values()]).sum().backward()  # type: ignore[no-untyped-call]
        self.method.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in self.method.named_buffers():
                buffer.copy_(buffers[name])
        return self._wrapped

    def step(self, batches: Iterator[TrainBatch], step: int, *, watch: bool = False) -> StepResult:
        """Take one optimizer step.

        Args:
            batches: Gives this process's micro-batches.
            step: Optimizer steps taken before, over the whole run.
            watch: Also measure H of every layer, the terms of MTO and the norm of the gradient.
        """
        recipe, device = self._recipe, self._group.device
        count = self._settings.accumulation
        rate = learning_rate(recipe, step, self._steps_per_epoch, recipe.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        measured: dict[str, float] = {}
        with self._kernels(), step_randomness(self._settings.seed, step, self._group.index, device):
            for number in range(count):
                batch = next(batches)
                last = number == count - 1
                with self._synchronised(last), self._watched(watch and last, step, measured):
                    if self.mto is not None:
                        self.mto.step = step  # its warm-up counts optimizer steps
                    terms = self.losses(batch)
                    loss = torch.stack([term.float() for term in terms.values()]).sum()
                    self.scaler.scale(loss / count).backward()  # type: ignore[no-untyped-call]
                for name, term in terms.items():
                    part = term.detach().double() / count if device.type != "mps" else term.detach() / count
                    sums[name] = sums[name] + part if name in sums else part
        self.scaler.unscale_(self.optimizer)
        norm = self._clip(wanted=watch)
        if watch and self.mto is not None:
            measured |= _mto_terms(self.mto.terms)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.after_step((step + 1) / self._total)
        if self.ema is not None:
            self.ema.update(self.method.student, step=step)
        return StepResult(sums, rate, norm, measured)

    @property
    def _half(self) -> bool:
        return self._settings.precision != "no"

    @contextlib.contextmanager
    def _kernels(self) -> Iterator[None]:
        """Those whose sums have one order only, where that was asked for."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self._settings.deterministic or before)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients meet in the last backward pass of a step only."""
        if self._settings.fsdp:
            sharding.synchronise(self.method, last)
        elif not last and self._wrapped is not self.method:
            with self._wrapped.no_sync():  # type: ignore[operator]
                yield
            return
        yield

    @contextlib.contextmanager
    def _watched(self, wanted: bool, step: int, measured: dict[str, float]) -> Iterator[None]:
        """With H of every layer measured in the forward inside."""
        if not wanted:
            yield
            return
        watch = watch_mto(self.method.student, every=1)
        watch.step = step
        try:
            yield
        finally:
            watch.detach()
        if watch.records:
            measured |= {name: value for name, value in watch.records[-1].items() if "heterogeneity" in name}

    def _clip(self, *, wanted: bool) -> Tensor | None:
        most = self._recipe.clip_grad
        if most is None and not wanted:
            return None
        if most is None:
            norm = torch.nn.utils.get_total_norm([each.grad for each in self._trained if each.grad is not None])
        else:
            norm = torch.nn.utils.clip_grad_norm_(self._trained, most)
        return sharding.whole(norm.detach())

    def finite(self) -> bool:
        """Whether all weights are finite; a collective call where they are sharded."""
        norms = torch._foreach_norm([sharding.local(each.detach()) for each in self._trained])
        good = torch.isfinite(torch.stack(list(norms)).sum()).float()
        return bool(self._group.mean(good) == 1)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on; a collective call where weights are sharded."""
        model, optimizer = sharding.whole_state(self.method, self.optimizer, sharded=self._settings.fsdp)
        return {
            "method": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
        }

    def whole_student(self, state: Mapping[str, Any] | None = None) -> MaskedImageModel | None:
        """The trained model with all its weights; ``None`` on processes that have only a share and need not write.

        Args:
            state: From :meth:`state`, where it is at hand; else a collective call where weights are sharded.
        """
        if not self._settings.fsdp:
            return self.method.student if self._group.main else None
        weights = (self.state() if state is None else state)["method"]
        if not self._group.main:
            return None
        if self._whole is None:
            self._whole = build_method(self._recipe, seed=self._settings.seed).student
        names = {name: tensor for name, tensor in weights.items() if name.startswith("student.")}
        self._whole.load_state_dict({name.removeprefix("student."): tensor for name, tensor in names.items()})
        return self._whole

    def published(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a checkpoint holds in the layout of the original method; ``None`` on processes that do not write."""
        student = self.whole_student(state)
        if student is None:
            return None
        content: dict[str, Any] = {"model": published_state(student), **published_facts(student)}
        teacher = None if self._settings.fsdp else self.method.teacher_state()
        if teacher is not None:
            content["model_ema"] = teacher  # the originals' name for it
        if self.ema is not None:
            content["model_average"] = published_state(self.ema.module)
        return content

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        """The terms of a batch, as a step computes them."""
        with torch.autocast(self._group.device.type, _DTYPES.get(self._settings.precision), enabled=self._half):
            terms: dict[str, Tensor] = self._wrapped(batch.images, batch.mask, batch.second_images)
        return terms if self.mto is None else {**terms, "mto": self.mto.loss()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: If it is of another model.
        """
        try:
            sharding.load_whole_state(
                self.method, self.optimizer, state["method"], state["optimizer"], sharded=self._settings.fsdp
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


def noise_batch(recipe: Recipe, count: int, device: torch.device) -> TrainBatch:
    """Noise for pictures, with masks as the recipe draws them; to try things out."""
    side = recipe.image_size
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    names = tuple(map(str, range(count)))
    grid = (side // recipe.patch_size,) * 2
    mask = recipe.mask_rule.draw(mask_keys(names), grid, recipe.patch_size).to(device)
    return TrainBatch(names, images, images if recipe.second_view else None, mask)


def _mto_terms(terms: Mapping[str, float]) -> dict[str, float]:
    """Terms of MTO before weights, named so that they are not taken for others; H is measured for all runs alike."""
    named = {}
    for name, value in terms.items():
        stack, slash, term = name.rpartition("/")
        if term != "loss" and not term.startswith("heterogeneity"):
            named[f"{stack}{slash}{term if term.startswith('mask_token') else f'mto_{term}'}"] = value
    return named


@contextlib.contextmanager
def step_randomness(seed: int, step: int, process: int, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded for one step of one process (drop path), and afterwards as they were."""
    text = f"{seed}\x1f{step}\x1f{process}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(key)
        yield
