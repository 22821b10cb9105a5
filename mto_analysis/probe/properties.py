"""The paper's three properties of masked tokens as numbers (section 1), seen at layer depth 0 in passing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mto_analysis.affinity import TokenSplit
from mto_analysis.models import LayerTokens, MaskedImageModel
from mto_analysis.probe.accumulating import Sums
from mto_analysis.probe.engine import LayerMeasure


class PropertyMeasure:
    """Collects the properties during a probe, as a layer measure that adds no column.

    Spatial randomness: how often each position is masked. Substitutional consistency: how far masked rows lie from the
    first one, over its norm, after and before the position embedding (0: the same vector everywhere). Data
    distinctiveness: the cosine of masked rows with the visible tokens of their image, after and before the position
    embedding. Where positions cannot be taken off, before is the same as after.

    Args:
        model: Whose position embedding is taken off.
    """

    def __init__(self, model: MaskedImageModel) -> None:
        self._positions = {stack: model.position_embedding(stack) for stack in model.stacks}
        self._counts, self._masks = Sums(), Sums()  # how often each position was masked, of how many masks
        self._first: dict[tuple[str, str], Tensor] = {}
        self._values: dict[tuple[str, str], list[Tensor]] = {}

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Take note of a batch at layer depth 0."""
        if layer.depth:
            return {}
        if layer.in_order:  # else it is not known how often a position is masked
            self._counts.add(stack, layer.mask.sum(dim=0))
            self._masks.add(stack, len(layer.mask))
        for when, tokens in self._variants(stack, layer):
            first = self._first.setdefault((stack, when), _first_masked(tokens, layer.mask))
            for name, value in (
                ("spread" + when, split.map(tokens, lambda x, count, first=first: _spread(x, count, first))),
                ("cosine" + when, split.map(tokens, _mean_cosine)),
            ):
                self._values.setdefault((stack, name), []).append(value)
        return {}

    def anchor(self, stack: str, layer: LayerTokens) -> None:
        """Take the first masked row from here, where the first image is in another process's part."""
        for when, tokens in self._variants(stack, layer):
            self._first[(stack, when)] = _first_masked(tokens, layer.mask)

    def _variants(self, stack: str, layer: LayerTokens) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
        position = self._positions[stack]
        plain = layer.tokens if position is None else layer.tokens - position
        return ("", layer.tokens), ("_before_position", plain)

    def kept(self) -> Any:
        """Counts and values of this process's images."""
        values = {key: [each.cpu() for each in values] for key, values in self._values.items()}
        return self._counts.kept(), self._masks.kept(), values

    def put_together(self, parts: Sequence[Any]) -> None:
        """Keep the counts and values of all images."""
        counts, masks, values = zip(*parts, strict=True)
        self._counts.take(counts)
        self._masks.take(masks)
        self._values = {}
        for part in values:
            for key, each in part.items():
                self._values.setdefault(key, []).extend(each)

    def to_frame(self) -> pd.DataFrame:
        """One row per stack and property, means over images and masks.

        Properties: ``masked_share`` with the min and max over positions and ``masked_share_deviation``, its
        standard deviation over positions, beside ``masked_share_deviation_expected`` of that many independent random
        masks; ``spread``, ``cosine`` and both ``_before_position``. Columns: ``stack property value``.
        """
        rows: list[tuple[str, str, float]] = []
        for stack, counts in self._counts.items():
            share = counts.double() / self._masks[stack]
            mean = share.mean().item()
            rows += [
                (stack, "masked_share", mean),
                (stack, "masked_share_min", share.min().item()),
                (stack, "masked_share_max", share.max().item()),
                (stack, "masked_share_deviation", share.std(correction=0).item()),
                (stack, "masked_share_deviation_expected", math.sqrt(mean * (1 - mean) / self._masks[stack])),
            ]
        rows += [(stack, name, torch.cat(values).mean().item()) for (stack, name), values in self._values.items()]
        return pd.DataFrame(rows, columns=["stack", "property", "value"])

    def share_of_positions(self, stack: str) -> Tensor:
        """How often each position was masked, from 0 to 1: ``num_patches``."""
        share: Tensor = (self._counts[stack].double() / self._masks[stack]).cpu()
        return share


class Properties:
    """Watches models for :func:`~mto_analysis.probe.study.measure_checkpoints`."""

    def __init__(self) -> None:
        self._measures: dict[str, PropertyMeasure] = {}

    @contextmanager
    def watch(self, model: MaskedImageModel, label: str) -> Iterator[Sequence[LayerMeasure]]:
        """The measure of one model."""
        self._measures[label] = PropertyMeasure(model)
        yield (self._measures[label],)

    def table(self) -> pd.DataFrame:
        """Rows of :meth:`PropertyMeasure.to_frame`, per model."""
        tables = [measure.to_frame().assign(model=label) for label, measure in self._measures.items()]
        return pd.concat(tables, ignore_index=True)[["model", "stack", "property", "value"]]


def _first_masked(tokens: Tensor, mask: Tensor) -> Tensor:
    return tokens[0, int(mask[0].to(torch.uint8).argmax())].clone()


def _spread(x: Tensor, num_masked: int, first: Tensor) -> Tensor:
    distance = torch.linalg.vector_norm(x[:, :num_masked] - first, dim=-1)
    spread: Tensor = distance.mean(dim=1) / torch.linalg.vector_norm(first).clamp_min(1e-12)
    return spread


def _mean_cosine(x: Tensor, num_masked: int) -> Tensor:
    directions = normalize(x, dim=-1)
    # The mean of all products is the product of the means.
    return (directions[:, :num_masked].mean(dim=1) * directions[:, num_masked:].mean(dim=1)).sum(dim=-1)
