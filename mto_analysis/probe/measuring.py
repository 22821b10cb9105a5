"""Measure any live model: images, masks and the model's own forward are all that is needed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mto_analysis.images import ImageBatch
from mto_analysis.masks import MaskRule, check_mask, mask_keys
from mto_analysis.models import MaskedImageModel
from mto_analysis.models.live import Call, LiveModel
from mto_analysis.probe.accumulating import Setup
from mto_analysis.probe.engine import MaskSource, ProbeResult, probe, run_measures
from mto_analysis.probe.measures import Measures, measuring
from mto_analysis.runtime.randomness import name_keys
from mto_analysis.taps.search import hinted_grids, unwrap
from mto_analysis.taps.stacks import StackSpec


def measure(
    model: nn.Module,
    batches: Tensor | Iterable[Any],
    mask: Tensor | MaskRule | MaskSource | None = None,
    *,
    call: Call | None = None,
    stacks: Sequence[StackSpec] | None = None,
    measures: Measures = "h",
    grid: Sequence[int] | None = None,
    patch_size: int | None = None,
    masks_per_image: int = 1,
    seed: int = 0,
    train_mode: bool = False,
) -> ProbeResult:
    """Measure every layer depth of any model with masked tokens, ours or not; the model is left as it was found.

    Masked tokens are found by structure and verified in the first forward, see :func:`~mto_analysis.mto.attach_mto`.
    The model runs in evaluation mode without gradients, through its own forward.

    Args:
        model: An instance, compiled or not (then the module inside runs).
        batches: Normalized images ``batch channels height width``, or an iterable of such (named by row number), of
            ``(images, labels)`` as a DataLoader gives, of dicts with ``pixel_values``, or of objects with ``names``
            and ``images``.
        mask: A bool tensor ``batch num_patches`` for a single batch; a rule, which needs the grid; a function of names
            and k as for :func:`~mto_analysis.probe.probe`; or ``None`` for masks that the model samples itself (with
            our seed). For models of ours ``None`` is their own rule.
        call: Runs the model on images and a mask, ``call(model, images, mask)``; by default the mask is passed as
            ``bool_masked_pos`` or ``mask``, as ``noise`` that gives exactly this mask, or as V-JEPA 2's numbers of
            patches.
        stacks: Where masked tokens live, for models in which they are not found.
        measures: Names of measures (:data:`~mto_analysis.probe.measures.MEASURES`), in one text or several, or
            ``"all"`` that the model allows (``notes`` say which are left out and why); or functions of tokens, by name.
        grid: Rows and columns of patches, for masks by rule and measures of places; with those in time in front for
            videos, whose frames all get the same mask by rule.
        patch_size: Side of a patch in pixels, for rules that mask larger units.
        masks_per_image: Masks per image.
        seed: Of masks by rule, and of the model's own.
        train_mode: Run the model in training mode, for one that masks only there; its buffers are restored.

    Returns:
        A row per stack, layer depth, image and mask, as of :func:`~mto_analysis.probe.probe`; ``notes`` say what was
        found and where masks come from.

    Raises:
        ValueError: If options do not fit, no structure fits, nothing tells how to pass a mask, or the model does not
            allow a measure that was named.
        StackError: If a check of the first forward fails; says what to pass.
        NumericalError: If a value is not finite.

    Example:
        >>> from mto_analysis.demo import DEMO_CHECKPOINTS, demo_batches
        >>> from mto_analysis import load_checkpoint
        >>> model = load_checkpoint(DEMO_CHECKPOINTS["SimMIM"])
        >>> images = next(demo_batches(model.info, limit=2)).images
        >>> measure(model, images, torch.arange(64).expand(2, -1) < 40).summary()["num_visible"].tolist()[:2]
        [24.0, 24.0]
    """
    stream = _batches(batches)
    if isinstance(inner := unwrap(model), MaskedImageModel) and not (call or stacks or train_mode):
        rule = inner.info.mask_rule if mask is None else mask
        source = _source(rule, inner, grid or inner.info.mask_grid, patch_size or inner.info.patch_size, seed)
        return probe(inner, stream, source, masks_per_image=masks_per_image, measures=measures, grid=grid)
    live = LiveModel(inner, stacks=stacks, call=call)
    try:
        watched = _Current(stream)
        info = inner.info if isinstance(inner, MaskedImageModel) else None
        known = info.mask_grid if info else next(hinted_grids(inner), None)
        source = _source(mask, inner, grid or known, patch_size or (info.patch_size if info else None), seed)
        own = source is None
        # In training mode dropout takes random numbers: the same for the same seed, and none of the user's.
        setup = Setup(live, tuple(grid or known or ()) or None, masks_per_image, compared=True)
        with _seeded(f"{seed}") if train_mode else nullcontext(), measuring(measures, setup) as made:
            result = run_measures(setup, watched, source or _OwnMasks(live, watched, seed), made, train_mode=train_mode)
        masks = f"masks: the model's own, seed {seed}" if own else "masks: as asked for"
        orders = [
            f"{stack}: in token order, as the positions of visible tokens are not known"
            for stack in live.stacks
            if not live.order_is_known(stack)
        ]
        return replace(result, notes=(masks, *live.description.splitlines(), *orders, *result.notes))
    finally:
        live.close()


def _batches(batches: Tensor | Iterable[Any]) -> Iterator[ImageBatch]:
    """Batches with names, by row number where they have none."""
    row = 0
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        images = _images(batch)
        names = getattr(batch, "names", None) or tuple(map(str, range(row, row + len(images))))
        row += len(images)
        yield ImageBatch(tuple(names), images)


def _images(batch: Any) -> Tensor:
    found = getattr(batch, "images", batch)
    if isinstance(found, Mapping):
        found = next(
            (
                found[name]
                for name in ("pixel_values", "pixel_values_videos", "images", "image", "videos", "x")
                if name in found
            ),
            None,
        )
    elif isinstance(found, (tuple, list)):
        found = found[0] if found else None
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise ValueError(
            f"a batch must be images, (images, ...), a dict with pixel_values, or have names and images, got a "
            f"{type(batch).__name__}"
        )
    return found


def _source(
    mask: Tensor | MaskRule | MaskSource | None,
    model: nn.Module,
    grid: Sequence[int] | None,
    patch_size: int | None,
    seed: int,
) -> MaskSource | None:
    """Where masks come from; ``None`` for the model's own."""
    if isinstance(mask, Tensor):
        flat = mask.flatten(1)
        check_mask(flat)
        return _Single(flat)
    if not isinstance(mask, MaskRule):
        return mask
    if grid is None:
        raise ValueError(f"{type(model).__name__} does not tell its grid of patches; pass grid=(rows, columns)")
    rule, sides = mask, tuple(grid)
    side = patch_size or getattr(getattr(model, "config", None), "patch_size", None) or mask.unit
    if not isinstance(side, int):
        raise ValueError(f"patches of {side} px are not square; pass patch_size=... or masks as a tensor")
    return lambda names, k: rule.sample(mask_keys(names, k=k, seed=seed), sides, side)


