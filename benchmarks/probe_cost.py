"""What measuring every layer depth costs above the bare forward of the same model, in time and in peak memory.

Measured are H alone, and everything that Fig. 2 takes: H, quadrant masses, moments of dot products and cosines, row
entropies, and the mean map. Time: bare forwards and the probes take turns in one process, each over a stream of batches
as in use. The bare forward runs twice: with torch's own settings, against which the targets were set, and with float32
products by the faster library (``runtime.precision``), as in the probe. Printed are the median ratio of whole runs
to the latter, and, steadier on a busy machine, the time spent inside the measure over the rest of the same run and over
the bare forward with torch's own settings.
Memory: the peak (VmHWM) of fresh processes that do one or the other, median of three each, and how much of the
difference is library code that only the probe runs (RssFile at the end). The C library is told to return all that is
greater than 1 MB at once: gaps that it keeps else come and go by tens of MB, in either. Random weights and images.

Run: ``python benchmarks/probe_cost.py`` (about a quarter of an hour on two cores; ``--no-memory`` for the times alone).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mto_analysis.affinity import TokenSplit, heterogeneity
from mto_analysis.images import ImageBatch
from mto_analysis.masks import MaskRule
from mto_analysis.models import MAE, LayerTokens, MAEConfig, MaskedImageModel, ModelInfo, SimMIM, SimMIMConfig
from mto_analysis.probe import masks_from_rule, probe
from mto_analysis.probe.quadrants import AffinityMaps
from mto_analysis.runtime.precision import full_float32

clock = time.perf_counter
AT_ONCE = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
TARGETS = "targets, of the bare forward: H 2 %; everything 4 % (SimMIM ViT-B), 3 % (MAE ViT-B); 16 MB"


def build(name: str) -> MaskedImageModel:
    torch.manual_seed(0)
    if name == "mae_vit_b":
        return MAE(MAEConfig(), ModelInfo("mae", "decoder", 224, 16, MaskRule("random", 0.75, 16)))
    return SimMIM(SimMIMConfig(), ModelInfo("simmim_vit", "inpainting", 224, 16, MaskRule("block", 0.6, 32)))


def images(size: int, batches: int) -> list[ImageBatch]:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.arange(batches * size).view(batches, size)
    return [
        ImageBatch(tuple(map(str, batch.tolist())), torch.randn(size, 3, 224, 224, generator=generator))
        for batch in numbers
    ]


@torch.no_grad()
def bare(model: MaskedImageModel, stream: Sequence[ImageBatch]) -> None:
    for batch in stream:
        mask = masks_from_rule(model.info)(batch.names, 0)
        for _ in model.eval().layer_tokens(batch.images, mask):
            pass


class Stopwatch:
    """What is measured, with the time spent in it."""

    def __init__(self, what: str) -> None:
        self.seconds = 0.0
        self._maps = AffinityMaps() if what == "everything" else None

    def __call__(
        self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]
    ) -> Mapping[str, torch.Tensor]:
        """The numbers of a layer, timed."""
        start = clock()
        if self._maps is None:
            value: Mapping[str, torch.Tensor] = {"heterogeneity": heterogeneity(layer.tokens, split)}
        else:
            value = self._maps(stack, layer, split, names)
        self.seconds += clock() - start
        return value


class Cost(NamedTuple):
    """Of a measure, in percent."""

    whole: float  #: whole runs, of the bare forward with the same products
    inside: float  #: inside the measure, of the rest of the same run
    of_bare: float  #: inside the measure, of the bare forward with torch's own settings


def times(
    name: str, size: int, batches: int, repeats: int, measures: Sequence[str]
) -> tuple[float, float, dict[str, Cost]]:
    """Median seconds of a batch's bare forward, with torch's own settings and with fast products; what each costs."""
    model, stream = build(name), images(size, batches)
    own: list[float] = []
    fast: list[float] = []
    costs: dict[str, list[Cost]] = {what: [] for what in measures}
    for repeat in range(repeats + 1):
        start = clock()
        bare(model, stream)
        middle = clock()
        with full_float32():
            bare(model, stream)
        end = clock()
        bare_seconds, seconds = middle - start, end - middle
        for what in measures:
            watch = Stopwatch(what)
            start = clock()
            probe(model, stream, measures={}, layer_measures=[watch])
            took = clock() - start
            if repeat:  # the first turn warms up
                rest = took - watch.seconds
                costs[what].append(Cost(took / seconds - 1, watch.seconds / rest, watch.seconds / bare_seconds))
        if repeat:
            own.append(bare_seconds / batches)
            fast.append(seconds / batches)
    percent = {
        what: Cost(*(100 * statistics.median(column) for column in zip(*each, strict=True)))
        for what, each in costs.items()
    }
    return statistics.median(own), statistics.median(fast), percent


def status_megabytes(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def memory(name: str, size: int, measures: Sequence[str], repeats: int = 3) -> dict[str, tuple[float, float]]:
    """Medians over processes that run the bare forward, and each probe: peak megabytes, and those of library code."""
    found: dict[str, list[list[float]]] = {what: [] for what in ("bare", *measures)}
    for _ in range(repeats):
        for what in found:
            command = [sys.executable, __file__, "--child", what, "--models", name, "--batches", str(size)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True, env=AT_ONCE).stdout
            found[what].append([float(word) for word in printed.split()])
    return {
        what: (statistics.median(peak for peak, _ in rows), statistics.median(code for _, code in rows))
        for what, rows in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["simmim_vit_b", "mae_vit_b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--measures", nargs="+", choices=("H", "everything"), default=["H", "everything"])
    parser.add_argument("--stream", type=int, default=4, help="batches of each turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread: steady on a busy machine")
    parser.add_argument("--child", choices=("bare", "H", "everything"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        model, stream = build(options.models[0]), images(options.batches[0], 2)
        if options.child == "bare":
            bare(model, stream)
        else:
            probe(model, stream, measures={}, layer_measures=[Stopwatch(options.child)])
        print(status_megabytes("VmHWM"), status_megabytes("RssFile"))
        return
    if options.cpu_time:
        global clock
        torch.set_num_threads(1)
        clock = time.thread_time
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {TARGETS}")
    print(
        "model         batch  measure     bare forward  with fast products  whole runs  inside  of bare"
        "  peak bare  above it  of that code"
    )
    for name in options.models:
        for size in options.batches:
            own, fast, percent = times(name, size, options.stream, options.repeats, options.measures)
            peaks = {} if options.no_memory else memory(name, size, options.measures)
            for what, cost in percent.items():
                row = f"{name:<13} {size:>5}  {what:<10}  {own:>10.2f} s  {fast:>16.2f} s"
                row += f"  {cost.whole:>8.2f} %  {cost.inside:>4.2f} %  {cost.of_bare:>5.2f} %"
                if peaks:
                    above, code = (there - bare for there, bare in zip(peaks[what], peaks["bare"], strict=True))
                    row += f"  {peaks['bare'][0]:>6.0f} MB  {above:>5.1f} MB  {code:>9.1f} MB"
                print(row, flush=True)


if __name__ == "__main__":
    main()
