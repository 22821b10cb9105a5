"""What an experiment is: recipes, arms with and without MTO, seeds, evaluation, windows; read from a TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mto_analysis.errors import DataNotFoundError, ExperimentError, MTOAnalysisError
from mto_analysis.mto import MTOConfig
from mto_analysis.runtime.settings import (
    Count,
    Fraction,
    Natural,
    Options,
    Reader,
    Rising,
    Settings,
    Share,
    bundled_names,
    field_types,
    open_settings,
)
from mto_analysis.training.evaluation import Evaluation
from mto_analysis.training.recipes import Recipe, load_recipe
from mto_analysis.training.settings import Precision, read_mto

#: So many candidates at most, or the choice itself becomes a search that the seeds of the experiment pay for.
MOST_CANDIDATES = 6


@dataclass(frozen=True)
class Variant:
    """One way to pre-train, which every arm is run with.

    Args:
        label: What curves and figures call it.
        recipe: With all changes.
    """

    label: str
    recipe: Recipe


@dataclass(frozen=True)
class Arm:
    """A way to train every variant.

    Args:
        name: What follows the variant's label, as in ``MAE + MTO``.
        mto: Settings of MTO, or none.
        chosen: Take the settings from the experiment's choice instead.
    """

    name: str
    mto: MTOConfig | None = None
    chosen: bool = False

    @property
    def plain(self) -> bool:
        """Whether nothing is added to the model's own loss."""
        return self.mto is None and not self.chosen


@dataclass(frozen=True)
class Candidate:
    """Settings of MTO to choose from."""

    name: str
    mto: MTOConfig


@dataclass(frozen=True)
class Choice(Settings):
    """How the settings of the chosen arms are found: on other seeds, in shorter runs.

    Args:
        candidates: At most six.
        seeds: None of them may be a seed of the experiment.
        share: Length of its runs, as a share of the experiment's epochs.
        by: ``final`` score, or the ``mean`` score along the run; of each candidate the mean over seeds.
    """

    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    share: Share = 0.5
    by: Literal["final", "mean"] = "final"


@dataclass(frozen=True)
class Images:
    """Where images are, relative to the folder that is given with ``--images``.

    Args:
        train: To pre-train on.
        eval_train: Labelled, for evaluation; by default the same.
        eval_test: Labelled, to score on.
    """

    train: str = "train.parquet"
    eval_train: str | None = None
    eval_test: str = "test.parquet"

    def resolved(self, folder: Path | None) -> Images:
        """With absolute paths, so that every process finds them."""

        def find(name: str) -> str:
            path = (folder or Path()).expanduser() / Path(name).expanduser()
            if not path.exists():
                raise DataNotFoundError(f"there are no images at {path}; give their folder with --images")
            return str(path.resolve())

        return Images(find(self.train), find(self.eval_train or self.train), find(self.eval_test))


