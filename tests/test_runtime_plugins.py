"""Plugins of other distributions: installed, used, and left out with a warning where they are broken."""

import sys

import pytest
import torch
from watched_models import small_simmim

from mto_analysis import load_checkpoint, save_checkpoint
from mto_analysis.errors import CheckpointError, DataError
from mto_analysis.rauc.logs import read_log
from mto_analysis.runtime.plugins import plugins

CODE = """
from mto_analysis.checkpoints.conversion import Conversion
from mto_analysis.checkpoints.layouts import Layout
from mto_analysis.checkpoints.native import convert_native
from mto_analysis.models import SimMIM, SimMIMConfig


def fails(names):
    raise KeyError("broken")


mine = Layout("Mine", lambda names: names.has("token_of_mine"), convert_native)
broken = Layout("Broken", fails, convert_native)
family = (SimMIM, SimMIMConfig)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution with entry points, as pip lays it out."""

    def installed(name, code, entries):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(entries)
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
        plugins.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    yield installed
    plugins.cache_clear()


def test_layouts__of_a_plugin_are_recognized(install, tmp_path):
    torch.save({"token_of_mine": torch.zeros(1), "encoder.weight": torch.zeros(2)}, tmp_path / "mine.pth")
    with pytest.raises(CheckpointError, match="a layout that is unknown"):
        load_checkpoint(tmp_path / "mine.pth")
    install("kept_apart", CODE, "[mto_analysis.layouts]\nmine = kept_apart:mine\n")
    with pytest.raises(CheckpointError) as caught:  # its converter is asked, which is that of our own files
        load_checkpoint(tmp_path / "mine.pth")
    assert "unknown" not in str(caught.value)


def test_families__of_a_plugin_are_saved_and_loaded(install, tmp_path):
    from dataclasses import replace

    model = small_simmim()
    model.info = replace(model.info, family="theirs")
    with pytest.raises(ValueError, match="family must be one of"):
        save_checkpoint(model, tmp_path / "theirs.safetensors")
    install("their_family", CODE, "[mto_analysis.families]\ntheirs = their_family:family\n")
    save_checkpoint(model, tmp_path / "theirs.safetensors")
    loaded = load_checkpoint(tmp_path / "theirs.safetensors")
    assert loaded.info.family == "theirs"
    assert torch.equal(loaded.mask_token, model.mask_token)


@pytest.mark.parametrize(
    ("entries", "error"),
    [("broken = broken_plugin:broken", "KeyError"), ("gone = broken_plugin:nothing", "AttributeError")],
)
def test_plugins__a_broken_one_is_a_warning_with_its_distribution(entries, error, install, tmp_path):
    install("broken_plugin", CODE, f"[mto_analysis.layouts]\n{entries}\n")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with (
        pytest.warns(UserWarning, match=rf"plugin \w+ of broken_plugin is left out \({error}"),
        pytest.raises(CheckpointError, match="a layout that is unknown"),
    ):
        load_checkpoint(tmp_path / "other.pth")


LOGS = """
import numpy as np
from mto_analysis.rauc.logs import Document, Format, LogFormat, RecordColumns

FORMAT = Format("mine", "my trainer", "lines that start with >>")


def read(name, data):
    rows = [line.split() for line in data.decode().splitlines() if line.startswith(">>")]
    records = [{"epoch": int(row[1]), "val_acc1": float(row[2])} for row in rows]
    return Document(name, FORMAT, RecordColumns(records, np.arange(1, len(rows) + 1)), axes=(("epoch", "epochs"),))


mine = LogFormat(lambda data: data.startswith(b">>"), read)
broken = LogFormat(lambda data: data.startswith(b">>"), lambda name, data: data.missing)
"""


def test_log_formats__of_a_plugin_are_read(install, tmp_path):
    (tmp_path / "run.log").write_text(">> 1 41.5\nsome words\n>> 2 52.25\n")
    (tmp_path / "table.csv").write_text("epoch,val_acc1\n1,41.5\n2,52.25\n")
    with pytest.raises(DataError, match="not a log of a known format"):
        read_log(tmp_path / "run.log")
    install("my_logs", LOGS, "[mto_analysis.log_formats]\nbroken = my_logs:broken\nmine = my_logs:mine\n")
    with pytest.warns(UserWarning, match=r"plugin broken of my_logs is left out \(AttributeError"):
        log = read_log(tmp_path / "run.log")
    assert log.document.format.name == "mine"
    assert log.rows["score"].tolist() == read_log(tmp_path / "table.csv").rows["score"].tolist()
