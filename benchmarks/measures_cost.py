"""What all measures cost: ``mto-analyze heterogeneity --measures all`` over the same command with H alone, in one run.

Both commands take turns in one process, on the same images and SimMIM ViT-B with random weights at 224 px; the first
turn warms up. Printed are the median seconds and the median of the ratios, by the clock and, steadier on a busy
machine, of the processor; with ``--each``, for each measure alone, the ratios of one turn.

Run: ``python benchmarks/measures_cost.py`` (about ten minutes on two cores; ``--each`` for the measures one by one).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from typer.testing import CliRunner

from mto_analysis.checkpoints import save_checkpoint
from mto_analysis.masks import MaskRule
from mto_analysis.models import ModelInfo, SimMIM, SimMIMConfig
from mto_analysis.probe.measures import MEASURES
from mto_analyze import app

TARGET = 2.0


def seconds(folder: Path, measures: str, limit: int, device: str) -> tuple[float, float]:
    """Of one whole command: by the clock, and of the processor."""
    options = ["--ckpt", str(folder / "simmim.safetensors"), "--limit", str(limit), "--batch-size", "16", "--overwrite"]
    out = ["--out", str(folder / "out"), "--device", device, "--quiet"]
    start, busy = time.perf_counter(), time.process_time()
    result = CliRunner().invoke(app, ["heterogeneity", *options, *out, "--measures", measures])
    if result.exit_code:
        raise SystemExit(result.output) from result.exception
    return time.perf_counter() - start, time.process_time() - busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=32, help="images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--each", action="store_true", help="also every measure alone")
    options = parser.parse_args()
    torch.manual_seed(0)
    info = ModelInfo("simmim_vit", "inpainting", 224, 16, MaskRule("block", 0.6, 32))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(SimMIM(SimMIMConfig(), info), folder / "simmim.safetensors")
        alone, every = [], []
        for turn in range(options.repeats + 1):
            pair = [seconds(folder, measures, options.limit, options.device) for measures in ("h", "all")]
            if turn:
                alone.append(pair[0])
                every.append(pair[1])
        for at, words in enumerate(("by the clock", "of the processor")):
            ratio = statistics.median(b[at] / a[at] for a, b in zip(alone, every, strict=True))
            h, both = (statistics.median(each[at] for each in times) for times in (alone, every))
            print(f"{words}: H alone {h:.2f} s, all {both:.2f} s, ratio {ratio:.2f} (target: at most {TARGET:g})")
        for measure in MEASURES if options.each else ():
            if measure not in ("h", "lidar"):
                took = seconds(folder, measure, options.limit, options.device)
                print(measure, *(f"{took[at] / statistics.median(each[at] for each in alone):.2f}" for at in (0, 1)))


if __name__ == "__main__":
    main()
