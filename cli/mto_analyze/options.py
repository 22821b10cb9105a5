"""Options that several commands share: each is defined once, in a group that :func:`takes` gives to a command.

A group is a class whose annotated attributes are options and whose ``panel`` is their heading in the help; an option
may name another panel. A command declares only what is its own, and those shared options whose values it reads itself;
all values are in ``context.params``.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import copy
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer
from typer.models import OptionInfo

#: Headings of the help, in this order; a command's own options stand under ``Method`` unless they say otherwise.
PANELS = ("Input", "Masks", "Model", "Method", "Evaluation", "Runs", "Output", "Figures", "Advanced")
INPUT, MASKS, MODEL, METHOD, EVALUATION, RUNS, OUTPUT, FIGURES, ADVANCED = PANELS

Command = Callable[..., None]


class Style(StrEnum):
    """Looks of figures."""

    screen = "screen"
    paper = "paper"
    slides = "slides"


class WeightsOption(StrEnum):
    """Which of the weights of a file."""

    model = "model"
    model_ema = "model_ema"


class Precision(StrEnum):
    """Number formats of a forward pass, in the one vocabulary that all commands have."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"


class EngineName(StrEnum):
    """Where the processes of a command run."""

    local = "local"
    ray = "ray"


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


def formats(text: str) -> tuple[str, ...]:
    """Formats of figures between commas."""
    from mto_analysis.figures.options import FORMATS

    found = tuple(dict.fromkeys(each.strip().lower() for each in text.split(",")))
    if set(found) - set(FORMATS):
        raise typer.BadParameter(f"{text!r} is not a list of {', '.join(FORMATS)} like pdf,png")
    return found


