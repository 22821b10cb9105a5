"""A recipe: all that a pre-training run depends on but its data, machine and seed; methods add their own settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from mto_analysis.errors import RecipeError
from mto_analysis.images import Augmentation
from mto_analysis.masks import MaskRule
from mto_analysis.runtime.settings import (
    Count,
    Natural,
    Options,
    Positive,
    Reader,
    Rising,
    Share,
    field_types,
    toml_value,
)
from mto_analysis.training.objective import TrainingSettings

R = TypeVar("R", bound="Recipe")

#: What ``--set`` may not touch: these name the recipe or say where it comes from.
_FIXED = ("name", "method", "summary", "sources", "model")
#: Of the architecture, but given by the recipe itself.
_GIVEN = ("image_size", "patch_size", "channels", "feature_dim")


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingSettings):
    """One method's pre-training, flat and typed.

    Beside the settings of every training (:class:`~mto_analysis.training.objective.TrainingSettings`):

    Args:
        name: Its own.
        method: Which method's model, loss, optimizer groups and schedule.
        summary: What it is, in a sentence.
        model: Fields of the architecture's config but image and patch size.
        image_size: Side of the input image in pixels.
        patch_size: Side of a patch in pixels.
        mask_kind: As in :class:`~mto_analysis.masks.MaskRule`.
        mask_ratio: Fraction of patches (units, for ``block``) to mask.
        mask_unit: Side of the square that is masked at once, in pixels.
        target: What is predicted, as in :class:`~mto_analysis.models.ModelInfo`.
        crop_ratio: Its aspect ratio.
        padding: Instead of resized crops: shifts by up to this many pixels over a reflected border.
        interpolation: Of the resized crop.
        mean: Channel means of pixels scaled to 0..1; as many as images have channels.
        std: Channel standard deviations of pixels scaled to 0..1.
        scale_all_lr: Whether ``min_lr`` and ``warmup_lr`` grow with the batch as well (SimMIM).
        schedule: ``cosine`` or ``multistep``.
        sources: Where values come from: a source and the fields it gives.
    """

    #: The architecture's config.
    config: ClassVar[type]

    name: str
    method: str
    summary: str
    model: Mapping[str, Any]
    image_size: Count
    patch_size: Count
    mask_kind: Literal["random", "block", "blockwise", "topped_up"]
    mask_ratio: float
    mask_unit: int
    target: Literal["pixels", "normalized_pixels", "normalized_channels", "features"]
    mean: tuple[float, ...]
    std: tuple[Positive, ...]
    crop_scale: Annotated[tuple[Share, Share], Rising(strict=False)] = (0.2, 1.0)
    crop_ratio: Annotated[tuple[Positive, Positive], Rising(strict=False)] = (0.75, 4 / 3)
    padding: Natural | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    scale_all_lr: bool = False
    schedule: Literal["cosine", "multistep"] = "cosine"
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what belongs together, too."""
        super().__post_init__()
        known = {*field_types(type(self)), *(f"model.{each}" for each in self.model)}
        unknown = {each for names in self.sources.values() for each in names} - known
        depths = [int(size) for name, size in self.model.items() if name.endswith("depth")]
        self._refuse(
            ("mean and std need a value for each channel of the images", not len(self.mean) == len(self.std) > 0),
            ("a multistep schedule needs milestones", (self.schedule == "multistep") != bool(self.turns)),
            ("the model must have at least one block in each stack", min(depths, default=1) < 1),
            (f"sources name unknown fields {', '.join(sorted(unknown))}", bool(unknown)),
        )
        self.mask_rule  # noqa: B018 - checks its own values
        self.model_config()

    @property
    def turns(self) -> tuple[int, ...]:
        """Epochs at which the learning rate drops."""
        return ()

    @property
    def mask_rule(self) -> MaskRule:
        """How its masks are sampled."""
        return MaskRule(self.mask_kind, self.mask_ratio, self.mask_unit)

    def model_config(self) -> Any:
        """The architecture's config."""
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size, "channels": len(self.mean)}
        return self.config(**self.model, **sizes)

    @classmethod
    def model_types(cls) -> Mapping[str, Any]:
        """Fields of the architecture that the table ``model`` may set, with their types."""
        return {name: kind for name, kind in field_types(cls.config).items() if name not in _GIVEN}

    def augmentation(self) -> Augmentation:
        """How its images are cropped, flipped and normalized."""
        return Augmentation(
            image_size=self.image_size,
            scale=self.crop_scale,
            ratio=self.crop_ratio,
            flip=self.flip,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            padding=self.padding,
        )

    def with_options(self: R, options: Mapping[str, Any], where: str = "--set") -> R:
        """The same recipe with some settings changed.

        Args:
            options: Text, as ``--set`` gives it, or values of their type, by the name of a field, or of a field of the
                architecture as ``model.depth``.
            where: What messages call their origin.

        Raises:
            RecipeError: If there is no such setting, or the text is not of its type.
        """
        reader = Reader(self.name, {}, Options(options, where), error=RecipeError)
        model = {**self.model, **reader.table("model").given(self.model_types())}
        sources = {
            source: tuple(name for name in names if name not in options) for source, names in self.sources.items()
        }
        if options:
            sources["set for this run"] = (*sources.get("set for this run", ()), *options)
        sources = {source: names for source, names in sources.items() if names}
        fixed = {name: getattr(self, name) for name in _FIXED}
        return reader.read(type(self), self, **{**fixed, "model": model, "sources": sources})

    def shortened(self: R, share: float) -> R:
        """A recipe whose run, with all that happens at some epoch of it, takes a share of the time."""
        epochs = max(1, round(share * self.epochs))
        return replace(self, epochs=epochs, warmup_epochs=share * self.warmup_epochs)

    def settings(self) -> dict[str, Any]:
        """What may differ between two recipes of its method, by name; fields of the architecture as ``model.depth``."""
        own = {name: getattr(self, name) for name in field_types(type(self)) if name not in _FIXED}
        return {**own, **{f"model.{name}": value for name, value in self.model.items()}}

    def source_of(self, setting: str) -> str:
        """Where the value of a field, or of ``model.depth``, comes from."""
        for name in (setting, "model") if setting.startswith("model.") else (setting,):
            for source, names in self.sources.items():
                if name in names:
                    return source
        return "default"

    def to_toml(self) -> str:
        """As a TOML file that :func:`load_recipe` reads."""
        values = self.to_dict()
        values = {name: values.pop(name) for name in ("name", "method", "summary")} | values
        model, sources = values.pop("model"), values.pop("sources")
        lines = [f"{name} = {toml_value(value)}" for name, value in values.items() if value is not None]
        lines += [
            "",
            "[model]",
            *(f"{name} = {toml_value(value)}" for name, value in model.items() if value is not None),
        ]
        lines += [
            "",
            "[sources]",
            *(f"{toml_value(source)} = {toml_value(names)}" for source, names in sources.items()),
        ]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class PixelRecipe(Recipe):
    """Recipe of a method that predicts pixels."""

    target: Literal["pixels", "normalized_pixels", "normalized_channels"]
