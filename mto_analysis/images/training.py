"""Training batches: images of an epoch in its own order, augmented and masked, shared out among processes.

Everything in a batch is a function of (seed, epoch, name), so it does not depend on workers, processes, accumulation
or on where a run was taken up again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mto_analysis.errors import DataError
from mto_analysis.images.augmentation import Augmentation
from mto_analysis.images.batches import BrokenImage
from mto_analysis.images.interface import Images
from mto_analysis.images.memory import HeldImages, decode_all, fits_memory
from mto_analysis.images.sampling import ImageSampler, Rows
from mto_analysis.images.workers import BatchPlan, CroppedBatch, CroppedBatches
from mto_analysis.masks import MaskRule


class TrainBatch(NamedTuple):
    """Augmented images with their masks, on the device.

    Shapes:
        images: batch channels height width (float32, normalized)
        second_images: batch channels height width (the same geometry, other colours), or None
        mask: batch num_patches
    """

    names: tuple[str, ...]
    images: Tensor
    second_images: Tensor | None
    mask: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Arguments of a pre-training method's forward."""
        return self.images, self.mask, self.second_images


def steps_in_epoch(count: int, batch_size: int) -> int:
    """Optimizer steps of an epoch; images that do not fill a last batch are left out of it.

    Args:
        count: Training images.
        batch_size: Images of a step, over all processes and micro-batches.

    Raises:
        ValueError: If the batch size is not positive.
        DataError: If there are too few images for one batch.

    Example:
        >>> steps_in_epoch(50_000, 4096)
        12
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if count < batch_size:
        raise DataError(
            f"{count} images do not fill one batch of {batch_size}; choose a smaller one with --set batch_size=N"
        )
    return count // batch_size


class EpochData(ABC):
    """Training images, every epoch in an order of its own, in batches that depend on seed, epoch and step alone."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, broken ones included."""

    @property
    @abstractmethod
    def skipped(self) -> dict[str, Any]:
        """For ``run.json``: what was skipped beside the images, by kind, and images found broken so far, by name."""

    @abstractmethod
    def order(self, epoch: int) -> Rows:
        """The rows of all images in the order of an epoch."""

    def prepare(self) -> bool:
        """Read what is held in memory, once; the first batch does it if nobody did. True if anything is held."""
        return False

    def micro_batches(
        self,
        epoch: int,
        *,
        micro_batch: int,
        accumulation: int = 1,
        process: int = 0,
        processes: int = 1,
        skip_steps: int = 0,
    ) -> Iterator[Any]:
        """The micro-batches of one process in one epoch.

        Micro-batch m of process r holds places (m * processes + r) * micro_batch onwards of the epoch's order, so an
        optimizer step sees the same images however they are shared out.

        Args:
            epoch: Counts from 0.
            micro_batch: Images per process and forward.
            accumulation: Micro-batches per optimizer step.
            process: Number of this process.
            processes: How many there are.
            skip_steps: Optimizer steps to leave out at the start, without decoding anything.

        Raises:
            ValueError: If a number is out of range.
            DataError: If there are too few images, one is gone, or one is broken (with ``strict``).
        """
        if min(micro_batch, accumulation, processes) < 1 or not 0 <= process < processes or skip_steps < 0:
            raise ValueError(
                "micro_batch, accumulation and processes must be at least 1, process below processes, skip_steps at "
                f"least 0, got {micro_batch=}, {accumulation=}, {process=}, {processes=}, {skip_steps=}"
            )
        steps = steps_in_epoch(len(self), micro_batch * accumulation * processes)
        order = self.order(epoch)
        plans = []
        for number in range(skip_steps * accumulation, steps * accumulation):
            start = (number * processes + process) * micro_batch
            place = (*divmod(number, accumulation), process)
            plans.append(BatchPlan(epoch, order[start : start + micro_batch], place))
        return self._batches(plans)

    @abstractmethod
    def _batches(self, plans: Sequence[BatchPlan]) -> Iterator[Any]:
        """The batches of plans, in their order."""


