"""Run a model over images and masks and reduce the tokens of every layer depth to a few numbers per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mto_analysis.affinity import TokenSplit
from mto_analysis.errors import DataError, NumericalError
from mto_analysis.images import ImageBatch
from mto_analysis.masks import MaskRule, mask_keys
from mto_analysis.models import LayerTokens, MaskedImageModel, ModelInfo
from mto_analysis.probe.accumulating import Row, Setup, TokenMeasure
from mto_analysis.probe.measures import Measure, Measures, measuring
from mto_analysis.runtime.memory import Scratch, lasting_memory
from mto_analysis.runtime.precision import full_float32
from mto_analysis.runtime.statistics import reach_of_mean

__all__ = [
    "LayerMeasure",
    "MaskSource",
    "Measure",
    "ProbeResult",
    "masks_from_file",
    "masks_from_rule",
    "mean_and_interval",
    "probe",
    "run_measures",
    "undisturbed",
]

#: Masks of a batch: from image names and k to a bool tensor ``batch num_patches``.
MaskSource = Callable[[Sequence[str], int], Tensor]

#: Several numbers per image at once, from the stack, the layer, its split and the names of the batch's images; the
#: names of numbers must be the same at every layer depth, and none may be a measure's.
LayerMeasure = Callable[[str, LayerTokens, TokenSplit, Sequence[str]], Mapping[str, Tensor]]


def masks_from_rule(info: ModelInfo, rule: MaskRule | None = None, *, seed: int = 0, epoch: int = 0) -> MaskSource:
    """Masks sampled by a rule, by default the model's own; the same for every batch size and device."""
    chosen = rule or info.mask_rule

    def sample(names: Sequence[str], k: int) -> Tensor:
        return chosen.sample(mask_keys(names, k=k, seed=seed, epoch=epoch), info.mask_grid, info.patch_size)

    return sample


def masks_from_file(info: ModelInfo, masks: Mapping[str, Tensor]) -> MaskSource:
    """Masks of :func:`load_masks`, looked up by image name.

    Raises:
        DataError: If the masks are for another grid; later, if an image has no mask in the file.
    """
    num_patches = next(iter(masks.values())).shape[1]
    if num_patches != info.num_patches:
        raise DataError(f"the mask file is for {num_patches} patches, the model has {info.num_patches}")

    def look_up(names: Sequence[str], k: int) -> Tensor:
        for name in names:
            if name not in masks:
                raise DataError(
                    f"the mask file has no mask for image {name}; it names {', '.join(list(masks)[:3])} ..."
                )
            if k >= len(masks[name]):
                raise DataError(f"the mask file has {len(masks[name])} masks for image {name}, not {k + 1}")
        return torch.stack([masks[name][k] for name in names])

    return look_up


@dataclass(frozen=True)
class _Chunk:
    """Values of one batch, one mask each, in one stack."""

    stack: str
    images: tuple[str, ...]
    k: int
    num_masked: np.ndarray  # layer depths, batch
    num_visible: np.ndarray  # layer depths, batch
    values: Mapping[str, np.ndarray]  # measure -> layer depths, batch


