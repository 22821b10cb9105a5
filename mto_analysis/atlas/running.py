"""Measuring many checkpoints, each in a process of its own, from wherever the last run stopped."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from mto_analysis.atlas.measuring import Entry, Protocol, measure_entry
from mto_analysis.atlas.table import SHARED, TABLE_FILES, join_tables, parquet_bytes, read_table, table_outputs
from mto_analysis.checkpoints import checkpoint_sha256, resolve
from mto_analysis.checkpoints.fetching import drop_fetched
from mto_analysis.errors import CheckpointError, DataError, ExperimentError, OutputExistsError
from mto_analysis.experiments.running import Engine, RunFailedError
from mto_analysis.experiments.worker import Outcome, Resources
from mto_analysis.images import open_images
from mto_analysis.images.image_sets import ImageSet, load_image_set
from mto_analysis.runtime.listener import Listener, Progress
from mto_analysis.runtime.outputs import csv_bytes, locked_folder, write_atomically
from mto_analysis.runtime.processes import pick_device

# Failures in a message.
_NAMED = 3
_OTHER = "use the same options, or another --out"


class Failure(NamedTuple):
    """A checkpoint that was not measured, a row of ``failures.csv``."""

    checkpoint: str
    source: str
    exit_code: int
    reason: str


class Ended(NamedTuple):
    """How a checkpoint ended."""

    entry: Entry
    notes: tuple[str, ...]
    failure: Failure | None


@dataclass(frozen=True)
class Measurement:
    """One checkpoint, as an engine does it; what it has measured is written at once.

    Args:
        entry: Which.
        images: Source of the images.
        image_set: File with their names and hashes, which are compared again wherever it runs.
        set_name: Name of the set.
        protocol: How.
        part: Where its rows go.
        drop: Whether the file is deleted from the cache afterwards.
    """

    entry: Entry
    images: Path
    image_set: Path
    set_name: str
    protocol: Protocol
    part: Path
    drop: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether it needs no GPU."""
        return self.protocol.device == "cpu"

    def in_use(self) -> bool:
        """Never: the whole folder is locked."""
        return False

    def do(self, resources: Resources, note: Callable[[str], None]) -> None:
        """Measure it."""
        torch.set_num_threads(resources.threads)
        image_set = replace(load_image_set(self.image_set), name=self.set_name)
        protocol = replace(self.protocol, device=pick_device(resources.device_for(self.protocol.device)))
        images = image_set.find(open_images(self.images))
        drop = self.drop and not _is_here(self.entry.source)
        rows, file = measure_entry(self.entry, images, image_set, protocol, Listener(note, note))
        write_atomically(self.part, parquet_bytes(rows))
        if drop:
            drop_fetched(self.entry.source, file)


def _is_here(source: str) -> bool:
    """Whether a checkpoint need not be fetched, so that its file is not ours to delete."""
    try:
        resolve(source, offline=True)
    except CheckpointError:
        return False
    return True