class TrainingData(EpochData):
    """Images for training.

    Small images (all of one size no larger than ``image_size``, 2 GiB in all) are decoded once, held on the device
    and augmented there by batch; larger ones are decoded and cropped in worker processes while the model works.

    Args:
        images: From :func:`~mto_analysis.images.open_images`.
        augmentation: What is done to them.
        mask_rule: How masks are sampled, by :func:`~mto_analysis.masks.mask_keys` of seed, epoch and name.
        patch_size: Of the model, in pixels.
        seed: Of order, augmentation and masks.
        num_workers: Processes that decode; batches do not depend on it.
        device: Where batches go.
        on_broken: Called once for each image that cannot be decoded; another takes its place.
        in_memory: Hold decoded images in memory; None decides by their size.
        strict: Make a broken image an error instead.
        on_progress: Called with (decoded, total) while images are decoded into memory.

    Attributes:
        broken: The images found broken so far, by name, with the reason.

    Raises:
        ValueError: If patches do not fit the image, or the mask rule not the patches.

    Example:
        >>> from mto_analysis.images import open_images
        >>> from mto_analysis.demo import DEMO_IMAGES
        >>> data = TrainingData(
        ...     open_images(DEMO_IMAGES), Augmentation(32), MaskRule("random", 0.75, 4), patch_size=4
        ... )
        >>> batch = next(data.micro_batches(epoch=0, micro_batch=64))
        >>> batch.images.shape, batch.mask.sum(dim=1)[0]
        (torch.Size([64, 3, 32, 32]), tensor(48))
    """

    def __init__(
        self,
        images: Images,
        augmentation: Augmentation,
        mask_rule: MaskRule,
        patch_size: int,
        *,
        seed: int = 0,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
        on_broken: Callable[[BrokenImage], None] | None = None,
        in_memory: bool | None = None,
        strict: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        self._sampler = ImageSampler(images.names, augmentation, mask_rule, patch_size, seed)
        self._images, self._workers, self._device = images, num_workers, torch.device(device)
        self._on_broken, self._in_memory, self._strict, self._on_progress = on_broken, in_memory, strict, on_progress
        self._source: HeldImages | CroppedBatches | None = None
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        """Number of images, broken ones included."""
        return len(self._images.names)

    @property
    def skipped(self) -> dict[str, Any]:
        """What was skipped beside the images, by kind, and images found broken so far, by name with the reason."""
        return {**self._images.skipped, **self.broken}

    def order(self, epoch: int) -> Rows:
        """The rows of all images in the order of an epoch."""
        return self._sampler.order(epoch)

    def prepare(self) -> bool:
        """Decode small images into memory, once; the first batch does it if nobody did. True if they are held there."""
        if self._source is None:
            self._source = self._held() or CroppedBatches(
                self._images, self._sampler, num_workers=self._workers, pin=self._device.type == "cuda"
            )
        return isinstance(self._source, HeldImages)

    def _held(self) -> HeldImages | None:
        augmentation, wanted = self._sampler.augmentation, self._in_memory
        if wanted is None:
            wanted = fits_memory(self._images, augmentation.image_size, augmentation.channels)
        if not wanted:
            return None
        broken: dict[int, str] = {}
        pixels = decode_all(self._images, augmentation, on_broken=broken.__setitem__, on_progress=self._on_progress)
        if isinstance(pixels, str):
            if self._in_memory:
                raise DataError(f"image {pixels} is not of the size of the others; leave in_memory to None")
            return None
        self._note_broken(list(broken.items()))
        return HeldImages(pixels, self._sampler, broken, self._device)

    def _batches(self, plans: Sequence[BatchPlan]) -> Iterator[TrainBatch]:
        self.prepare()
        if isinstance(self._source, HeldImages):
            yield from self._from_memory(self._source, plans)
        elif self._source is not None:
            yield from self._from_workers(self._source, plans)

    def _from_memory(self, held: HeldImages, plans: Sequence[BatchPlan]) -> Iterator[TrainBatch]:
        # On a GPU a stream of its own, or each copy to it would wait for all of the model's work before.
        stream = self._side_stream()
        # Masks and geometry are drawn on the CPU, one batch ahead of the device.
        with ThreadPoolExecutor(1, thread_name_prefix="masks") as ahead:
            coming = [ahead.submit(held.sample, plan.rows, plan.epoch) for plan in plans[:1]]
            for number, plan in enumerate(plans):
                rows, geometry, mask = coming.pop().result()
                coming = [
                    ahead.submit(held.sample, later.rows, later.epoch) for later in plans[number + 1 : number + 2]
                ]
                with torch.cuda.stream(stream):
                    images, second = held.augmented(rows, geometry, plan.epoch)
                    batch = TrainBatch(self._sampler.names_of(rows), images, second, mask.to(self._device))
                if stream is not None:
                    self._hand_over(stream, [each for each in batch[1:] if each is not None])
                yield batch

    def _side_stream(self) -> torch.cuda.Stream | None:
        """A stream that comes after all that the device was asked for until now; none on a CPU."""
        if self._device.type != "cuda":
            return None
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        return stream

    def _hand_over(self, stream: torch.cuda.Stream, tensors: Sequence[Tensor]) -> None:
        """Let the model's stream use what was made on another."""
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(current)

    def _from_workers(self, source: CroppedBatches, plans: Sequence[BatchPlan]) -> Iterator[TrainBatch]:
        batches, stream = source.run(plans), self._side_stream()
        if stream is not None:
            batches = self._copied_ahead(stream, batches)
        for batch in batches:
            self._note_broken(batch.broken)
            rows = batch.rows.numpy()
            batch = batch.to(self._device)
            images, second = self._sampler.finish(batch.pixels, rows, batch.epoch)
            yield TrainBatch(self._sampler.names_of(rows), images, second, batch.mask)

    def _copied_ahead(self, stream: torch.cuda.Stream, batches: Iterator[CroppedBatch]) -> Iterator[CroppedBatch]:
        """One batch ahead on a stream of its own, so that copying overlaps with the model's work."""
        ready: CroppedBatch | None = None
        while True:
            batch = next(batches, None)
            coming = None
            if batch is not None:
                with torch.cuda.stream(stream):
                    coming = batch.to(self._device)
            if ready is not None:
                yield ready
            if coming is None:
                return
            self._hand_over(stream, [coming.pixels, coming.mask])
            ready = coming

    def _note_broken(self, found: Sequence[tuple[int, str]]) -> None:
        for row, reason in found:
            name = self._images.names[row]
            if self._strict:
                raise DataError(f"image {name} cannot be decoded ({reason})")
            if name not in self.broken:
                self.broken[name] = reason
                if self._on_broken is not None:
                    self._on_broken(BrokenImage(name, reason))