@dataclass(frozen=True)
class Experiment(Settings):
    """A whole experiment.

    Args:
        name: Its own.
        summary: What it asks, in a sentence.
        variants: Every arm is run with each.
        arms: The first one without MTO is the baseline of the others.
        seeds: Of every arm, so that runs pair.
        images: Where they are.
        evaluation: Protocol and settings; its images and epochs are filled in for each run.
        points: Evaluations along a run, the last at its end; the random encoder comes on top.
        windows: For RAUC, as shares of the run from 0 to 1; moved to the next evaluated epoch.
        choice: How the settings of chosen arms are found.
        compare: Further pairs of methods, baseline first, as ``("SimMIM", "MAE")``.
        precision: Autocast precision.
        device: ``auto`` (CUDA, else CPU), ``cpu``, ``cuda``, ``cuda:N``, ``mps``.
        deterministic: Exact resume on a GPU too; slower.
        num_workers: Processes of each run that decode images.
        log_every: Steps between rows of each ``metrics.csv``; H is measured on these.
        verify_data: Hash all training images, so that a resumed run notices any that was replaced.
        value_range: Values of black and white, of images that are not in eight bits and do not state them.
    """

    name: str
    summary: str
    variants: tuple[Variant, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    images: Images
    evaluation: Evaluation
    points: Count = 10
    windows: tuple[Annotated[tuple[Fraction, Fraction], Rising()], ...] = ((0.0, 1.0),)
    choice: Choice | None = None
    compare: tuple[tuple[str, str], ...] = ()
    precision: Precision = "fp32"
    device: str = "auto"
    deterministic: bool = False
    num_workers: Natural = 0
    log_every: Count = 20
    verify_data: bool = False
    value_range: Annotated[tuple[float, float], Rising()] | None = None

    def __post_init__(self) -> None:
        """Check what belongs together, too; the message names the key."""
        super().__post_init__()
        seeds = self.choice.seeds if self.choice else ()
        candidates = [each.name for each in self.choice.candidates] if self.choice else []
        arms, labels = [each.name for each in self.arms], [each.label for each in self.variants]
        strangers = [method for pair in self.compare for method in pair if method not in self.methods]
        self._refuse(
            ("recipes: an experiment needs at least one", not self.variants),
            ("recipes: labels must differ", len(set(labels)) < len(labels)),
            ("arms: an experiment needs at least one", not self.arms),
            ("arms: names must differ", len(set(arms)) < len(arms)),
            ("seeds: an experiment needs at least one", not self.seeds),
            (
                "seeds: must differ, and not be negative",
                len(set(self.seeds)) < len(self.seeds) or min(self.seeds, default=0) < 0,
            ),
            ('choose: an arm has mto = "chosen", so it needs candidates', self._chosen and not candidates),
            ('choose: no arm has mto = "chosen"', bool(candidates) and not self._chosen),
            (f"choose.candidates: at most {MOST_CANDIDATES}", len(candidates) > MOST_CANDIDATES),
            ("choose.candidates: names must differ", len(set(candidates)) < len(candidates)),
            (
                "choose.candidates: the baseline's name is taken",
                self.baseline is not None and self.baseline.name in candidates,
            ),
            ("choose.seeds: at least one is needed", bool(candidates) and not seeds),
            ("choose.seeds: must be other seeds than the experiment's", bool(set(seeds) & set(self.seeds))),
            (
                f"compare: no method is called {next(iter(strangers), None)!r}; there are {', '.join(self.methods)}",
                bool(strangers),
            ),
        )

    @property
    def _chosen(self) -> bool:
        return any(arm.chosen for arm in self.arms)

    @property
    def baseline(self) -> Arm | None:
        """The first arm without MTO."""
        return next((arm for arm in self.arms if arm.plain), None)

    def method(self, variant: Variant, arm: Arm) -> str:
        """What curves call a variant under an arm: the variant's label alone for the baseline."""
        return variant.label if arm == self.baseline else f"{variant.label} + {arm.name}"

    @property
    def methods(self) -> tuple[str, ...]:
        """All methods, variant by variant."""
        return tuple(self.method(variant, arm) for variant in self.variants for arm in self.arms)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Baseline and target of every comparison."""
        baseline = self.baseline
        own = [
            (self.method(variant, baseline), self.method(variant, arm))
            for variant in self.variants
            for arm in self.arms
            if baseline is not None and arm != baseline
        ]
        return (*own, *(pair for pair in self.compare if pair not in own))

    def metadata(self) -> dict[str, Any]:
        """All of it as plain values for JSON."""
        return asdict(self) | {"variants": [{"label": v.label, "recipe": v.recipe.to_dict()} for v in self.variants]}


def experiment_names() -> tuple[str, ...]:
    """Names of the experiments that come with the package.

    Example:
        >>> "mae_cifar10" in experiment_names()
        True
    """
    return bundled_names("experiments")


def load_experiment(name_or_path: str | Path, options: Mapping[str, str] | None = None) -> Experiment:
    """An experiment that comes with the package, by name, or one of the user's own, by the path of its TOML file.

    Args:
        name_or_path: Which.
        options: Text by key, as ``--set`` gives it: a key of the file (``seeds``, ``evaluation.protocol``,
            ``arms.MTO.mto.ranking_weight``), or a setting of all recipes (``epochs``, ``model.depth``).

    Raises:
        ExperimentError: If there is none, or a key is wrong; names the key.

    Example:
        >>> load_experiment("mae_cifar10", {"seeds": "0,1"}).methods
        ('MAE', 'MAE + MTO')
    """
    given = Options(options or {}, shared=True)  # with the recipes
    top, folder = open_settings("experiments", name_or_path, given, error=ExperimentError)
    evaluation, points = _evaluation(top.table("evaluation"))
    values: dict[str, Any] = {
        "summary": top.take("summary", str, ""),
        "images": top.table("data").read(Images),
        "evaluation": evaluation,
        "points": points,
        "arms": tuple(_arm(each) for each in top.tables("arms")),
        "choice": _choice(top.table("choose")) if "choose" in top else None,
        "variants": (),
    }
    values |= top.given({name: kind for name, kind in field_types(Experiment).items() if name not in values})
    recipes = top.tables("recipes")
    top.end()
    # What no table asked for is for the recipes; they name a key that they do not know.
    values["variants"] = tuple(_variant(each, folder) for each in recipes)
    experiment: Experiment = top.read(Experiment, **values)
    return experiment


def _variant(reader: Reader, folder: Path | None) -> Variant:
    source = reader.take("recipe", str)
    label = reader.take("label", str, source)
    changes = reader.raw("set", {})
    reader.end()
    if not isinstance(changes, Mapping):
        raise reader.error("set must be a table of settings of the recipe")
    beside = folder / source if folder is not None else None
    try:
        recipe = load_recipe(beside if beside is not None and beside.is_file() else source)
        return Variant(label, recipe.with_options(changes, "set").with_options(reader.options.left))
    except MTOAnalysisError as error:
        raise reader.error(str(error)) from error


def _arm(reader: Reader) -> Arm:
    name = reader.take("name", str)
    mto = reader.raw("mto")
    if mto in (None, False, "none", "chosen"):
        reader.end()
        return Arm(name, chosen=mto == "chosen")
    arm = Arm(name, mto=read_mto(reader.inner({"preset": mto} if isinstance(mto, str) else mto, "mto")))
    reader.end()
    return arm


def _evaluation(reader: Reader) -> tuple[Evaluation, int]:
    points = reader.take("points", Count, 10)
    protocol = reader.take("protocol", Literal["knn", "linear", "linear_cached"], "linear")
    # Images and epochs are filled in for each run.
    return reader.read(Evaluation, protocol=protocol, train="", test="", every=10), points


def _choice(reader: Reader) -> Choice:
    candidates = tuple(Candidate(each.take("name", str), read_mto(each)) for each in reader.tables("candidates"))
    return reader.read(Choice, candidates=candidates)
