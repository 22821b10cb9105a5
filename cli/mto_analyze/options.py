"""Options that several commands share, with their help."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

SOURCE = "File or Hugging Face folder, id of the registry, hf://owner/name[@revision], or URL"

Checkpoints = Annotated[list[str], typer.Option("--ckpt", help=f"{SOURCE}; repeat to compare.")]
Checkpoint = Annotated[str, typer.Argument(help=f"{SOURCE}.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]
Heads = Annotated[
    int | None, typer.Option("--num-heads", min=1, help="Encoder attention heads, where the file does not say.")
]
DecoderHeads = Annotated[
    int | None, typer.Option("--decoder-num-heads", min=1, help="Decoder attention heads, where the file does not say.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are already there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress bar; warnings still show.")]
Images = Annotated[
    Path | None, typer.Option(help="Folder, list (.txt) or Parquet file; by default 256 bundled CIFAR-10 images.")
]
Labels = Annotated[list[str] | None, typer.Option("--label", help="Name of each checkpoint, in order.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Use only N images, evenly spaced over the sorted list.", metavar="N")
]
MaskRatio = Annotated[float | None, typer.Option(help="Fraction masked; by default the model's own.")]
MaskUnit = Annotated[int | None, typer.Option(min=1, help="Side of a mask unit in pixels; by default the model's own.")]
Masks = Annotated[Path | None, typer.Option(help="Mask file (.npz with `mask` and `names`).")]
Seed = Annotated[int, typer.Option(help="Seed of the random masks.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Batch size.")]
DeviceName = Annotated[str, typer.Option(help="auto (CUDA, else CPU), cpu, cuda, cuda:N, or mps.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images.")]
Strict = Annotated[bool, typer.Option("--strict", help="A broken image is an error.")]
Out = Annotated[Path, typer.Option(help="Folder for results.")]


class Precision(StrEnum):
    """Number formats of the model's forward."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


Dtype = Annotated[Precision, typer.Option(help="Of the forward; H is always computed in float32 or better.")]
