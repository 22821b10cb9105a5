"""What figures are drawn from, and what they are when drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mto_analysis.errors import DataNotFoundError
from mto_analysis.runtime.outputs import chosen_labels, file_words
from mto_analysis.runtime.render import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Forms of a table beside its CSV, by the endings of their files.
TABLE_FORMS: Mapping[str, str] = {"md": "markdown", "tex": "latex"}


@dataclass(frozen=True)
class Inputs:
    """What stands in place of the bundled models, images and results.

    Args:
        checkpoints: Paths, registry ids, ``hf://owner/name``, URLs; none: the bundled small models.
        labels: Their names, in order.
        images: Folder, list or Parquet file of images; none: the bundled ones.
        limit: Number of images, spread evenly.
        experiment: Folder that ``mto-analyze experiment`` wrote; its curves are drawn beside what is published.
        batch_size: Images at once.
        device: ``auto``, ``cpu``, ``cuda`` ...
        value_range: Values of black and white, of images that are not in eight bits and do not state them.
        loading: Fields of :class:`~mto_analysis.checkpoints.LoadOptions`, for the checkpoints.
    """

    checkpoints: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    images: Path | None = None
    limit: int | None = None
    experiment: Path | None = None
    batch_size: int = 64
    device: str = "cpu"
    value_range: tuple[float, float] | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)

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
        return tuple(chosen_labels(self.checkpoints, self.labels)) if self.checkpoints else ()


@dataclass(frozen=True)
class Drawn:
    """A figure or table as it is written: images or texts, the values behind them, and what a reader is told.

    Attributes:
        figures: By the stem of their files.
        tables: By the stem of their files.
        caption: One paragraph: what is shown, with n and intervals.
        metadata: For the JSON file: checkpoints with their hashes, masks, own losses.
        texts: Tables to read, by the names of their files.
    """

    figures: Mapping[str, Figure]
    tables: Mapping[str, pd.DataFrame]
    caption: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def map_stems(name: str, inputs: Inputs) -> tuple[str, ...]:
    """Files of a figure of one model each: the first model's has the figure's name, the others carry their own."""
    models = inputs.names or ("SimMIM", "MAE")
    return (name, *(f"{name}-{word.lower()}" for word in file_words(models)[1:]))


def table_texts(stem: str, table: pd.DataFrame, *, title: str, notes: Sequence[str]) -> dict[str, str]:
    """A table in the forms in which tables are written beside their CSV, by the names of the files."""
    return {
        f"{stem}.{suffix}": render(table, form, title=title, notes=notes) + "\n" for suffix, form in TABLE_FORMS.items()
    }