@dataclass(frozen=True)
class ProbeResult:
    """Measured values per (stack, layer depth, image, mask); parts measured apart can be merged.

    ``notes`` say what was found of a live model, where its masks come from, and which measures were left out and why;
    ``measures`` hold what was measured of all images together.
    """

    chunks: tuple[_Chunk, ...]
    notes: tuple[str, ...] = ()
    measures: tuple[TokenMeasure, ...] = field(default=(), compare=False)

    def merge(self, *others: ProbeResult) -> ProbeResult:
        """This result and others as one.

        Raises:
            ValueError: If two parts hold the same image and mask of a stack.
        """
        parts = (self, *others)
        merged = ProbeResult(
            tuple(chunk for part in parts for chunk in part.chunks),
            tuple(dict.fromkeys(note for part in parts for note in part.notes)),
            tuple(map(_merged, zip(*(part.measures for part in parts if part.chunks), strict=True))),
        )
        keys = [(chunk.stack, chunk.k, image) for chunk in merged.chunks for image in chunk.images]
        if len(set(keys)) != len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"parts overlap: stack {twice[0]}, mask {twice[1]}, image {twice[2]} was measured twice")
        return merged

    def to_frame(self) -> pd.DataFrame:
        """One row per (stack, layer depth, image, mask).

        Columns: ``stack layer_depth image mask num_masked num_visible``, then one per measure.
        """
        parts = []
        for chunk in self.chunks:
            depths, batch = chunk.num_masked.shape
            columns = {
                "stack": np.repeat(chunk.stack, depths * batch),
                "layer_depth": np.repeat(np.arange(depths), batch),
                "image": np.tile(np.asarray(chunk.images, dtype=object), depths),
                "mask": np.repeat(chunk.k, depths * batch),
                "num_masked": chunk.num_masked.ravel(),
                "num_visible": chunk.num_visible.ravel(),
            }
            parts.append(pd.DataFrame({**columns, **{name: value.ravel() for name, value in chunk.values.items()}}))
        return pd.concat(parts, ignore_index=True)

    def table(self, compared: Mapping[str, ProbeResult] | None = None) -> pd.DataFrame:
        """All measures as a tidy table: one row per stack, layer depth and measure, and per head or other depth.

        ``value`` of a measure per image is its mean over images, an image's masks averaged first, with Student's 95 %
        interval; how others come to theirs is said of each. Intervals are empty where there are too few images.

        Columns: those of :class:`~mto_analysis.probe.accumulating.Row`: ``stack layer_depth measure value ci_low
        ci_high num_images``, then ``head`` (empty: all heads), ``other_model other_stack other_layer_depth`` (of a
        measure that compares two layers).

        Args:
            compared: Results of other models on the same images by name, for measures between models.
        """
        columns = [column for measure in self.measures for column in measure.columns]
        found: list[Row] = []
        frame = self.to_frame()
        if "heterogeneity" in columns:
            frame["normalized_heterogeneity"] = frame["heterogeneity"] / np.log(np.maximum(frame["num_visible"], 2))
            columns.insert(columns.index("heterogeneity") + 1, "normalized_heterogeneity")
        for column in [column for column in columns if column in frame]:
            means = mean_and_interval(frame[frame[column].notna()], ["stack", "layer_depth"], [column])
            keep = ["stack", "layer_depth", column, f"{column}_ci_low", f"{column}_ci_high", "num_images"]
            found += [
                Row(stack, depth, column, *numbers)
                for stack, depth, *numbers in means[keep].itertuples(index=False, name=None)
            ]
        for measure in self.measures:
            found += measure.rows()
            for name, other in (compared or {}).items():
                theirs = next((each for each in other.measures if type(each) is type(measure)), None)
                found += [] if theirs is None else measure.rows_with(theirs, name)
        table = pd.DataFrame(found, columns=list(Row._fields))
        return table.astype({"head": "Int64", "other_layer_depth": "Int64"})

    def left_out(self) -> dict[str, str]:
        """Why measures were left out, by name."""
        return {
            type(each).__name__.lower() + (f" of {stack}" if stack else ""): reason
            for each in self.measures
            for stack, reason in each.left_out.items()
        }

    def summary(self) -> pd.DataFrame:
        """Mean, standard deviation and 95 % interval over images, per stack and layer depth.

        An image's masks are averaged first: images are independent, masks of one image are not. ``normalized`` is
        H / log(num_visible), from 0 to 1. Intervals are Student's t, cut at the range of H (:func:`interval_ends`);
        with one image they are empty.

        Columns: ``stack layer_depth heterogeneity heterogeneity_std ci_low ci_high normalized normalized_ci_low
        normalized_ci_high num_visible num_visible_min num_visible_max num_images num_masks``.

        Raises:
            ValueError: If heterogeneity was not among the measures.
        """
        frame = self.to_frame()
        if "heterogeneity" not in frame:
            raise ValueError("heterogeneity was not measured; table() has what was")
        frame["normalized"] = frame["heterogeneity"] / np.log(np.maximum(frame["num_visible"], 2))
        per_image = frame.groupby(["stack", "layer_depth", "image"], sort=False)[["heterogeneity", "normalized"]].mean()
        groups = per_image.groupby(["stack", "layer_depth"], sort=False)
        mean, std = groups.mean(), groups.std(ddof=1)
        count = groups.size()
        half = std.mul(reach_of_mean(count), axis=0)
        visible = frame.groupby(["stack", "layer_depth"], sort=False)["num_visible"]
        masks = frame.groupby(["stack", "layer_depth"], sort=False)["mask"].nunique()
        ends = {
            name: interval_ends(name, mean[name], half[name], visible.mean())
            for name in ("heterogeneity", "normalized")
        }
        table = mean[["heterogeneity"]].assign(
            heterogeneity_std=std["heterogeneity"],
            ci_low=ends["heterogeneity"][0],
            ci_high=ends["heterogeneity"][1],
            normalized=mean["normalized"],
            normalized_ci_low=ends["normalized"][0],
            normalized_ci_high=ends["normalized"][1],
            num_visible=visible.mean(),
            num_visible_min=visible.min(),
            num_visible_max=visible.max(),
            num_images=count,
            num_masks=masks,
        )
        return table.reset_index()


