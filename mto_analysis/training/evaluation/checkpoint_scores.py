"""Every checkpoint of a run, scored in the order of its epochs into a curve that an interrupted evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from mto_analysis.checkpoints import LoadOptions, checkpoint_sha256, open_checkpoint
from mto_analysis.checkpoints.reading import Weights
from mto_analysis.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DataError,
    OutputExistsError,
)
from mto_analysis.images import Images
from mto_analysis.models import MaskedImageModel
from mto_analysis.models.initialization import random_weights
from mto_analysis.probe.request import Request
from mto_analysis.probe.request import Settings as ProbeSettings
from mto_analysis.runtime.listener import Listener
from mto_analysis.runtime.outputs import (
    atomic_file,
    check_writable,
    csv_bytes,
    json_bytes,
    labels_of,
    write_atomically,
)
from mto_analysis.runtime.processes import Processes
from mto_analysis.training.evaluation.evaluator import Score
from mto_analysis.training.evaluation.protocols import weights_of

#: Columns of ``curves.csv``; the first four are what ``mto-analyze rauc`` reads.
COLUMNS = (
    *("method", "epoch", "score", "seed", "protocol", "top5"),
    *("pooling", "layer", "norm", "crop_pct", "weights", "iterations", "checkpoint", "sha256", "seconds"),
)
_OWN = ("settings.json", "random.csv", "run.json", "curves.png", "curves.pdf", "curves.svg")
_NUMBER = re.compile(r"checkpoint-(\d+)\.pth$")
_COPY = re.compile(r"checkpoint_copy-(\d+)\.pth$")  # ConMIM's slow branch, which its code keeps in files of their own


class RunCheckpoint(NamedTuple):
    """A checkpoint of a run; ``epoch`` as its file name or the file says, ``None`` where neither does."""

    source: str
    method: str
    seed: int
    epoch: int | None

    @property
    def key(self) -> tuple[str, int, int | None]:
        """What a curve has one row for."""
        return self.method, self.seed, self.epoch

    @property
    def sha256(self) -> str:
        """Of a local file, its first digits; of one to be fetched, of its address."""
        local = Path(self.source).expanduser().exists()
        whole = checkpoint_sha256(self.source) if local else hashlib.sha256(self.source.encode()).hexdigest()
        return whole[:16]

    @property
    def stem(self) -> str:
        """For the name of a folder; methods whose names differ in other characters only have other ones."""
        name = re.sub(r"[^A-Za-z0-9.+-]+", "-", self.method).strip("-")
        if name != self.method:
            name += f"-{hashlib.sha256(self.method.encode()).hexdigest()[:6]}"
        return f"{name}-seed{self.seed}-" + ("final" if self.epoch is None else f"{self.epoch:04d}")


def find_checkpoints(source: str, method: str, seed: int, *, offline: bool = False) -> list[RunCheckpoint]:
    """All ``checkpoint-*.pth`` of a run's folder in the order of their numbers, or the one that ``source`` is.

    Numbers are taken as they are: ours count finished epochs, the original MAE's count from 0.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        numbered = sorted(
            (int(found[1]), path) for path in folder.iterdir() if (found := _NUMBER.search(path.name)) is not None
        )
        if not numbered:
            last = folder / "last.pth"
            words = f"give {last}" if last.exists() else "give a run's folder or one checkpoint"
            raise CheckpointNotFoundError(f"{folder} holds no checkpoint-*.pth; {words}")
        return [RunCheckpoint(str(path), method, seed, number) for number, path in numbered]
    found = _NUMBER.search(source) or _COPY.search(source)
    if found is not None:
        return [RunCheckpoint(source, method, seed, int(found[1]))]
    epoch = open_checkpoint(source, mmap=True, offline=offline).extras.get("epoch")
    return [RunCheckpoint(source, method, seed, epoch if isinstance(epoch, int) else None)]


class Encoder(NamedTuple):
    """A model to be scored; which of the checkpoint's weights it has, and what is to be said about that.

    Attributes:
        model: The model.
        weights: Which of the checkpoint's.
        note: What is to be said about that.
        unknown: Options that the encoder does not need, in place of which the model has any value that fits.
    """

    model: MaskedImageModel
    weights: Weights
    note: str = ""
    unknown: tuple[str, ...] = ()


