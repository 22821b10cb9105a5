"""What a pre-training run shows of itself at an epoch: its measures and reconstructions, as figures and rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mto_analysis.figures.plots.measures import draw_measures
from mto_analysis.figures.plots.reconstruct import draw_reconstructions
from mto_analysis.figures.plots.style import figure_bytes
from mto_analysis.images import ImageBatch, Images, image_batches
from mto_analysis.images.interface import choose_rows, spread_rows
from mto_analysis.models import MaskedImageModel
from mto_analysis.probe.engine import masks_from_rule, probe, undisturbed
from mto_analysis.probe.own_loss import own_loss
from mto_analysis.probe.reconstruction import reconstruct_shown
from mto_analysis.probe.request import masked_batch
from mto_analysis.probe.shown import ShownModel
from mto_analysis.training.showing import Shown


class EpochFigures:
    """Measures and draws a model on a few images, always the same, under its own mask rule with seed 0.

    Args:
        images: That the run is trained on, or others.
        count: Images to measure, spread evenly.
        drawn: Of these, images to reconstruct.
        measures: As for :func:`~mto_analysis.probe.probe`.
    """

    def __init__(
        self, images: Images, *, count: int = 64, drawn: int = 4, measures: str | Sequence[str] = "all"
    ) -> None:
        self._images, self._count, self._drawn, self._measures = images, count, drawn, measures

    def __call__(self, model: MaskedImageModel, epoch: int) -> Shown:
        """The figures ``measures`` and, of models that predict pixels, ``reconstructions``; rows of measures."""
        rows = spread_rows(len(self._images.names), self._count)
        with torch.compiler.set_stance("force_eager"):  # hooks that come after compilation would not run
            result = probe(model, self._batches(model, rows), measures=self._measures)
            reconstructed = self._reconstruct(model, [rows[at] for at in spread_rows(len(rows), self._drawn)])
        table = result.table()
        figures = {"measures": figure_bytes(draw_measures(table.assign(model=f"epoch {epoch}")), "png")}
        if reconstructed is not None:
            figures["reconstructions"] = reconstructed
        return Shown(figures, table.astype(object).where(table.notna(), None).to_dict("records"))

    def _batches(self, model: MaskedImageModel, rows: Sequence[int]) -> Sequence[ImageBatch]:
        chosen = choose_rows(self._images, rows)
        # A broken image is replaced in training, and left out here.
        return list(image_batches(chosen, model.info, batch_size=32, on_broken=lambda image: None))

    def _reconstruct(self, model: MaskedImageModel, rows: Sequence[int]) -> bytes | None:
        for batch in self._batches(model, rows):
            with undisturbed(model):
                images, mask = masked_batch(model, batch, masks_from_rule(model.info))
                loss = own_loss(model, images, mask)
            if loss is None:
                return None
            shown = ShownModel("model", model, batch.names, images, mask, loss, {})
            return figure_bytes(draw_reconstructions(reconstruct_shown(shown), captioned=False), "png")
        return None