def _merged(parts: tuple[TokenMeasure, ...]) -> TokenMeasure:
    whole = copy(parts[0])
    whole.put_together([part.kept() for part in parts])
    return whole


def interval_ends(
    column: str, mean: pd.Series[float], half: pd.Series[float], num_visible: pd.Series[float]
) -> tuple[pd.Series[float], pd.Series[float]]:
    """Both ends of Student's interval of a mean over images, cut at the range that the column has.

    Student's interval knows no range and leaves it where values lie near an end. The mean over all images is inside:
    the part beyond cannot hold it, and cutting it off leaves the coverage as it is. An interval contains its own mean,
    also where rounding takes that beyond the bound by a float's last digits.

    Args:
        column: ``heterogeneity`` is from 0 to the log of the mean number of visible patches (by Jensen's inequality),
            ``normalized`` from 0 to 1; others have no range.
        mean: Of the images.
        half: Half of the width of Student's interval, NaN for one image.
        num_visible: Mean number of visible patches.
    """
    low, high = mean - half, mean + half
    if column in ("heterogeneity", "normalized"):
        bound = np.log(num_visible.clip(lower=1)) if column == "heterogeneity" else 1.0
        low = low.clip(lower=np.minimum(mean, 0.0))
        high = high.clip(upper=np.maximum(mean, bound))
    return low, high


