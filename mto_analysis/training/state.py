"""The folder of a run: whose it is, and checkpoints from which the run goes on as if it had never stopped."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mto_analysis.errors import CheckpointError, OutputError, OutputExistsError
from mto_analysis.images.interface import Images, contents_digest
from mto_analysis.runtime.outputs import atomic_file, folder_in_use, json_bytes, locked_folder, write_atomically
from mto_analysis.runtime.processes import Processes
from mto_analysis.training.settings import RunSettings

#: What to do after a failure; an experiment is taken up by its own command instead.
ADVICE = "fix it and continue with --resume"

#: Part of every identity, raised whenever a release samples other random numbers: a run that went on across such a
#: change would be neither the old run nor the new one. 2: colour augmentation by torchvision.
RANDOMNESS = 2


# Images whose contents tell whether a folder still holds those that a run began with.
_SAMPLE = 32
_REPLACED = "images have other contents under the same names"


class RunFolder:
    """Files of a run, by name.

    Args:
        path: The folder; made by :meth:`claim`.
        final: A file that takes the place of ``last.pth`` when the run is complete, for runs whose way does not matter
            afterwards; by default checkpoints are kept beside ``last.pth``.
    """

    def __init__(self, path: str | Path, final: str | None = None) -> None:
        self.path = Path(path)
        self.final = None if final is None else self.path / final
        self.metadata = self.path / "run.json"
        self.recipe = self.path / "recipe.toml"
        self.metrics = self.path / "metrics.csv"
        self.curves = self.path / "curves.csv"
        self.measures = self.path / "measures.csv"
        self.shown, self.tensorboard = self.path / "shown", self.path / "tensorboard"
        self.last = self.path / "last.pth"
        self.figures = {kind: self.path / f"run.{kind}" for kind in ("png", "pdf", "svg")}

    def kept(self, epoch: int, *, complete: bool = False) -> Path:
        """The checkpoint that is kept of an epoch, or of the complete run."""
        return self.final if complete and self.final is not None else self.path / f"checkpoint-{epoch:04d}.pth"

    def finished(self) -> bool:
        """Whether the run is complete, as ``run.json`` says, or the final file in the place of ``last.pth``.

        ``last.pth`` is not needed: it may have been deleted to save space.
        """
        if self.final is not None and self.final.exists() and not self.last.exists():
            return True
        return self.metadata.exists() and self.stored_metadata().get("state") == "complete"

    def num_epochs(self) -> int:
        """Epochs that ``metrics.csv`` has rows of."""
        if not self.metrics.exists():
            return 0
        with self.metrics.open(newline="", encoding="utf-8") as file:
            return sum(row.get("kind") == "epoch" for row in csv.DictReader(file))

    def lost_rows(self, state: Mapping[str, Any] | None) -> Iterator[str]:
        """Which tables hold fewer rows than when the resume state was saved, in words."""
        for name, count in (state or {}).get("rows", {}).items():
            path = self.path / name
            left = max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0
            if left < count:
                yield f"{path} has lost {count - left} of {count} rows, which figures and tables lack"

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes out of the folder, see :func:`~mto_analysis.runtime.outputs.locked_folder`."""
        return locked_folder(self.path)

    def in_use(self) -> bool:
        """Whether another process works on the run."""
        return folder_in_use(self.path)

    def holds_run(self) -> bool:
        """Whether a run began here."""
        return self.metadata.exists() or self.last.exists()

    def stored_metadata(self) -> dict[str, Any]:
        """What ``run.json`` says.

        Raises:
            CheckpointError: If there is none, or it is damaged.
        """
        try:
            metadata = dict(json.loads(self.metadata.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} holds no run.json, so it is no run that could be resumed") from None
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.metadata} is damaged ({error}); {self._begin_anew}") from error
        if "identity" not in metadata:
            raise CheckpointError(f"{self.metadata} is of another command, so there is no run that could be resumed")
        return metadata

    def check(self, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Whether a run may begin or go on here; nothing is changed.

        Raises:
            OutputExistsError: If there is a run and neither ``resume`` nor ``overwrite``, or if files of no run would
                be replaced.
            CheckpointError: If the run to resume is another one, the message says what differs; or if ``last.pth`` is
                gone before the run was complete.
        """
        if not self.holds_run():
            written = (*self._files(), self.recipe, self.tensorboard, self.shown)
            if (foreign := [each.name for each in written if each.exists()]) and not overwrite:
                raise OutputExistsError(
                    f"{self.path} contains {', '.join(foreign)}, not written by a run; choose another --out or pass "
                    "--overwrite"
                )
            return
        if resume:
            stored = self.stored_metadata()
            check_randomness(self.path, stored["identity"], stored)
            known = stored["identity"].get("images", {}).get("contents")
            if identity["images"]["contents"] is not None and known is None:
                raise CheckpointError(
                    f"{self.path} began without --verify-data, so only a sample of its images is known; leave it out"
                )
            if other := run_differences(stored["identity"], identity):
                raise CheckpointError(
                    f"{self.path} holds another run: {'; '.join(other)}; give the same, choose another --out or pass "
                    "--overwrite"
                )
            # Without a checkpoint one epoch at most has a row: its checkpoint is written after it.
            if (
                not self.finished()
                and not self.last.exists()
                and (epochs := self.num_epochs()) > stored.get("settings", {}).get("save_every", 1)
            ):
                raise CheckpointError(f"{self.last} is gone after {epochs} epochs; {self._begin_anew}")
        elif not overwrite:
            raise OutputExistsError(
                f"{self.path} already holds a run; continue with --resume, choose another --out or pass --overwrite"
            )

    def claim(self, metadata: Mapping[str, Any], files: Mapping[str, str], *, resume: bool) -> None:
        """Make the folder ready: what an earlier run left is removed, or of a resumed one only half-written files.

        Args:
            metadata: For ``run.json``.
            files: Text files to write beside it, by name.
            resume: Whether the run goes on.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        own = {each.name for each in (*self._files(), self.metadata, *(self.path / name for name in files))}
        for stale in self.path.glob(".*.*.tmp"):
            if stale.name.startswith((".checkpoint-", *(f".{name}." for name in own))):
                stale.unlink(missing_ok=True)
        if not resume:
            for old in self._files():
                old.unlink(missing_ok=True)
            for whole in (self.tensorboard, self.shown):
                shutil.rmtree(whole, ignore_errors=True)
        self.write_metadata(metadata)  # first: files without it are of no run
        for name, text in files.items():
            write_atomically(self.path / name, text.encode())

    def write_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        write_atomically(self.metadata, json_bytes(metadata))

    @property
    def _begin_anew(self) -> str:
        return f"restore it, or delete {self.path} to begin anew"

    def _files(self) -> Iterator[Path]:
        yield self.last  # first: without it nothing can be taken for a run that goes on
        yield from (self.metrics, self.curves, self.measures, *self.figures.values(), self.path / "wandb-id.txt")
        yield from self.path.glob("checkpoint-[0-9]*.pth")
        if self.final is not None:
            yield self.final

    def read_last(self) -> dict[str, Any] | None:
        """The resume state of ``last.pth``, on the CPU; ``None`` where nothing was saved yet.

        Raises:
            CheckpointError: If the file is damaged or was written by something else.
        """
        fix = "delete it: the run is complete without it" if self.finished() else self._begin_anew
        try:
            content = torch.load(self.last, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:  # of many types, from a damaged file
            line = (str(error).strip().splitlines() or [""])[0]
            raise CheckpointError(f"{self.last} is damaged ({type(error).__name__}: {line}); {fix}") from error
        if not isinstance(content, dict) or "resume" not in content:
            raise CheckpointError(f"{self.last} holds no state to resume from; {fix}")
        return dict(content["resume"])


def check_randomness(path: Path, identity: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Refuse to go on with a run whose random numbers this version no longer samples."""
    written = identity.get("randomness", 1)
    if written != RANDOMNESS:
        version = metadata.get("versions", {}).get("mto-analysis", "of unknown number")
        raise CheckpointError(
            f"{path} was written by mto-analysis {version}, which samples other random numbers (revision {written}; "
            f"this version has revision {RANDOMNESS}); finish it with that version, or choose another --out"
        )


def run_identity(settings: RunSettings, images: Images, **own: Any) -> dict[str, Any]:
    """What makes a run this run, as plain values: with any of it changed it is another one.

    Args:
        settings: Of the run.
        images: To train on. Of what they hold a sample is hashed, or all with ``verify_data``.
        own: What else a run of its kind depends on.
    """
    metadata = settings.metadata()
    return {
        "randomness": RANDOMNESS,
        **{name: metadata[name] for name in ("seed", "init", "mto", "precision", "ema", "fsdp", "value_range")},
        "images": image_identity(images, whole=settings.verify_data),
        **own,
    }


def image_identity(images: Images, *, whole: bool) -> dict[str, Any]:
    """What tells images from others: their number and names, and hashes of what a sample, or all, of them hold."""
    names = images.names
    return {
        "count": len(names),
        "names": hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest(),
        "sample": contents_digest(images, _SAMPLE),
        "contents": contents_digest(images) if whole else None,
    }


def run_differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes two runs different ones, in words.

    What a recipe only says of itself does not: a setting that is given again, or in another order, is the same run.
    Neither does a setting that its method does not have.
    """
    known = set(now.get("recipe") or ()) - {"summary", "sources"}

    def without_words(identity: Mapping[str, Any]) -> dict[str, Any]:
        recipe = identity.get("recipe") or {}
        return {**identity, "recipe": {name: recipe[name] for name in recipe if name in known}}

    lines = differences(without_words(stored), without_words(now))
    hashed = all((each.get("images") or {}).get("contents") for each in (stored, now))
    lines = [line for line in lines if hashed or not line.startswith("images.contents ")]
    replaced = ("images.sample ", "images.contents ")
    return list(dict.fromkeys(_REPLACED if line.startswith(replaced) else line for line in lines))


def run_layout(settings: RunSettings, processes: Processes) -> dict[str, Any]:
    """What a run's result depends on in its last digits only."""
    return {
        "processes": processes.count,
        "accumulation": settings.accumulation,
        "device": processes.device.type,
        "threads": torch.get_num_threads(),
        **{name: getattr(settings, name) for name in ("compile", "gradient_checkpointing", "deterministic")},
        "torch": torch.__version__,
    }


def differences(stored: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two nested mappings of plain values, in words.

    Example:
        >>> differences({"seed": 1, "recipe": {"epochs": 20}}, {"seed": 1, "recipe": {"epochs": 40}})
        ['recipe.epochs was 20 and is now 40']
    """
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        return [
            line
            for key in dict.fromkeys([*stored, *now])
            for line in differences(stored.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if _plain(stored) == _plain(now) else [f"{name} was {stored} and is now {now}"]


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a torch file, whole or not at all, one tensor after the other."""
    guarded: _Guarded | None = None
    try:
        with atomic_file(path) as file:
            guarded = _Guarded(file)
            torch.save(dict(content), guarded)  # type: ignore[arg-type]
    except Exception as error:
        reason = error if isinstance(error, OSError) else guarded.error if guarded is not None else None
        if reason is None:
            raise
        words = f"{path} cannot be written ({reason.strerror or reason}); what was there before is whole"
        raise OutputError(words, advice=ADVICE) from error


class _Guarded:
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()
