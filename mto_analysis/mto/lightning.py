"""Masked token optimization in Lightning, by a callback and without a change of the module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mto_analysis.mto.attach import MTO, attach_mto, with_loss
from mto_analysis.mto.losses import MTOConfig
from mto_analysis.mto.watch import EvaluationWatch
from mto_analysis.taps.search import find_stacks
from mto_analysis.taps.stacks import StackSpec

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError("MTOLightningCallback needs Lightning: pip install mto-analysis[lightning]") from error


class MTOLightningCallback(Callback):  # type: ignore[misc, unused-ignore]
    """For ``Trainer(callbacks=[MTOLightningCallback(...)])``: adds the losses to that of ``training_step``.

    Steps are optimizer steps, so warm-up goes on where a resumed run is. Logged are ``mto/loss``,
    ``mto/heterogeneity_0`` ..., and of validation ``val_heterogeneity_0`` ..., as means over processes, and over all
    images of a validation.

    Args:
        config: Settings; ``None`` watches H in validation only.
        stacks: As for :func:`~mto_analysis.mto.attach_mto`.

    Raises:
        ValueError: At the start of fitting, if no structure fits.
        StackError: From the training step, if a check failed, or it returns no loss (manual optimization).
    """

    def __init__(self, config: MTOConfig | None = None, *, stacks: Sequence[StackSpec] | None = None) -> None:
        self.config, self._stacks = config, stacks
        self.mto: MTO | None = None
        self._evaluated: EvaluationWatch | None = None
        self._ever = False  # whether a loss was added in any step

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the module."""
        self._ever = False
        specs = self._stacks or find_stacks(pl_module)
        self._evaluated = EvaluationWatch(pl_module, specs)
        if self.config is None:
            return
        self.mto = mto = attach_mto(pl_module, self.config, stacks=specs)
        own = pl_module.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            if not (mto.pending or mto.failed):
                return output
            mto.step = trainer.global_step
            output = with_loss(output, mto.loss())
            self._ever = True
            if trainer.global_step % trainer.log_every_n_steps == 0:
                pl_module.log_dict({f"mto/{name}": value for name, value in mto.terms.items()}, sync_dist=True)
            return output

        pl_module.training_step = training_step

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Refuse to go on where no step had masked tokens."""
        if self.mto is not None and not self._ever:
            self.mto.loss()  # says why no forward with masked tokens was seen

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log H of the validation batches."""
        if self._evaluated is not None:
            found = self._evaluated.take()
            pl_module.log_dict({f"val_{name}": value for name, value in found.items()}, sync_dist=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was, also where training is interrupted."""
        self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was."""
        for each in (self.mto, self._evaluated):
            if each is not None:
                each.detach()
        vars(pl_module).pop("training_step", None)
