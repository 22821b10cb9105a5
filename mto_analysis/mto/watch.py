"""Watching masked tokens in training, without any loss: H and quadrant masses every k steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mto_analysis.affinity import TokenSplit, heterogeneity, quadrant_mass
from mto_analysis.mto.collapse import collapse_of, warn_of
from mto_analysis.taps.forward import Forward, Stack
from mto_analysis.taps.hooks import Attached
from mto_analysis.taps.search import find_stacks, unwrap
from mto_analysis.taps.stacks import StackSpec

_Value = TypeVar("_Value")


class _Numbers(Forward):
    """H and quadrant masses of one stack in one forward, without gradients."""

    def __init__(self, *seen: Any) -> None:
        self.splits: dict[int, TokenSplit] = {}
        self._values: dict[int, Tensor] = {}
        super().__init__(*seen)

    @torch.no_grad()
    def take(self, depth: int, tokens: Tensor) -> None:
        """Measure one layer depth."""
        patches = self.images(tokens.detach())[:, self.prefix :]
        if patches.shape[1] not in self.splits:
            mask, numbers = self.mask_for(patches.shape[1])
            self.splits[patches.shape[1]] = TokenSplit(mask, numbers=numbers)
        split = self.splits[patches.shape[1]]
        h, bound = heterogeneity(patches, split), (split.num_patches - split.num_masked).log()
        per_image = torch.stack([h, bound.to(h.dtype), h / bound.clamp_min(math.log(2))], dim=1)
        self._values[depth] = torch.cat([per_image, quadrant_mass(patches, split)], dim=1).mean(dim=0)

    def values(self) -> dict[str, float]:
        """Means over the images; the device is waited for once."""
        names = ("heterogeneity", "bound", "ratio", *(f"quadrant_{quadrant}_mass" for quadrant in (1, 2, 3, 4)))
        rows = torch.stack(list(self._values.values())).tolist()
        return {
            f"{name}_{depth}": value
            for depth, row in zip(self._values, rows, strict=True)
            for name, value in zip(names, row, strict=True)
        }


class Watch(Attached[_Numbers]):
    """What :func:`watch_mto` gives: numbers of every k-th training forward, without any loss.

    ``records`` holds one dict per watched step, the last ones: ``step``, ``heterogeneity_0`` ..., its bound
    log(num_visible) ``bound_0`` ..., H over that bound ``ratio_0`` ..., ``quadrant_1_mass_0`` ...; with several stacks
    each key but ``step`` starts with the stack's name. What fails is warned about, once, and so is that nothing was
    recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Sequence[StackSpec],
        every: int,
        on_record: Callable[[dict[str, float]], None] | None,
        keep: int,
        warn_after: int,
    ) -> None:
        self.records: list[dict[str, float]] = []
        self._every = every
        self._on_record = on_record
        self._keep, self._warn_after = keep, max(warn_after, every)
        self._forwards = 0  # of the model in training
        self.num_images = 0  # of the last record
        self._ended: set[int] = set()
        self._warned_of_failure = False
        super().__init__(model, specs, _Numbers)

    def _due(self) -> bool:
        return self.step % self._every == 0

    def _seen(self, at: int, depths: tuple[int, ...], module: nn.Module, values: Any) -> None:
        super()._seen(at, depths, module, values)
        if self._stacks[at].spec.depth not in depths or not self._records(module):
            return
        self._ended.add(at)
        # Where the model itself is not called (Lightning), a step ends with its last stack; they run in any order.
        if self._recording is None and self._ended >= {at for at in range(len(self._stacks)) if self._follows(at)}:
            self._step_ends()

    def _model_ends(self, *seen: Any) -> None:
        self._forwards += bool(self._recording)
        super()._model_ends(*seen)
        if self._ended:
            self._step_ends()
        if self._forwards == self._warn_after and not self.records and not self._warned_of_failure:
            self._warned_of_failure = True
            warnings.warn(
                f"nothing was recorded in {self._forwards} training forwards: no masked token was seen in "
                f"{', '.join(stack.where for stack in self._stacks)}; pass stacks=[StackSpec(...)]",
                stacklevel=4,
            )

    def _step_ends(self) -> None:
        self._ended.clear()
        self._settle_candidates()
        for failure in list(self._failures.values())[: 0 if self._warned_of_failure else 1]:
            self._warned_of_failure = True
            warnings.warn(f"step {self.step} was not recorded: {failure}", stacklevel=4)
        failed = set(self._failures)  # forwards of such a stack before the one that failed are no whole step
        self._failures.clear()
        record: dict[str, float] = {"step": self.step}
        self.step += 1
        for at, stack in enumerate(self._stacks):
            record |= {} if failed & {at, -1} else self._numbers_of(stack)
            stack.drop()
        if len(record) > 1:
            self.records.append(record)
            del self.records[: -self._keep]
            if self._on_record is not None:
                self._on_record(record)

    def _numbers_of(self, stack: Stack[_Numbers]) -> dict[str, float]:
        """Means over the forwards of a step."""
        whole = [forward for forward in stack.forwards if len(forward.depths) == stack.spec.depth + 1]
        if not whole:
            return {}
        total = self.num_images = sum(forward.num_images for forward in whole)
        weighted = [(forward.num_images / total, forward.values()) for forward in whole]
        numbers = {key: sum(share * values[key] for share, values in weighted) for key in weighted[0][1]}
        h = [value for key, value in numbers.items() if key.startswith("heterogeneity")]
        if words := collapse_of(h):
            warn_of(f"{stack.spec.name}, step {self.step - 1}: {words}")
        start = self._key_prefix(stack)
        return {start + key: value for key, value in numbers.items()}


