"""Large images for training: read, decoded, cropped and masked by micro-batch, in worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mto_analysis.errors import DataError
from mto_analysis.images.interface import Images, reason_of
from mto_analysis.images.loading import Loader
from mto_analysis.images.reading import read_pixels
from mto_analysis.images.sampling import ImageSampler, Rows


class BatchPlan(NamedTuple):
    """One micro-batch before anything is read; its place is step, micro-batch of the step, and process."""

    epoch: int
    rows: Rows
    place: tuple[int, int, int]


class CroppedBatch(NamedTuple):
    """One micro-batch out of a worker process; ``failure`` says in its place why there is none.

    Shapes:
        rows: batch (those of replacements where images were broken)
        pixels: batch channels image_size image_size (uint8; float32 where an image is not in eight bits)
        mask: batch num_patches
    """

    epoch: int
    rows: Tensor
    pixels: Tensor
    mask: Tensor
    broken: list[tuple[int, str]]
    failure: str | None

    def to(self, device: torch.device) -> CroppedBatch:
        """Pixels and mask on a device."""
        return self._replace(
            pixels=self.pixels.to(device, non_blocking=True), mask=self.mask.to(device, non_blocking=True)
        )


class _Cropping(Dataset[CroppedBatch]):
    """Carries out plans; picklable, so that worker processes can do it."""

    def __init__(self, images: Images, sampler: ImageSampler) -> None:
        self._images, self._sampler = images, sampler

    def __getitem__(self, plan: BatchPlan) -> CroppedBatch:
        size, channels = self._sampler.augmentation.image_size, self._sampler.augmentation.channels
        pixels = [torch.empty(channels, size, size, dtype=torch.uint8)] * len(plan.rows)
        rows, numbers = plan.rows.copy(), self._sampler.numbers(plan.rows, plan.epoch)
        broken: list[tuple[int, str]] = []
        failure = None
        try:
            for place, row in enumerate(plan.rows.tolist()):
                one = numbers[place : place + 1]
                rows[place], pixels[place] = self._cropped(row, plan.epoch, one, broken)
        except DataError as error:  # would come out of a worker with its whole traceback
            failure = str(error)
        mask = self._sampler.masks(rows, plan.epoch)
        if any(each.is_floating_point() for each in pixels):
            pixels = [each.float() for each in pixels]
        return CroppedBatch(plan.epoch, torch.from_numpy(rows), torch.stack(pixels), mask, broken, failure)

    def _cropped(
        self, row: int, epoch: int, numbers: npt.NDArray[np.float64], broken: list[tuple[int, str]]
    ) -> tuple[int, Tensor]:
        """An image's crop, or that of its replacement, and the row that it is of."""
        for candidate in self._sampler.candidates(row, epoch):
            try:
                one = read_pixels(self._images, candidate, self._sampler.augmentation.channels)
            except DataError:
                raise
            except Exception as error:  # decoders fail in many ways, and one bad file must not end a run
                broken.append((candidate, reason_of(error)))
                continue
            if candidate != row:
                numbers = self._sampler.numbers(np.array([candidate], dtype=np.int64), epoch)
            geometry = self._sampler.geometry(numbers, (one.shape[1], one.shape[2]))
            return candidate, self._sampler.augmentation.apply_to_image(one, geometry)
        raise DataError(f"there is no image in place of {self._images.names[row]}")


class _Plans(Sampler[BatchPlan]):
    """Hands out the plans it was last given, so that one set of worker processes serves every epoch."""

    def __init__(self) -> None:
        self.plans: Sequence[BatchPlan] = ()

    def __iter__(self) -> Iterator[BatchPlan]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)


class CroppedBatches:
    """Carries out plans in worker processes, which are started once, or in this process.

    Only the geometry is applied here, on eight-bit pixels: a quarter of the bytes to hand over, and the rest is done
    by batch on the device.

    Args:
        images: Where from.
        sampler: Samples what is random about each image.
        num_workers: Processes; 0 works in this one.
        pin: Make batches ready for copying to a GPU while it works.
    """

    def __init__(self, images: Images, sampler: ImageSampler, *, num_workers: int, pin: bool) -> None:
        self._cropping, self._plans, self._running = _Cropping(images, sampler), _Plans(), False
        self._loader = Loader(
            self._cropping,
            batch_size=None,
            sampler=self._plans,
            num_workers=num_workers,
            collate=_unchanged,
            pin_memory=pin,
            persistent_workers=num_workers > 0,
        )

    def run(self, plans: Sequence[BatchPlan]) -> Iterator[CroppedBatch]:
        """Carry out plans, in order; broken images are in the batches."""
        if self._running and self._loader.keeps_workers:
            raise RuntimeError("the workers are carrying out other plans; close that iterator first")
        self._running, self._plans.plans = True, plans
        try:
            for batch in self._loader:
                if batch.failure is not None:
                    raise DataError(batch.failure)
                yield batch
        finally:
            self._running = False


def _unchanged(batch: Any) -> Any:
    return batch
