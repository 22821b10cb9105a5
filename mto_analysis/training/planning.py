"""What a run would do, before it does it: steps, schedule, parameter groups, memory, time by a few timed steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mto_analysis.images import Images, steps_in_epoch
from mto_analysis.runtime.listener import duration
from mto_analysis.runtime.processes import Processes, this_process
from mto_analysis.training.initial import InitialWeights
from mto_analysis.training.methods import build_method, learning_rate
from mto_analysis.training.methods.method import peak_learning_rate
from mto_analysis.training.objective import Batch
from mto_analysis.training.recipes import Recipe
from mto_analysis.training.settings import RunSettings
from mto_analysis.training.shares import micro_batch_size
from mto_analysis.training.stepping import Stepper

# Images in the probe steps: activations are measured at both, and grow linearly with the batch.
_PROBES = (1, 3)
_TIMED_STEPS = 2
# Activations of the timed batch, in bytes.
_TIMED_BYTES = 2**28


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        rows: Title, value and remark, in order.
        bytes_needed: Estimate for one process.
        seconds: Estimate for the whole run.
    """

    rows: tuple[tuple[str, str, str], ...]
    bytes_needed: int
    seconds: float

    def as_text(self) -> str:
        """Aligned lines."""
        first = max(len(row[0]) for row in self.rows)
        second = min(44, max(len(row[1]) for row in self.rows))
        return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}".rstrip() for a, b, c in self.rows)


def plan(recipe: Recipe, images: Images, settings: RunSettings, *, processes: int | None = None) -> Plan:
    """Everything a run would do; nothing is written.

    Args:
        recipe: What would be trained.
        images: Only counted.
        settings: How.
        processes: How many there would be; by default those that were launched.

    Raises:
        ValueError: If the batch cannot be shared out.
        DataError: If there are too few images.
    """
    here = this_process(settings.device)
    count = processes or here.count
    micro = micro_batch_size(recipe.batch_size, processes=count, accumulation=settings.accumulation)
    steps = steps_in_epoch(len(images.names), recipe.batch_size)
    start = None if settings.init is None else InitialWeights(settings.init)
    method = build_method(recipe, seed=settings.seed, start=start)
    stepper = Stepper(method, replace(settings, accumulation=1), here, steps, micro)
    measured = _measure(stepper, settings, here, micro)
    total = steps * recipe.epochs
    seconds = measured.seconds_per_image * micro * settings.accumulation * total
    rows = [
        *_recipe_rows(recipe),
        ("", "", ""),
        (
            "images",
            f"{len(images.names)}",
            f"{len(images.names) - steps * recipe.batch_size} left over per epoch",
        ),
        (
            "effective batch",
            f"{recipe.batch_size} = {micro} x {count} x {settings.accumulation}",
            "images per forward x processes x accumulation",
        ),
        ("steps", f"{total} = {recipe.epochs} x {steps}", "epochs x steps per epoch"),
        ("peak learning rate", f"{peak_learning_rate(recipe, recipe.batch_size):.6g}", _scaling(recipe)),
        *_schedule_rows(recipe, steps),
        ("", "", ""),
        *(("initial weights", "", line) for line in (start.notes if start is not None else ())),
        *_group_rows(stepper),
        ("precision", settings.precision, f"on {here.device}"),
        ("masked token optimization", "on" if settings.mto else "off", str(settings.mto or "")),
        ("", "", ""),
        *measured.rows(micro),
        (
            "time",
            duration(seconds),
            f"{recipe.batch_size * total / seconds:.0f} images/s in timed steps, reading images not counted",
        ),
    ]
    return Plan(tuple(rows), measured.total(micro), seconds)


