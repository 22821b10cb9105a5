"""What the paper shows, as a list: name, what it is, where it is drawn, which files it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mto_analysis.errors import DataNotFoundError
from mto_analysis.runtime.outputs import file_word

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from mto_analysis.figures.paper.workbench import Workbench

__all__ = ["FIGURES", "Drawn", "Inputs", "PaperFigure", "find_figures"]

#: ``measured``: from checkpoints; ``published``: from numbers that the paper states; ``drawn``: a schematic.
Origin = Literal["measured", "published", "drawn"]


@dataclass(frozen=True)
class Inputs:
    """What stands in place of the bundled models, images and results.

    Args:
        checkpoints: Paths, registry ids, ``hf://owner/name``, URLs; none: the bundled small models.
        labels: Their names, in order.
        images: Folder, list or Parquet file of images; none: the bundled ones.
        limit: Number of images, spread evenly.
        experiment: Folder that ``mto-analyze experiment`` wrote; its curves are drawn beside what is published.
        num_heads: For checkpoints that do not hold their head counts.
        decoder_num_heads: The same for decoders.
        batch_size: Images at once.
        device: ``auto``, ``cpu``, ``cuda`` ...
        offline: Never touch the network.

    Raises:
        ValueError: If there are labels, but not one different label per checkpoint.
        DataNotFoundError: If the experiment's folder is not there.
    """

    checkpoints: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    images: Path | None = None
    limit: int | None = None
    experiment: Path | None = None
    num_heads: int | None = None
    decoder_num_heads: int | None = None
    batch_size: int = 64
    device: str = "cpu"
    offline: bool = False

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if self.labels and len(set(self.labels)) != len(self.checkpoints):
            raise ValueError(
                f"give one different label per checkpoint: {len(self.checkpoints)} checkpoints, "
                f"labels {list(self.labels)}"
            )
        if self.experiment is not None and not self.experiment.is_dir():
            raise DataNotFoundError(f"no experiment at {self.experiment}; give a folder that `experiment` wrote")

    @property
    def bundled(self) -> bool:
        """Whether the bundled models are measured as they were made: on their images, under their masks."""
        return not self.checkpoints and self.images is None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the checkpoints."""
        from mto_analysis.runtime.outputs import chosen_labels

        return tuple(chosen_labels(self.checkpoints, self.labels)) if self.checkpoints else ()


@dataclass(frozen=True)
class Drawn:
    """A figure as it is written: images, the tables they were drawn from, and what a reader is told.

    Attributes:
        figures: By the stem of their files.
        tables: By the stem of their files.
        caption: One paragraph: what is shown, with n and intervals.
        facts: For the JSON file: checkpoints with their hashes, masks, own losses.
    """

    figures: Mapping[str, Figure]
    tables: Mapping[str, pd.DataFrame]
    caption: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def _own_stem(figure: PaperFigure, inputs: Inputs) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (figure.name,), (figure.name,)


@dataclass(frozen=True)
class PaperFigure:
    """One figure or table of the paper.

    Args:
        name: Of its script and files.
        title: Number in the paper, and what it shows.
        origin: Where its numbers are from.
        where: ``module:function`` that draws it, given a :class:`~mto_analysis.figures.paper.workbench.Workbench`.
        stems: Names of its images and of its tables, known before the work starts.
        slow: More than some seconds with the bundled models.
        takes_experiment: Whether an experiment's folder can be drawn.
    """

    name: str
    title: str
    origin: Origin
    where: str
    stems: Callable[[PaperFigure, Inputs], tuple[tuple[str, ...], tuple[str, ...]]] = _own_stem
    slow: bool = False
    takes_experiment: bool = False

    def files(self, inputs: Inputs) -> list[str]:
        """Names of the files it becomes."""
        figures, tables = self.stems(self, inputs)
        images = [f"{stem}.{kind}" for stem in figures for kind in ("png", "pdf")]
        return [*images, *(f"{stem}.csv" for stem in tables), f"{figures[0]}.json"]

    def draw(self, bench: Workbench) -> Drawn:
        """Measure what has to be measured, and draw."""
        module, _, function = self.where.partition(":")
        drawn: Drawn = getattr(import_module(f"mto_analysis.figures.paper.{module}"), function)(bench)
        return drawn

    def check(self, inputs: Inputs) -> None:
        """Refuse what this figure cannot use.

        Raises:
            ValueError: If it is drawn from published numbers and checkpoints or images are given, or it has no use
                for an experiment.
        """
        if self.origin != "measured" and (inputs.checkpoints or inputs.images is not None):
            raise ValueError(f"{self.name} takes no checkpoints or images: it is {_ORIGIN_WORDS[self.origin]}")
        if inputs.experiment is not None and not self.takes_experiment:
            able = ", ".join(each.name for each in FIGURES.values() if each.takes_experiment)
            raise ValueError(f"{self.name} cannot be drawn from an experiment; those that can are {able}")


