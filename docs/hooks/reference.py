"""Pages made from the code: the public names, and all options of every command."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "cli"), str(Path(__file__).parent)]

from public import PAGES  # noqa: E402  (hooks are loaded by path and see no folder of their own)

OPTIONS = "options.md"
OVERVIEW = "reference/index.md"
TYPES = "reference/types.md"
# Searching for a word finds the guides before the reference, which holds every word.
LAST = "---\nsearch:\n  boost: 0.2\n---\n"

STABILITY = """
## What stays stable

The names on these pages, the options and exit codes of `mto-analyze`, the columns of the tables it writes and the keys
of its JSON output are the interface. From version 1.0 on they change only with the first digit of the version, after a
`DeprecationWarning` in at least one release before. Before 1.0 any release may change them, and the
[changelog](../CHANGELOG.md) then lists the old name and the new one. What other programs are meant to read states a
`schema_version`.

Every other module is internal and may change in any release, even though its names can be imported; pages that
show one (writing a converter, a method or a plot) say so. Checkpoints written by `save_checkpoint` stay readable.
Results stay equal for equal inputs and seeds; where a correction changes a number, the changelog says which and by how
much.
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The pages in the navigation: options after the commands, the reference last."""
    for group in config.nav or []:
        for pages in group.values():
            at = next((n for n, page in enumerate(pages) if "commands.md" in str(page)), None)
            if at is not None:
                pages.insert(at + 1, {"CLI reference": OPTIONS})
    assert config.nav is not None
    config.nav.append(
        {"Reference": [OVERVIEW, *({page.title: page.file} for page in PAGES), {"Types and errors": TYPES}]}
    )
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """A page for the functions of each package, one for all types, their list, and the options."""
    files.append(File.generated(config, OVERVIEW, content=overview()))
    for page in PAGES:
        content = "\n".join([f"{LAST}# {page.title}\n\n{page.summary}\n", *_entries(page.names())])
        files.append(File.generated(config, page.file, content=content))
    types = [line for page in PAGES for line in [f"## {page.package}\n", *_entries(page.names(types=True), level=3)]]
    heading = f"{LAST}# Types and errors\n\nWhat functions take, return and raise, by the package to import it from.\n"
    files.append(File.generated(config, TYPES, content="\n".join([heading, *types])))
    files.append(File.generated(config, OPTIONS, content=LAST + "\n".join(options())))
    return files


def _entries(names: Mapping[str, str], level: int = 2) -> Iterator[str]:
    options = f"    options:\n      show_root_heading: true\n      heading_level: {level}\n"
    yield from (f"::: {path}\n{options}" for path in names.values())


def overview() -> str:
    """The list of public names by page, and what may change."""
    lines = [f"{LAST}# Reference", "", "Import each name from the package that heads its list.", ""]
    for page in PAGES:
        title = f"## [{page.title}]({page.file.removeprefix('reference/')})"
        lines += [title, "", page.summary, "", _listed(page.package, page.names()), ""]
    lines += ["## [Types and errors](types.md)", "", "What these take, return and raise.", ""]
    for page in PAGES:
        lines += [_listed(page.package, page.names(types=True)), ""]
    return "\n".join(lines) + STABILITY


def _listed(package: str, names: Mapping[str, str]) -> str:
    """Names, each a link to where it is documented."""
    shown = (f'<autoref identifier="{path}"><code>{name}</code></autoref>' for name, path in names.items())
    return f"`{package}`: {', '.join(shown)}."


def options() -> Iterator[str]:
    """Every command with its arguments and options, from the command line itself."""
    import typer

    from mto_analyze import app

    yield "# CLI reference\n\nThe output of `mto-analyze COMMAND --help` for every command.\n"
    for name, command in typer.main.get_command(app).commands.items():
        for each in getattr(command, "commands", {}).items() if hasattr(command, "commands") else [(None, command)]:
            sub, leaf = each
            yield from _command(f"{name} {sub}" if sub else name, leaf)


def _command(name: str, command: Any) -> Iterator[str]:
    """The help of a command, then its options with their panels."""
    text, _, example = (command.help or "").partition("\n\nExample:\n")
    yield f"## mto-analyze {name}\n\n{text.strip()}\n\n```bash\n{textwrap.dedent(example).strip()}\n```\n"
    yield "| option | what | default |\n| --- | --- | --- |"
    from mto_analyze.options import PANELS

    panel = None
    for parameter in sorted(command.params, key=lambda each: PANELS.index(_panel(each))):
        names = ", ".join(f"`{each}`" for each in [*parameter.opts, *parameter.secondary_opts])
        text = " ".join((getattr(parameter, "help", None) or "").split())
        default = parameter.default
        shown = "" if default is None or default is False or callable(default) or default == () else f"`{default}`"
        names = names if names.startswith("`-") else f"`{str(parameter.name).upper()}`"
        if _panel(parameter) != panel:
            panel = _panel(parameter)
            yield f"| **{panel}** | | |"
        yield f"| {names} | {text} | {shown} |".replace("||", "|")
    yield ""


def _panel(parameter: Any) -> str:
    return getattr(parameter, "rich_help_panel", None) or "Input"  # an argument
