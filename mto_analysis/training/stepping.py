"""One optimizer step: learning rate, micro-batches, one backward pass each on the sum of all losses, teachers, EMA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mto_analysis.mto import watch_mto
from mto_analysis.runtime.precision import fast_float32
from mto_analysis.training import sharding
from mto_analysis.training.assembly import Assembly, total_loss
from mto_analysis.training.objective import Batch
from mto_analysis.training.randomness import step_randomness


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


class Stepper(Assembly):
    """What a run trains, and how it takes a step."""

    def step(self, batches: Iterator[Batch], step: int, *, watch: bool = False) -> StepResult:
        """Take one optimizer step.

        Args:
            batches: Gives this process's micro-batches.
            step: Optimizer steps taken before, over the whole run.
            watch: Also measure H of every layer, the terms of MTO and the norm of the gradient.
        """
        device = self.processes.device
        count = self.settings.accumulation
        rate = self.method.rate(step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        measured: dict[str, float] = {}
        with self._kernels(), self._products(), step_randomness(self.settings.seed, step, self.processes.rank, device):
            for number in range(count):
                batch = next(batches)
                last = number == count - 1
                clip = self.method.clips_micro_batches and not last
                with self._synchronized(last or clip), self._watched(watch and last, step, measured):
                    if self.mto is not None:
                        self.mto.step = step  # its warm-up counts optimizer steps
                    terms = self.losses(batch)
                    self.scaler.scale(total_loss(terms) / count).backward()  # type: ignore[no-untyped-call]
                if clip:  # gradients are still scaled
                    self._clip(wanted=False, scale=self.scaler.get_scale())
                for name, term in terms.items():
                    part = term.detach().double() / count if device.type != "mps" else term.detach() / count
                    sums[name] = sums[name] + part if name in sums else part
        self.scaler.unscale_(self.optimizer)
        norm = self._clip(wanted=watch)
        if watch and self.mto is not None:
            measured |= _mto_terms(self.mto.terms)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.after_step((step + 1) / self.total)
        if self.ema is not None:
            self.ema.update(self.method.student, step=step)
        return StepResult(sums, rate, norm, measured)

    @contextlib.contextmanager
    def _kernels(self) -> Iterator[None]:
        """Those whose sums have one order only, where that was asked for."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self.settings.deterministic or before)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)

    def _products(self) -> contextlib.AbstractContextManager[None]:
        """Float32 by the faster library; compiled code has chosen its own."""
        return contextlib.nullcontext() if self.settings.compile else fast_float32(self.processes.device.type)

    @contextlib.contextmanager
    def _synchronized(self, last: bool) -> Iterator[None]:
        """Gradients meet in the last backward pass of a step only."""
        if self.settings.fsdp:
            sharding.synchronize(self.method, last)
        elif not last and self.wrapped is not self.method:
            with self.wrapped.no_sync():  # type: ignore[operator]
                yield
            return
        yield

    @contextlib.contextmanager
    def _watched(self, wanted: bool, step: int, measured: dict[str, float]) -> Iterator[None]:
        """With H of every layer measured in the forward inside."""
        if not (wanted and self.method.masked):
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

    def _clip(self, *, wanted: bool, scale: float = 1.0) -> Tensor | None:
        most = self.method.settings.clip_grad
        if most is None and not wanted:
            return None
        if most is None:
            norm = torch.nn.utils.get_total_norm([each.grad for each in self.trained if each.grad is not None])
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.trained, most * scale)
        return sharding.whole(norm.detach())


def _mto_terms(terms: Mapping[str, float]) -> dict[str, float]:
    """Terms of MTO before weights, named so that they are not taken for others; H is measured for all runs alike."""
    named = {}
    for name, value in terms.items():
        stack, slash, term = name.rpartition("/")
        if term != "loss" and not term.startswith("heterogeneity"):
            named[f"{stack}{slash}{term if term.startswith('mask_token') else f'mto_{term}'}"] = value
    return named