@dataclass(frozen=True)
class _Measured:
    """Bytes by what holds them, and the time of an image."""

    weights: int
    teachers: int
    gradients: int
    optimizer: int
    ema: int
    per_batch: int
    per_image: int
    seconds_per_image: float

    def total(self, micro: int) -> int:
        fixed = self.weights + self.teachers + self.gradients + self.optimizer + self.ema
        return fixed + self.per_batch + self.per_image * micro

    def rows(self, micro: int) -> Iterator[tuple[str, str, str]]:
        yield "memory of a process", _size(self.total(micro)), "estimate, without torch itself and decoded images"
        for name, size in (
            ("weights", self.weights),
            ("slow branch, fixed tables", self.teachers),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("moving average", self.ema),
        ):
            if size:
                yield f"  {name}", _size(size), ""
        yield "  activations", _size(self.per_batch + self.per_image * micro), f"{_size(self.per_image)} an image"


def _measure(stepper: Stepper, settings: RunSettings, here: Processes, micro: int) -> _Measured:
    trained = [each for each in stepper.method.parameters() if each.requires_grad]
    weights = _bytes(trained)
    everything = _bytes([*stepper.method.parameters(), *stepper.method.buffers()])
    shares = here.count if settings.fsdp else 1
    kept = {size: _activations(stepper, stepper.method.noise(size, here.device), trained) for size in _PROBES}
    slope = max(0, (kept[_PROBES[1]] - kept[_PROBES[0]]) // (_PROBES[1] - _PROBES[0]))
    # A batch that is long enough to measure: of small models a step of a few images is nearly all overhead.
    size = max(1, min(micro, max(8, _TIMED_BYTES // max(1, slope))))
    batch = stepper.method.noise(size, here.device)
    _time(stepper, batch)  # the first step makes the optimizer's state, and compiles
    seconds = min(_time(stepper, batch) for _ in range(_TIMED_STEPS)) / size
    return _Measured(
        weights // shares,
        (everything - weights) // shares,
        weights // shares,
        2 * weights // shares,
        weights if settings.ema is not None else 0,
        max(0, kept[_PROBES[0]] - slope * _PROBES[0]),
        slope,
        seconds,
    )


def _activations(stepper: Stepper, batch: Batch, weights: Sequence[Tensor]) -> int:
    """Bytes that a forward keeps for the backward pass: every storage once, weights left out."""
    owned = {each.untyped_storage().data_ptr() for each in weights}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, _same):
        terms = stepper.losses(batch)
    size = sum(each.untyped_storage().nbytes() for each in kept.values())
    del terms
    return size


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _time(stepper: Stepper, batch: Batch) -> float:
    """Seconds of an optimizer step."""
    start = time.perf_counter()
    result = stepper.step(iter([batch]), 0)
    for value in result.losses.values():
        value.item()  # waits for the device
    if batch.images.is_cuda:
        torch.cuda.synchronize(batch.images.device)
    return time.perf_counter() - start


def _recipe_rows(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    yield "recipe", recipe.name, recipe.summary
    yield "method", recipe.method, ""
    for name, value in recipe.settings().items():
        if value is not None and value != ():
            yield name, _plain(value), recipe.source_of(name)


def _plain(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_plain, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _scaling(recipe: Recipe) -> str:
    if recipe.lr_batch is None:
        return "not scaled with the batch"
    return f"base_lr {recipe.base_lr:g} x effective batch / {recipe.lr_batch}"


def _schedule_rows(recipe: Recipe, steps: int) -> Iterator[tuple[str, str, str]]:
    total = recipe.epochs * steps
    marks = {0.0, recipe.warmup_epochs, recipe.epochs / 4, recipe.epochs / 2, 3 * recipe.epochs / 4, recipe.epochs}
    for epoch in sorted(marks | set(map(float, recipe.turns))):
        step = min(total - 1, round(epoch * steps))
        rate = learning_rate(recipe, step, steps, recipe.batch_size)
        yield f"learning rate, epoch {epoch:g}", f"{rate:.4g}", f"step {step + 1}"


def _group_rows(stepper: Stepper) -> Iterator[tuple[str, str, str]]:
    for group in stepper.optimizer.param_groups:
        count = sum(each.numel() for each in group["params"])
        yield (
            f"parameters, {group.get('name', 'group')}",
            f"{count:,} in {len(group['params'])}",
            f"weight decay {group['weight_decay']:g}",
        )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
