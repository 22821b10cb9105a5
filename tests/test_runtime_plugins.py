"""Plugins of other distributions: installed, used, and left out with a warning where they are broken."""

import sys

import pytest
import torch
from watched_models import small_simmim

from mto_analysis import load_checkpoint, save_checkpoint
from mto_analysis.errors import CheckpointError
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


def test_layouts__of_a_plugin_are_recognised(install, tmp_path):
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
