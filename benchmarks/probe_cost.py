"""What measuring H at every layer depth costs above the bare forward of the same model, in time and in peak memory.

Time: the bare forward and the probe take turns in one process; printed are the median ratio of whole runs and, steadier
on a busy machine, the time spent inside the measure over the rest of the same run. Memory: the peak (VmHWM) of fresh
processes that do one or the other, median of five each. Random weights, random pictures.

Run: ``python benchmarks/probe_cost.py`` (about ten minutes on two cores; ``--no-memory`` for the times alone).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from mto_analysis.affinity import TokenSplit, heterogeneity
from mto_analysis.data import PictureBatch
from mto_analysis.masking import MaskRule
from mto_analysis.models import MAE, MAEConfig, MaskedImageModel, ModelInfo, SimMIM, SimMIMConfig
from mto_analysis.probe import masks_from_rule, probe

TARGETS = {"time": 2.0, "memory": 16.0}


def build(name: str) -> MaskedImageModel:
    torch.manual_seed(0)
    if name == "mae_vit_b":
        return MAE(MAEConfig(), ModelInfo("mae", "decoder", 224, 16, MaskRule("random", 0.75, 16)))
    return SimMIM(SimMIMConfig(), ModelInfo("simmim_vit", "inpainting", 224, 16, MaskRule("block", 0.6, 32)))


def pictures(size: int) -> PictureBatch:
    generator = torch.Generator().manual_seed(0)
    return PictureBatch(tuple(map(str, range(size))), torch.randn(size, 3, 224, 224, generator=generator))


@torch.no_grad()
def bare(model: MaskedImageModel, batch: PictureBatch) -> None:
    mask = masks_from_rule(model.info)(batch.names, 0)
    for _ in model.eval().layer_tokens(batch.images, mask):
        pass


class Stopwatch:
    """The measure, with the time spent in it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, tokens: torch.Tensor, split: TokenSplit) -> torch.Tensor:
        """H, timed."""
        start = time.perf_counter()
        value = heterogeneity(tokens, split)
        self.seconds += time.perf_counter() - start
        return value


def times(name: str, size: int, repeats: int) -> tuple[float, float, float]:
    """Median seconds of the bare forward, percent by whole runs, percent inside the measure."""
    model, batch = build(name), pictures(size)
    forward, whole, inside = [], [], []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        bare(model, batch)
        middle = time.perf_counter()
        watch = Stopwatch()
        probe(model, [batch], measures={"heterogeneity": watch})
        end = time.perf_counter()
        if repeat:  # the first turn warms up
            forward.append(middle - start)
            whole.append(100 * ((end - middle) / (middle - start) - 1))
            inside.append(100 * watch.seconds / (end - middle - watch.seconds))
    return statistics.median(forward), statistics.median(whole), statistics.median(inside)


def peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def memory(name: str, size: int, repeats: int = 5) -> tuple[float, float]:
    """Median peak megabytes of processes that run the bare forward, and the probe."""
    peaks: dict[str, list[float]] = {"bare": [], "probe": []}
    for _ in range(repeats):
        for what, found in peaks.items():
            command = [sys.executable, __file__, "--child", what, "--models", name, "--batches", str(size)]
            found.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return statistics.median(peaks["bare"]), statistics.median(peaks["probe"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["simmim_vit_b", "mae_vit_b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", choices=("bare", "probe"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        model, batch = build(options.models[0]), pictures(options.batches[0])
        for _ in range(2):
            bare(model, batch) if options.child == "bare" else probe(model, [batch])
        print(peak_megabytes())
        return
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"targets: {TARGETS['time']} %, {TARGETS['memory']} MB"
    )
    print("model         batch  bare forward  probe, whole runs  probe, inside  peak bare  above it")
    for name in options.models:
        for size in options.batches:
            forward, whole, inside = times(name, size, options.repeats)
            row = f"{name:<13} {size:>5}  {forward:>10.2f} s  {whole:>15.2f} %  {inside:>11.2f} %"
            if not options.no_memory:
                low, high = memory(name, size)
                row += f"  {low:>6.0f} MB  {high - low:>5.1f} MB"
            print(row, flush=True)


if __name__ == "__main__":
    main()