def figure_width(text: str) -> float:
    """A length in inches."""
    from mto_analysis.figures.options import inches

    try:
        found = inches(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not 1 <= found <= 40:
        raise typer.BadParameter(f"{text!r} is not from 1 to 40 inches")
    return found


def level(text: str) -> float:
    """A confidence level, from 0 to 1 or in percent; percent begin at 50: 2 is rather a mistake than 2 %."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if 0 < number < 1:
        return number
    if 50 <= number < 100:
        return number / 100
    raise typer.BadParameter(f"{text!r} is no confidence level: 95 % is 0.95 or 95")


def numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers like 0.5,0.5,0.5") from None


# Input.
Images = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Folder, list (.txt) or Parquet file of images; by default 256 bundled CIFAR-10 images.",
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Use only N images, evenly spaced over the sorted list.", metavar="N")
]
ImageNames = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        metavar="NAME",
        help="Only this image (path below --images, or row number); repeatable.",
        rich_help_panel=INPUT,
    ),
]
Show = Annotated[
    int, typer.Option(min=1, metavar="N", help="Without --image: number of images shown.", rich_help_panel=INPUT)
]
ValueRange = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Black and white values of images other than 8-bit.",
        rich_help_panel=ADVANCED,
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Treat a broken or skipped image as an error.", rich_help_panel=ADVANCED)
]

# Masks.
MaskRatio = Annotated[
    float | None, typer.Option(metavar="RATIO", help="Fraction of patches masked; by default the model's own.")
]
MaskUnit = Annotated[
    int | None,
    typer.Option(min=1, metavar="PX", help="Side of a mask unit in pixels; by default the model's own."),
]
Masks = Annotated[Path | None, typer.Option(metavar="FILE", help="Mask file (.npz with `mask` and `names`).")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the random masks.")]

# Models.
SOURCE = "File or Hugging Face folder, registry id, hf://owner/name[@revision], or URL"
Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help=f"{SOURCE}.")]
Checkpoints = Annotated[list[str], typer.Option("--ckpt", metavar="CKPT", help=f"{SOURCE}; repeat to compare.")]
AnyCheckpoints = Annotated[
    list[str] | None, typer.Option("--ckpt", metavar="CKPT", help=f"{SOURCE}; repeat to compare.")
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="MODULE:FACTORY",
        help="Model that a function of your own code returns; repeat to compare.",
    ),
]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="NAME", help="Name of each model, in order.")]
Heads = Annotated[
    int | None,
    typer.Option("--num-heads", min=1, metavar="N", help="Attention heads of the encoder, if not in the file."),
]
DecoderHeads = Annotated[
    int | None,
    typer.Option("--decoder-num-heads", min=1, metavar="N", help="Attention heads of the decoder, if not in the file."),
]
AutoHeads = Annotated[
    Any,
    typer.Option(
        "--num-heads",
        parser=head_count,
        metavar="N|auto",
        help="Attention heads of the encoder, if not in the file; auto: the count with the lowest loss.",
    ),
]
AutoDecoderHeads = Annotated[
    Any,
    typer.Option(
        "--decoder-num-heads",
        parser=head_count,
        metavar="N|auto",
        help="Attention heads of the decoder, if not in the file, or auto.",
    ),
]
StatedRatio = Annotated[
    float | None,
    typer.Option(
        metavar="RATIO",
        help="Fraction masked in pre-training, if the file's is not one number.",
        rich_help_panel=ADVANCED,
    ),
]
ImageSize = Annotated[
    Any,
    typer.Option(
        parser=image_size,
        metavar="PX|HxW",
        help="Image size; positions are resized to it.",
    ),
]
Mean = Annotated[
    Any,
    typer.Option(
        parser=numbers,
        metavar="M,M,M",
        help="Channel means, pixels in 0..1; by default the file's.",
        rich_help_panel=ADVANCED,
    ),
]
Std = Annotated[
    Any,
    typer.Option(
        parser=numbers,
        metavar="S,S,S",
        help="Channel standard deviations; by default the file's.",
        rich_help_panel=ADVANCED,
    ),
]
Weights = Annotated[
    WeightsOption, typer.Option(metavar="NAME", help="model, or model_ema: the momentum teacher or moving average.")
]
WeightsOrFile = Annotated[
    str,
    typer.Option(
        "--weights",
        metavar="NAME|FILE",
        help="model, or model_ema: the momentum teacher or moving average. With --model: the file of its weights.",
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.", rich_help_panel=ADVANCED)]

# Output.
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for results.", rich_help_panel=OUTPUT)]
OutFile = Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that exist.", rich_help_panel=OUTPUT)]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No notes and no progress bar, only warnings.", rich_help_panel=OUTPUT),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)]
Confidence = Annotated[
    Any, typer.Option(parser=level, metavar="LEVEL", help="Confidence level of the intervals, such as 0.95 or 95.")
]

# Figures.
DrawingStyle = Annotated[
    Style, typer.Option(metavar="NAME", help="screen, paper (serif; notes in captions.md) or slides.")
]
FigureFormat = Annotated[Any, typer.Option(parser=formats, metavar="FORMAT,...", help="Any of pdf, png and svg.")]
FigureWidth = Annotated[
    Any,
    typer.Option(
        parser=figure_width,
        metavar="LENGTH",
        help="Width, such as 86mm, 3.4in or 345pt; by default the style's.",
    ),
]

# Advanced.
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Images per forward pass.", rich_help_panel=ADVANCED)]
DeviceName = Annotated[
    str,
    typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=ADVANCED),
]
Workers = Annotated[
    int, typer.Option(min=0, metavar="N", help="Processes that decode images.", rich_help_panel=ADVANCED)
]
AutoWorkers = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Processes that decode images; by default automatic.",
        rich_help_panel=ADVANCED,
    ),
]
MeasuringPrecision = Annotated[
    Precision,
    typer.Option(
        metavar="FORMAT",
        help="fp32, bf16, fp16 or fp64, of the model.",
        rich_help_panel=ADVANCED,
    ),
]
Accumulation = Annotated[
    int, typer.Option(min=1, metavar="N", help="Micro-batches per optimizer step.", rich_help_panel=ADVANCED)
]


Measures = Annotated[
    str,
    typer.Option(
        metavar="h,NAME,...",
        help="Also: cka, rank, rankme, lidar, attention, frequency, cosine, separability; all; all,-NAME: all others.",
    ),
]

# Engines.
Jobs = Annotated[int, typer.Option(min=1, metavar="N", help="Processes at a time on a machine.")]
EngineOption = Annotated[
    EngineName,
    typer.Option(metavar="NAME", help="local (this machine) or ray (a Ray cluster).", rich_help_panel=ADVANCED),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Of the Ray cluster; by default RAY_ADDRESS, else a new local one.",
        rich_help_panel=ADVANCED,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="CPUs per process; by default those of the machine / --jobs.",
        rich_help_panel=ADVANCED,
    ),
]
Gpus = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="N",
        help="GPUs per process on Ray, also 0.5; by default those of a node / --jobs.",
        rich_help_panel=ADVANCED,
    ),
]
Retries = Annotated[
    int,
    typer.Option(min=0, metavar="N", help="Restarts of a run whose process or node died.", rich_help_panel=ADVANCED),
]


Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="TOML file of options, such as an earlier run.toml."),
]


class Group:
    """Options that stand together."""

    panel: ClassVar[str] = METHOD

    @classmethod
    def applied(cls, given: Mapping[str, Any]) -> AbstractContextManager[None]:
        """What a command runs in, where the options of the group hold for all that it does."""
        return nullcontext()


class InputOptions(Group):
    """Images to measure on."""

    panel = INPUT
    images: Images = None
    limit: Limit = None
    value_range: ValueRange = None


class MaskOptions(Group):
    """Masks of the images."""

    panel = MASKS
    mask_ratio: MaskRatio = None
    mask_unit: MaskUnit = None
    masks: Masks = None
    seed: Seed = 0


class LoadingOptions(Group):
    """How checkpoints are loaded, where there are images to compare head counts on."""

    panel = MODEL
    num_heads: AutoHeads = None
    decoder_num_heads: AutoDecoderHeads = None
    image_size: ImageSize = None
    mean: Mean = None
    std: Std = None
    offline: Offline = False


class FileOptions(LoadingOptions):
    """How one checkpoint is loaded that is read without images."""

    num_heads: Heads = None
    decoder_num_heads: DecoderHeads = None
    mask_ratio: StatedRatio = None
    weights: Weights = WeightsOption.model


class CheckpointOptions(LoadingOptions):
    """Checkpoints to measure, and how they are loaded."""

    ckpt: Checkpoints
    label: Labels = None
    weights: Weights = WeightsOption.model


class ModelOptions(LoadingOptions):
    """Checkpoints or models of the user's code to measure, and how they are loaded."""

    ckpt: AnyCheckpoints = None
    model: Models = None
    label: Labels = None
    weights: WeightsOrFile = "model"


class ComputeOptions(Group):
    """Where and how a pass over the images is computed."""

    panel = ADVANCED
    device: DeviceName = "auto"
    batch_size: BatchSize = 32


class EngineOptions(Group):
    """Where the processes of a command run, and how many at a time."""

    panel = RUNS
    jobs: Jobs = 1
    engine: EngineOption = EngineName.local
    address: Address = None
    threads: Threads = None
    gpus: Gpus = None
    retries: Retries = 2


class DrawingOptions(Group):
    """How figures are drawn."""

    panel = FIGURES
    style: DrawingStyle = Style.screen
    figure_format: FigureFormat = "png,pdf"
    width: FigureWidth = None

    @classmethod
    def applied(cls, given: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Figures are drawn and written as the options say."""
        from mto_analysis.figures.options import DrawingOptions, drawing

        return drawing(DrawingOptions(given["style"].value, given["figure_format"], given["width"]))


class OutputOptions(Group):
    """Where results go."""

    panel = OUTPUT
    out: Out
    overwrite: Overwrite = False
    quiet: Quiet = False


class EveryCommand(Group):
    """What every command has."""

    panel = ADVANCED
    config: Config = None


def takes(*groups: type[Group], without: tuple[str, ...] = (), **defaults: Any) -> Callable[[Command], Command]:
    """Give a command the options of groups, beside its own.

    Args:
        groups: Groups, in the order of the help.
        without: Names of options that this command lacks.
        defaults: Defaults that differ from the groups' own, by name.

    Returns:
        A decorator. The command is called with its own options, and with those shared ones that it declares by name
        without an option of its own.
    """
    shared = {
        parameter.name: parameter
        for group in (*groups, EveryCommand)
        for parameter in _parameters(group, defaults)
        if parameter.name not in without
    }

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        declared = inspect.signature(command).parameters
        own = [
            each.replace(annotation=_in_panel(hints[name], METHOD))
            for name, each in declared.items()
            if name not in shared
        ]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            with ExitStack() as stack:
                for group in groups:
                    stack.enter_context(group.applied(given))
                command(**{name: given[name] for name in declared})

        # Keyword-only, since options without a default may follow others.
        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *shared.values())]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {}  # typer resolves these by name, and the signature has them resolved
        return run

    return decorate


def _parameters(group: type[Group], defaults: dict[str, Any]) -> list[inspect.Parameter]:
    """The options of a group as parameters of a function, each with its panel."""
    found = []
    hints = get_type_hints(group, include_extras=True)
    for name in dict.fromkeys(
        name for each in group.__mro__ for name in inspect.get_annotations(each)
    ):  # own ones first
        if name == "panel":
            continue
        default = defaults.get(name, getattr(group, name, inspect.Parameter.empty))
        annotation = _in_panel(hints[name], group.panel)
        found.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return found


def _in_panel(annotation: Any, panel: str) -> Any:
    """An annotated option under a heading, unless it names its own; anything else as it is."""
    if len(parts := get_args(annotation)) != 2 or not isinstance(parts[1], OptionInfo):
        return annotation
    info = copy(parts[1])
    info.rich_help_panel = info.rich_help_panel or panel
    return Annotated[parts[0], info]
