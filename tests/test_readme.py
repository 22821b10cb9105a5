"""README and docs: python blocks run as they stand, commands exist with the options shown, links lead somewhere."""

from __future__ import annotations

import doctest
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import typer
from documents import ROOT, blocks, pages

from mto_analyze import app

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
COMMANDS = typer.main.get_command(app).commands


def scripts(page: Path) -> list[str]:
    """Python blocks that are not sessions, which ``doctest`` runs."""
    return [code for code in blocks(page, "python") if not code.startswith(">>>")]


def python_pages() -> list[str]:
    return [name for name, page in PAGES.items() if scripts(page)]


def session_pages() -> list[str]:
    return [name for name, page in PAGES.items() if ">>> " in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", session_pages())
def test_python_sessions__give_what_the_page_says(name: str) -> None:
    result = doctest.testfile(str(PAGES[name]), module_relative=False)
    assert result.attempted
    assert result.failed == 0


def test_pages__are_there() -> None:
    assert "README.md" in PAGES
    assert "README.md" in python_pages()
    assert any(name.startswith("docs/") for name in python_pages())


@pytest.mark.parametrize("name", python_pages())
def test_python_blocks__run_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = types.ModuleType("page")  # a real module, which dataclasses look for
    monkeypatch.setitem(sys.modules, "page", page)
    for number, code in enumerate(scripts(PAGES[name])):
        exec(compile(code, f"{name}, block {number}", "exec"), vars(page))


def shown_commands() -> list[tuple[str, str]]:
    found = []
    for name, page in PAGES.items():
        for code in blocks(page, "bash", "console", "sh", "shell", ""):
            joined = code.replace("\\\n", " ")
            for line in joined.splitlines():
                found += [(name, each.strip()) for each in re.findall(r"(?<![\w/.-])mto-analyze [^&|;#]*", line)]
    return found


def test_readme__shows_commands() -> None:
    assert any(line.startswith("mto-analyze demo") for name, line in shown_commands() if name == "README.md")
    assert any(line.startswith("mto-analyze heterogeneity") for name, line in shown_commands() if name == "README.md")


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_commands__exist_with_the_options_shown(page: str, line: str) -> None:
    words = shlex.split(line)[1:]
    if words[0].startswith("-"):
        return
    commands = COMMANDS
    while words[0] in commands and hasattr(commands[words[0]], "commands"):  # a group, such as `checkpoints`
        commands = commands[words.pop(0)].commands
    assert words[0] in commands, line
    options = {
        option for parameter in commands[words[0]].params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    used = {word.split("=")[0] for word in words[1:] if word.startswith("-") and len(word) > 1}
    assert used <= options | {"--help"}, line


@pytest.mark.parametrize("name", PAGES)
def test_links__lead_to_files_that_exist(name: str) -> None:
    page = PAGES[name]
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if re.match(r"[a-z]+:|#", target):
            continue
        assert (page.parent / target.split("#")[0]).exists(), f"{name}: {target}"
