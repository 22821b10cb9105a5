"""What a study is asked for, and each of its checkpoints in turn: opened once, loaded, its own loss checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mto_analysis.checkpoints import LoadOptions, RawCheckpoint, checkpoint_info, load_checkpoint, open_checkpoint
from mto_analysis.checkpoints.statistics import Statistics
from mto_analysis.errors import DataError, HeadCountError, OptionNeededError
from mto_analysis.images import BrokenImage, ImageBatch, Images, image_batches
from mto_analysis.images.interface import choose_rows, spread_rows
from mto_analysis.images.loading import usual_workers
from mto_analysis.masks import MaskRule
from mto_analysis.models import MaskedImageModel, ModelInfo
from mto_analysis.models.adapting import with_config
from mto_analysis.models.interface import HEADS_ASSUMED
from mto_analysis.probe.engine import MaskSource, masks_from_file, masks_from_rule, undisturbed
from mto_analysis.probe.head_counts import COMPARED_IMAGES, HeadCounts, compare_heads
from mto_analysis.probe.live_source import LiveSource
from mto_analysis.probe.measures import names_of
from mto_analysis.probe.own_loss import OwnLoss, own_loss, without_pixels
from mto_analysis.probe.pairing import common_num_visible, rule_leaving
from mto_analysis.runtime.listener import Listener
from mto_analysis.runtime.outputs import chosen_labels
from mto_analysis.runtime.processes import Processes

_CHECKED_IMAGES = 16


@dataclass(frozen=True)
class Settings:
    """How to measure; the defaults are the model's own masks, once per image, on the CPU in float32.

    Args:
        limit: Number of images, spread evenly; all by default.
        mask_ratio: Instead of the model's own.
        mask_unit: Side in pixels of the square masked at once, instead of the model's own.
        match_visible: The model's own kind of mask, but with equally many patches left visible for all models.
        masks: Masks by image name, instead of sampling them.
        masks_per_image: Masks per image.
        seed: Seed of the random masks.
        batch_size: Images at once; results do not depend on it beyond rounding.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: Of the model's forward; H is computed in at least float32.
        num_workers: Processes that decode images; by default as many as pay off for their number
            (:func:`~mto_analysis.images.loading.usual_workers`).
        strict: A broken image is an error.
        measures: Names of :data:`~mto_analysis.probe.measures.MEASURES` in one text or several, or ``"all"`` that a
            model allows; heterogeneity is always among them.
        keep_masks: Keep the masks for :meth:`~mto_analysis.probe.study.HeterogeneityStudy.mask_file`.
    """

    limit: int | None = None
    mask_ratio: float | None = None
    mask_unit: int | None = None
    match_visible: bool = False
    masks: Mapping[str, Tensor] | None = None
    masks_per_image: int = 1
    seed: int = 0
    batch_size: int = 32
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    num_workers: int | None = None
    strict: bool = False
    measures: str | Sequence[str] = "h"
    keep_masks: bool = False

    def __post_init__(self) -> None:
        """Check what belongs together."""
        names_of(self.measures)
        if self.masks is not None and (self.mask_ratio is not None or self.mask_unit is not None):
            raise ValueError("masks from a file have their own ratio and unit; leave mask_ratio and mask_unit out")
        if self.match_visible and (self.masks, self.mask_ratio, self.mask_unit) != (None, None, None):
            raise ValueError("match_visible decides the mask; leave masks, mask_ratio and mask_unit out")

    def rows(self, images: Images) -> list[int]:
        """Which images are measured, by number."""
        return spread_rows(len(images.names), self.limit)


def masked_batch(model: MaskedImageModel, batch: ImageBatch, masks: MaskSource) -> tuple[Tensor, Tensor]:
    """The images of a batch as the model takes them, and the first mask of each, on its device."""
    like = next(model.parameters())
    return batch.images.to(like.device, like.dtype), masks(batch.names, 0).to(like.device)


@dataclass(frozen=True)
class LoadedModel:
    """One checkpoint of a request, on its device, ready to be measured."""

    label: str
    model: MaskedImageModel
    masks: MaskSource
    own_loss: OwnLoss | None  #: ``None`` where the family predicts no pixels, or no image could be read
    metadata: dict[str, Any]  #: For ``run.json``.


@dataclass(frozen=True)
class Request:
    """What to measure: every study takes one, and nothing that it names is resolved or opened twice.

    Args:
        sources: Checkpoints, one after the other in memory: paths, registry ids, ``hf://owner/name``, URLs; or
            :class:`~mto_analysis.probe.live_source.LiveSource`, models of the user's own code.
        images: From :func:`~mto_analysis.images.open_images`.
        settings: How to measure.
        labels: Names of the models, one per checkpoint; by default from the paths.
        loading: How checkpoints are loaded; head counts given for several are for those that need them.
        listener: Takes notes, warnings and progress.
        processes: Those of a launcher, from :func:`~mto_analysis.runtime.processes.this_process`; by default this one.

    Raises:
        ValueError: If there is not one different label per checkpoint.
    """

    sources: Sequence[str | Path]
    images: Images
    settings: Settings = field(default_factory=Settings)
    labels: Sequence[str] = ()
    loading: LoadOptions = field(default_factory=LoadOptions)
    listener: Listener = field(default_factory=Listener)
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        """Name the models."""
        object.__setattr__(self, "labels", chosen_labels(self.sources, self.labels))

    @cached_property
    def _opened(self) -> list[RawCheckpoint | None]:
        """All checkpoints, before an hour is spent on one; their weights stay on the disk until they are loaded."""
        options: dict[str, Any] = {"mmap": True, "weights": self.loading.weights, "offline": self.loading.offline}
        return [
            source.open() if isinstance(source, LiveSource) else open_checkpoint(source, **options)
            for source in self.sources
        ]

    @cached_property
    def _num_visible(self) -> int | None:
        """How many patches all models leave visible, where that was asked for."""
        if not self.settings.match_visible:
            return None
        infos = [self._info(source, raw) for source, raw in zip(self.sources, self._opened, strict=True)]
        if self.loading.mask_ratio is not None and not any("given" in info.mask_rule_source for info in infos):
            raise ValueError("match_visible decides the mask, and no file needs a ratio; leave mask_ratio out")
        return common_num_visible(infos)

    def _info(self, source: str | Path, raw: RawCheckpoint | None) -> ModelInfo:
        if raw is None or isinstance(source, LiveSource):
            return self._load(source, raw).info
        return checkpoint_info(raw, self.loading.image_size, self.loading.mask_ratio)

    def _load(self, source: str | Path, raw: RawCheckpoint | None, *, encoder_only: bool = False) -> MaskedImageModel:
        """Load a checkpoint; numbers given for several are for those that need them, as is ``auto``.

        Masks from a file or matched to other models need no ratio of the model's own, and an encoder alone needs
        neither that nor the decoder's head count.
        """
        if isinstance(source, LiveSource):
            self.listener.note(f"{source}: its module is imported, so its code runs")
            return self._with_statistics(source, source.load(raw))
        assert raw is not None
        chosen = self.loading.keywords()
        given = {option: getattr(self.loading, option) for option in HEADS_ASSUMED}
        if len(self.sources) > 1:
            chosen = {option: value for option, value in chosen.items() if option not in given}
        if encoder_only:
            given["decoder_num_heads"] = given["decoder_num_heads"] or "auto"
        without = encoder_only or self.settings.masks is not None or self.settings.match_visible
        given["mask_ratio"] = chosen.pop("mask_ratio") or self.settings.mask_ratio or ("auto" if without else None)
        while True:
            try:
                return load_checkpoint(raw, **chosen)
            except OptionNeededError as error:
                if given.get(error.option) is None:
                    if isinstance(error, HeadCountError):
                        error.args = (f"{error}, or auto to compare losses on the images",)
                    raise
                if encoder_only and error.option != "num_heads" and given[error.option] == "auto":
                    self.stand_ins[error.option] = error.stand_in
                chosen[error.option] = error.stand_in if given[error.option] == "auto" else given[error.option]

    def _with_statistics(self, source: LiveSource, model: MaskedImageModel) -> MaskedImageModel:
        """A live model with the mean and std that were given; the other options are for files."""
        options = ("image_size", *(() if len(self.sources) > 1 else HEADS_ASSUMED))
        if odd := [name for name in options if getattr(self.loading, name) is not None]:
            words = odd[0].replace("_", " ")
            raise ValueError(f"{source} is a live model, which has {words} of its own; leave {odd[0]} out")
        if (self.loading.mean, self.loading.std) != (None, None):
            info = model.info
            found = Statistics(info.mean, info.std, info.statistics_source)
            found = found.overridden(self.loading.mean, self.loading.std)
            found.check(info.channels)
            model.info = replace(info, mean=found.mean, std=found.std, statistics_source=found.source)
        return model

    @cached_property
    def stand_ins(self) -> dict[str, Any]:
        """What :meth:`encoder` took in place of options that an encoder does not need, and the file does not say."""
        return {}

    def encoder(self) -> MaskedImageModel:
        """The first checkpoint, on its device, for the sake of its encoder: nothing but that need be known."""
        label = self.labels[0]
        model = self._load(self.sources[0], self._opened[0], encoder_only=True)
        model = model.to(self.settings.device, self.settings.dtype)
        if "num_heads" in model.info.unsettled_heads:
            model = self._settle_heads(label, model, self._masks(model)[0], encoder_only=True)
        self._say_assumptions(label, model, without=HEADS_ASSUMED["decoder_num_heads"])
        return model

    def models(self, checked: Sequence[int] | None = None) -> Iterator[LoadedModel]:
        """Load one checkpoint after the other.

        Args:
            checked: Rows of the images that its own loss is computed on; by default some of those to be measured.
        """
        self._describe_images()
        for source, raw, label in zip(self.sources, self._opened, self.labels, strict=True):
            model = self._load(source, raw).to(self.settings.device, self.settings.dtype)
            masks, words, rule = self._masks(model)
            rows = self.settings.rows(self.images)[:_CHECKED_IMAGES] if checked is None else checked
            if model.info.unsettled_heads:
                model = self._settle_heads(label, model, masks)
            self._describe(label, model, words)
            loss = self._check(label, model, masks, rows) if self.processes.main else None
            metadata = {
                "model": label,
                "source": str(source),
                "sha256": raw.sha256 if raw is not None else None,
                "info": asdict(model.info),
                "config": asdict(model.config),
                "mask_rule": asdict(rule) if rule else None,
                "masks": words,
                "num_images": len(self.settings.rows(self.images)),
                "own_loss": loss._asdict() if loss else None,
            }
            yield LoadedModel(label, model, masks, loss, metadata)

    def _describe_images(self) -> None:
        """Say what was skipped beside the images, and which of their values are black and white."""
        if self.images.skipped:
            skipped = f"skipped {self.images.skipped_in_words}"
            if self.settings.strict:
                raise DataError(f"{skipped} beside the images; move them away, or measure without --strict")
            self.listener.note(skipped)
        with contextlib.suppress(Exception):  # a broken image is dealt with when it is decoded
            if words := self.images.range_in_words(self.settings.rows(self.images)[0]):
                self.listener.note(f"image {self.images.names[0]}: {words}")

    def _masks(self, model: MaskedImageModel) -> tuple[MaskSource, str, MaskRule | None]:
        """Where masks come from, in words, and their rule."""
        info, settings = model.info, self.settings
        if settings.masks is not None:
            counts = [(int(each.sum()), each.numel()) for each in settings.masks.values()]
            share = sum(masked for masked, _ in counts) / sum(number for _, number in counts)
            own = info.mask_rule.ratio
            if info.mask_rule_source != "assumed" and abs(1 - share - own) + 0.05 < abs(share - own):
                self.listener.warn(
                    f"the mask file masks {share:.0%} of the patches, the model's own rule {own:.0%}: True means "
                    "masked there, so invert it if True means visible"
                )
            return masks_from_file(info, settings.masks), f"from the mask file, {share:.0%} masked", None
        if self._num_visible is not None:
            rule = rule_leaving(info, self._num_visible)
        else:
            rule = info.mask_rule.with_options(ratio=settings.mask_ratio, unit=settings.mask_unit)
        origin = info.mask_rule_source if rule == info.mask_rule else "as asked for"
        return masks_from_rule(info, rule, seed=settings.seed), f"{rule} ({origin}), seed {settings.seed}", rule

    def _describe(self, label: str, model: MaskedImageModel, masks: str) -> None:
        info = model.info
        self.listener.note(f"{label}: {info.family} ({info.layout}), {info.pixels}; masks: {masks}")
        if info.channels == 1:
            self.listener.note(f"{label}: has one channel; colour images are turned grey (ITU-R 601)")
        if info.statistics_source != "published":
            self.listener.note(f"{label}: mean {info.mean}, std {info.std} ({info.statistics_source})")
        if info.caveat:
            self.listener.note(f"{label}: {info.caveat}")
        self._say_assumptions(label, model)

    def _say_assumptions(self, label: str, model: MaskedImageModel, without: str = "") -> None:
        for assumption in model.info.assumptions:
            if assumption != without:
                self.listener.note(f"{label}: assumed that {assumption}")

    def _settle_heads(
        self, label: str, model: MaskedImageModel, masks: MaskSource, *, encoder_only: bool = False
    ) -> MaskedImageModel:
        """Choose head counts by the loss where that was asked for, and doubt those that another one beats."""
        found = HeadCounts()
        if self.processes.main:
            rows = self.settings.rows(self.images)
            batch = self._masked(model, masks, [rows[index] for index in spread_rows(len(rows), COMPARED_IMAGES)])
            asked = {option: getattr(self.loading, option) for option in model.info.unsettled_heads}
            if encoder_only and asked["num_heads"] == "auto":
                asked |= {option: "auto" for option, count in asked.items() if count is None}
            try:
                found = compare_heads(model, batch, asked, encoder_only=encoder_only)
            except HeadCountError as error:
                raise HeadCountError(f"{label}: {error}", error.option) from error
            for say, words in ((self.listener.note, found.note), (self.listener.warn, found.warning)):
                if words:
                    say(f"{label}: {words}")
        (taken, *_) = self.processes.exchange(found.taken)
        if not taken:
            return model
        changed = with_config(model, replace(model.config, **taken))
        assumed = {HEADS_ASSUMED[option] for option in taken}
        others = tuple(each for each in model.info.assumptions if each not in assumed)
        changed.info = replace(model.info, assumptions=others)
        return changed

    def _masked(self, model: MaskedImageModel, masks: MaskSource, rows: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Some images on the model's device, with their masks."""
        batch = next(self.batches(model, rows, batch_size=max(len(rows), 1)), None)
        return None if batch is None else masked_batch(model, batch, masks)

    def _check(self, label: str, model: MaskedImageModel, masks: MaskSource, rows: Sequence[int]) -> OwnLoss | None:
        """The model's own loss on a few images: a sanity check that the weights were loaded correctly."""
        batch = self._masked(model, masks, rows)
        if batch is None:
            return None
        with undisturbed(model):
            loss = own_loss(model, *batch)
        if loss is None:
            self.listener.note(f"{label}: {without_pixels(model)}, so its own loss cannot be checked on images")
            return None
        say = self.listener.warn if loss.suspicious else self.listener.note
        say(f"{label}: {loss.in_words()}")
        return loss

    @cached_property
    def broken(self) -> dict[str, str]:
        """Images that could not be decoded, by name, with the reason."""
        return {}

    @property
    def skipped(self) -> dict[str, Any]:
        """For ``run.json``: what was skipped beside the images, by kind, and broken images, by name."""
        return {**self.images.skipped, **self.broken}

    def measured(self, loaded: LoadedModel) -> dict[str, Any]:
        """Metadata of a model after its pass: broken images do not count."""
        return {**loaded.metadata, "num_images": loaded.metadata["num_images"] - len(self.broken)}

    def note_broken(self, image: BrokenImage) -> None:
        """Say once that an image is broken, though every model meets it again."""
        if image.name not in self.broken:
            self.broken[image.name] = image.reason
            self.listener.warn(f"skipped {image.name}: {image.reason}")

    def batches(
        self,
        model: MaskedImageModel,
        rows: Sequence[int],
        *,
        batch_size: int | None = None,
        num_workers: int | None = 0,
    ) -> Iterator[ImageBatch]:
        """Some images for a model; broken ones are noted, or an error under ``strict``."""
        if num_workers is None:
            num_workers = usual_workers(len(rows), self.processes.count)
        return image_batches(
            choose_rows(self.images, rows),
            model.info,
            batch_size=batch_size or self.settings.batch_size,
            num_workers=num_workers,
            on_broken=None if self.settings.strict else self.note_broken,
        )
