"""Masked token optimization in other people's trainers, without a subclass and without a change of their code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mto_analysis.errors import StackError
from mto_analysis.mto.attach import MTO, attach_mto, with_loss
from mto_analysis.mto.losses import MTOConfig
from mto_analysis.mto.watch import EvaluationWatch, of_all_processes
from mto_analysis.taps.hooked import on_output
from mto_analysis.taps.search import find_stacks, unwrap
from mto_analysis.taps.stacks import StackSpec

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("MTOTrainerCallback needs transformers: pip install mto-analysis[libraries]") from error


class MTOTrainerCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """For ``Trainer(callbacks=[MTOTrainerCallback(...)])``: adds the losses to the model's own, and logs them and H.

    The loss is added to that of the model's output, so a Trainer that computes another one (label smoothing,
    ``compute_loss_func``) is refused at the end of its first step. Steps are optimizer steps, so warm-up goes on where
    a resumed run is. Logged are ``mto/loss``, ``mto/heterogeneity_0`` ..., and with evaluation
    ``eval_heterogeneity_0`` ..., as means over processes, and over all images of an evaluation.

    Args:
        config: Settings; ``None`` watches H in evaluation only.
        stacks: As for :func:`~mto_analysis.mto.attach_mto`.

    Example (not run: it needs data):
        ``Trainer(model, arguments, train_dataset=images, callbacks=[MTOTrainerCallback(MTOConfig())]).train()``
    """

    def __init__(self, config: MTOConfig | None = None, *, stacks: Sequence[StackSpec] | None = None) -> None:
        self.config, self._stacks = config, stacks
        self.mto: MTO | None = None
        self._evaluated: EvaluationWatch | None = None
        self._handle: Any = None
        self._ever = False  # whether a loss was added in any step
        self._added: list[bool] = []  # whether each loss that was added went through a backward pass
        self._failure: StackError | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Attach to the model."""
        self._ever = False
        inner = unwrap(model)
        specs = self._stacks or find_stacks(inner)
        if self.config is not None:
            self.mto = attach_mto(inner, self.config, stacks=specs)
            self._handle = on_output(inner, self._add, self._leave)
        self._evaluated = EvaluationWatch(inner, specs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count in optimizer steps."""
        if self.mto is not None:
            self.mto.step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what went wrong in the forwards of the step."""
        failure, self._failure = self._failure, None
        added, self._added = self._added, []
        if failure is not None:
            raise failure
        self._ever = self._ever or bool(added)
        if added and not all(added):
            raise StackError(
                "the Trainer does not use the loss of the model's output (label smoothing or compute_loss_func?), so "
                "the losses have no effect; add mto.loss() in compute_loss instead"
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to go on where no step had masked tokens."""
        if self.mto is not None and not self._ever:
            self.mto.loss()  # says why no forward with masked tokens was seen

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the terms, or H of the evaluation, to what is logged."""
        if logs is None:
            return
        found: dict[str, float] = {}
        if self._evaluated is not None and any(name.startswith("eval_") for name in logs):
            found = {f"eval_{name}": value for name, value in self._evaluated.take().items()}
        elif self.mto is not None and "loss" in logs:
            found = _mean_over_processes({f"mto/{name}": value for name, value in self.mto.terms.items()})
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self._leave()

    def _leave(self) -> None:
        for each in (self.mto, self._evaluated):
            if each is not None:
                each.detach()
        if self._handle is not None:
            self._handle.remove()

    def _add(self, model: nn.Module, output: Any) -> Any:
        """The model's output with the losses added to its own."""
        if self.mto is None or not model.training or not torch.is_grad_enabled():
            return output
        try:
            if not (self.mto.pending or self.mto.failed):
                return output
            step = self.mto.step
            extra = self.mto.loss()
            self.mto.step = step  # optimizer steps are counted, not forwards
            extra.register_hook(self._mark(len(self._added)))  # type: ignore[no-untyped-call]
            changed = with_loss(output, extra)
        except StackError as error:  # nothing of ours may stop the user's forward
            self._failure = self._failure or error
            return output
        self._added.append(False)
        return changed

    def _mark(self, at: int) -> Any:
        added = self._added

        def mark(gradient: Tensor) -> None:
            added[at] = True

        return mark


def _mean_over_processes(values: Mapping[str, float]) -> dict[str, float]:
    parts = of_all_processes(dict(values))
    return {name: sum(part[name] for part in parts if name in part) / sum(name in p for p in parts) for name in values}
