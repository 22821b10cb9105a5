"""The folder of a run, and checkpoints that are written whole or not at all."""

import io
import multiprocessing
import os
import signal
import time
import zipfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from pretraining_cases import contents, run, small_recipe

from mto_analysis.errors import CheckpointError, OutputError, OutputExistsError, RunInUseError
from mto_analysis.mto import MTOConfig
from mto_analysis.runtime.outputs import atomic_file
from mto_analysis.training import RunFolder, RunSettings, mto_config
from mto_analysis.training.state import differences, write_checkpoint


class FullDisk(io.BytesIO):
    """Takes so many bytes."""

    def __init__(self, file, room):
        super().__init__()
        self.file, self.room = file, room

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(content)

    def flush(self):
        self.file.flush()

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize("room", [0, 10, 1000, 30_000])
def test_checkpoint__on_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch, room):
    path = tmp_path / "last.pth"
    write_checkpoint(path, {"old": torch.ones(3)})
    plain = os.fdopen

    class Opened:
        def __init__(self, *args):
            self.file = plain(*args)

        def __enter__(self):
            return FullDisk(self.file.__enter__(), room)

        def __exit__(self, *args):
            return self.file.__exit__(*args)

    monkeypatch.setattr("os.fdopen", Opened)
    with pytest.raises(OutputError, match=r"last.pth cannot be written \(No space left on device\)"):
        write_checkpoint(path, {"new": torch.ones(10_000), "more": torch.ones(10_000)})
    monkeypatch.undo()
    assert list(contents(path)) == ["old"]
    assert [each.name for each in tmp_path.iterdir()] == ["last.pth"]


def test_checkpoint__shared_tensors_are_stored_once(tmp_path):
    run(tmp_path / "run", small_recipe(epochs="1", warmup_epochs="0"))
    stored = contents(tmp_path / "run" / "last.pth")
    student = {k: v for k, v in stored["resume"]["method"].items() if k.startswith("student.")}
    shared = {v.untyped_storage().data_ptr() for v in stored["model"].values()}
    assert shared == {v.untyped_storage().data_ptr() for v in student.values()}
    weights = sum(v.numel() * 4 for v in student.values())
    with zipfile.ZipFile(tmp_path / "run" / "last.pth") as archive:
        size = sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    assert size < 3.2 * weights  # with both moments of AdamW


def test_atomic_file__is_not_there_until_it_is_whole(tmp_path):
    with atomic_file(tmp_path / "a") as file:
        file.write(b"half")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"half"


def test_differences__name_nested_values():
    assert differences({"a": {"b": (1, 2)}}, {"a": {"b": [1, 2]}}) == []
    assert differences({"a": {"b": 1}}, {"a": {"b": 2, "c": None}}) == ["a.b was 1 and is now 2"]
    assert differences({"mto": None}, {"mto": {"eps": 0.1}}) == ["mto was None and is now {'eps': 0.1}"]


def test_folder__must_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="is a file"):
        run(tmp_path / "file")
    with pytest.raises(OSError, match="Not a directory"):
        run(tmp_path / "file" / "run")


def test_folder__keeps_what_no_run_has_written(tmp_path):
    (tmp_path / "run" / "shown").mkdir(parents=True)
    with pytest.raises(OutputExistsError, match="contains shown, not written by a run"):
        run(tmp_path / "run")
    (tmp_path / "run" / "shown").rmdir()
    names = (".draft.tmp", ".notes.md.x1.tmp", ".last.pth.x1.tmp")
    for name in names:
        (tmp_path / "run" / name).write_text("")
    run(tmp_path / "run")
    assert [(tmp_path / "run" / name).exists() for name in names] == [True, True, False]


def test_folder__keeps_a_recipe_that_no_run_has_written(tmp_path):
    (tmp_path / "recipe.toml").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"contains recipe.toml, not written by a run"):
        RunFolder(tmp_path).check({}, resume=False, overwrite=False)


def test_folder__with_damaged_metadata_is_refused(tmp_path):
    run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run.json is damaged .*; restore it, or delete"):
        run(tmp_path / "run", resume=True)


def test_settings__come_back_from_their_metadata():
    import json

    settings = RunSettings(seed=4, mto=MTOConfig(layers=(0, 2)), precision="bf16", save_steps=7)
    assert RunSettings.from_metadata(json.loads(json.dumps(settings.metadata()))) == settings


def test_settings__are_checked():
    for wrong in (
        {"precision": "half"},
        {"accumulation": 0},
        {"ema": 1.0},
        {"save_steps": 0},
        {"ema": 0.9, "fsdp": True},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RunSettings(**wrong)


def test_mto_config__begins_at_a_preset_and_refuses_unknown_names():
    assert mto_config({"eps": "0.5"}, MTOConfig(ranking_weight=3)) == MTOConfig(ranking_weight=3, eps=0.5)
    assert mto_config({"preset": "paper"}) == MTOConfig.paper()
    with pytest.raises(ValueError, match=r"'mto\.weight'; known are mto\.preset, mto\.sparsity_weight"):
        mto_config({"weight": "1"})


def test_folder__names_its_files(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.kept(10) == Path(tmp_path) / "checkpoint-0010.pth"
    assert not folder.holds_run()


def test_locked__keeps_others_out_and_leaves_nothing(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    with folder.locked():
        assert folder.in_use()
        with pytest.raises(RunInUseError, match="is in use by another process"), RunFolder(folder.path).locked():
            raise AssertionError("never here")
        assert folder.in_use()
    assert not folder.in_use()
    assert not folder.path.exists()


def _leave_a_worker(folder: Path, sender: Connection) -> None:
    with RunFolder(folder).locked():
        worker = os.fork()
        if worker:
            sender.send(worker)
        else:
            time.sleep(60)
        os._exit(0)


def test_locked__a_worker_process_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    parent = context.Process(target=_leave_a_worker, args=(tmp_path / "run", sender))
    parent.start()
    worker = receiver.recv()
    parent.join()
    try:
        with RunFolder(tmp_path / "run").locked():
            os.kill(worker, 0)  # it is still there
    finally:
        os.kill(worker, signal.SIGKILL)


def test_locked__a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), RunFolder(tmp_path / "file" / "run").locked():
        raise AssertionError("never here")
