"""Invocations as files: ``--config FILE`` reads options, and every run writes the ``run.toml`` that repeats it.

What a user gave is kept as it was typed, so that reading it back is parsing it again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from mto_analysis.errors import OutputExistsError

RUN_FILE = "run.toml"
METHODS_FILE = "methods.md"
_FIRST_LINE = "# Repeats this run: mto-analyze"
_METHODS_LINE = "<!-- Written by mto-analyze -->"

#: What takes a path says so in its placeholder.
_PATHS = ("PATH", "FILE", "FOLDER", "CKPT", "TABLE")


@dataclass
class Invocation:
    """The command that runs, and its options as they were typed or read from ``--config``, by name."""

    command: str = ""
    given: dict[str, Any] = field(default_factory=dict)
    one_file: bool = False  # whether --out is the only file of results, and no folder

    def as_toml(self, name: str = RUN_FILE) -> str:
        """The file, of this name, that repeats it; files that exist are named by their absolute paths."""
        from importlib.metadata import version

        from mto_analysis.runtime.settings import toml_value

        lines = [f"{_FIRST_LINE} {self.command} --config {name}", f"# mto-analysis {version('mto-analysis')}"]
        values = {"command": self.command, **self.given}
        lines += [f"{key} = {toml_value(_plain(value))}" for key, value in values.items()]
        return "\n".join(lines) + "\n"


#: Of this process; :class:`~mto_analyze.console.Command` fills it when it has parsed.
current = Invocation()


def begin(command: str, parameters: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Note what runs.

    Args:
        command: Its words, as ``evaluate knn``.
        parameters: The command's parameters, by name.
        given: Their raw values, by name.
    """
    current.command = command
    current.one_file = "out" in parameters and parameters["out"].metavar == "FILE"
    current.given = {
        option_name(parameter): _absolute(given[name], parameter)
        if takes_path(parameter) and name != "out"
        else given[name]
        for name, parameter in parameters.items()
        if given.get(name) not in (None, (), []) and name != "overwrite"  # repeating a run replaces nothing
    }


def option_name(parameter: Any) -> str:
    """What a parameter is called in a file: its long option, or the name of an argument.

    A flag with an opposite is ``true`` or ``false`` under its first name.
    """
    options = [each for each in parameter.opts if each.startswith("--")]
    return str(options[0]).removeprefix("--") if options else str(parameter.name)


def read_config(file: str, command: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a TOML file, by name of the parameter, as the command line would give them.

    Raises:
        ValueError: If the file is not TOML, is another command's, or has a key that is no option.
    """
    import tomllib

    try:
        values = tomllib.loads(Path(file).read_text(encoding="utf-8", errors="surrogateescape"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file} is not TOML: {error}") from error
    if (other := values.pop("command", command)) != command:
        raise ValueError(f"--config {file} is of `mto-analyze {other}`, not of `mto-analyze {command}`")
    names = {option_name(parameter): name for name, parameter in parameters.items() if name != "config"}
    found = {}
    for key, value in values.items():
        option = key.replace("_", "-") if key.replace("_", "-") in names else key
        if option not in names:
            close = get_close_matches(option, names, 3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(names)}"
            raise ValueError(f"--config {file}: `{command}` has no option {key!r}; {hint}")
        found[names[option]] = _as_typed(f"--config {file}: {key}", value, parameters[names[option]])
    return found


def check_own(out: Path, *, overwrite: bool | None) -> None:
    """Whether the files that every run writes can be written; ``None`` of a command without ``--overwrite``.

    Raises:
        OutputExistsError: If one of them exists and is not from an earlier run.
    """
    for name, line in ((RUN_FILE, _FIRST_LINE), (METHODS_FILE, _METHODS_LINE)):
        path = _beside(out, name)
        own = f"{line} {current.command} " if name == RUN_FILE else line
        if not overwrite and path.is_file() and not path.read_bytes().startswith(own.encode()):
            other = "" if overwrite is None else " or pass --overwrite"
            raise OutputExistsError(f"{path} is not from an earlier run of this command; choose another --out{other}")


def write_record(out: Path, metadata: Mapping[str, Any] | None = None) -> list[str]:
    """Write the file that repeats the current run, and its paragraph for a paper, if its command has one.

    Args:
        out: Folder of the results, or their only file.
        metadata: As in ``run.json``.

    Returns:
        The names of the files written.
    """
    return [*write_run_file(out), *(write_methods(out, metadata) if metadata else [])]


def write_run_file(out: Path) -> list[str]:
    """Write the file that repeats the current run."""
    return _written(out, RUN_FILE, current.as_toml(_beside(out, RUN_FILE).name))


def write_methods(out: Path, metadata: Mapping[str, Any]) -> list[str]:
    """Write the current command's paragraph for a paper, if it has one."""
    from mto_analysis.figures.methods import methods_paragraph

    paragraph = methods_paragraph(current.command, metadata)
    return _written(out, METHODS_FILE, f"{_METHODS_LINE}\n{paragraph}\n") if paragraph else []


def _written(out: Path, name: str, text: str) -> list[str]:
    from mto_analysis.runtime.outputs import write_atomically

    path = _beside(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode("utf-8", "surrogateescape"))  # paths need not be UTF-8
    return [path.name]


def _beside(out: Path, name: str) -> Path:
    """Where a file of the record is: in the folder of results, or beside a single file under its name."""
    return out.with_name(f"{out.stem}-{name}") if current.one_file else out / name


def _plain(value: Any) -> Any:
    """Text that is a number, as the number, where it reads back as the same text."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    for kind in (int, float):
        with suppress(ValueError, TypeError):
            if not isinstance(value, bool) and str(kind(value)) == value:
                return kind(value)
    return value


def takes_path(parameter: Any) -> bool:
    """Whether values of a parameter are paths, or can be."""
    return any(word in (parameter.metavar or "") for word in _PATHS)


def _absolute(value: Any, parameter: Any) -> Any:
    """Paths that exist, made absolute, so that a file works from every folder; other text as it is.

    A log is ``[NAME=]FILE[options]``; a recipe or experiment is a file, also where a folder has the name of one.
    """
    if isinstance(value, (list, tuple)):
        return [_absolute(each, parameter) for each in value]
    whole = Path(str(value))
    if parameter.metavar in ("FILE", "NAME|FILE") and not whole.is_file():
        return value
    if whole.exists():
        return str(whole.absolute())
    parts = re.fullmatch(r"([^=\[]*=)?([^\[]*)(\[.*)?", str(value), re.DOTALL)
    if parts is None or not parts[2] or not Path(parts[2]).exists():
        return value
    return f"{parts[1] or ''}{Path(parts[2]).absolute()}{parts[3] or ''}"


def _as_typed(where: str, value: Any, parameter: Any) -> Any:
    """A value of TOML as the parser would have it: text, a truth for a flag, a list where options repeat."""
    flag = getattr(parameter, "is_flag", False)
    if flag != isinstance(value, bool):
        raise ValueError(f"{where} must be {'true or false' if flag else 'a value, not true or false'}")
    if flag:
        return value
    several = getattr(parameter, "multiple", False) or parameter.nargs != 1
    values = value if isinstance(value, list) else [value]
    if isinstance(value, dict) or (isinstance(value, list) and not several):
        raise ValueError(f"{where} must be one value, got {value!r}")
    if not several:
        return str(value)
    if parameter.nargs > 1 and len(values) != parameter.nargs:
        raise typer.BadParameter(f"{where} must have {parameter.nargs} values")
    return tuple(map(str, values)) if parameter.nargs > 1 else [str(each) for each in values]