def mean_and_interval(frame: pd.DataFrame, keys: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Mean and 95 % interval over images of some columns, per group; an image's masks are averaged first.

    Columns: the keys, then for each column itself, ``_ci_low`` and ``_ci_high``, then ``num_visible num_images``.
    """
    per_image = frame.groupby([*keys, "image"], sort=False)[[*columns, "num_visible"]].mean()
    groups = per_image.groupby(list(keys), sort=False)
    mean, count = groups.mean(), groups.size()
    half = groups.std(ddof=1).mul(reach_of_mean(count), axis=0)
    table = mean[[]].copy()
    for column in columns:
        table[column] = mean[column]
        ends = interval_ends(column, mean[column], half[column], mean["num_visible"])
        table[f"{column}_ci_low"], table[f"{column}_ci_high"] = ends
    return table.assign(num_visible=mean["num_visible"], num_images=count).reset_index()


@contextmanager
def undisturbed(model: torch.nn.Module, *, train_mode: bool = False) -> Iterator[None]:
    """Eval mode, no gradients and full float32 products inside; all as it was afterwards, also after an error.

    In training mode, for models that mask only there, buffers are restored too.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if train_mode else []
    try:
        model.train(train_mode)
        like = next(model.parameters(), None)
        with full_float32("cpu" if like is None else like.device.type), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, before in buffers:
            buffer.data.copy_(before)


def probe(
    model: MaskedImageModel,
    batches: Iterable[ImageBatch],
    masks: MaskSource | None = None,
    *,
    masks_per_image: int = 1,
    stacks: Sequence[str] | None = None,
    measures: Measures = "h",
    grid: Sequence[int] | None = None,
    layer_measures: Sequence[LayerMeasure] = (),
    train_mode: bool = False,
) -> ProbeResult:
    """Measure every layer depth of a model over images, streamed: one depth of one batch is held at a time.

    The model stays where it is (device and dtype) and is left as it was found; images are moved to it. Values are
    computed in at least float32, in inference mode: what measures keep can't be trained on.

    Args:
        model: Any model behind the interface.
        batches: Preprocessed images with names.
        masks: Where masks come from; by default the model's own rule with seed 0.
        masks_per_image: Masks per image, k = 0, 1, ...
        stacks: Stacks to measure; by default all that hold masked tokens.
        measures: Names of measures (:data:`~mto_analysis.probe.measures.MEASURES`), in one text or several, or
            ``"all"`` that the model allows; or functions of the tokens of each layer depth, by name.
        grid: Rows and columns of patches, where the model does not tell.
        layer_measures: Functions of stack and layer that give several numbers, and may keep more for themselves.
        train_mode: Run the model in training mode, for one that masks only there.

    Raises:
        ValueError: If there is no image, a stack or measure is unknown, or the model does not allow a measure.
        NumericalError: If a value is not finite; names stack, depth and image.

    Example:
        >>> from mto_analysis.demo import DEMO_CHECKPOINTS, demo_batches
        >>> from mto_analysis.checkpoints import load_checkpoint
        >>> model = load_checkpoint(DEMO_CHECKPOINTS["MAE"])
        >>> result = probe(model, demo_batches(model.info, limit=8))
        >>> result.summary()["layer_depth"].tolist()
        [0, 1, 2, 3, 4]
    """
    if masks_per_image < 1:
        raise ValueError(f"masks_per_image must be at least 1, got {masks_per_image}")
    setup = Setup(model, tuple(grid or model.info.mask_grid), masks_per_image, compared=True)
    source = masks or masks_from_rule(model.info)
    with measuring(measures, setup, layer_measures) as made:
        return run_measures(setup, batches, source, [*made, *layer_measures], stacks=stacks, train_mode=train_mode)


def run_measures(
    setup: Setup,
    batches: Iterable[ImageBatch],
    masks: MaskSource,
    measures: Sequence[LayerMeasure],
    *,
    stacks: Sequence[str] | None = None,
    train_mode: bool = False,
) -> ProbeResult:
    """:func:`probe` with measures that are made and watching already."""
    model = setup.model
    like = next(model.parameters())
    chunks = []
    scratch, seen = Scratch(), set[str]()
    with undisturbed(model, train_mode=train_mode):
        for batch in batches:
            for name in batch.names:
                if name in seen:
                    raise DataError(f"two images are called {name}, but images are told apart by their names")
                seen.add(name)
            images = batch.images.to(like.device, like.dtype)
            for k in range(setup.masks_per_image):
                sampled = masks(batch.names, k)
                mask = sampled.to(like.device)
                split = TokenSplit(mask, numbers=sampled.sum(dim=1).tolist(), scratch=scratch)
                chunks += [
                    _measure(model, images, split, stack, batch.names, k, measures)
                    for stack in (model.stacks_for(images, mask) if stacks is None else stacks)
                ]
    if not chunks:
        raise DataError("there is no image to measure")
    return ProbeResult(tuple(chunks), measures=tuple(each for each in measures if isinstance(each, TokenMeasure)))


def _measure(
    model: MaskedImageModel,
    images: Tensor,
    split: TokenSplit,
    stack: str,
    names: tuple[str, ...],
    k: int,
    measures: Sequence[LayerMeasure],
) -> _Chunk:
    measured: tuple[str, ...] = ()
    values = torch.empty(0)
    counts: list[Sequence[int]] = []
    sizes: list[int] = []
    scratch = split.scratch
    for layer in model.layer_tokens(images, split.mask, stack):
        with torch.inference_mode():  # measures are many small operators, each of which starts a little faster so
            if layer.mask is not split.mask:  # sorted anew only where the token grid changes
                split = TokenSplit(layer.mask, scratch=scratch)
            found: dict[str, Tensor] = {}
            for measure in measures:
                found.update(measure(stack, layer, split, names))
            if not measured:
                measured = tuple(found)
                values = scratch("values", layer.tokens, len(measured), model.depth(stack) + 1, len(names))
            if measured:
                values[:, layer.depth] = torch.stack([found[name] for name in measured])
        counts.append(split.numbers)
        sizes.append(layer.mask.shape[1])
    # One copy from the device per batch: every copy waits for it.
    table = lasting_memory(*values.shape, dtype=torch.float64).copy_(values).numpy()
    arrays = dict(zip(measured, table, strict=True))
    tolerated = {name for each in measures if isinstance(each, TokenMeasure) and each.tolerant for name in each.columns}
    for name, array in arrays.items():
        if name not in tolerated and not np.isfinite(array).all():
            depth, row = (int(index) for index in np.argwhere(~np.isfinite(array))[0])
            raise NumericalError(
                f"{name} is not finite in stack {stack} at layer depth {depth} for image {names[row]}; "
                "try --precision fp32, or check the checkpoint"
            )
    num_masked = np.asarray(counts, dtype=np.int32)
    num_visible = np.asarray(sizes, dtype=np.int32)[:, None] - num_masked
    return _Chunk(stack, names, k, num_masked, num_visible, arrays)
