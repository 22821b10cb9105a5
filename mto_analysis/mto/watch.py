"""Watching masked tokens in training, without any loss: H and quadrant masses every k steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mto_analysis.affinity import TokenSplit, heterogeneity, quadrant_mass
from mto_analysis.taps.hooks import COLLAPSED, Attached, StackForward, recomputing, warn_of
from mto_analysis.taps.structures import StackSpec, find_stacks, unwrap

__all__ = ["Watch", "watch_mto"]


class _Numbers(StackForward):
    """H and quadrant masses of one stack, without gradients."""

    def clear(self) -> None:
        """Forget the last forward."""
        super().clear()
        self.splits: dict[int, TokenSplit] = {}
        self.values: dict[str, float] = {}

    @torch.no_grad()
    def take(self, depth: int, tokens: Tensor) -> None:
        """Measure one layer depth."""
        patches = self.images(tokens.detach())[:, self.spec.prefix_tokens :]
        if patches.shape[1] not in self.splits:
            self.splits[patches.shape[1]] = TokenSplit(self.mask_for(patches.shape[1])[0])
        split = self.splits[patches.shape[1]]
        self.values[f"heterogeneity_{depth}"] = heterogeneity(patches, split).mean().item()
        for quadrant, mass in enumerate(quadrant_mass(patches, split).mean(dim=0).tolist(), start=1):
            self.values[f"quadrant_{quadrant}_mass_{depth}"] = mass


class Watch(Attached):
    """What :func:`watch_mto` gives: numbers of every k-th training forward, without any loss.

    ``records`` holds one dict per watched step: ``step``, ``heterogeneity_0`` ..., ``quadrant_1_mass_0`` ...; with
    several stacks each key but ``step`` starts with the stack's name.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Sequence[StackSpec],
        every: int,
        on_record: Callable[[dict[str, float]], None] | None,
    ) -> None:
        self.records: list[dict[str, float]] = []
        self._every = every
        self._on_record = on_record
        self._numbers = [_Numbers(spec) for spec in specs]
        self._ended: set[int] = set()
        super().__init__(model, self._numbers)

    def _due(self) -> bool:
        return self.step % self._every == 0

    def _block_ends(
        self, stack: int, depth: int, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        super()._block_ends(stack, depth, module, args, kwargs, output)
        if depth < len(self._numbers[stack].spec.blocks) or recomputing() or not self._records(module):
            return
        self._ended.add(stack)
        if len(self._ended) == len(self._numbers):  # stacks may run in any order
            self._ended.clear()
            self._record()
            self.step += 1

    def _record(self) -> None:
        record: dict[str, float] = {"step": self.step}
        for numbers in self._numbers:
            if numbers.mask is None:
                continue
            start = f"{numbers.spec.name}/" if len(self._numbers) > 1 else ""
            record |= {start + key: value for key, value in numbers.values.items()}
            h = [value for key, value in numbers.values.items() if key.startswith("heterogeneity")]
            if not all(map(math.isfinite, h)):
                warn_of(f"{numbers.spec.name}, step {self.step}: heterogeneity is not finite")
            elif max(h) < COLLAPSED:
                warn_of(f"{numbers.spec.name}, step {self.step}: heterogeneity of all layers has collapsed to 0")
            numbers.clear()
        if len(record) > 1:
            self.records.append(record)
            if self._on_record is not None:
                self._on_record(record)


def watch_mto(
    model: nn.Module,
    *,
    every: int = 100,
    stacks: Sequence[StackSpec] | None = None,
    on_record: Callable[[dict[str, float]], None] | None = None,
) -> Watch:
    """Watch masked tokens in training without any loss: H and quadrant masses of every layer depth, every k steps.

    Args:
        model: As for :func:`attach_mto`.
        every: Steps (training forwards) between records; the others cost nothing.
        stacks: Where masked tokens live, for models of another structure.
        on_record: Called with each record, to log it.

    Raises:
        ValueError: If no structure fits, or ``every`` is not positive.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    inner = unwrap(model)
    return Watch(inner, stacks or find_stacks(inner), every, on_record)
