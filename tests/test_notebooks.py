"""Notebooks run from a fresh kernel, offline, as they are committed: without outputs, with short cells."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT, notebooks

FOUND = {str(path.relative_to(ROOT)): path for path in notebooks()}


@pytest.fixture
def nbformat() -> Any:
    return pytest.importorskip("nbformat")


def test_notebooks__are_there() -> None:
    assert any(Path(name).name.startswith("01_") for name in FOUND)


@pytest.mark.parametrize("name", FOUND)
def test_notebook__runs_in_a_fresh_kernel(name: str, nbformat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    path = os.pathsep.join([str(ROOT), str(ROOT / "cli"), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(FOUND[name], as_version=4)
    kernel = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=kernel).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr" or "Traceback" not in output["text"]
    drawn = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert drawn, "a notebook tells with figures"


@pytest.mark.parametrize("name", FOUND)
def test_notebook__is_committed_without_outputs(name: str, nbformat) -> None:
    for cell in nbformat.read(FOUND[name], as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
