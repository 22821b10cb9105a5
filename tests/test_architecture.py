"""The architecture can be seen from the tree: few subpackages, one-way imports, no circles, nothing by string."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
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


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


#: Calls that import what a string names.
BY_STRING = re.compile(r"(.*\.)?(import_module|resolve_name|run_module|run_path|find_spec)|__import__|exec|eval")


def strings(node: ast.Module) -> Iterator[str]:
    """What code says in strings, but for docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(each.body[0].value) for each in ast.walk(node) if isinstance(each, documented) and each.body
                  and isinstance(each.body[0], ast.Expr)}  # fmt: skip
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str) and id(each) not in docstrings:
            yield each.value


def imports(node: ast.Module) -> Iterator[str]:
    """What a file imports of this project: also inside functions, for type checkers, and by a string."""
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            yield from (alias.name for alias in each.names if alias.name in FILES)
        elif isinstance(each, ast.ImportFrom):
            assert each.level == 0, f"a relative import of {each.module}"
            inside = [f"{each.module}.{alias.name}" for alias in each.names]
            names = {name if name in FILES else str(each.module) for name in inside}
            yield from (name for name in names if name in FILES)
    for text in strings(node):
        # A module by itself, or in a program's text.
        for name in (text, *re.findall(r"(?:from|import) ([\w.]+)", text)):
            if name.partition(".")[2] and name in FILES:
                yield name


def upwards(module: str, node: ast.Module) -> set[str]:
    # Only `python -m mto_analysis` may import the command.
    allowed = ORDER if module == "mto_analysis.__main__" else ORDER[ORDER.index(subpackage(module)) :]
    return {name for name in imports(node) if subpackage(name) not in allowed}


def by_string(node: ast.Module) -> list[str]:
    calls = [ast.unparse(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)]
    return [name for name in calls if BY_STRING.fullmatch(name)]


def test_imports__go_one_way() -> None:
    assert not {module: found for module in FILES if (found := upwards(module, tree(module)))}


def test_imports__have_no_circles_between_files() -> None:
    # The root names what is public for type checkers, and imports it on first use.
    arrows = {module: set(imports(tree(module))) - {module} for module in FILES if module != "mto_analysis"}
    while arrows:  # take away what imports nothing that is left; a circle stays
        free = {module for module, targets in arrows.items() if not targets & arrows.keys()}
        assert free, f"circular imports among {sorted(arrows)}"
        for module in free:
            del arrows[module]


def test_imports__are_not_hidden_in_strings() -> None:
    found = {module: calls for module in FILES if (calls := by_string(tree(module)))}
    assert found == {
        "mto_analysis": ["import_module"],  # the public names, on first use
        "mto_analysis.probe.live_source": ["resolve_name"],  # what the user names
        "mto_analysis.training.metrics": ["importlib.util.find_spec"],  # whether a board's library is installed
    }


@pytest.mark.parametrize(
    "code",
    [
        "import mto_analysis.probe",
        "def f():\n    from mto_analysis.figures.plots import style",
        "if TYPE_CHECKING:\n    from mto_analysis import probe",
        "def f():\n    importlib.import_module('mto_analysis.training.recipes')",
        "sys.modules['mto_analysis.figures.files']",
        "subprocess.run([sys.executable, '-c', 'from mto_analysis.experiments.worker import main; main()'])",
    ],
)
def test_imports__are_found_wherever_they_hide(code: str) -> None:
    assert upwards("mto_analysis.masks.rules", ast.parse(code))


def test_imports__by_computed_names_are_found() -> None:
    assert by_string(ast.parse("def f(name):\n    return importlib.import_module(f'{__package__}.{name}')"))


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


def test_commands__are_thin() -> None:
    for module in (name for name in FILES if subpackage(name) == "mto_analyze"):
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno
                assert lines <= 60, f"{module}.{node.name} has {lines} lines"
