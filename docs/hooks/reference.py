"""Pages made from the code: the API reference, one page a module, and all options of every command."""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mto_analysis"
OPTIONS = "options.md"
OVERVIEW = "reference/index.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The pages in the navigation: options after the commands, the reference last but one."""
    for group in config.nav or []:
        for pages in group.values():
            at = next((n for n, page in enumerate(pages) if "commands.md" in str(page)), None)
            if at is not None:
                pages.insert(at + 1, {"CLI reference": OPTIONS})
    packages: dict[str, list[Any]] = {"": [OVERVIEW]}
    for module in modules():
        name = module_name(module)
        inside = name.count(".") > 1 or module.name == "__init__.py"
        pages = packages.setdefault(name.split(".")[1] if inside else "", [])
        pages.append({name.removeprefix("mto_analysis."): page_of(name)})
    top = packages.pop("")
    assert config.nav is not None
    config.nav.append({"Reference": [*top, *({name: pages} for name, pages in sorted(packages.items()))]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """A page for every module, their list, and the options."""
    files.append(File.generated(config, OVERVIEW, content=overview()))
    for module in modules():
        name = module_name(module)
        content = f"# {name}\n\n::: {name}\n" + (public_names(module) if module.name == "__init__.py" else "")
        files.append(File.generated(config, page_of(name), content=content))
    files.append(File.generated(config, OPTIONS, content="\n".join(options())))
    return files


def modules() -> list[Path]:
    """Public modules of the library, as they lie on disk."""
    named = (path for path in sorted(PACKAGE.rglob("*.py")) if path.name == "__init__.py" or path.name[0] != "_")
    return [path for path in named if path != PACKAGE / "__init__.py"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def page_of(name: str) -> str:
    return f"reference/{name.removeprefix('mto_analysis.').replace('.', '-')}.md"


def overview() -> str:
    """The list of modules with the first sentence of each."""
    lines = ["# Reference", "", *_docstring(PACKAGE / "__init__.py"), "", public_names(PACKAGE / "__init__.py")]
    lines += ["", "## Modules", "", "| module | what it owns |", "| --- | --- |"]
    for path in modules():
        name = module_name(path)
        first = re.split(r"(?<!Eq)(?<!Eqs)(?<!Fig)\. ", " ".join(_docstring(path)))[0].rstrip(".")
        first = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", first)
        lines.append(f"| [{name}]({page_of(name).removeprefix('reference/')}) | {first.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def public_names(package: Path) -> str:
    """What a package gives under its own name, each name a link to where it is documented."""
    links = []
    for node in ast.walk(ast.parse(package.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mto_analysis."):
            links += [(each.asname or each.name, f"{node.module}.{each.name}") for each in node.names]
    shown = (f'<autoref optional identifier="{path}"><code>{name}</code></autoref>' for name, path in sorted(links))
    return f"\nFrom `{module_name(package)}`: {', '.join(shown)}.\n" if links else ""


def _docstring(path: Path) -> list[str]:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0].splitlines()


def options() -> Iterator[str]:
    """Every command with its arguments and options, from the command line itself."""
    sys.path[:0] = [str(ROOT), str(ROOT / "cli")]
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
    return getattr(parameter, "rich_help_panel", None) or "Options"
