"""What a run writes down: ``metrics.csv`` and ``curves.csv``, cut back to a step on resume; TensorBoard, W&B."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from mto_analysis.errors import DataError, OutputError
from mto_analysis.runtime.outputs import write_atomically

_HETEROGENEITY = re.compile(r"(?:(?P<stack>.+?)[._/])?heterogeneity_(?P<depth>\d+)")


def layer_of(column: str) -> tuple[str, int] | None:
    """Stack and layer depth of a column of ``metrics.csv`` that holds H; ``None`` for other columns.

    Example:
        >>> layer_of("heterogeneity_2"), layer_of("pixel_decoder/heterogeneity_0"), layer_of("loss")
        (('', 2), ('pixel_decoder', 0), None)
    """
    found = _HETEROGENEITY.fullmatch(column)
    return None if found is None else (found["stack"] or "", int(found["depth"]))


def heterogeneity_by_layer(rows: pd.DataFrame) -> pd.DataFrame:
    """H in long form, ``epoch stack layer_depth heterogeneity``; empty where none was measured.

    Args:
        rows: Of ``metrics.csv``, those of steps or those of epochs.
    """
    parts = []
    for column in rows:
        if (found := layer_of(str(column))) is not None:
            stack, depth = found
            values = {"epoch": rows["epoch"], "stack": stack, "layer_depth": depth, "heterogeneity": rows[column]}
            parts.append(pd.DataFrame(values))
    if not parts:
        return pd.DataFrame({"epoch": [], "stack": [], "layer_depth": [], "heterogeneity": []})
    return pd.concat(parts, ignore_index=True).dropna(subset="heterogeneity")


class Averages:
    """Means of named values; float64 sums in the order of steps, so that they resume exactly."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """One more value of each name."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean of each name."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def clear(self) -> None:
        """Begin again."""
        self.sums.clear()
        self.counts.clear()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


class Table:
    """A CSV file that grows by whole rows and survives being cut off anywhere."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        #: That the file holds, but for its header.
        self.rows = 0
        self._columns: list[str] | None = None

    def cut_back(self, last: int) -> None:
        """Drop rows beyond ``last``, and a line that was cut while it was written."""
        try:
            lines = self.path.read_bytes().decode(errors="replace").splitlines(keepends=True)
        except FileNotFoundError:
            return
        whole = [line for line in lines if line.endswith("\n")]
        if not whole:
            self.path.unlink()
            return
        self._columns = next(csv.reader([whole[0]]))
        if self.key not in self._columns:
            raise DataError(f"{self.path} has no column {self.key!r}; it is not of this run: move it away")
        at = self._columns.index(self.key)
        kept = [whole[0]]
        for line in whole[1:]:
            cells = next(csv.reader([line]))
            if len(cells) == len(self._columns) and float(cells[at]) <= last:
                kept.append(line)
        self.rows = len(kept) - 1
        if kept != lines:
            write_atomically(self.path, "".join(kept).encode())

    def append(self, row: Mapping[str, Any], columns: Sequence[str]) -> None:
        """Add a row as :meth:`extend` does."""
        self.extend([row], columns)

    def extend(self, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
        """Add rows; the first ones of a file fix the columns, later ones leave blank what they lack."""
        begin = self._columns is None
        if self._columns is None:
            self._columns = list(columns)
        names = self._columns
        lines = [names] * begin + [[_cell(row.get(name)) for name in names] for row in rows]
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write("".join(map(_line, lines)).encode())
                file.flush()
                os.fsync(file.fileno())
            self.rows += len(lines) - begin
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            raise OutputError(
                f"{self.path} cannot be written ({error.strerror})", advice="continue with --resume"
            ) from error


def _cell(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _line(cells: Iterable[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def check_boards(*, tensorboard: bool, wandb: bool) -> None:
    """Whether the packages are there that a run is to log to as well."""
    for name, wanted in (("tensorboard", tensorboard), ("wandb", wandb)):
        if wanted and importlib.util.find_spec(name) is None:
            raise ValueError(f"--{name} needs the package {name}: pip install {name}")


class Boards:
    """TensorBoard and Weights & Biases, where asked for.

    Args:
        folder: The run's.
        tensorboard: Whether to write events.
        wandb: Project, or none. ``WANDB_MODE=offline`` keeps it on this machine.
        step: Steps that are done already; events beyond are of a run that was cut off.
        config: Shown beside the run.
    """

    def __init__(
        self, folder: Path, *, tensorboard: bool, wandb: str | None, step: int, config: Mapping[str, Any]
    ) -> None:
        self._events: Any = None
        self._run: Any = None
        check_boards(tensorboard=tensorboard, wandb=wandb is not None)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if wandb is not None:
            import wandb as client

            note = folder / "wandb-id.txt"
            identity = note.read_text().strip() if step and note.is_file() else secrets.token_hex(4)
            write_atomically(note, f"{identity}\n".encode())
            self._run = client.init(
                project=wandb, name=folder.name, id=identity, resume="allow", dir=str(folder), config=dict(config)
            )

    def add(self, row: Mapping[str, Any], step: int) -> None:
        """Numbers of a row of ``metrics.csv``."""
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "seed"}
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(f"{row['kind']}/{name}", value, step)
            self._events.flush()
        if self._run is not None:
            self._run.log({f"{row['kind']}/{name}": value for name, value in numbers.items()}, step=step)

    def show(self, figures: Mapping[str, bytes], step: int) -> None:
        """PNG files by name, as images."""
        for name, png in figures.items() if self._events is not None or self._run is not None else ():
            with Image.open(io.BytesIO(png)) as image:
                colours = image.convert("RGB")
            if self._events is not None:
                self._events.add_image(f"shown/{name}", np.asarray(colours), step, dataformats="HWC")
                self._events.flush()
            if self._run is not None:
                import wandb as client

                self._run.log({f"shown/{name}": client.Image(colours)}, step=step)

    def close(self) -> None:
        """Write what is still held back."""
        if self._events is not None:
            self._events.close()
        if self._run is not None:
            self._run.finish()
