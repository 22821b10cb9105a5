"""Notebooks run from a fresh kernel, offline, as they are committed: without outputs, with short cells."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT, notebooks

#: What the second code cell says, made small; a notebook uses some of these names.
SMALL = {"LIMIT": 4, "SEEDS": 2, "STEPS": 4, "BATCH": 64, "EPOCHS": 1}

FOUND = {str(path.relative_to(ROOT)): path for path in notebooks()}


@pytest.fixture
def nbformat() -> Any:
    return pytest.importorskip("nbformat")


def test_notebooks__are_there() -> None:
    assert any(Path(name).name.startswith("01_") for name in FOUND)


def make_small(notebook: Any) -> None:
    """Replace the values of the code cell after the installation by small ones."""
    first = [cell for cell in notebook.cells if cell.cell_type == "code"][1]
    first.source, count = re.subn(
        rf"^({'|'.join(SMALL)}) = \d+",
        lambda found: f"{found[1]} = {SMALL[found[1]]}",
        first.source,
        flags=re.MULTILINE,
    )
    assert count, "the second code cell holds the few values to change"


@contextmanager
def environment(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        path = os.pathsep.join([str(ROOT), str(ROOT / "cli"), *filter(None, [os.environ.get("PYTHONPATH")])])
        patch.setenv("PYTHONPATH", path)
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        yield


def check_outputs(notebook: Any) -> None:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr" or "Traceback" not in output["text"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "a notebook tells with figures"


def test_notebooks__run_one_after_the_other(nbformat: Any, tmp_path: Path) -> None:
    """One test and one kernel for all, so that torch is imported once."""
    nbclient = pytest.importorskip("nbclient")
    settings = {"timeout": 600, "kernel_name": "python3", "shutdown_kernel": "immediate"}
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), **settings)
    with environment(tmp_path), client.setup_kernel():
        for name, path in FOUND.items():
            client.nb = nbformat.read(path, as_version=4)
            make_small(client.nb)
            folder = tmp_path / path.stem
            folder.mkdir()
            # As in a new kernel, but for the modules that are imported, which no reset has to look through.
            begin = f"import gc\ngc.freeze()\n%reset -f\nimport os\nos.chdir({str(folder)!r})"
            client.nb.cells.insert(0, nbformat.v4.new_code_cell(begin))
            client.reset_execution_trackers()
            try:
                for index, cell in enumerate(client.nb.cells):
                    client.execute_cell(cell, index)
                check_outputs(client.nb)
            except Exception as error:
                error.add_note(name)
                raise


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_notebook__runs_in_a_fresh_kernel(name: str, nbformat: Any, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(FOUND[name], as_version=4)
    make_small(notebook)
    with environment(tmp_path):
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    check_outputs(notebook)


@pytest.mark.parametrize("name", FOUND)
def test_notebook__is_committed_without_outputs(name: str, nbformat) -> None:
    for cell in nbformat.read(FOUND[name], as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.mark.parametrize("name", FOUND)
def test_notebook__installs_the_package_where_it_is_missing(name: str, nbformat, monkeypatch) -> None:
    source = next(cell.source for cell in nbformat.read(FOUND[name], as_version=4).cells if cell.cell_type == "code")
    run: list[tuple[str, str]] = []
    shell = type("Shell", (), {"run_line_magic": lambda self, *words: run.append(words)})
    exec(source, {"get_ipython": shell})
    assert not run
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(source, {"get_ipython": shell})
    assert run == [("pip", "install --quiet mto-analysis")]


@pytest.mark.parametrize("name", FOUND)
def test_notebook__tells_in_calls_to_the_library(name: str, nbformat) -> None:
    for cell in nbformat.read(FOUND[name], as_version=4).cells:
        if cell.cell_type == "code":
            source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef):
                    assert (node.end_lineno or 0) - node.lineno < 18, f"{node.name} belongs into a module"
