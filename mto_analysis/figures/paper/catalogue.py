"""What the paper shows, as a list: name, what it is, where it is drawn, which files it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mto_analysis.figures.files import file_names
from mto_analysis.figures.paper.inputs import TABLE_FORMS, Drawn, Inputs, map_stems

if TYPE_CHECKING:
    from mto_analysis.figures.paper.workbench import Workbench

#: ``measured``: from checkpoints; ``published``: from numbers that the paper states; ``drawn``: a schematic.
Origin = Literal["measured", "published", "drawn"]


def _own_stem(figure: PaperFigure, inputs: Inputs) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (figure.name,), (figure.name,)


@dataclass(frozen=True)
class PaperFigure:
    """One figure or table of the paper.

    Args:
        name: Of its script and files.
        title: Number in the paper, and what it shows.
        origin: Where its numbers are from.
        stems: Names of its images and of its tables, known before the work starts; a table has no image.
        slow: More than some seconds with the bundled models.
        takes_experiment: Whether an experiment's folder can be drawn.
    """

    name: str
    title: str
    origin: Origin
    stems: Callable[[PaperFigure, Inputs], tuple[tuple[str, ...], tuple[str, ...]]] = _own_stem
    slow: bool = False
    takes_experiment: bool = False

    def files(self, inputs: Inputs) -> list[str]:
        """Names of the files it becomes."""
        figures, tables = self.stems(self, inputs)
        images = file_names(figures)
        texts = [] if figures else [f"{stem}.{kind}" for stem in tables for kind in TABLE_FORMS]
        return [*images, *texts, *(f"{stem}.csv" for stem in tables), f"{(figures or tables)[0]}.json"]

    def draw(self, bench: Workbench) -> Drawn:
        """Measure what has to be measured, and draw."""
        return _drawings()[self.name](bench)

    def check(self, inputs: Inputs) -> None:
        """Refuse what this figure cannot use."""
        if self.origin != "measured" and (inputs.checkpoints or inputs.images is not None):
            raise ValueError(f"{self.name} takes no checkpoints or images: it is {_ORIGIN_WORDS[self.origin]}")
        if inputs.experiment is not None and not self.takes_experiment:
            able = ", ".join(each.name for each in FIGURES.values() if each.takes_experiment)
            raise ValueError(f"{self.name} cannot be drawn from an experiment; those that can are {able}")


_ORIGIN_WORDS = {"measured": "measured", "published": "drawn from published numbers", "drawn": "a schematic"}


def _map_stems(figure: PaperFigure, inputs: Inputs) -> tuple[tuple[str, ...], tuple[str, ...]]:
    stems = map_stems(figure.name, inputs)
    return stems, (figure.name, *(f"{stem}-maps" for stem in stems))


def _definition_stems(figure: PaperFigure, inputs: Inputs) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return ("definitions",), ("definitions", "attention", "properties")


def _with_experiment(figure: PaperFigure, inputs: Inputs) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is published, or what an experiment measured in its place."""
    if inputs.experiment is None:
        return _own_stem(figure, inputs)
    name = f"{figure.name}-measured"
    return (name,), (name, f"{name}-rauc") if figure.name == "fig4" else (name,)


def _table_stems(figure: PaperFigure, inputs: Inputs) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (), _with_experiment(figure, inputs)[1]


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
            _table_stems,
            takes_experiment=name == "3",
        )
        for name, title in titles.items()
    ]


_FIGURES = (
    PaperFigure("fig1a", "Fig. 1(a): heterogeneity of several models over layer depth", "measured"),
    PaperFigure("fig1b", "Fig. 1(b): heterogeneity before and after convergence", "measured"),
    PaperFigure("fig2", "Fig. 2: affinity maps of every layer depth", "measured", _map_stems),
    PaperFigure("fig3", "Fig. 3: masked token optimization, a schematic", "drawn"),
    PaperFigure(
        "fig4",
        "Fig. 4: accuracy over pre-training epochs",
        "published",
        _with_experiment,
        takes_experiment=True,
    ),
    *_tables(),
    PaperFigure(
        "supp-fig1",
        "Supplementary Fig. 1: inpainting style against decoder style",
        "published",
        _with_experiment,
        takes_experiment=True,
    ),
    PaperFigure(
        "supp-fig2",
        "Supplementary Fig. 2: decoder depth",
        "published",
        _with_experiment,
        takes_experiment=True,
    ),
    PaperFigure(
        "definitions",
        "Beyond the paper: Fig. 1 under twelve definitions, and the models' own attention",
        "measured",
        _definition_stems,
        slow=True,
    ),
    PaperFigure(
        "controls",
        "Beyond the paper: Fig. 1 beside curves of models that have learned nothing",
        "measured",
        slow=True,
    ),
)

#: All of them, by name, in the order of the paper.
FIGURES: Mapping[str, PaperFigure] = {each.name: each for each in _FIGURES}


def _drawings() -> Mapping[str, Callable[[Workbench], Drawn]]:
    """What draws each figure; imported on demand, as a list of figures needs neither torch nor matplotlib."""
    from mto_analysis.figures.paper import measured, printed, published

    return {
        **{name: printed.table for name in FIGURES if "table" in name},
        "fig1a": measured.fig1a,
        "fig1b": measured.fig1b,
        "fig2": measured.fig2,
        "fig3": published.fig3,
        "fig4": published.fig4,
        "supp-fig1": published.supp_fig1,
        "supp-fig2": published.supp_fig2,
        "definitions": measured.definitions,
        "controls": measured.controls,
    }


def find_figures(names: Iterable[str] = (), *, inputs: Inputs | None = None) -> Sequence[PaperFigure]:
    """The figures of these names; without names, all that the inputs can be drawn in.

    Example:
        >>> [each.name for each in find_figures(["table2", "fig3"])]
        ['table2', 'fig3']
    """
    inputs = inputs or Inputs()
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in FIGURES]
    if unknown:
        raise ValueError(f"figure must be one of {', '.join(FIGURES)}, got {unknown[0]!r}")
    if not wanted and inputs.experiment is not None:
        wanted = [each.name for each in _FIGURES if each.takes_experiment]
    if not wanted:
        if inputs.checkpoints or inputs.images is not None:
            return [each for each in _FIGURES if each.origin == "measured"]
        return _FIGURES
    found = [FIGURES[name] for name in wanted]
    for figure in found:
        figure.check(inputs)
    return found
