"""A checkpoint's file to a model: read, recognized, converted by the converter of its origin, built."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mto_analysis.checkpoints.containers import first_line
from mto_analysis.checkpoints.conversion import Conversion, Given, build, check_finite, untrained_tokens, zero_biases
from mto_analysis.checkpoints.fetching import resolve
from mto_analysis.checkpoints.layouts import recognize, without_holder
from mto_analysis.checkpoints.metadata import refuse_other_depth, section, whole
from mto_analysis.checkpoints.native import stored_info
from mto_analysis.checkpoints.reading import RawCheckpoint, Weights, read_checkpoint
from mto_analysis.checkpoints.statistics import (
    IMAGE_CHANNELS,
    Statistics,
    prepared_size,
    stated_statistics,
    unpublished_statistics,
)
from mto_analysis.errors import CheckpointError, HeadCountError, OptionNeededError, explained
from mto_analysis.models import MaskedImageModel, ModelInfo
from mto_analysis.models.interface import HEADS_ASSUMED, ImageSize


def load_checkpoint(
    source: str | Path | RawCheckpoint,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    image_size: ImageSize | None = None,
    mask_ratio: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    weights: Weights = "model",
    offline: bool = False,
) -> MaskedImageModel:
    """Load a masked image model as published: recognized from the file alone, strictly, without running foreign code.

    Reads MAE, SimMIM (ViT, Swin, SwinV2), BootMAE, BEiT, BEiT v2, data2vec vision, ConMIM, CAE, MILAN, Hiera, HiViT,
    MCMAE, GreenMIM, MAE-Lite, I-JEPA, iBOT (ViT, Swin), EVA and EVA-02 as their authors saved them; folders of Hugging
    Face of ViTMAE, BEiT, Swin, SwinV2 and Hiera; MAE, MFF, SimMIM Swin, BEiT, BEiT v2, MaskFeat, MILAN and CAE of
    mmpretrain; SimMIM ViT of OpenMixup; MaskFeat of PySlowFast; Prithvi of one frame; and our own layout.

    Args:
        source: A file or a Hugging Face folder, or where to get one: an id of the registry, ``hf://owner/name``, a URL;
            or what :func:`open_checkpoint` gave.
        num_heads: Attention heads of the encoder, where the file does not hold them and its width is not a published
            one. A wrong count raises no error but gives wrong numbers: compare the model's own loss.
        decoder_num_heads: The same for the decoder.
        image_size: Side of the images in pixels, or height and width: where the file does not tell, or to resize its
            positions. What was assumed or resized is listed in ``info.assumptions``.
        mask_ratio: Fraction masked in pre-training, where what the file states is not one number.
        mean: Of each channel of pixels scaled to 0..1, as in pre-training, in place of what the file states.
        std: Their standard deviations.
        weights: ``model``, or ``model_ema`` for the momentum teacher or moving average that some files hold beside it.
        offline: Never touch the network: only what is on this machine already.

    Returns:
        The model on the CPU, in float32, in eval mode; its ``info`` says how to feed it.

    Raises:
        CheckpointNotFoundError: If nothing is there.
        OptionNeededError: If a number of heads or the mask ratio must be given.
        CheckpointError: If the file cannot be used; one line says why, and what was found.

    Example:
        >>> from mto_analysis.demo import DEMO_CHECKPOINTS
        >>> load_checkpoint(DEMO_CHECKPOINTS["MAE"]).info.family
        'mae'
    """
    raw = _opened(source, weights=weights, offline=offline)
    given = Given(num_heads, decoder_num_heads, image_size, mask_ratio)
    conversion = _with_statistics(_convert(raw, given), raw, mean, std)
    with _naming(raw, conversion.info.layout):
        return build(conversion, copy=raw.mapped)


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint holds, as ``mto-analyze inspect`` shows it; ``depths`` is each stack's last layer depth."""

    path: str
    info: ModelInfo
    config: dict[str, Any]
    depths: dict[str, int]
    parameters: int
    dtypes: tuple[str, ...]
    epoch: int | None
    dropped: tuple[str, ...]
    needed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def inspect_checkpoint(
    source: str | Path | RawCheckpoint,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    image_size: ImageSize | None = None,
    mask_ratio: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    weights: Weights = "model",
    offline: bool = False,
) -> CheckpointReport:
    """Recognize a checkpoint and check that all its tensors are there and finite, without keeping the weights.

    Head counts that must be given are listed in ``needed`` and ``None`` in ``config``.

    Args:
        source: As for :func:`load_checkpoint`.
        num_heads: As for :func:`load_checkpoint`.
        decoder_num_heads: As for :func:`load_checkpoint`.
        image_size: As for :func:`load_checkpoint`.
        mask_ratio: As for :func:`load_checkpoint`.
        mean: As for :func:`load_checkpoint`.
        std: As for :func:`load_checkpoint`.
        weights: As for :func:`load_checkpoint`.
        offline: As for :func:`load_checkpoint`.

    Raises:
        CheckpointError: As :func:`load_checkpoint` would, but for missing head counts.
    """
    raw = _opened(source, mmap=True, weights=weights, offline=offline)
    conversion, needed = _converted(raw, Given(num_heads, decoder_num_heads, image_size, mask_ratio))
    conversion = _with_statistics(conversion, raw, mean, std)
    with _naming(raw, conversion.info.layout):
        model = build(conversion, materialize=False)
        check_finite(conversion.state)
    config = asdict(conversion.config)
    config |= dict.fromkeys(needed)
    epoch = raw.extras.get("epoch")
    return CheckpointReport(
        path=str(raw.path),
        info=conversion.info,
        config=config,
        depths={stack: model.depth(stack) for stack in model.stacks},
        parameters=sum(math.prod(parameter.shape) for parameter in model.parameters()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in raw.tensors.values()})),
        epoch=epoch if isinstance(epoch, int) else None,
        dropped=tuple(conversion.state.dropped),
        needed=tuple(needed),
    )


