"""Recipes: all that a pre-training run depends on but its data, machine and seed, as data in TOML files.

Those of the paper (supplementary Tables 3-6) and small ones lie in ``assets/recipes``; each says for every value where
it comes from.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mto_analysis.errors import RecipeError
from mto_analysis.masks import MaskRule
from mto_analysis.runtime.settings import field_types, parse_value, typed_value

if TYPE_CHECKING:
    from mto_analysis.images import Augmentation

__all__ = ["Recipe", "load_recipe", "recipe_names"]

_METHODS = ("mae", "simmim", "bootmae", "conmim")
#: Settings that only some methods have; elsewhere they must stay at their defaults.
_ONLY_FOR = {
    "milestones": ("simmim",),
    "decay_factor": ("simmim",),
    "momentum": ("bootmae", "conmim"),
    "momentum_epochs": ("bootmae",),
    "feature_weight": ("bootmae",),
    "feature_ramp": ("bootmae",),
    "neighbour_weight": ("bootmae",),
    "temperature": ("conmim",),
    "second_view": ("conmim",),
}
#: What a command's ``--set`` may not touch: they name the recipe or say where it comes from.
_FIXED = ("name", "method", "summary", "sources", "model")


@dataclass(frozen=True)
class Recipe:
    """One method's pre-training, flat and typed.

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
        crop_scale: Area of the random crop, as a fraction of the image.
        crop_ratio: Its aspect ratio.
        padding: Instead of resized crops: shifts by up to this many pixels over a reflected border.
        flip: Probability of a horizontal flip.
        interpolation: Of the resized crop.
        mean: Channel means of pixels scaled to 0..1.
        std: Channel standard deviations of pixels scaled to 0..1.
        second_view: Whether the teacher sees the same crop with other colours (ConMIM).
        epochs: Length of the run.
        batch_size: Effective: over all processes and accumulated micro-batches.
        base_lr: Learning rate for ``lr_batch`` images at a time.
        lr_batch: The peak rate is ``base_lr * batch / lr_batch``; without it, ``base_lr``.
        min_lr: Where the cosine ends.
        warmup_lr: Where the warm-up starts.
        scale_all_lr: Whether ``min_lr`` and ``warmup_lr`` grow with the batch as well (SimMIM).
        warmup_epochs: Length of the linear warm-up.
        schedule: ``cosine`` or ``multistep``.
        milestones: Epochs at which a multi-step schedule decays.
        decay_factor: What it multiplies the rate by.
        weight_decay: Of weights; biases and norms have none.
        betas: Of AdamW.
        clip_grad: Largest norm of the gradient, or no clipping.
        drop_path: Largest rate of dropped branches, growing linearly with the block (SimMIM).
        momentum: Of the slow branch: at each of ``momentum_epochs`` (BootMAE), or the value from which a cosine rises
            to 1 (ConMIM).
        momentum_epochs: Epochs between which the momentum is linear.
        feature_weight: Of the feature loss (BootMAE).
        feature_ramp: Fraction of the run over which that weight rises.
        neighbour_weight: Whether a masked patch counts more, the more of its neighbours are masked (BootMAE).
        temperature: Of the contrastive loss (ConMIM).
        sources: Where values come from: a source and the fields it gives.
    """

    name: str
    method: Literal["mae", "simmim", "bootmae", "conmim"]
    summary: str
    model: Mapping[str, Any]
    image_size: int
    patch_size: int
    mask_kind: Literal["random", "block", "blockwise", "topped_up"]
    mask_ratio: float
    mask_unit: int
    target: Literal["pixels", "normalized_pixels", "normalized_channels", "features"]
    epochs: int
    batch_size: int
    base_lr: float
    warmup_epochs: float
    weight_decay: float
    betas: tuple[float, float]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    padding: int | None = None
    flip: float = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    second_view: bool = False
    lr_batch: int | None = None
    min_lr: float = 0.0
    warmup_lr: float = 0.0
    scale_all_lr: bool = False
    schedule: Literal["cosine", "multistep"] = "cosine"
    milestones: tuple[int, ...] = ()
    decay_factor: float = 0.1
    clip_grad: float | None = None
    drop_path: float = 0.0
    momentum: tuple[float, ...] = ()
    momentum_epochs: tuple[int, ...] = ()
    feature_weight: float = 1.0
    feature_ramp: float = 0.25
    neighbour_weight: bool = False
    temperature: float = 0.1
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values; the message names the field and the rule."""
        defaults = {each.name: each.default for each in fields(self)}
        for name, methods in _ONLY_FOR.items():
            if self.method not in methods and getattr(self, name) != defaults[name]:
                raise RecipeError(f"{self.name}: {name} is a setting of {', '.join(methods)}, not of {self.method}")
        for rule, broken in (
            ("epochs must be at least 1", self.epochs < 1),
            ("batch_size must be at least 1", self.batch_size < 1),
            ("base_lr must be above 0", not self.base_lr > 0),
            ("lr_batch must be at least 1", self.lr_batch is not None and self.lr_batch < 1),
            ("warmup_epochs must lie between 0 and epochs", not 0 <= self.warmup_epochs <= self.epochs),
            ("min_lr and warmup_lr must be at least 0", self.min_lr < 0 or self.warmup_lr < 0),
            ("weight_decay must be at least 0", self.weight_decay < 0),
            ("betas must lie between 0 and 1", not all(0 <= beta < 1 for beta in self.betas)),
            ("clip_grad must be above 0", self.clip_grad is not None and not self.clip_grad > 0),
            ("drop_path must lie between 0 and 1", not 0 <= self.drop_path < 1),
            ("flip must lie between 0 and 1", not 0 <= self.flip <= 1),
            ("crop_scale must rise within 0 to 1", not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1),
            ("std must be above 0", not all(each > 0 for each in self.std)),
            ("a multistep schedule needs milestones", (self.schedule == "multistep") != bool(self.milestones)),
            ("milestones must rise", list(self.milestones) != sorted(set(self.milestones))),
            ("temperature must be above 0", not self.temperature > 0),
            ("momentum must lie between 0 and 1", not all(0 <= each <= 1 for each in self.momentum)),
            ("momentum needs a value", self.method in _ONLY_FOR["momentum"] and not self.momentum),
            ("feature_ramp must lie between 0 and 1", not 0 <= self.feature_ramp <= 1),
            (
                "the model must have at least one block in each stack",
                any(int(size) < 1 for name, size in self.model.items() if name.endswith("depth")),
            ),
            ("target must be features for conmim only", (self.method == "conmim") != (self.target == "features")),
        ):
            if broken:
                raise RecipeError(f"{self.name}: {rule}")
        if self.method == "bootmae" and len(self.momentum) != len(self.momentum_epochs):
            raise RecipeError(f"{self.name}: momentum needs one value for each of momentum_epochs")
        if self.method == "conmim" and len(self.momentum) != 1:
            raise RecipeError(f"{self.name}: momentum must be one value, from which it rises to 1")
        try:
            self.mask_rule  # noqa: B018 - checks its own values
            self.model_config()
        except ValueError as error:
            raise RecipeError(f"{self.name}: {error}") from error
        known = {each.name for each in fields(self)} | {f"model.{each}" for each in self.model}
        if unknown := {each for names in self.sources.values() for each in names} - known:
            raise RecipeError(f"{self.name}: sources name unknown fields {', '.join(sorted(unknown))}")

    @property
    def mask_rule(self) -> MaskRule:
        """How its masks are drawn."""
        return MaskRule(self.mask_kind, self.mask_ratio, self.mask_unit)

    @property
    def pixel_target(self) -> Literal["pixels", "normalized_pixels", "normalized_channels"]:
        """The target of methods that predict pixels."""
        if self.target == "features":
            raise ValueError(f"{self.method} predicts no pixels")
        return self.target

    def model_config(self) -> Any:
        """The architecture's config: ``MAEConfig``, ``SimMIMConfig``, ``BootMAEConfig`` or ``ConMIMConfig``.

        BootMAE predicts features as wide as its own encoder.
        """
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size}
        config = _config_class(self.method)(**self.model, **sizes)
        return replace(config, feature_dim=config.dim) if self.method == "bootmae" else config

    def augmentation(self) -> Augmentation:
        """How its images are cropped, flipped and normalised."""
        from mto_analysis.images import CONMIM_TEACHER, Augmentation

        return Augmentation(
            image_size=self.image_size,
            scale=self.crop_scale,
            ratio=self.crop_ratio,
            flip=self.flip,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            padding=self.padding,
            second_view=CONMIM_TEACHER if self.second_view else None,
        )

    def with_options(self, options: Mapping[str, str]) -> Recipe:
        """The same recipe with some settings changed, as ``--set key=value`` gives them.

        Args:
            options: Text by the name of a field, or of a field of the architecture as ``model.depth``.

        Raises:
            RecipeError: If there is no such setting, or the text is not of its type.
        """
        declared, inner = field_types(Recipe), _model_types(self.method)
        changes: dict[str, Any] = {}
        model = dict(self.model)
        for key, text in options.items():
            try:
                if key.startswith("model.") and key.removeprefix("model.") in inner:
                    name = key.removeprefix("model.")
                    model[name] = parse_value(key, inner[name], text)
                elif key in declared and key not in _FIXED:
                    changes[key] = parse_value(key, declared[key], text)
                else:
                    raise RecipeError(f"{self.name}: no setting is called {key!r}; known are {_known(self.method)}")
            except RecipeError:
                raise
            except ValueError as error:
                raise RecipeError(f"{self.name}: {error}") from error
        sources = {
            source: tuple(name for name in names if name not in options) for source, names in self.sources.items()
        }
        if options:
            sources["set for this run"] = (*sources.get("set for this run", ()), *options)
        sources = {source: names for source, names in sources.items() if names}
        return replace(self, model=model, sources=sources, **changes)

    def settings(self) -> dict[str, Any]:
        """What may differ between two recipes of its method, by name; fields of the architecture as ``model.depth``."""
        values = {name: getattr(self, name) for name in field_types(Recipe) if name not in (*_FIXED, "sources")}
        own = {name: value for name, value in values.items() if self.method in _ONLY_FOR.get(name, (self.method,))}
        return {**own, **{f"model.{name}": value for name, value in self.model.items()}}

    def source_of(self, setting: str) -> str:
        """Where the value of a field, or of ``model.depth``, comes from."""
        for name in (setting, "model") if setting.startswith("model.") else (setting,):
            for source, names in self.sources.items():
                if name in names:
                    return source
        return "default"

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; :func:`load_recipe` reads them back from a TOML file."""
        return asdict(replace(self, model=dict(self.model), sources=dict(self.sources)))

    def to_toml(self) -> str:
        """As a TOML file that :func:`load_recipe` reads."""
        values = self.to_dict()
        model, sources = values.pop("model"), values.pop("sources")
        lines = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
        lines += ["", "[model]", *(f"{name} = {_toml(value)}" for name, value in model.items() if value is not None)]
        lines += ["", "[sources]", *(f"{_toml(source)} = {_toml(names)}" for source, names in sources.items())]
        return "\n".join(lines) + "\n"


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package.

    Example:
        >>> "mae_cifar10" in recipe_names()
        True
    """
    folder = resources.files("mto_analysis") / "assets" / "recipes"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe that comes with the package, by name, or one of the user's own, by the path of its TOML file.

    Raises:
        RecipeError: If there is none, or its file is not a whole recipe.

    Example:
        >>> load_recipe("mae_vit_base").batch_size
        4096
    """
    text = str(name_or_path)
    if text in recipe_names():
        content = (resources.files("mto_analysis") / "assets" / "recipes" / f"{text}.toml").read_text("utf-8")
        return _read(content, text)
    path = Path(text).expanduser()
    if not path.is_file():
        raise RecipeError(f"no recipe is called {text!r}, nor is it a file; known are {', '.join(recipe_names())}")
    try:
        return _read(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error


def _read(content: str, where: str) -> Recipe:
    try:
        values = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where} is not TOML: {error}") from error
    values.setdefault("name", Path(where).stem)
    method = values.get("method")
    if method not in _METHODS:
        raise RecipeError(f"{where}: method must be one of {', '.join(_METHODS)}, got {method!r}")
    declared, inner = field_types(Recipe), _model_types(method)
    tables = {name: values.pop(name, {}) for name in ("model", "sources")}
    if not all(isinstance(table, dict) for table in tables.values()):
        raise RecipeError(f"{where}: model and sources must be tables")
    if unknown := [key for key in values if key not in declared]:
        raise RecipeError(f"{where}: no setting is called {unknown[0]!r}; known are {_known(method)}")
    if unknown := [key for key in tables["model"] if key not in inner]:
        raise RecipeError(f"{where}: no setting is called {f'model.{unknown[0]}'!r}; known are {_known(method)}")
    required = [each.name for each in fields(Recipe) if each.default is each.default_factory and each.name != "model"]
    if missing := [name for name in required if name not in values]:
        raise RecipeError(f"{where}: lacks {', '.join(missing)}")
    try:
        typed = {key: typed_value(key, declared[key], value) for key, value in values.items()}
        model = {key: typed_value(f"model.{key}", inner[key], value) for key, value in tables["model"].items()}
        names = {source: typed_value(source, tuple[str, ...], value) for source, value in tables["sources"].items()}
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error
    return Recipe(model=model, sources=names, **typed)


def _config_class(method: str) -> Any:
    from mto_analysis.models import BootMAEConfig, ConMIMConfig, MAEConfig, SimMIMConfig

    return {"mae": MAEConfig, "simmim": SimMIMConfig, "bootmae": BootMAEConfig, "conmim": ConMIMConfig}[method]


@cache
def _model_types(method: str) -> Mapping[str, Any]:
    """Fields of the architecture that a recipe's ``model`` table may set."""
    types = field_types(_config_class(method))
    return {name: kind for name, kind in types.items() if name not in ("image_size", "patch_size", "feature_dim")}


def _known(method: str) -> str:
    """Names of all settings that a user may change."""
    own = [name for name in field_types(Recipe) if name not in _FIXED and method in _ONLY_FOR.get(name, (method,))]
    return ", ".join([*own, *(f"model.{name}" for name in _model_types(method))])


def _toml(value: Any) -> str:
    """A plain value in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    return repr(value)
