"""Controls of a heterogeneity curve: how it looks without training, the mask token, or masked tokens at all.

A curve that stays inside the bands of its controls says nothing about what the model has learned.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor

from mto_analysis.affinity import TokenSplit, heterogeneity, row_entropy
from mto_analysis.masks import MaskKey
from mto_analysis.models import LayerTokens, MaskedImageModel
from mto_analysis.models.initialization import initialization_of, mask_token_names, random_weights, with_mask_token
from mto_analysis.probe.engine import LayerMeasure, mean_and_interval
from mto_analysis.probe.request import LoadedModel, Request
from mto_analysis.probe.sharing import shared_probe
from mto_analysis.probe.study import HeterogeneityStudy

#: What each control is, as figure and sentences name it.
CONTROLS = {
    "random_weights": "random weights",
    "random_token": "random mask token",
    "zero_token": "zero mask token",
    "shuffled_positions": "shuffled masked positions",
    "visible_null": "visible against visible",
}
_MARGIN = 0.001
_IN_PASS = ("shuffled_positions", "visible_null")


class ControlMeasure:
    """Controls that need no other forward, as a layer measure; columns are normalized, from 0 to 1.

    ``shuffled_positions``: the same tokens, but which of them are called masked is drawn anew, as many per image: H
    where the two kinds do not differ. ``visible_null``: the affinity of each visible token over the other visible
    tokens, over log(num_visible - 1): H without any masked token.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._shuffled: tuple[Tensor, TokenSplit] | None = None

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Both controls for each image."""
        if self._shuffled is None or self._shuffled[0] is not layer.mask:
            self._shuffled = (layer.mask, TokenSplit(self._shuffle(layer.mask, names)))
        bound = split.num_visible.clamp_min(2).log()
        return {
            "shuffled_positions": heterogeneity(layer.tokens, self._shuffled[1]) / bound,
            "visible_null": split.map(layer.tokens, _visible_null),
        }

    def _shuffle(self, mask: Tensor, names: Sequence[str]) -> Tensor:
        rows = []
        for name, row in zip(names, mask, strict=True):
            order = list(range(len(row)))
            MaskKey(self._seed, 0, f"shuffled {name}", 0).generator().shuffle(order)
            rows.append(row[torch.tensor(order, device=row.device)])
        return torch.stack(rows)


def _visible_null(x: Tensor, num_masked: int) -> Tensor:
    visible = x[:, num_masked:]
    count = visible.shape[1]
    if count < 3:  # one other token at most: nothing to choose between
        return x.new_zeros(len(x))
    products = visible @ visible.mT
    others = ~torch.eye(count, dtype=torch.bool, device=x.device)
    logits = products[:, others].reshape(len(x), count, count - 1)
    return row_entropy(logits).mean(dim=1) / torch.tensor(count - 1.0).log().item()


class Controls:
    """Watches the passes of :func:`~mto_analysis.probe.study.measure_checkpoints`, and runs others after each."""

    def __init__(self, request: Request, seeds: int = 3) -> None:
        if seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {seeds}")
        self._request, self._seeds = request, seeds
        self._start = 0.0
        self._tables: list[pd.DataFrame] = []

    @contextmanager
    def watch(self, model: MaskedImageModel, label: str) -> Iterator[Sequence[LayerMeasure]]:
        """The controls that need no other forward; the pass is timed to say how long the others will take."""
        self._start = time.perf_counter()
        yield (ControlMeasure(),)

    def then(self, loaded: LoadedModel) -> None:
        """Measure the changed copies of a model, right after its own pass."""
        seconds, passes = time.perf_counter() - self._start, 2 * self._seeds + 1
        listener, label = self._request.listener, loaded.label
        listener.note(f"{label}: {passes} more passes for its controls, about {passes * seconds:.0f} s")
        listener.note(f"{label}: random weights as {initialization_of(loaded.model)}")
        for control, seed, changed in self._changed(loaded.model):
            words = f"{label}, {CONTROLS[control]} {seed}"
            result = shared_probe(self._request, changed, loaded.masks, label=words)
            self._tables.append(result.summary().assign(model=label, control=control, seed=seed))

    def table(self, study: HeterogeneityStudy) -> pd.DataFrame:
        """One row per model, stack, layer depth, control and seed.

        Columns: ``model stack layer_depth control seed``, then ``normalized`` with its 95 % interval over images.
        """
        keys, tables = ["model", "stack", "layer_depth"], []
        for control in _IN_PASS:
            frame = study.measured.assign(normalized=study.measured[control]).dropna(subset="normalized")
            tables.append(mean_and_interval(frame, keys, ["normalized"]).assign(control=control, seed=0))
        columns = [*keys, "control", "seed", "normalized", "normalized_ci_low", "normalized_ci_high", "num_images"]
        return pd.concat([*tables, *self._tables], ignore_index=True)[columns]

    def _changed(self, model: MaskedImageModel) -> Iterator[tuple[str, int, MaskedImageModel]]:
        for seed in range(self._seeds):
            yield "random_weights", seed, random_weights(model, seed)
        if mask_token_names(model):
            for seed in range(self._seeds):
                yield "random_token", seed, with_mask_token(model, seed)
            yield "zero_token", 0, with_mask_token(model, None)


def control_bands(controls: pd.DataFrame) -> pd.DataFrame:
    """The band of each control: from the least to the greatest end of its seeds' 95 % intervals.

    Columns: ``model stack layer_depth control low high``.
    """
    groups = controls.groupby(["model", "stack", "layer_depth", "control"], sort=False)
    # Of one image there is no interval, only the value.
    low = groups["normalized_ci_low"].min().fillna(groups["normalized"].min())
    high = groups["normalized_ci_high"].max().fillna(groups["normalized"].max())
    return low.rename("low").to_frame().assign(high=high).reset_index()


def control_sentences(table: pd.DataFrame, controls: pd.DataFrame) -> list[str]:
    """A line per model and stack: the layer depths at which its curve leaves the band of each control.

    A curve is outside where its own 95 % interval and the band are more than 0.001 of the bound apart; less is no
    finding, and near the bound it is rounding.

    Args:
        table: Rows of ``heterogeneity.csv``.
        controls: Rows of ``controls.csv``.
    """
    bands = control_bands(controls)
    several = table.groupby("model")["stack"].nunique().max() > 1
    sentences = []
    for (model, stack), curve in table.groupby(["model", "stack"], sort=False):
        mine = bands[(bands["model"] == model) & (bands["stack"] == stack)]
        parts = []
        for control, band in mine.groupby("control", sort=False):
            both = curve.merge(band, on="layer_depth")
            above = both["normalized_ci_low"].fillna(both["normalized"]) > both["high"] + _MARGIN
            below = both["normalized_ci_high"].fillna(both["normalized"]) < both["low"] - _MARGIN
            outside = both["layer_depth"][above | below].tolist()
            parts.append(f"{CONTROLS[str(control)]} {_ranges(outside) or 'none'}")
        name = f"{model}, {stack}" if several else str(model)
        sentences.append(f"{name}: layer depths where H differs from its controls: {'; '.join(parts)}.")
    return sentences


def _ranges(depths: Sequence[int]) -> str:
    """Numbers in rising order, with those in a row as a range.

    Example:
        >>> _ranges([0, 1, 2, 4])
        '0-2, 4'
    """
    runs: list[list[int]] = []
    for depth in depths:
        if runs and depth == runs[-1][1] + 1:
            runs[-1][1] = depth
        else:
            runs.append([depth, depth])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
