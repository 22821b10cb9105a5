"""``mto-analyze inspect``: what a checkpoint is, where its masked tokens live, what is missing."""

import json
from typing import TYPE_CHECKING

import typer

from mto_analyze import measuring
from mto_analyze.options import AsJson, Checkpoint, FileOptions, takes

if TYPE_CHECKING:
    from mto_analysis.checkpoints import CheckpointReport


@takes(FileOptions)
def inspect(context: typer.Context, ckpt: Checkpoint, as_json: AsJson = False) -> None:
    """Print what a checkpoint holds, without loading its weights.

    Exit code 3 if it cannot be measured.

    Example:
      mto-analyze inspect mae_vit_base_full
    """
    from mto_analysis.checkpoints import inspect_checkpoint

    report = inspect_checkpoint(ckpt, **measuring.loading(context.params))
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else in_words(report))


def in_words(report: "CheckpointReport") -> str:
    """A report as lines of a terminal."""
    info = report.info
    config = ", ".join(
        f"{name} {'?' if value is None else value}"
        for name, value in report.config.items()
        if value is not None or name in report.needed
    )
    stacks = ", ".join(f"{stack} (layer depths 0 to {depth})" for stack, depth in report.depths.items())
    rows = {
        "file": report.path,
        "family": f"{info.family} ({info.layout})",
        "architecture": config,
        "parameters": f"{report.parameters / 1e6:.1f} M ({', '.join(report.dtypes)} in the file)",
        "masked tokens": f"{info.style}-style, in {stacks}",
        "image": f"{info.pixels}, patches of {info.patch_size} px, {info.num_patches} patches, "
        f"{info.channels} channel{'s' * (info.channels > 1)}",
        "masks": f"{info.mask_rule} ({info.mask_rule_source})",
        "caveat": info.caveat or "none",
        "assumed": "; ".join(info.assumptions) or "nothing",
        "normalization": f"mean {info.mean}, std {info.std} ({info.statistics_source})",
        "target": (info.target or "not in the file").replace("_", " "),
        "epoch": "not in the file" if report.epoch is None else str(report.epoch),
        "left out": ", ".join(report.dropped) or "nothing",
        "missing": ", ".join(f"--{name.replace('_', '-')}" for name in report.needed) or "nothing",
    }
    return "\n".join(f"{name + ':':<15}{value}" for name, value in rows.items())