class _Single:
    """The mask of a single batch."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask
        self._names: Sequence[str] | None = None

    def __call__(self, names: Sequence[str], k: int) -> Tensor:
        """The mask, for the first batch only."""
        if self._names not in (None, names):
            raise ValueError("mask is a tensor, which is for a single batch; pass a rule or a function of names and k")
        if len(names) != len(self._mask) or k:
            raise ValueError(f"the mask is for {len(self._mask)} images, the batch has {len(names)} (mask {k})")
        self._names = names
        return self._mask


class _Current:
    """The batches, and the one that is measured now."""

    def __init__(self, batches: Iterable[ImageBatch]) -> None:
        self._batches = batches
        self.images = torch.empty(0)

    def __iter__(self) -> Iterator[ImageBatch]:
        """Each batch in turn."""
        for batch in self._batches:
            self.images = batch.images
            yield batch


class _OwnMasks:
    """Masks that the model samples itself, the same for the same seed and batches."""

    def __init__(self, live: LiveModel, current: _Current, seed: int) -> None:
        self._live, self._current, self._seed = live, current, seed

    def __call__(self, names: Sequence[str], k: int) -> Tensor:
        """Run the model on the current batch."""
        like = next(self._live.parameters())
        with _seeded(f"{self._seed} {k} {names[0]}"):
            return self._live.own_mask(self._current.images.to(like.device, like.dtype))


@contextmanager
def _seeded(words: str) -> Iterator[None]:
    """Random numbers of torch, numpy and Python of a seed inside, and as they were afterwards."""
    seed = int(name_keys([words])[0] % 2**32)
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - a model's code may use the global generator
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