_ORIGIN_WORDS = {"measured": "measured", "published": "drawn from published numbers", "drawn": "a schematic"}


def _map_stems(figure: PaperFigure, inputs: Inputs) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The first model's maps are the figure; those of others carry their name."""
    names = inputs.names or ("SimMIM", "MAE")
    stems = (figure.name, *(f"{figure.name}-{file_word(name).lower()}" for name in names[1:]))
    return stems, (figure.name, *(f"{stem}-maps" for stem in stems))


def _definition_stems(figure: PaperFigure, inputs: Inputs) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return ("definitions",), ("definitions", "attention", "properties")


def _with_experiment(figure: PaperFigure, inputs: Inputs) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is published, or what an experiment measured in its place."""
    if inputs.experiment is None:
        return _own_stem(figure, inputs)
    name = f"{figure.name}-measured"
    return (name,), (name, f"{name}-rauc") if figure.name == "fig4" else (name,)


def _tables() -> list[PaperFigure]:
    titles = {
        "1": "Table 1: RAUC in two windows",
        "2": "Table 2: linear evaluation, and RAUC",
        "3": "Table 3: ablation of the losses",
        "supp1": "Supplementary Table 1: ADE20K",
        "supp2": "Supplementary Table 2: COCO",
        "supp3": "Supplementary Table 3: hyperparameters of SimMIM",
        "supp4": "Supplementary Table 4: hyperparameters of MAE",
        "supp5": "Supplementary Table 5: hyperparameters of BootMAE",
        "supp6": "Supplementary Table 6: hyperparameters of ConMIM",
    }
    return [
        PaperFigure(
            name.replace("supp", "supp-table") if name.startswith("supp") else f"table{name}",
            title,
            "published",
            "printed:table",
            _with_experiment,
            takes_experiment=name == "3",
        )
        for name, title in titles.items()
    ]


_FIGURES = (
    PaperFigure("fig1a", "Fig. 1(a): heterogeneity of several models over layer depth", "measured", "measured:fig1a"),
    PaperFigure("fig1b", "Fig. 1(b): heterogeneity before and after convergence", "measured", "measured:fig1b"),
    PaperFigure("fig2", "Fig. 2: affinity maps of every layer depth", "measured", "measured:fig2", _map_stems),
    PaperFigure("fig3", "Fig. 3: masked token optimization, a schematic", "drawn", "published:fig3"),
    PaperFigure(
        "fig4",
        "Fig. 4: accuracy over pre-training epochs",
        "published",
        "published:fig4",
        _with_experiment,
        takes_experiment=True,
    ),
    *_tables(),
    PaperFigure(
        "supp-fig1",
        "Supplementary Fig. 1: inpainting style against decoder style",
        "published",
        "published:supp_fig1",
        _with_experiment,
        takes_experiment=True,
    ),
    PaperFigure(
        "supp-fig2",
        "Supplementary Fig. 2: decoder depth",
        "published",
        "published:supp_fig2",
        _with_experiment,
        takes_experiment=True,
    ),
    PaperFigure(
        "definitions",
        "Beyond the paper: Fig. 1 under twelve definitions, and the models' own attention",
        "measured",
        "measured:definitions",
        _definition_stems,
        slow=True,
    ),
    PaperFigure(
        "controls",
        "Beyond the paper: Fig. 1 beside curves of models that have learned nothing",
        "measured",
        "measured:controls",
        slow=True,
    ),
)

#: All of them, by name, in the order of the paper.
FIGURES: Mapping[str, PaperFigure] = {each.name: each for each in _FIGURES}


def find_figures(names: Iterable[str] = (), *, inputs: Inputs | None = None) -> Sequence[PaperFigure]:
    """The figures of these names; without names, all that the inputs can be drawn in.

    Raises:
        ValueError: If there is no such figure, or it has no use for the inputs.

    Example:
        >>> [each.name for each in find_figures(["table2", "fig3"])]
        ['table2', 'fig3']
    """
    inputs = inputs or Inputs()
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in FIGURES]
    if unknown:
        raise ValueError(f"figure must be one of {', '.join(FIGURES)}, got {unknown[0]!r}")
    if not wanted:
        if inputs.experiment is not None:
            return [each for each in _FIGURES if each.takes_experiment]
        if inputs.checkpoints or inputs.images is not None:
            return [each for each in _FIGURES if each.origin == "measured"]
        return _FIGURES
    found = [FIGURES[name] for name in wanted]
    for figure in found:
        figure.check(inputs)
    return found