def checkpoint_info(
    raw: RawCheckpoint, image_size: ImageSize | None = None, mask_ratio: float | None = None
) -> ModelInfo:
    """What names, shapes and settings of an opened checkpoint say about its model; weights are not looked at.

    Raises:
        CheckpointError: If the file is not recognized, or its settings do not fit together.
    """
    return _converted(raw, Given(image_size=image_size, mask_ratio=mask_ratio), OptionNeededError)[0].info


def open_checkpoint(
    source: str | Path, *, mmap: bool = False, weights: Weights = "model", offline: bool = False
) -> RawCheckpoint:
    """Resolve and read a checkpoint once, for all that is done with it afterwards.

    Its ``path``, ``sha256``, ``tensors`` and settings can be looked at; :func:`load_checkpoint` and
    :func:`inspect_checkpoint` take it in place of a source, and read nothing again.

    Args:
        source: As for :func:`load_checkpoint`.
        mmap: Map a torch archive instead of reading it.
        weights: As for :func:`load_checkpoint`.
        offline: As for :func:`load_checkpoint`.
    """
    return read_checkpoint(resolve(source, offline=offline), mmap=mmap, weights=weights)


def _opened(
    source: str | Path | RawCheckpoint, *, mmap: bool = False, weights: Weights = "model", offline: bool = False
) -> RawCheckpoint:
    if isinstance(source, RawCheckpoint):
        return source
    return open_checkpoint(source, mmap=mmap, weights=weights, offline=offline)


