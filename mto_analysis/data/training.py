"""Training batches: pictures of an epoch in its own order, augmented and masked, shared out among processes.

Everything in a batch is a function of (seed, epoch, name), so it does not depend on workers, processes, accumulation
or on where a run was taken up again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mto_analysis.data.augmentation import Augmentation, Geometry
from mto_analysis.data.batches import BrokenPicture
from mto_analysis.data.keyed import keyed_permutation, name_keys
from mto_analysis.data.loading import (
    BatchPlan,
    CroppedBatch,
    CroppedBatches,
    PlanSampler,
    Rows,
    decode_all,
    fits_memory,
    replacement_rows,
)
from mto_analysis.data.sources import Pictures
from mto_analysis.errors import DataError
from mto_analysis.masking import MaskRule, mask_keys

__all__ = ["TrainBatch", "TrainingData"]


class TrainBatch(NamedTuple):
    """Augmented pictures with their masks, on the device.

    Shapes:
        images: batch channels height width (float32, normalised)
        second_images: batch channels height width (the same geometry, other colours), or None
        mask: batch num_patches
    """

    names: tuple[str, ...]
    images: Tensor
    second_images: Tensor | None
    mask: Tensor


class TrainingData:
    """Pictures for training.

    Small pictures (all of one size no larger than ``image_size``, 2 GiB in all) are decoded once, held on the device
    and augmented there by batch; larger ones are decoded and cropped in worker processes while the model works.

    Args:
        pictures: From :func:`~mto_analysis.data.open_pictures`.
        augmentation: What is done to them.
        mask_rule: How masks are drawn, by :func:`~mto_analysis.masking.mask_keys` of seed, epoch and name.
        patch_size: Of the model, in pixels.
        seed: Of order, augmentation and masks.
        num_workers: Processes that decode; batches do not depend on it.
        device: Where batches go.
        on_broken: Called once for each picture that cannot be decoded; another takes its place.
        in_memory: Hold decoded pictures in memory; None decides by their size.
        strict: Make a broken picture an error instead.
        on_progress: Called with (decoded, total) while pictures are decoded into memory.

    Attributes:
        broken: The pictures found broken so far, by name, with the reason.

    Raises:
        ValueError: If patches do not fit the picture, or the mask rule not the patches.
    """

    def __init__(
        self,
        pictures: Pictures,
        augmentation: Augmentation,
        mask_rule: MaskRule,
        patch_size: int,
        *,
        seed: int = 0,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
        on_broken: Callable[[BrokenPicture], None] | None = None,
        in_memory: bool | None = None,
        strict: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if patch_size < 1 or augmentation.image_size % patch_size:
            raise ValueError(f"patch_size must divide image_size {augmentation.image_size}, got {patch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        side = augmentation.image_size // patch_size
        self._grid = (side, side)
        mask_rule.draw(mask_keys(["a rule that does not fit the patches fails here"]), self._grid, patch_size)
        self._pictures, self._augmentation, self._rule = pictures, augmentation, mask_rule
        self._patch_size, self._seed, self._workers = patch_size, seed, num_workers
        self._device = torch.device(device)
        self._on_broken, self._in_memory, self._strict, self._on_progress = on_broken, in_memory, strict, on_progress
        self._keys = name_keys(pictures.names)
        self._pixels: Tensor | None = None
        self._prepared = False
        self._broken_rows: set[int] = set()
        self._loader: DataLoader[CroppedBatch] | None = None
        self._sampler = PlanSampler()
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        """Number of pictures, broken ones included."""
        return len(self._pictures.names)

    def steps_per_epoch(self, global_batch: int) -> int:
        """Optimizer steps in an epoch; the last incomplete global batch is dropped.

        Raises:
            DataError: If there are too few pictures for one.
        """
        if global_batch < 1:
            raise ValueError(f"global_batch must be at least 1, got {global_batch}")
        if len(self) < global_batch:
            raise DataError(
                f"{len(self)} pictures do not fill one batch of {global_batch}; take a smaller batch size or more data"
            )
        return len(self) // global_batch

    def order(self, epoch: int) -> Rows:
        """The rows of all pictures in the order of an epoch."""
        return keyed_permutation(self._keys, seed=self._seed, epoch=epoch)

    def prepare(self) -> bool:
        """Decode small pictures into memory, once; the first batch does it if nobody did. True if they are held there.

        Raises:
            DataError: If a picture cannot be read, is broken (with ``strict``) or is of another size than the others
                where ``in_memory`` was asked for.
        """
        if self._prepared:
            return self._pixels is not None
        wanted = self._in_memory
        if wanted is None:
            wanted = fits_memory(self._pictures, self._augmentation.image_size)
        if wanted:
            found: list[tuple[int, str]] = []
            pixels = decode_all(
                self._pictures,
                self._augmentation,
                lambda row, reason: found.append((row, reason)),
                self._on_progress,
            )
            if isinstance(pixels, Tensor):
                self._note_broken(found)
                self._pixels = pixels.to(self._device)
            elif self._in_memory:
                raise DataError(f"picture {pixels} is not of the size of the others; leave in_memory off")
        self._prepared = True
        return self._pixels is not None

    def micro_batches(
        self,
        epoch: int,
        *,
        micro_batch: int,
        accumulation: int = 1,
        process: int = 0,
        processes: int = 1,
        skip_steps: int = 0,
    ) -> Iterator[TrainBatch]:
        """The micro-batches of one process in one epoch.

        Micro-batch m of process r holds places (m * processes + r) * micro_batch onwards of the epoch's order, so an
        optimizer step sees the same pictures however they are shared out.

        Args:
            epoch: Counts from 0.
            micro_batch: Pictures per process and forward.
            accumulation: Micro-batches per optimizer step.
            process: Number of this process.
            processes: How many there are.
            skip_steps: Optimizer steps to leave out at the start, without decoding anything.

        Raises:
            ValueError: If a number is out of range.
            DataError: If there are too few pictures, one is gone, or one is broken (with ``strict``).
        """
        if min(micro_batch, accumulation, processes) < 1 or not 0 <= process < processes or skip_steps < 0:
            raise ValueError(
                "micro_batch, accumulation and processes must be at least 1, process below processes, skip_steps at "
                f"least 0, got {micro_batch=}, {accumulation=}, {process=}, {processes=}, {skip_steps=}"
            )
        steps = self.steps_per_epoch(micro_batch * accumulation * processes)
        order = self.order(epoch)
        starts = (
            (number * processes + process) * micro_batch
            for number in range(skip_steps * accumulation, steps * accumulation)
        )
        plans = [BatchPlan(epoch, order[start : start + micro_batch]) for start in starts]
        return self._batches(plans)

    def _batches(self, plans: Sequence[BatchPlan]) -> Iterator[TrainBatch]:
        if self.prepare():
            yield from self._from_memory(plans)
        else:
            yield from self._from_workers(plans)

    # Small pictures.

    def _from_memory(self, plans: Sequence[BatchPlan]) -> Iterator[TrainBatch]:
        # Masks and geometry are drawn on the CPU, one batch ahead of the device.
        with ThreadPoolExecutor(1, thread_name_prefix="masks") as drawing:
            coming = drawing.submit(self._draw, plans[0]) if plans else None
            for number, plan in enumerate(plans):
                assert coming is not None
                rows, names, geometry, mask = coming.result()
                if number + 1 < len(plans):
                    coming = drawing.submit(self._draw, plans[number + 1])
                yield self._augmented(plan.epoch, rows, names, geometry, mask)

    def _draw(self, plan: BatchPlan) -> tuple[Rows, tuple[str, ...], Geometry, Tensor]:
        rows = plan.rows
        if self._broken_rows:
            rows = np.array([self._good_row(row, plan.epoch) for row in rows.tolist()], dtype=np.int64)
        names = tuple(self._pictures.names[row] for row in rows.tolist())
        assert self._pixels is not None
        heights = np.full(len(rows), self._pixels.shape[1], dtype=np.int64)
        widths = np.full(len(rows), self._pixels.shape[3], dtype=np.int64)
        geometry = self._augmentation.draw(self._keys[rows], heights, widths, seed=self._seed, epoch=plan.epoch)
        mask = self._rule.draw(mask_keys(names, seed=self._seed, epoch=plan.epoch), self._grid, self._patch_size)
        return rows, names, geometry, mask

    def _good_row(self, row: int, epoch: int) -> int:
        if row not in self._broken_rows:
            return row
        for candidate in replacement_rows(self._keys, row, seed=self._seed, epoch=epoch):
            if candidate not in self._broken_rows:
                return candidate
        raise DataError(f"{len(self._broken_rows)} of {len(self)} pictures are broken, too many to replace")

    def _augmented(
        self, epoch: int, rows: Rows, names: tuple[str, ...], geometry: Geometry, mask: Tensor
    ) -> TrainBatch:
        assert self._pixels is not None
        pixels = self._pixels[torch.from_numpy(rows).to(self._device)]
        cut = self._augmentation.apply_to_batch(pixels, geometry)
        images, second = self._augmentation.finish(cut, self._keys[rows], seed=self._seed, epoch=epoch)
        return TrainBatch(names, images, second, mask.to(self._device, non_blocking=True))

    # Large pictures.

    def _from_workers(self, plans: Sequence[BatchPlan]) -> Iterator[TrainBatch]:
        previous: tuple[int, CroppedBatch] | None = None
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        for plan, cropped in zip(plans, self._cropped(plans), strict=True):
            if cropped.failure is not None:
                raise DataError(cropped.failure)
            self._note_broken(cropped.broken)
            if stream is None:
                yield self._finished(plan.epoch, cropped)
                continue
            # One batch ahead on a stream of its own, so that the copy overlaps with the model's work.
            with torch.cuda.stream(stream):
                pixels = cropped.pixels.to(self._device, non_blocking=True)
                moved = cropped._replace(pixels=pixels, mask=cropped.mask.to(self._device, non_blocking=True))
            if previous is not None:
                yield self._finished(*previous, stream)
            previous = (plan.epoch, moved)
        if previous is not None:
            yield self._finished(*previous, stream)

    def _cropped(self, plans: Sequence[BatchPlan]) -> Iterator[CroppedBatch]:
        batches = CroppedBatches(
            self._pictures, self._keys, self._augmentation, self._rule, self._patch_size, self._seed
        )
        if self._workers == 0:
            yield from (batches[plan] for plan in plans)
            return
        if self._loader is None:
            self._loader = DataLoader(
                batches,
                batch_size=None,
                sampler=self._sampler,
                num_workers=self._workers,
                collate_fn=_unchanged,
                pin_memory=self._device.type == "cuda",
                persistent_workers=True,
                generator=torch.Generator(),  # or it would draw its seed from the global generator
            )
        self._sampler.plans = list(plans)
        try:
            yield from self._loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a process that decodes pictures ended ({str(error).splitlines()[0]}); often memory is short: "
                f"use fewer workers"
            ) from error

    def _finished(self, epoch: int, cropped: CroppedBatch, stream: Any = None) -> TrainBatch:
        if stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(stream)
            cropped.pixels.record_stream(current)
            cropped.mask.record_stream(current)
        rows = cropped.rows.numpy()
        names = tuple(self._pictures.names[row] for row in rows.tolist())
        pixels = cropped.pixels.to(self._device)
        images, second = self._augmentation.finish(pixels, self._keys[rows], seed=self._seed, epoch=epoch)
        return TrainBatch(names, images, second, cropped.mask.to(self._device))

    def _note_broken(self, found: Sequence[tuple[int, str]]) -> None:
        for row, reason in found:
            name = self._pictures.names[row]
            if self._strict:
                raise DataError(f"picture {name} cannot be decoded ({reason})")
            if row in self._broken_rows:
                continue
            self._broken_rows.add(row)
            self.broken[name] = reason
            if self._on_broken is not None:
                self._on_broken(BrokenPicture(name, reason))


def _unchanged(batch: Any) -> Any:
    return batch
