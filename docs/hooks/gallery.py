"""The notebooks as pages, run while the site is built; with ``NOTEBOOKS=source`` they are shown without being run.

No outputs are committed, so what the site shows was computed by the code it documents. Results are kept in ``.cache``
until a notebook or a module changes.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CACHE = ROOT / ".cache" / "notebooks"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A tab of notebooks before the results."""
    assert config.nav is not None
    at = next(number for number, group in enumerate(config.nav) if "Results" in group)
    config.nav.insert(at, {"Notebooks": ["notebooks/index.md", *({title(path): page_of(path)} for path in NOTEBOOKS)]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """A page, its images and the file to download for each notebook, and the list of them."""
    run = os.environ.get("NOTEBOOKS", "run") != "source"
    for path in NOTEBOOKS:
        text, images = rendered(executed(path) if run else nbformat.read(path, as_version=4), path)
        files.append(File.generated(config, page_of(path), content=text))
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
        for name, content in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    files.append(File.generated(config, "notebooks/index.md", content=contents(run)))
    return files


def page_of(path: Path) -> str:
    return f"notebooks/{path.stem}.md"


def title(path: Path) -> str:
    """The first heading."""
    return _first_cell(path).partition("\n")[0].lstrip("# ")


def _first_cell(path: Path) -> str:
    return str(nbformat.read(path, as_version=4).cells[0].source)


def contents(run: bool) -> str:
    """The list: what each notebook asks."""
    how = "They were run when this site was built." if run else "This build shows them without their outputs."
    lines = ["# Notebooks", "", f"Each runs offline in under two minutes on two cores, with bundled models. {how}", ""]
    lines += ["```bash", "pip install '.[notebooks]' jupyterlab && jupyter lab notebooks", "```", ""]
    for path in NOTEBOOKS:
        heading, _, text = _first_cell(path).partition("\n")
        lines += [f"## [{heading.lstrip('# ')}]({path.stem}.md)", "", text.strip().partition("\n\n")[0], ""]
    return "\n".join(lines)


def rendered(notebook: Any, path: Path) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook, and its images by name."""
    resources = {"output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
    text, found = MarkdownExporter().from_notebook_node(notebook, resources=resources)
    first, _, rest = text.lstrip().partition("\n")
    return f"{first}\n\n[Download this notebook]({path.name})\n{rest}", found["outputs"]


def executed(path: Path) -> Any:
    """The notebook with its outputs, computed in an empty folder or taken from the cache."""
    from tempfile import TemporaryDirectory

    from nbclient import NotebookClient

    kept = CACHE / f"{path.stem}-{_state(path)}.ipynb"
    if kept.is_file():
        return nbformat.read(kept, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")])
    with TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    CACHE.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, kept)
    return notebook


def _state(path: Path) -> str:
    """Changes with the notebook and with any module."""
    sources = [path, *sorted((ROOT / "mto_analysis").rglob("*.py"))]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