class EvaluationWatch(Watch):
    """H of the forwards in evaluation mode, until it is taken."""

    def __init__(self, model: nn.Module, specs: Sequence[StackSpec]) -> None:
        self._totals: dict[str, tuple[float, int]] = {}  # sum over images, and their number
        super().__init__(model, specs, 1, self._add, keep=1, warn_after=1_000_000_000)

    def _add(self, record: dict[str, float]) -> None:
        named = {name: (self.num_images * value, self.num_images) for name, value in record.items() if name != "step"}
        self._totals = _totals(self._totals, named)

    def _records(self, module: nn.Module) -> bool:
        return not module.training

    def take(self) -> dict[str, float]:
        """Means over the images of all processes since the last call; a collective call."""
        totals, self._totals = _totals(*of_all_processes(self._totals)), {}
        return {name: total / count for name, (total, count) in totals.items()}


def _totals(*parts: Mapping[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    found: dict[str, tuple[float, int]] = {}
    for part in parts:
        for name, (total, count) in part.items():
            before, images = found.get(name, (0.0, 0))
            found[name] = before + total, images + count
    return found


def of_all_processes(value: _Value) -> list[_Value]:
    """The values of all processes that torch.distributed knows, by rank; a collective call."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def watch_mto(
    model: nn.Module,
    *,
    every: int = 100,
    stacks: Sequence[StackSpec] | None = None,
    on_record: Callable[[dict[str, float]], None] | None = None,
    keep: int = 10_000,
    warn_after: int = 100,
) -> Watch:
    """Watch masked tokens in training without any loss: H and quadrant masses of every layer depth, every k steps.

    Args:
        model: As for :func:`attach_mto`.
        every: Steps (training forwards) between records; the others cost nothing.
        stacks: Where masked tokens live, for models of another structure.
        on_record: Called with each record, to log it.
        keep: Records that are held, the last ones.
        warn_after: Warn if so many training forwards (at least ``every``) recorded nothing.

    Raises:
        ValueError: If no structure fits, or a number is not positive.
    """
    for name, number in (("every", every), ("keep", keep), ("warn_after", warn_after)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    inner = unwrap(model)
    return Watch(inner, stacks or find_stacks(inner), every, on_record, keep, warn_after)
