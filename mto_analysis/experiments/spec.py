"""What an experiment is: recipes, arms with and without MTO, seeds, evaluation, windows; read from a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from mto_analysis.errors import DataNotFoundError, ExperimentError, MTOAnalysisError
from mto_analysis.mto import MTOConfig
from mto_analysis.runtime.settings import field_types, typed_value
from mto_analysis.runtime.tables import Overrides, TableReader
from mto_analysis.training.evaluation import Evaluation
from mto_analysis.training.recipes import Recipe, load_recipe

__all__ = ["Arm", "Candidate", "Choice", "Experiment", "Images", "Variant", "experiment_names", "load_experiment"]

#: So many candidates at most, or the choice itself becomes a search that the seeds of the experiment pay for.
MOST_CANDIDATES = 6

Precision = Literal["no", "bf16", "fp16"]


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
class Choice:
    """How the settings of the chosen arms are found: on other seeds, in shorter runs.

    Args:
        candidates: At most six.
        seeds: None of them may be a seed of the experiment.
        share: Length of its runs, as a share of the experiment's epochs.
        by: ``final`` score, or the ``mean`` score along the run; of each candidate the mean over seeds.
    """

    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    share: float = 0.5
    by: Literal["final", "mean"] = "final"


@dataclass(frozen=True)
class Images:
    """Where images are, relative to the folder that is given with ``--data``.

    Args:
        train: To pre-train on.
        eval_train: Labelled, for evaluation; by default the same.
        eval_test: Labelled, to score on.
    """

    train: str = "train.parquet"
    eval_train: str | None = None
    eval_test: str = "test.parquet"

    def resolved(self, folder: Path | None) -> Images:
        """With absolute paths, so that every process finds them.

        Raises:
            DataNotFoundError: If one is not there; says which.
        """

        def find(name: str) -> str:
            path = (folder or Path()).expanduser() / Path(name).expanduser()
            if not path.exists():
                raise DataNotFoundError(f"there are no images at {path}; give their folder with --data")
            return str(path.resolve())

        return Images(find(self.train), find(self.eval_train or self.train), find(self.eval_test))


@dataclass(frozen=True)
class Experiment:
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
        precision: Of the forward pass.
        device: ``auto`` (CUDA, else CPU), ``cpu``, ``cuda``, ``cuda:N``, ``mps``.
        deterministic: Exact resume on a GPU too; slower.
        num_workers: Processes of each run that decode images.
        log_every: Steps between rows of each ``metrics.csv``; H is measured on these.
    """

    name: str
    summary: str
    variants: tuple[Variant, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    images: Images
    evaluation: Evaluation
    points: int = 10
    windows: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    choice: Choice | None = None
    compare: tuple[tuple[str, str], ...] = ()
    precision: Precision = "no"
    device: str = "auto"
    deterministic: bool = False
    num_workers: int = 0
    log_every: int = 20

    def __post_init__(self) -> None:
        """Check what belongs together; the message names the key."""
        seeds = self.choice.seeds if self.choice else ()
        share = self.choice.share if self.choice else 1.0
        candidates = [each.name for each in self.choice.candidates] if self.choice else []
        arms, labels = [each.name for each in self.arms], [each.label for each in self.variants]
        ends = [share for window in self.windows for share in window]
        for rule, broken in (
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
            ("choose.share: must be above 0 and at most 1", not 0 < share <= 1),
            ("evaluation.points: must be at least 1", self.points < 1),
            ("log_every: must be at least 1", self.log_every < 1),
            ("windows: shares must lie between 0 and 1", not all(0 <= share <= 1 for share in ends)),
            ("windows: each must begin before it ends", not all(start < end for start, end in self.windows)),
        ):
            if broken:
                raise ExperimentError(f"{self.name}: {rule}")
        for pair in self.compare:
            for method in pair:
                if method not in self.methods:
                    raise ExperimentError(
                        f"{self.name}: compare: no method is called {method!r}; there are {', '.join(self.methods)}"
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

    def facts(self) -> dict[str, Any]:
        """All of it as plain values for JSON."""
        return asdict(self) | {"variants": [{"label": v.label, "recipe": v.recipe.to_dict()} for v in self.variants]}


def experiment_names() -> tuple[str, ...]:
    """Names of the experiments that come with the package.

    Example:
        >>> "mae_cifar10" in experiment_names()
        True
    """
    folder = resources.files("mto_analysis") / "assets" / "experiments"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


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
    text = str(name_or_path)
    if text in experiment_names():
        content = (resources.files("mto_analysis") / "assets" / "experiments" / f"{text}.toml").read_text("utf-8")
        return _read(content, text, None, options or {})
    path = Path(text).expanduser()
    if not path.is_file():
        known = ", ".join(experiment_names())
        raise ExperimentError(f"no experiment is called {text!r}, nor is it a file; known are {known}")
    try:
        return _read(path.read_text("utf-8"), str(path), path.parent, options or {})
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path} cannot be read: {error}") from error


def _read(content: str, source: str, folder: Path | None, options: Mapping[str, str]) -> Experiment:
    try:
        values = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ExperimentError(f"{source} is not TOML: {error}") from error
    overrides = Overrides(options)
    top = TableReader(source, "", values, overrides)
    name = top.take("name", str, Path(source).stem)
    summary = top.take("summary", str, "")
    seeds = top.take("seeds", tuple[int, ...])
    images = _fields(top.table("data"), Images())
    evaluation, points = _evaluation(top.table("evaluation"))
    arms = tuple(_arm(each) for each in top.tables("arms"))
    choice = _choice(top.table("choose")) if "choose" in top else None
    windows = tuple(typed_value("windows", tuple[float, float], each) for each in _array(top, "windows", [[0.0, 1.0]]))
    compare = tuple(typed_value("compare", tuple[str, str], each) for each in _array(top, "compare", []))
    keys = ("precision", "device", "deterministic", "num_workers", "log_every")
    declared = field_types(Experiment)
    defaults = {each.name: each.default for each in fields(Experiment)}
    machine = {key: top.take(key, declared[key], defaults[key]) for key in keys}
    readers = top.tables("recipes")
    top.end(f"name, summary, seeds, data, recipes, arms, evaluation, choose, windows, compare, {', '.join(keys)}")
    # What no table asked for is for the recipes; they name a key that they do not know.
    variants = tuple(_variant(each, folder, overrides) for each in readers)
    try:
        return Experiment(
            name=name,
            summary=summary,
            variants=variants,
            arms=arms,
            seeds=seeds,
            images=images,
            evaluation=evaluation,
            points=points,
            windows=windows,
            choice=choice,
            compare=compare,
            **machine,
        )
    except ExperimentError as error:
        raise ExperimentError(f"{source}: {error}") from error


def _array(reader: TableReader, key: str, default: list[Any]) -> list[Any]:
    found = reader.raw(key, default)
    if not isinstance(found, list):
        raise reader.error(key, f"must be an array of pairs, got {found!r}")
    return found


def _fields(reader: TableReader, start: Any, known: tuple[str, ...] = (), also: str = "") -> Any:
    """A dataclass with the fields that the table names."""
    declared = field_types(type(start))
    names = known or tuple(each.name for each in fields(start))
    changes = {key: reader.take(key, declared[key], getattr(start, key)) for key in names}
    reader.end(f"{also}{', '.join(names)}")
    try:
        return replace(start, **changes)
    except ValueError as error:
        raise reader.error("", str(error)) from error


def _variant(reader: TableReader, folder: Path | None, overrides: Overrides) -> Variant:
    source = reader.take("recipe", str)
    beside = folder / source if folder is not None else None
    label = reader.take("label", str, source)
    changes = reader.raw("set", {})
    reader.end("recipe, label, set")
    if not isinstance(changes, Mapping):
        raise reader.error("set", "must be a table of settings of the recipe")
    texts = {key: _text(value) for key, value in changes.items()}
    try:
        recipe = load_recipe(beside if beside is not None and beside.is_file() else source)
        return Variant(label, recipe.with_options({**texts, **overrides.left}))
    except MTOAnalysisError as error:
        raise reader.error("", str(error)) from error


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _arm(reader: TableReader) -> Arm:
    name = reader.take("name", str)
    mto = reader.raw("mto")
    reader.end("name, mto")
    if mto in (None, False, "none"):
        return Arm(name)
    if mto == "chosen":
        return Arm(name, chosen=True)
    values = {"preset": mto} if isinstance(mto, str) else mto
    return Arm(name, mto=_mto(TableReader(reader.source, f"{reader.path}.mto", values, reader.overrides)))


def _mto(reader: TableReader) -> MTOConfig:
    """Settings of MTO: the preset ``default`` or ``paper``, and what is changed in it."""
    preset = reader.take("preset", str, "default")
    if preset not in ("default", "paper"):
        raise reader.error("preset", f'must be default or paper, or the arm\'s mto = "chosen"; got {preset!r}')
    config: MTOConfig = _fields(reader, MTOConfig() if preset == "default" else MTOConfig.paper(), also="preset, ")
    return config


def _evaluation(reader: TableReader) -> tuple[Evaluation, int]:
    points = reader.take("points", int, 10)
    protocol = reader.take("protocol", Literal["knn", "linear", "linear_cached"], "linear")
    filled_in = ("protocol", "train", "test", "every")  # these are not read here, or for each run
    known = tuple(each.name for each in fields(Evaluation) if each.name not in filled_in)
    chosen: Evaluation = _fields(reader, Evaluation(protocol, "", ""), known, "protocol, points, ")
    return chosen, points


def _choice(reader: TableReader) -> Choice:
    candidates = []
    for each in reader.tables("candidates"):
        name = each.take("name", str)
        candidates.append(Candidate(name, _mto(each)))
    seeds = reader.take("seeds", tuple[int, ...])
    share = reader.take("share", float, 0.5)
    by = reader.take("by", Literal["final", "mean"], "final")
    reader.end("seeds, share, by, candidates")
    return Choice(tuple(candidates), seeds, share, by)