def _with_statistics(
    conversion: Conversion, raw: RawCheckpoint, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Conversion:
    """The number of channels and their mean and standard deviation: given, else of the file, else of the family."""
    info, channels = conversion.info, conversion.config.channels
    with _naming(raw, info.layout):
        found = Statistics(info.mean, info.std, info.statistics_source)
        own = "mto_analysis" in raw.metadata or "mto_analysis" in raw.extras  # our files state them
        if not own and None in (mean, std):
            found = stated_statistics(raw, channels) or found
        if channels != IMAGE_CHANNELS and found.source == "published" and not own:
            found = unpublished_statistics(channels)
        found = found.overridden(mean, std)
        found.check(channels)
    info = replace(
        info,
        channels=channels,
        mean=found.mean,
        std=found.std,
        statistics_source=found.source,
        assumptions=info.assumptions + ((found.assumption,) if found.assumption else ()),
    )
    return replace(conversion, info=info)


def _convert(raw: RawCheckpoint, given: Given) -> Conversion:
    raw = without_holder(raw)
    layout, convert = recognize(raw)
    about = section(raw.extras, "mto_analysis")  # files that publishing.py wrote say what their layout cannot
    with _naming(raw, layout):
        if about:
            given = _stated_heads(given, section(about, "config"))
        conversion = convert(raw, given)
        refuse_other_depth(raw, conversion.config)
        prepared = prepared_size(raw)
        if given.image_size is None and prepared not in (None, conversion.info.image_size):
            raise CheckpointError(
                f"preprocessor_config.json makes images of {prepared} px, the model takes {conversion.info.pixels}; "
                "give --image-size"
            )
        if about:
            stored = section(about, "config")
            known = {each.name: stored[each.name] for each in fields(conversion.config) if each.name in stored}
            size, notes = conversion.info.image_size, conversion.info.assumptions  # of resized positions, maybe
            known["image_size"] = size
            info = replace(stored_info(section(about, "info")), image_size=size, assumptions=notes)
            conversion = replace(conversion, config=replace(conversion.config, **known), info=info)
    info, assumed = conversion.info, conversion.info.assumptions + given.assumed_heads
    assumed += tuple(note for note in zero_biases(conversion.state.tensors) if note not in assumed)
    if raw.config is not None:  # transformers starts mask tokens as zeros, and classifiers never train them
        assumed += untrained_tokens(raw.tensors)
    unsettled = given.unsettled_heads or info.unsettled_heads  # also before the file was converted to our own layout
    source = info.mask_rule_source
    if given.origins.get("mask_ratio") == "given":
        source = source.replace("file", "given", 1)
    info = replace(info, layout=layout, assumptions=assumed, unsettled_heads=unsettled, mask_rule_source=source)
    return replace(conversion, info=info)


def _converted(
    raw: RawCheckpoint, given: Given, lacking: type[OptionNeededError] = HeadCountError
) -> tuple[Conversion, list[str]]:
    """A conversion, and which head counts it lacks; others stand in for them, which fit all shapes."""
    needed: list[str] = []
    while True:
        try:
            return _convert(raw, given), needed
        except lacking as error:
            if error.option not in HEADS_ASSUMED:
                raise
            needed.append(error.option)
            options: dict[str, Any] = {error.option: error.stand_in}
            given = replace(given, **options)


def _stated_heads(given: Given, stored: Mapping[str, Any]) -> Given:
    """The head counts that a file states, unless the user contradicts them."""
    counts = {option: whole(stored, option) for option in ("num_heads", "decoder_num_heads")}
    known: dict[str, Any] = {
        option: given.choose(option, count, stated=count) for option, count in counts.items() if count
    }
    return replace(given, **known)


@contextmanager
def _naming(raw: RawCheckpoint, layout: str) -> Iterator[None]:
    """Errors inside name the file: a command may have been given several."""
    try:
        yield
    except CheckpointError as error:
        error.args = (f"{raw.path} ({layout}): {error}",)
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if explained(error) == explained(MemoryError()):
            raise
        # Shapes and settings that no real file has can fail a converter in any of these ways.
        raise CheckpointError(f"{raw.path} ({layout}): does not fit together ({first_line(error)})") from error
