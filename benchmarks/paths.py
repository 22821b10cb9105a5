"""How much code the five main paths of ``docs/architecture.md`` enter: distinct modules and functions of this project.

Run in the project's root: ``python benchmarks/paths.py``. Each path runs once in a process of its own on the bundled
models and images; a function counts once however often it is called, comprehensions and lambdas are not counted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import mto_analysis

ASSETS = Path(mto_analysis.__file__).parent / "assets"
IMAGES = str(ASSETS / "cifar10_test_256.parquet")
TINY = ("dim=16", "depth=1", "num_heads=2", "mlp_dim=32", "decoder_dim=16", "decoder_depth=1", "decoder_mlp_dim=32")
EXPERIMENT = """
summary = "One small run."
seeds = [0]
[[recipes]]
recipe = "mae_cifar10_tiny"
set = { epochs = 2, batch_size = 64, "model.depth" = 1 }
[[arms]]
name = "plain"
[[arms]]
name = "MTO"
mto = "default"
[evaluation]
limit = 64
test_limit = 32
"""


def checkpoint_to_figure() -> None:
    command("heterogeneity", "--ckpt", str(ASSETS / "mae_cifar10_final.safetensors"), "--limit", "8", "--out", "out")


def forward_to_loss() -> None:
    import torch

    from mto_analysis.checkpoints import load_checkpoint
    from mto_analysis.training import attach_mto

    model = load_checkpoint(ASSETS / "mae_cifar10_final.safetensors").train()
    mask = torch.arange(64).expand(2, -1) >= 16
    entered.clear()  # only what happens from the attachment on
    mto = attach_mto(model)
    model(torch.randn(2, 3, 32, 32), mask).sum()
    mto.loss().backward()


def log_to_rauc() -> None:
    rows = [f"{method},{epoch},{epoch * speed}" for method, speed in (("a", 1), ("b", 2)) for epoch in range(1, 6)]
    Path("log.csv").write_text("\n".join(["method,epoch,score", *rows]) + "\n")
    command("rauc", "--log", "log.csv", "--baseline", "a", "--target", "b", "--out", "out")


def image_to_batch() -> None:
    tiny = [text for pair in TINY for text in ("--set", f"model.{pair}")]
    command(
        *("pretrain", "--recipe", "mae_cifar10_tiny", "--images", IMAGES, "--out", "run"),
        *("--set", "epochs=1", "--set", "batch_size=64", *tiny),
    )


def experiment_to_table() -> None:
    Path("experiment.toml").write_text(EXPERIMENT)
    for name in ("train", "test"):
        Path(f"{name}.parquet").symlink_to(IMAGES)
    command("experiment", "experiment.toml", "--images", ".", "--out", "out")


PATHS = {
    each.__name__: each
    for each in (checkpoint_to_figure, forward_to_loss, log_to_rauc, image_to_batch, experiment_to_table)
}
entered: set[tuple[str, str]] = set()


def command(*arguments: str) -> None:
    from mto_analyze import app

    try:
        app(list(arguments), prog_name="mto-analyze")
    except SystemExit as stop:
        if stop.code:
            raise


def count(frame: Any, event: str, argument: Any) -> None:
    module = frame.f_globals.get("__name__") or ""
    name = frame.f_code.co_qualname
    if event == "call" and module.startswith(("mto_analysis", "mto_analyze")) and not name.endswith(">"):
        entered.add((module, name))


def main() -> None:
    if len(sys.argv) > 1:
        threading.setprofile(count)
        sys.setprofile(count)
        PATHS[sys.argv[1]]()
        sys.setprofile(None)
        print(f"{sys.argv[1]}: {len({module for module, _ in entered})} modules, {len(entered)} functions")
        return
    for name in PATHS:
        with tempfile.TemporaryDirectory() as folder:
            found = subprocess.run(
                [sys.executable, Path(__file__).resolve(), name], cwd=folder, capture_output=True, text=True
            )
            print(found.stdout.splitlines()[-1] if found.returncode == 0 else f"{name} failed: {found.stderr}")


if __name__ == "__main__":
    main()