class AtlasFolder:
    """The folder of an atlas: a part for each checkpoint, from which the table is made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = path / "images.csv"
        self._parts, self._failures = path / "parts", path / "failures.csv"

    def part(self, entry: Entry) -> Path:
        """Where the rows of a checkpoint are."""
        return self._parts / f"{entry.name}.parquet"

    def begin(self, image_set: ImageSet) -> None:
        """Write down which images are measured."""
        own = (*TABLE_FILES, "run.json", "failures.csv")
        if not self._parts.is_dir() and (there := [name for name in own if (self.path / name).exists()]):
            raise OutputExistsError(f"{self.path} already holds {', '.join(there)} of no run; choose another --out")
        if self.images.exists() and load_image_set(self.images).sha256 != image_set.sha256:
            raise ExperimentError(f"{self.path} holds measurements of other images; {_OTHER}")
        self.failures()  # is readable, which matters only at the end
        self._parts.mkdir(parents=True, exist_ok=True)
        write_atomically(self.images, image_set.to_csv())

    def left(self, wanted: Mapping[Entry, Protocol], image_set: ImageSet) -> list[Entry]:
        """The checkpoints that are not measured yet."""
        identities = [protocol.identity() for protocol in wanted.values()]
        now = identities[0] | {"images_sha256": image_set.sha256}
        of_all = {key: now[key] for key in SHARED} | {"mto_analysis_version": version("mto-analysis")}
        # Of a run, which has one protocol; tables that are verified may state several.
        of_all |= {key: now[key] for key in ("measures", "precision") if len({each[key] for each in identities}) == 1}
        expected: dict[Path, dict[str, Any]] = {part: {**of_all, "checkpoint": part.stem} for part in self._measured()}
        for entry, protocol in wanted.items():
            expected[self.part(entry)] = {
                **of_all,
                "checkpoint": entry.name,
                "source": entry.source,
                **protocol.identity(),
            }
            if self.part(entry).exists() and Path(entry.source).exists():  # a file of the user's may have changed since
                expected[self.part(entry)]["file_sha256"] = checkpoint_sha256(entry.source)
        for part in self._measured():
            try:
                row = read_table(part).iloc[0]
            except DataError as error:
                raise DataError(f"{error}; delete it to measure it again") from error
            for column, value in expected[part].items():
                if row[column] != value:
                    raise ExperimentError(f"{part} was measured with {column} {row[column]}, now {value}; {_OTHER}")
        return [entry for entry in wanted if not self.part(entry).exists()]

    def table(self) -> pd.DataFrame:
        """All rows that were measured, also in earlier runs."""
        return join_tables([read_table(part) for part in self._measured()])

    def _measured(self) -> list[Path]:
        return sorted(self._parts.glob("*.parquet"))

    def write(self, entries: Iterable[Entry], failures: Sequence[Failure]) -> None:
        """Write the table and the list of failures: those of these checkpoints, and older ones of others."""
        table = self.table()
        if len(table):
            for name, content in table_outputs(table).items():
                write_atomically(self.path / name, content)
        now = {entry.name for entry in entries}
        self._write_failures([*(each for each in self.failures() if each.checkpoint not in now), *failures])

    def failures(self) -> list[Failure]:
        """What failed when it was last tried."""
        if not self._failures.exists():
            return []
        with self._failures.open(encoding="utf-8", newline="") as file:
            try:
                rows = list(csv.DictReader(file, strict=True))
                return [Failure(row["checkpoint"], row["source"], int(row["exit_code"]), row["reason"]) for row in rows]
            except (KeyError, TypeError, ValueError, csv.Error) as error:
                raise DataError(f"{self._failures} is not the list of an earlier run; move it away") from error

    def _write_failures(self, failures: Sequence[Failure]) -> None:
        if failures:
            write_atomically(self._failures, csv_bytes(pd.DataFrame(failures, columns=list(Failure._fields))))
        else:
            self._failures.unlink(missing_ok=True)


def measure_all(
    wanted: Mapping[Entry, Protocol],
    images: Path,
    image_set: ImageSet,
    folder: AtlasFolder,
    engine: Engine,
    *,
    drop_files: bool = False,
    progress: Progress = lambda items, total, label: iter(items),
    tell: Callable[[Ended], None] = lambda ended: None,
) -> list[Failure]:
    """Measure the checkpoints that are not measured yet; one that fails does not stop the others.

    Stopped or killed, the same call goes on with those that are left; those that failed are tried again.

    Args:
        wanted: Which, and how.
        images: Their source.
        image_set: Which of them, verified against the source before anything is fetched.
        folder: Where to.
        engine: Does them.
        drop_files: Delete each file from the cache once it is measured.
        progress: Wraps what ends, given the number and a label.
        tell: Takes each checkpoint as it ends.

    Returns:
        What failed, in the order of ``wanted``.
    """
    image_set.find(open_images(images))
    failures: dict[Entry, Failure] = {}
    with locked_folder(folder.path):
        folder.begin(image_set)
        left = folder.left(wanted, image_set)
        try:
            with engine as begun:
                going: dict[Future[Outcome], Entry] = {}
                for entry in left:
                    task = Measurement(
                        entry,
                        Path(os.path.abspath(images)),  # noqa: PTH100 - a link keeps its name
                        folder.images.absolute(),
                        image_set.name,
                        wanted[entry],
                        folder.part(entry).absolute(),
                        drop_files,
                    )
                    going[begun.submit(task)] = entry
                for future in progress(as_completed(going), len(going), "checkpoints"):
                    ended = _ended(going[future], future.result())
                    if ended.failure:
                        failures[ended.entry] = ended.failure
                    tell(ended)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command resumes") from None
        finally:
            ordered = [failures[entry] for entry in wanted if entry in failures]
            folder.write(wanted, ordered)
    return ordered


def _ended(entry: Entry, outcome: Outcome) -> Ended:
    if not outcome.failure:
        return Ended(entry, outcome.notes, None)
    if outcome.exit_code is not None:
        return Ended(entry, outcome.notes, Failure(entry.name, entry.source, outcome.exit_code, outcome.failure))
    last = outcome.failure.strip().splitlines()[-1]
    failure = Failure(entry.name, entry.source, 1, f"a mistake in the program: {last}")
    return Ended(entry, (*outcome.notes, outcome.failure), failure)


def raise_failures(failures: Sequence[Failure], advice: str) -> None:
    """Say what failed, if anything did; why was told of each when it ended."""
    if failures:
        some = ", ".join([each.checkpoint for each in failures[:_NAMED]] + ["..."] * (len(failures) > _NAMED))
        what = "checkpoint failed" if len(failures) == 1 else "checkpoints failed"
        raise RunFailedError(f"{len(failures)} {what}: {some}; {advice}", failures[0].exit_code)
