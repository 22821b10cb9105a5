"""The whole of ``mto-analyze heterogeneity`` beside what it cannot do without, as ratios of one run.

Throughput: SimMIM ViT-B at 224 px over JPEG files of 500 x 375, with the default number of worker processes, against
the slower of decoding alone (the same batches, no model) and the forward alone (the same batches in memory, nothing
measured, products as in the probe): at least 0.9. A short run is subtracted from each, so that what is done once does
not count. All take turns; of each the shortest time is taken, and beside it the processor time with that of worker
processes, which other programs disturb less: on a CPU, which does all of it, the ratio of processor times is that of
the forward to everything.

Start: the command on eight of the bundled images, figures included, against ``import torch, timm.models, matplotlib,
pandas``, as processes that take turns: at most 1.25.

Without ``--images`` the JPEG files are made here. Run: ``python benchmarks/end_to_end.py`` (some minutes on two cores).
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from input_pipeline import smooth_images
from probe_cost import build

from mto_analysis.demo import DEMO_CHECKPOINTS
from mto_analysis.images import image_batches, open_images
from mto_analysis.images.loading import usual_workers
from mto_analysis.models import MaskedImageModel
from mto_analysis.probe import masks_from_rule
from mto_analysis.probe.request import LoadedModel, Request, Settings
from mto_analysis.probe.sharing import shared_probe
from mto_analysis.runtime.precision import full_float32

THROUGHPUT, START = 0.9, 1.25
IMPORTS = "import torch, timm.models, matplotlib, pandas"


class Took(NamedTuple):
    """Seconds by the clock, and of processors."""

    wall: float
    cpu: float


def processor() -> str:
    """Its name, as the system tells it."""
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return found[0].partition(":")[2].strip() if found else platform.processor()


def used() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def took(work: Callable[[], object]) -> Took:
    wall, cpu = time.perf_counter(), used()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Took(time.perf_counter() - wall, used() - cpu)


def shortest(works: dict[str, Callable[[], object]], turns: int) -> dict[str, Took]:
    """The shortest of each, in turns."""
    found: dict[str, list[Took]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            found[name].append(took(work))
    return {name: Took(*map(min, zip(*each, strict=True))) for name, each in found.items()}


@contextmanager
def jpegs(folder: Path | None, count: int) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        for row, image in enumerate(smooth_images(min(count, 32))):
            for copy in range(row, count, 32):
                image.save(Path(made, f"{copy:04d}.jpg"), quality=90)
        yield Path(made)


def throughput(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Images per second of each, by the clock; ratios of processor times."""
    images = open_images(folder)
    model: MaskedImageModel = build("simmim_vit_b").to(options.device).eval()
    request = Request(["simmim_vit_b"], images, Settings(limit=options.count, device=options.device))
    rows = request.settings.rows(images)
    workers = usual_workers(len(rows))
    few = max(options.count // 8, 8)

    def decode(count: int) -> int:
        return sum(len(b.names) for b in image_batches(images, model.info, limit=count, num_workers=workers))

    batch = next(image_batches(images, model.info, limit=32))

    @torch.no_grad()
    def forward(count: int) -> None:
        with full_float32(options.device):
            for start in range(0, count, 32):
                part = batch.images[: min(32, count - start)].to(options.device)
                mask = masks_from_rule(model.info)(batch.names[: len(part)], 0).to(options.device)
                for _ in model.layer_tokens(part, mask):
                    pass

    def probe(count: int) -> None:
        settings = Settings(limit=count, device=options.device, num_workers=workers)
        request = Request(["simmim_vit_b"], images, settings)
        loaded = LoadedModel("simmim_vit_b", model, masks_from_rule(model.info), None, {})
        shared_probe(request, loaded.model, loaded.masks, label="")

    works: dict[str, Callable[[], object]] = {}
    for name, work in (("decoding", decode), ("forward", forward), ("heterogeneity", probe)):
        works[f"{name}, few"] = lambda work=work: work(few)
        works[name] = lambda work=work: work(options.count)
    found = shortest(works, options.turns)
    net = {
        name: Took(*(a - b for a, b in zip(found[name], found[f"{name}, few"], strict=True)))
        for name in ("decoding", "forward", "heterogeneity")
    }
    slower = max(net["decoding"].wall, net["forward"].wall)
    print(f"{len(rows)} JPEG files, {workers} worker processes, {options.device}, {torch.get_num_threads()} threads")
    for name, each in net.items():
        rate = (options.count - few) / each.wall
        print(f"  {name:<14}{rate:>8.1f} images/s  {each.wall:>7.2f} s  {each.cpu:>7.2f} s of processors")
    return {
        "wall": slower / net["heterogeneity"].wall,
        "processors": max(net["decoding"].cpu, net["forward"].cpu) / net["heterogeneity"].cpu,
    }


def start(turns: int) -> dict[str, float]:
    """The command on eight images over the imports, by the clock and in processor time."""
    with tempfile.TemporaryDirectory() as out:
        command = ["-m", "mto_analyze", "heterogeneity", "--ckpt", str(DEMO_CHECKPOINTS["SimMIM"]), "--limit", "8"]
        command += ["--out", f"{out}/h", "--overwrite"]
        found = shortest({"imports": lambda: run("-c", IMPORTS), "command": lambda: run(*command)}, turns)
    for name, each in found.items():
        print(f"  {name:<14}{each.wall:>7.2f} s  {each.cpu:>7.2f} s of processors")
    imports, whole = found["imports"], found["command"]
    return {"wall": whole.wall / imports.wall, "processors": whole.cpu / imports.cpu}


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="JPEG files (default: made here)")
    parser.add_argument("--count", type=int, default=256, help="images")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("throughput", "start"))
    options = parser.parse_args()
    print(f"{processor()}, torch {torch.__version__}")
    if options.only != "throughput":
        ratios = start(options.turns + 2)
        print(f"command / imports: {ratios['wall']:.2f}, processors {ratios['processors']:.2f} (<= {START})")
    if options.only != "start":
        with jpegs(options.images, options.count) as folder:
            ratios = throughput(options, folder)
        print(
            f"heterogeneity / the slower of decoding and forward: {ratios['wall']:.3f}, "
            f"processors {ratios['processors']:.3f} (>= {THROUGHPUT})"
        )


if __name__ == "__main__":
    main()
