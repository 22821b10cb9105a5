"""The architecture can be seen from the tree: few subpackages, one-way imports, no circles, nothing by string."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import ROOT

#: Each may import those after it, as `docs/architecture.md` says.
ORDER = (
    *(
        "mto_analyze",
        "mto_analysis",
        "atlas",
        "figures",
        "demo",
        "experiments",
        "training",
        "rauc",
        "mto",
        "probe",
        "images",
    ),
    *("checkpoints", "models", "taps", "affinity", "masks", "runtime", "errors"),
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "cli" if path.is_relative_to(ROOT / "cli") else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path for folder in ("mto_analysis", "cli/mto_analyze") for path in (ROOT / folder).rglob("*.py")
}


def subpackage(module: str) -> str:
    root, _, rest = module.partition(".")
    return rest.partition(".")[0] if root == "mto_analysis" and rest else root


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """What a file imports, also inside functions, and whether that is for type checkers alone."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    guarded = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else str(node.module) for name in inside]
        else:
            continue
        yield from ((name, id(node) in guarded) for name in names if name in FILES and name != module)


@pytest.mark.parametrize("module", FILES)
def test_imports__go_one_way(module: str) -> None:
    # Only `python -m mto_analysis` may import the command.
    allowed = ORDER if module == "mto_analysis.__main__" else ORDER[ORDER.index(subpackage(module)) :]
    upwards = {name for name, _ in imports(module) if subpackage(name) not in allowed}
    assert not upwards, f"{module} imports what stands above it"


def test_imports__have_no_circles_between_files() -> None:
    # The root names what is public for type checkers, and imports it on first use.
    arrows = {module: {name for name, _ in imports(module)} for module in FILES if module != "mto_analysis"}
    while arrows:  # take away what imports nothing that is left; a circle stays
        free = {module for module, targets in arrows.items() if not targets & arrows.keys()}
        assert free, f"circular imports among {sorted(arrows)}"
        for module in free:
            del arrows[module]


def test_imports__are_not_hidden_in_strings() -> None:
    hidden = [
        module
        for module, path in FILES.items()
        # The root's public names are imported on first use, and a live source imports what the user names.
        if module not in ("mto_analysis", "mto_analysis.probe.live_source")
        and ("import_module(" in path.read_text(encoding="utf-8") or "__import__(" in path.read_text(encoding="utf-8"))
    ]
    assert not hidden


def test_tree__shows_the_subpackages_and_nothing_else() -> None:
    assert {subpackage(module) for module in FILES} - {"__main__"} == set(ORDER)
    loose = [path.name for path in (ROOT / "mto_analysis").glob("*.py")]
    assert len(loose) <= 4
    assert not [path for path in FILES.values() if path.name in ("utils.py", "misc.py", "common.py", "helpers.py")]


def test_page__names_every_subpackage() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    places = [
        page.index(f"\n{name}/") for name in ORDER if name not in ("mto_analyze", "mto_analysis", "demo", "errors")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("path", sorted((ROOT / "cli/mto_analyze").glob("*.py")), ids=lambda path: path.stem)
def test_commands__are_thin(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno
            assert lines <= 60, f"{node.name} has {lines} lines"
