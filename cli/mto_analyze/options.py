"""Options that several commands share, with their help."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class WeightsOption(StrEnum):
    """Which of the weights of a file."""

    model = "model"
    model_ema = "model_ema"


def head_count(text: str) -> int | str:
    """A number of heads, or ``auto``."""
    if text != "auto" and (not text.isdecimal() or int(text) < 1):
        raise typer.BadParameter(f"{text!r} is neither a number from 1 nor auto")
    return text if text == "auto" else int(text)


def image_size(text: str) -> int | tuple[int, int]:
    """A side in pixels, or height and width."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise typer.BadParameter(f"{text!r} is neither a side in pixels nor HEIGHTxWIDTH")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers like 0.5,0.5,0.5") from None


SOURCE = "File or Hugging Face folder, id of the registry, hf://owner/name[@revision], or URL"

Checkpoints = Annotated[list[str], typer.Option("--ckpt", help=f"{SOURCE}; repeat to compare.")]
AnyCheckpoints = Annotated[list[str] | None, typer.Option("--ckpt", help=f"{SOURCE}; repeat to compare.")]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", metavar="package.module:factory", help="Model that a function of yours makes: its code runs."
    ),
]
Checkpoint = Annotated[str, typer.Argument(help=f"{SOURCE}.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]
Heads = Annotated[
    int | None, typer.Option("--num-heads", min=1, help="Encoder attention heads, where the file does not say.")
]
DecoderHeads = Annotated[
    int | None, typer.Option("--decoder-num-heads", min=1, help="Decoder attention heads, where the file does not say.")
]
AutoHeads = Annotated[
    Any,
    typer.Option(
        "--num-heads", parser=head_count, metavar="N|auto", help="As the file does not say; auto compares losses."
    ),
]
AutoDecoderHeads = Annotated[
    Any, typer.Option("--decoder-num-heads", parser=head_count, metavar="N|auto", help="The same of the decoder.")
]
ImageSize = Annotated[
    Any,
    typer.Option(
        parser=image_size, metavar="PX|HxW", help="Instead of the file's; positions are resized as by its authors."
    ),
]
Mean = Annotated[
    Any, typer.Option(parser=numbers, metavar="M,M,M", help="Of each channel of pixels in 0..1, instead of the file's.")
]
Std = Annotated[Any, typer.Option(parser=numbers, metavar="S,S,S", help="Standard deviations, as --mean.")]
Weights = Annotated[
    WeightsOption, typer.Option(help="model_ema: the momentum teacher or moving average, where the file holds one.")
]
WeightsOrFile = Annotated[
    str,
    typer.Option(
        "--weights",
        metavar="model|model_ema|FILE",
        help="model_ema: the moving average that a file holds beside the model. With --model: the file of its weights.",
    ),
]
ValueRange = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Values of black and white, of images that are not in 8 bits (TIFF, .npy)."),
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
Strict = Annotated[bool, typer.Option("--strict", help="A broken or skipped image is an error.")]
Out = Annotated[Path, typer.Option(help="Folder for results.")]


class Precision(StrEnum):
    """Number formats of the model's forward."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


Dtype = Annotated[Precision, typer.Option(help="Of the forward; H is always computed in float32 or better.")]
