"""What the losses add to a training step, and what measuring adds to a forward pass, on a CUDA device.

Goals in bf16: H at most 10 %, the probe of everything that Fig. 2 takes 30 %, the losses 8 % of a step.

Training: forward, backward and fused AdamW, plainly and with the losses in turns, timed by CUDA events over a few steps
each; beside the medians the time that the device spends inside hooks, ``loss()`` and their backward passes, and the
peak of allocated memory. ``tf32`` says whether products of float32 matrices may be made in TF32 (torch's default: no);
tokens in bf16 are multiplied as they are and summed in float32. Measuring: the bare forward, the probe of H, and the
probe of everything, in turns. ``kernels`` are those that a probe or the losses start beside the model's own, counted by
torch's profiler. First come how far numbers of the device lie from float64's. Random weights and images, nothing is
fetched.

Run: ``python benchmarks/gpu.py --csv gpu.csv`` (about two minutes on a large GPU, bf16 first; ``--seconds`` limits it:
what would begin later is left out). ``--only training --repeats 3 --seconds 30`` is the short form. Runs on a CPU too,
to try the script: ``--tiny``.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mto_cost import HOOKS, Training, mae, simmim
from torch import Tensor

from mto_analysis.affinity import TokenSplit, entropies, heterogeneity
from mto_analysis.images import ImageBatch
from mto_analysis.masks import mask_keys
from mto_analysis.models import MaskedImageModel
from mto_analysis.mto import MTO, MTOConfig, attach_mto, mto_loss
from mto_analysis.probe import probe
from mto_analysis.probe.quadrants import AffinityMaps, quadrant_statistics

COLUMNS = ("what", "model", "precision", "tf32", "batch", "plain_ms", "with_ms", "percent", "inside_percent")
COLUMNS += ("kernels", "plain_mb", "added_mb", "added_mb_percent", "target_percent")

#: Percent that each may add.
GOALS = {"training step": 8.0, "probe of H": 10.0, "probe of everything": 30.0}


class Row(NamedTuple):
    """One row of ``COLUMNS``."""

    what: str
    model: str
    precision: str
    tf32: bool
    batch: int
    plain_ms: float
    with_ms: float
    inside_percent: float | None
    kernels: int | None
    plain_mb: float | None
    added_mb: float | None

    def cells(self) -> dict[str, object]:
        """As in the CSV."""
        cells: dict[str, object] = {
            name: round(value, 3) if isinstance(value, float) else value for name, value in self._asdict().items()
        }
        cells["percent"] = round(100 * (self.with_ms / self.plain_ms - 1), 2)
        cells["target_percent"] = GOALS[self.what]
        if self.plain_mb and self.added_mb is not None:
            cells["added_mb_percent"] = round(100 * self.added_mb / self.plain_mb, 2)
        return {name: "" if cells.get(name) is None else cells[name] for name in COLUMNS}


def differences(device: str) -> Iterator[str]:
    """How far losses, gradients and statistics on the device lie from float64 on the CPU, of the same tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = 0.3 * torch.randn(8, 197, 768, generator=generator, dtype=torch.float64) / 768**0.5 * 8
    masks = {
        "equal": torch.rand(8, 196, generator=generator).argsort(dim=1) < 120,
        "ragged": torch.rand(8, 196, generator=generator) < 0.6,
    }

    def losses_of(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, split = x.clone().requires_grad_(), TokenSplit(mask, 1)
        masked, visible = entropies.token_products(x, split, with_visible=True)
        h = entropies.masked_rows_entropy([masked, *entropies.token_products(x, split)], split)
        rows = entropies.visible_rows_entropy(masked, visible, split)
        loss = h.sum(dim=0).mean() + 0.01 * rows.mean()
        terms = mto_loss([x[:, 1:], 0.9 * x[:, 1:], 0.8 * x[:, 1:]], mask, MTOConfig())
        (loss + terms.loss).backward()
        assert x.grad is not None
        return torch.stack([*h, rows, terms.loss.expand(len(x))]).detach(), x.grad

    def error(here: Tensor, exact: Tensor) -> str:
        return f"{((here.cpu().double() - exact).norm() / exact.norm()).item():.1e}"

    for name, mask in masks.items():
        for dtype in (torch.float32, torch.bfloat16):
            x = tokens.to(dtype)
            exact = losses_of(x.double(), mask)
            here = losses_of(x.to(device), mask.to(device))
            yield (
                f"{str(dtype).removeprefix('torch.')}, {name} masks: losses {error(here[0], exact[0])}, gradient "
                f"{error(here[1], exact[1])} of their norm, of prefix tokens {here[1][:, 0].abs().max().item():.0e}"
            )
        found, expected = (
            torch.stack(list(quadrant_statistics(tokens[:, 1:].to(there, kind), mask.to(there)).values()))
            for there, kind in ((device, torch.float32), ("cpu", torch.float64))
        )
        yield f"statistics, {name} masks: {error(found, expected)} of their norm"


class Clock:
    """Milliseconds on the device, by events; on a CPU by the wall."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def now(self) -> Any:
        """A moment."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize()

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds; wait first."""
        return float(start.elapsed_time(end)) if self.cuda else 1000 * (end - start)

    def of(self, work: Callable[[], object], times: int) -> float:
        """Milliseconds of one piece of work, over a few of them without a wait in between."""
        self.wait()
        start = self.now()
        for _ in range(times):
            work()
        end = self.now()
        self.wait()
        return self.between(start, end) / times


@contextmanager
def watched(clock: Clock, mto: MTO) -> Iterator[list[tuple[Any, Any]]]:
    """Moments before and after everything that the losses do, forward and backward."""
    spans: list[tuple[Any, Any]] = []
    classes = (entropies._Products, entropies._RowEntropy)
    originals = [each.backward for each in classes]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = clock.now()
            result = function(*arguments, **named)
            spans.append((start, clock.now()))
            return result

        return call

    for name in HOOKS:
        setattr(mto, name, timed(getattr(mto, name)))
    for each, original in zip(classes, originals, strict=True):
        each.backward = staticmethod(timed(original))  # type: ignore[method-assign]
    try:
        yield spans
    finally:
        for name in HOOKS:
            delattr(mto, name)
        for each, original in zip(classes, originals, strict=True):
            each.backward = staticmethod(original)  # type: ignore[method-assign]


def peak_mb(clock: Clock, work: Callable[[], object]) -> float | None:
    if not clock.cuda:
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        work()
    clock.wait()
    return torch.cuda.max_memory_allocated() / 2**20


def count_kernels(clock: Clock, work: Callable[[], object]) -> int | None:
    """How many kernels, copies and fills of memory a piece of work starts."""
    if not clock.cuda:
        return None
    work()
    clock.wait()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        work()
        clock.wait()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def more(with_it: int | None, plain: int | None) -> int | None:
    return None if with_it is None or plain is None else with_it - plain


def train(name: str, training: Training, clock: Clock, tf32: bool, repeats: int, steps: int) -> Row:
    """One model: a step with the losses against one without."""

    def plain() -> None:
        training.step(None)

    def attached() -> MTO:
        return attach_mto(training.model, MTOConfig(), check_every=0)

    plain_mb = peak_mb(clock, plain)
    mto = attached()
    with_mb = peak_mb(clock, partial(training.step, mto))
    with_kernels = count_kernels(clock, partial(training.step, mto))
    mto.detach()
    kernels = more(with_kernels, count_kernels(clock, plain))
    plain_ms, with_ms, inside = [], [], []
    for repeat in range(repeats + 1):
        first = clock.of(plain, steps)
        mto = attached()
        with_losses = partial(training.step, mto)
        second = clock.of(with_losses, steps)
        with watched(clock, mto) as spans:
            whole = clock.of(with_losses, 1)
            within = sum(clock.between(*span) for span in spans)
        mto.detach()
        if repeat:  # the first turn warms up
            plain_ms.append(first)
            with_ms.append(second)
            inside.append(100 * within / (whole - within))
    return Row(
        "training step",
        name,
        "bf16" if training.bf16 else "fp32",
        tf32,
        len(training.images),
        statistics.median(plain_ms),
        statistics.median(with_ms),
        statistics.median(inside),
        kernels,
        plain_mb,
        None if with_mb is None or plain_mb is None else with_mb - plain_mb,
    )


def measure(
    name: str, model: MaskedImageModel, batch: ImageBatch, clock: Clock, repeats: int, steps: int
) -> Iterator[Row]:
    """One model: probes against the bare forward."""
    info = model.info
    sampled = info.mask_rule.sample(mask_keys(batch.names), info.grid, info.patch_size)
    mask = sampled.to(batch.images.device)

    @torch.no_grad()
    def bare() -> None:
        for _ in model.eval().layer_tokens(batch.images, mask):
            pass

    def everything() -> None:
        probe(model, [batch], lambda names, k: sampled, measures={}, layer_measures=[AffinityMaps()])

    def h_alone() -> None:
        probe(model, [batch], lambda names, k: sampled, measures={"heterogeneity": heterogeneity})

    probes: Mapping[str, Callable[[], None]] = {"probe of H": h_alone, "probe of everything": everything}
    plain_mb, plain_kernels = peak_mb(clock, bare), count_kernels(clock, bare)
    peaks = {what: peak_mb(clock, work) for what, work in probes.items()}
    kernels = {what: more(count_kernels(clock, work), plain_kernels) for what, work in probes.items()}
    forward: list[float] = []
    found: dict[str, list[float]] = {what: [] for what in probes}
    for repeat in range(repeats + 1):
        plain = clock.of(bare, steps)
        for what, work in probes.items():
            took = clock.of(work, steps)
            if repeat:
                found[what].append(took)
        if repeat:
            forward.append(plain)
    for what in probes:
        peak = peaks[what]
        added = None if peak is None or plain_mb is None else peak - plain_mb
        precision = "bf16" if batch.images.dtype == torch.bfloat16 else "fp32"
        yield Row(
            what,
            name,
            precision,
            False,
            len(batch.names),
            statistics.median(forward),
            statistics.median(found[what]),
            None,
            kernels[what],
            plain_mb,
            added,
        )


class Case(NamedTuple):
    """A model and how it is trained."""

    name: str
    build: Callable[[], MaskedImageModel]
    bf16: bool
    tf32: bool
    times: float = 1.0  # as many images as asked for


def cases(tiny: bool) -> tuple[list[Case], list[tuple[str, Callable[[], MaskedImageModel], bool]]]:
    """What is trained, and what is measured; the most telling first."""
    small = {"depth": 2, "dim": 32, "num_heads": 2, "mlp_dim": 64} if tiny else {}
    small_decoder = {"decoder_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2, "decoder_mlp_dim": 64}

    def simmim_b() -> MaskedImageModel:
        return simmim(**small)

    def simmim_s() -> MaskedImageModel:
        return simmim(**({"dim": 384, "num_heads": 6, "mlp_dim": 1536} | small))

    def mae_b() -> MaskedImageModel:
        return mae(**small, **(small_decoder if tiny else {}))

    trained = [
        Case("simmim_vit_b", simmim_b, True, False),
        Case("simmim_vit_s", simmim_s, True, False),
        Case("simmim_vit_s", simmim_s, True, False, 2.0),
        Case("mae_vit_b", mae_b, True, False),
        Case("simmim_vit_b", simmim_b, False, False, 0.5),
        Case("simmim_vit_b", simmim_b, True, True),
        Case("simmim_vit_s", simmim_s, True, True),
        Case("mae_vit_b", mae_b, True, True),
        Case("simmim_vit_b", simmim_b, False, True, 0.5),
    ]
    measured = [
        ("simmim_vit_b", simmim_b, True),
        ("mae_vit_b", mae_b, True),
        ("simmim_vit_b", simmim_b, False),
        ("mae_vit_b", mae_b, False),
    ]
    return trained, measured


def rows(options: argparse.Namespace) -> Iterator[Row]:
    clock, began = Clock(options.device), time.monotonic()

    def late() -> bool:
        return time.monotonic() - began > options.seconds

    trained, measured = cases(options.tiny)
    if options.only == "training":
        measured = []
    if options.only == "measuring":
        trained = []
    for name, build, bf16 in measured[:2]:
        yield from measured_rows(name, build, bf16, clock, options)
    for case in trained:
        if late():
            return
        torch.backends.cuda.matmul.allow_tf32 = case.tf32
        size = max(2, round(options.batch * case.times))
        training = Training(case.build(), case.bf16, size, options.device)
        yield train(case.name, training, clock, case.tf32, options.repeats, options.steps)
        del training
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, build, bf16 in measured[2:]:
        if late():
            return
        yield from measured_rows(name, build, bf16, clock, options)


def measured_rows(
    name: str, build: Callable[[], MaskedImageModel], bf16: bool, clock: Clock, options: argparse.Namespace
) -> Iterator[Row]:
    dtype = torch.bfloat16 if bf16 else torch.float32
    torch.manual_seed(0)
    model = build().to(options.device, dtype)
    images = torch.randn(options.batch, 3, 224, 224, device=options.device, dtype=dtype)
    batch = ImageBatch(tuple(map(str, range(options.batch))), images)
    yield from measure(name, model, batch, clock, options.repeats, options.steps)


def table(found: Sequence[Row]) -> Iterator[str]:
    """Lines for people."""
    yield (
        f"{'what':<20} {'model':<13} {'prec':<5} {'tf32':<5} {'batch':>5}  {'plain':>9}  {'with':>9}  {'adds':>8}"
        f"  {'inside':>8}  {'kernels':>7}  {'peak':>9}  {'above it':>18}  target"
    )
    for row in found:
        cells = row.cells()
        inside = "" if row.inside_percent is None else f"{row.inside_percent:.2f} %"
        kernels = "" if row.kernels is None else str(row.kernels)
        peak = "" if row.plain_mb is None else f"{row.plain_mb:.0f} MB"
        above = "" if row.added_mb is None else f"{row.added_mb:.0f} MB {cells['added_mb_percent']} %"
        yield (
            f"{row.what:<20} {row.model:<13} {row.precision:<5} {'yes' if row.tf32 else 'no':<5} {row.batch:>5}"
            f"  {row.plain_ms:>6.1f} ms  {row.with_ms:>6.1f} ms  {cells['percent']:>6} %  {inside:>8}  {kernels:>7}"
            f"  {peak:>9}  {above:>18}  <= {GOALS[row.what]:.0f} %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128, help="images (half of it for float32 training)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps between two looks at the clock")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin nothing new after so long")
    parser.add_argument("--only", choices=("training", "measuring"), help="leave out the other part")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if options.tiny:
        options.batch, options.repeats, options.steps = 4, 1, 1
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(f"torch {torch.__version__}, {device}; medians of {options.repeats} turns of {options.steps}", flush=True)
    print("differences from float64 on the CPU:", flush=True)
    for line in differences(options.device):
        print(" ", line, flush=True)
    found: list[Row] = []
    try:
        for row in rows(options):
            found.append(row)
            print(list(table([row]))[1], file=sys.stderr, flush=True)
    finally:  # what is known is kept, also where a model does not fit
        print("\n".join(table(found)), flush=True)
        if options.csv:
            with options.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(row.cells() for row in found)


if __name__ == "__main__":
    main()
