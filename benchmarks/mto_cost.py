"""What the attached losses cost above a plain training step (forward, backward, fused AdamW), time and peak memory.

Time: some plain steps and some with the losses take turns on one model in one process, the first of each turn not
timed. Printed are the ratio of the medians of whole steps and, steadier on a busy machine, the time inside the hooks,
``loss()`` and their backward passes (with one addition of gradients per layer depth, which autograd makes) over the
rest of the same step. On a CPU times are those of the process (all its threads), which other programs disturb little.
Memory: the peak (VmHWM) of fresh processes that do one or the other, median of three each; the C library is told to
return all that is greater than 1 MB at once, as gaps that it keeps else come and go by tens of MB, in either. On CUDA:
whole steps, and peak allocated memory. Random weights and images.

Run: ``python benchmarks/mto_cost.py`` (about fifteen minutes on two cores; ``--no-memory`` for the times alone).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from probe_cost import AT_ONCE, status_megabytes

from mto_analysis.affinity import entropies
from mto_analysis.masks import MaskRule, mask_keys
from mto_analysis.models import MAE, MAEConfig, MaskedImageModel, ModelInfo, SimMIM, SimMIMConfig
from mto_analysis.models.targets import reconstruction_loss
from mto_analysis.mto import MTO, MTOConfig, attach_mto

STEPS = 3  # timed ones of a turn

#: Methods in which the losses spend their time.
HOOKS = ("_model_starts", "_model_ends", "_call_starts", "_call_ends", "_seen", "_goes_on", "loss")

# On CUDA a step ends with a wait for the device, so elapsed time is the step's.
clock = time.perf_counter if torch.cuda.is_available() else time.process_time


class Case(NamedTuple):
    """A model, its precision, and the targets in percent of the plain step (on CUDA the time's is 8)."""

    build: Callable[[], MaskedImageModel]
    bf16: bool
    time: float
    memory: float = 2.0


def simmim(**widths: int) -> SimMIM:
    return SimMIM(SimMIMConfig(**widths), ModelInfo("simmim_vit", "inpainting", 224, 16, MaskRule("block", 0.6, 32)))


def mae(**widths: int) -> MAE:
    return MAE(MAEConfig(**widths), ModelInfo("mae", "decoder", 224, 16, MaskRule("random", 0.75, 16)))


CASES = {
    "simmim_vit_b": Case(simmim, False, 2.0),
    "mae_vit_b": Case(mae, False, 2.0),
    "simmim_vit_s": Case(lambda: simmim(dim=384, num_heads=6, mlp_dim=1536), True, 4.0),
}


class Training:
    """A model in training, one step at a time, with the losses or without."""

    def __init__(self, model: MaskedImageModel, bf16: bool, size: int, device: str) -> None:
        torch.manual_seed(0)
        self.model = model.train().to(device)
        for token in (self.model.mask_token, self.model.cls_token):
            torch.nn.init.normal_(token, std=0.02)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.images = torch.randn(size, 3, 224, 224, device=device)
        info = self.model.info
        self.mask = info.mask_rule.sample(mask_keys(map(str, range(size))), info.grid, info.patch_size).to(device)
        self.device, self.bf16 = device, bf16

    def step(self, mto: MTO | None) -> None:
        """One step, with the losses where there is a handle."""
        with torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext():
            prediction = self.model(self.images, self.mask)
        patch = self.model.info.patch_size
        loss = reconstruction_loss(prediction.float(), self.images, self.mask, patch).mean()
        if mto is not None:
            loss = loss + mto.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Stopwatch:
    """Seconds inside what the losses add."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.gradient: torch.Tensor | None = None

    def on(self, owner: object, name: str) -> None:
        """Time a function of an object or class."""
        function = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            start = clock()
            result = function(*arguments)
            if isinstance(result, tuple) and isinstance(result[0], torch.Tensor):
                self.gradient = torch.zeros_like(result[0]) if self.gradient is None else self.gradient
                self.gradient.add_(result[0])  # in place, as autograd adds it to the model's own
            self.seconds += clock() - start
            return result

        setattr(owner, name, staticmethod(timed) if isinstance(owner, type) else timed)


def times(case: Case, size: int, turns: int, device: str) -> tuple[float, float, float]:
    """Median seconds of a plain step, percent by whole steps, percent inside what the losses add."""
    training, watch = Training(case.build(), case.bf16, size, device), Stopwatch()
    functions = (entropies._Products, entropies._RowEntropy)
    originals = [function.backward for function in functions]
    for function in functions:
        watch.on(function, "backward")

    def timed_steps(mto: MTO | None) -> Iterator[tuple[float, float]]:
        for step in range(STEPS + 1):
            watch.seconds, start = 0.0, clock()
            training.step(mto)
            if step:  # the first one finds its memory
                yield clock() - start, watch.seconds

    plain, attached, inside = [], [], []
    for _ in range(turns):
        plain += [seconds for seconds, _ in timed_steps(None)]
        mto = attach_mto(training.model, MTOConfig(), check_every=0)
        for name in HOOKS:
            watch.on(mto, name)
        for seconds, added in timed_steps(mto):
            attached.append(seconds)
            inside.append(100 * added / (seconds - added))
        mto.detach()
    for function, original in zip(functions, originals, strict=True):
        function.backward = staticmethod(original)
    whole = 100 * (statistics.median(attached) / statistics.median(plain) - 1)
    return statistics.median(plain), whole, statistics.median(inside)


def peak_megabytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return status_megabytes("VmHWM")


def memory(name: str, size: int, device: str, repeats: int = 3) -> tuple[float, float]:
    """Median peak megabytes of processes that train plainly, and with the losses."""
    peaks: dict[str, list[float]] = {"plain": [], "mto": []}
    for _ in range(repeats):
        for what, found in peaks.items():
            command = [sys.executable, __file__, "--child", what, "--models", name, "--batch", str(size)]
            command += ["--device", device]
            printed = subprocess.run(command, check=True, capture_output=True, text=True, env=AT_ONCE).stdout
            found.append(float(printed))
    return statistics.median(peaks["plain"]), statistics.median(peaks["mto"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", choices=("plain", "mto"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        case = CASES[options.models[0]]
        training = Training(case.build(), case.bf16, options.batch, options.device)
        mto = attach_mto(training.model, MTOConfig(), check_every=0) if options.child == "mto" else None
        for _ in range(3):
            training.step(mto)
        print(peak_megabytes(options.device))
        return
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, batch {options.batch}")
    print("model         precision  plain step  whole steps   inside  target  plain peak  above it        target")
    for name in options.models:
        case = CASES[name]
        plain, whole, inside = times(case, options.batch, options.turns, options.device)
        if options.device == "cuda":
            inside = float("nan")  # launches return at once: only whole steps tell
        target = 8.0 if options.device == "cuda" else case.time
        row = f"{name:<13} {'bf16' if case.bf16 else 'fp32':<9}  {plain:>8.3f} s  {whole:>9.2f} %  {inside:>5.2f} %"
        row += f"  <= {target:.0f} %"
        if not options.no_memory:
            low, high = memory(name, options.batch, options.device)
            row += f"  {low:>7.0f} MB  {high - low:>5.1f} MB {100 * (high / low - 1):>5.2f} %  <= {case.memory:.0f} %"
        print(row, flush=True)


if __name__ == "__main__":
    main()