def load_encoder(
    source: str,
    images: Images,
    *,
    weights: Weights | None = None,
    loading: LoadOptions | None = None,
    settings: ProbeSettings | None = None,
    listener: Listener | None = None,
    processes: Processes | None = None,
) -> Encoder:
    """A checkpoint for the sake of its encoder: the decoder's heads and the mask ratio need not be known.

    A head count that the file does not state is compared with others by the model's own loss on some images.

    Args:
        source: As for :func:`mto_analysis.load_checkpoint`.
        images: To compare head counts on.
        weights: Which ones; by default those that the authors of its family evaluate, if they are there. ConMIM's slow
            branch is in the file, or in ``checkpoint_copy-N.pth`` beside ``checkpoint-N.pth``.
        loading: How it is loaded, but for the weights.
        settings: Device of the model, and how many of the images there are.
        listener: Takes notes and warnings.
        processes: All of them call this; by default this one alone.
    """
    unknown: dict[str, Any] = {}

    def load(source: str, weights: Weights) -> MaskedImageModel:
        request = Request(
            [source],
            images,
            settings or ProbeSettings(),
            loading=replace(loading or LoadOptions(), weights=weights),
            listener=listener or Listener(),
            processes=processes or Processes(),
        )
        model = request.encoder()
        unknown.update(request.stand_ins)
        return model

    def choose() -> Encoder:
        if _COPY.search(source):
            return Encoder(load(source, "model"), "model_ema")
        number = _NUMBER.search(source)
        copy = Path(source).with_name(f"checkpoint_copy-{number[1]}.pth") if number else None
        if copy is not None and copy.exists() and weights != "model":
            return Encoder(load(str(copy), "model"), "model_ema", f"weights from {copy.name}, the momentum teacher")
        model = load(source, weights or "model")
        if weights is None and weights_of(model) == "model_ema":
            try:
                return Encoder(load(source, "model_ema"), "model_ema")
            except CheckpointError:  # it was read just now: only these weights are missing
                authors = f"the authors of {model.info.family}"
                words = f"{source} holds no model_ema, which {authors} evaluate; its model is scored"
                return Encoder(model, "model", words)
        return Encoder(model, weights or "model")

    return choose()._replace(unknown=tuple(unknown))


def _identity(source: str) -> tuple[str | None, int | None]:
    """Method and seed of a run, from the first row of its ``metrics.csv``; ``None`` where it has none."""
    path = Path(source).expanduser()
    metrics = (path if path.is_dir() else path.parent) / "metrics.csv"
    try:
        first = pd.read_csv(metrics, nrows=1).iloc[0]
        return str(first["method"]), int(first["seed"])
    except (OSError, KeyError, IndexError, ValueError):
        return None, None


def named_checkpoints(
    sources: Sequence[str],
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    offline: bool = False,
) -> list[RunCheckpoint]:
    """All checkpoints of several sources, with the names and seeds that are given, else those of their runs.

    A source that does not say its method is called by its file or folder; its seed is 0.
    """
    if methods and len(methods) != len(sources):
        raise ValueError(f"give one --label per --ckpt: {len(sources)} checkpoints, {len(methods)} labels")
    if seeds and len(seeds) not in (1, len(sources)):
        raise ValueError(f"give one --seed, or one per --ckpt: {len(sources)} checkpoints, {len(seeds)} seeds")
    distinct = list(dict.fromkeys(sources))
    labels = dict(zip(distinct, labels_of(distinct), strict=True))
    found: list[RunCheckpoint] = []
    for number, source in enumerate(sources):
        method, seed = _identity(source)
        method = methods[number] if methods else method or labels[source]
        if seeds:
            seed = seeds[number % len(seeds)]
        found += find_checkpoints(source, method, seed or 0, offline=offline)
    seen: dict[Any, str] = {}
    for checkpoint in found:
        if checkpoint.key in seen:
            method, seed, epoch = checkpoint.key
            raise DataError(
                f"{seen[checkpoint.key]} and {checkpoint.source} are both {method!r}, seed {seed}, epoch {epoch};"
                " tell them apart with --label or --seed"
            )
        seen[checkpoint.key] = checkpoint.source
    return found


class CurveFile:
    """``curves.csv`` and the settings behind it, kept whole after every row.

    Args:
        folder: Where they are.
        settings: What scores depend on; a curve that was begun with others is refused.
        overwrite: Begin anew.
        writes: Whether this process writes; of several, one does.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, overwrite: bool = False, writes: bool = True
    ) -> None:
        if folder.exists() and not folder.is_dir():
            raise OutputExistsError(f"{folder} is a file, and results need a folder; choose another --out")
        if (folder / "last.pth").exists():  # its run.json and curves.csv are what the run goes on from
            raise OutputExistsError(f"{folder} holds a run, whose files would be replaced; choose another --out")
        if writes:
            check_writable(folder)
        self.path = folder / "curves.csv"
        self.writes = writes
        self.settings = json.loads(json.dumps(dict(settings), default=str))
        beside = folder / "settings.json"
        self.rows: list[dict[str, Any]] = []
        if self.path.exists() and not overwrite:
            try:
                before = json.loads(beside.read_text())
                self.rows = _read_rows(self.path)
                lacking = [column for column in COLUMNS if self.rows and column not in self.rows[0]]
            except (OSError, ValueError):
                before, lacking = None, []
            if before is None or lacking:
                raise OutputExistsError(f"{self.path} is no curve of ours; choose another --out or pass --overwrite")
            odd = [name for name, value in self.settings.items() if before.get(name) != value]
            if odd:
                raise OutputExistsError(
                    f"{self.path} was begun with {odd[0]} = {before.get(odd[0])}, not {self.settings[odd[0]]};"
                    " choose another --out or pass --overwrite"
                )
        elif not overwrite and (there := self._foreign()):
            raise OutputExistsError(
                f"{folder} already holds {', '.join(there)}; choose another --out or pass --overwrite"
            )
        self._began = bool(self.rows)

    def _foreign(self) -> list[str]:
        """Names of files that would be replaced; the same settings alone are those of a call that was killed."""
        there = [name for name in _OWN if (self.path.parent / name).exists()]
        if there == ["settings.json"]:
            try:
                same = json.loads((self.path.parent / "settings.json").read_text()) == self.settings
            except (OSError, ValueError):
                same = False
            return [] if same else there
        return there

    def holds(self, checkpoint: RunCheckpoint) -> bool:
        """Whether a checkpoint has its row already; a row of another file is refused."""
        row = next((row for row in self.rows if _key(row) == checkpoint.key), None)
        if row is not None and str(row["sha256"]) != checkpoint.sha256:
            epoch = "" if checkpoint.epoch is None else f", epoch {checkpoint.epoch}"
            raise OutputExistsError(
                f"{self.path} has a score of {checkpoint.method}, seed {checkpoint.seed}{epoch}, of another file than"
                f" {checkpoint.source}; give --label or --seed, another --out, or pass --overwrite"
            )
        return row is not None

    def add(self, checkpoint: RunCheckpoint, score: Score, protocol: str) -> dict[str, Any]:
        """Write one more row; rows are in the order of method, seed and epoch."""
        row = _row(checkpoint, score, protocol)
        self.rows.append(row)
        if self.writes:
            self._write(csv_bytes(self.table()))
        return row

    def _write(self, content: bytes) -> None:
        if self._began:
            write_atomically(self.path, content)
            return
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / "settings.json") as file:
            file.write(json_bytes(self.settings))
            file.flush()  # before anything is replaced there is room for both
            write_atomically(self.path, content)
        (folder / "random.csv").unlink(missing_ok=True)
        self._began = True

    def table(self) -> pd.DataFrame:
        """The rows so far, epochs of a run in order."""
        table = _frame(self.rows)
        names = {name: number for number, name in enumerate(dict.fromkeys(table["method"]))}
        order = table.assign(method=table["method"].map(names)).sort_values(["method", "seed", "epoch"], kind="stable")
        return table.loc[order.index].reset_index(drop=True)


def _frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for name in ("epoch", "layer", "iterations"):
        table[name] = pd.to_numeric(table[name]).astype("Int64")
    return table


def _row(checkpoint: RunCheckpoint, score: Score, protocol: str) -> dict[str, Any]:
    return {
        "method": checkpoint.method,
        "epoch": checkpoint.epoch,
        "score": score.top1,
        "seed": checkpoint.seed,
        "protocol": protocol,
        "top5": score.top5,
        **score.feature._asdict(),
        "crop_pct": score.crop_pct,
        "weights": score.weights,
        "iterations": score.iterations,
        "checkpoint": Path(checkpoint.source).name,
        "sha256": checkpoint.sha256,
        "seconds": round(score.seconds, 2),
    }


def _read_rows(path: Path) -> list[dict[str, Any]]:
    table = pd.read_csv(path, dtype={"method": str, "sha256": str}, keep_default_na=False, na_values=[""])
    rows: list[dict[str, Any]] = table.astype(object).to_dict("records")  # type: ignore[assignment]
    return rows


def _key(row: Mapping[str, Any]) -> tuple[str, int, int | None]:
    epoch = row["epoch"]
    return str(row["method"]), int(row["seed"]), None if epoch is None or pd.isna(epoch) else int(epoch)


def score_checkpoints(
    checkpoints: Sequence[RunCheckpoint],
    curve: CurveFile,
    score: Callable[[RunCheckpoint], Score],
    protocol: str,
) -> Iterator[dict[str, Any]]:
    """Score what the curve does not hold yet; each row is in the file before it is yielded."""
    for checkpoint in checkpoints:
        if not curve.holds(checkpoint):
            yield curve.add(checkpoint, score(checkpoint), protocol)


def score_random(
    checkpoints: Sequence[RunCheckpoint],
    curve: CurveFile,
    load: Callable[[RunCheckpoint], MaskedImageModel],
    score: Callable[[MaskedImageModel, RunCheckpoint], Score],
    protocol: str,
) -> dict[str, float]:
    """Score the architecture of each method with the random weights that its pre-training begins with.

    They go to ``random.csv`` beside the curve, not into it; what is there already is not scored again.

    Returns:
        Mean accuracy over seeds, by method.
    """
    path = curve.path.parent / "random.csv"
    rows = _read_rows(path) if path.exists() else []
    first = {(checkpoint.method, checkpoint.seed): checkpoint for checkpoint in reversed(checkpoints)}
    for (method, seed), checkpoint in reversed(list(first.items())):
        if any((str(row["method"]), int(row["seed"])) == (method, seed) for row in rows):
            continue
        start = RunCheckpoint(checkpoint.source, f"{method} random", seed, 0)
        model = load(checkpoint)
        device = next(model.parameters()).device
        result = score(random_weights(model.cpu(), seed).to(device), start)._replace(weights="random")
        rows.append({**_row(start, result, protocol), "method": method})
        if curve.writes:
            write_atomically(path, csv_bytes(_frame(rows)))
    return {str(method): float(part["score"].mean()) for method, part in _frame(rows).groupby("method", sort=False)}


def verdicts(table: pd.DataFrame, random: Mapping[str, float], test_images: int) -> list[str]:
    """A sentence per method: its last scores against the same architecture with random weights.

    A difference counts where it exceeds 1.96 standard errors of two proportions on ``test_images`` images each; that
    both were scored on the same ones makes the true error smaller.

    Args:
        table: Rows of ``curves.csv``.
        random: Top-1 percent of random weights, by method; without any, how to get them.
        test_images: How many images were scored.

    Example:
        >>> rows = pd.DataFrame({"method": ["MAE", "MAE"], "epoch": [1, 10], "score": [30.0, 45.0]})
        >>> verdicts(rows, {"MAE": 28.0}, 1000)
        ['MAE at epoch 10: 45.00 %, 17.00 points above random weights (28.00 %; +-4.15 by chance on 1000 images).']
        >>> verdicts(rows, {}, 1000)
        ['No verdict: add --random-baseline to compare with random weights of the same architecture.']
    """
    if not random:
        return ["No verdict: add --random-baseline to compare with random weights of the same architecture."]
    sentences = []
    for method, value in random.items():
        mine = table[table["method"] == method]
        epoch = mine["epoch"].max()  # missing where no checkpoint says its own
        last = mine if pd.isna(epoch) else mine[mine["epoch"] == epoch]
        score = float(last["score"].mean())
        chance = 196 * math.sqrt(sum(share * (1 - share) for share in (score / 100, value / 100)) / test_images)
        gap = score - value
        words = (
            "no different from" if abs(gap) <= chance else f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'}"
        )
        sentences.append(
            f"{method}{'' if pd.isna(epoch) else f' at epoch {epoch:g}'}: {score:.2f} %, {words} random weights "
            f"({value:.2f} %; +-{chance:.2f} by chance on {test_images} images)."
        )
    return sentences
