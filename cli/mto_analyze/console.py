"""What the terminal sees: errors as one line and an exit code, notes on stderr, progress bars."""

from __future__ import annotations

import gc
import inspect
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from mto_analysis.errors import explained
from mto_analysis.runtime.collection import without_collection
from mto_analysis.runtime.processes import failing_together, is_connected, this_process
from mto_analyze import repeating
from mto_analyze.options import ADVANCED, PANELS
from mto_analyze.repeating import read_config, takes_path

if TYPE_CHECKING:
    import pandas as pd

Item = TypeVar("Item")

USAGE = 2
INTERRUPTED = 130
CLOSED_PIPE = 141


@contextmanager
def frozen_imports() -> Iterator[None]:
    """No garbage collection while much is made that stays; what is there at the end is left out of it afterwards.

    Only once: later calls in the same process (a notebook's, a test's) make garbage, which would never be freed.
    """
    if gc.get_freeze_count() or not gc.isenabled():
        yield
        return
    with without_collection():
        try:
            yield
        finally:
            gc.freeze()


class Command(TyperCommand):
    """A command whose help has its options in panels and ends with an example, within 80 columns.

    Options can come from a file, empty ones are refused, and what was given is kept for the file that repeats the run.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, with the options of ``--config`` for those that are not given."""
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        words = " ".join(ctx.command_path.split()[1:])
        parameters: dict[str, Any] = {str(each.name): each for each in self.get_params(ctx)}
        try:
            given = dict(self.make_parser(ctx).parse_args(list(args))[0])
            if file := given.get("config"):
                ctx.default_map = read_config(file, words, parameters)
                del given["config"]
            given = {**(ctx.default_map or {}), **{name: each for name, each in given.items() if each is not None}}
            for name, value in given.items():
                if "" in (value if isinstance(value, (list, tuple)) else [value]):
                    advice = "; give a path (. is the current folder)" if takes_path(parameters[name]) else ""
                    raise typer.BadParameter(f"is empty{advice}", param_hint=parameters[name].opts[0])
            repeating.begin(words, parameters, given)
            return super().parse_args(ctx, args)
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            if hasattr(error, "possibilities") and any("--set" in each.opts for each in parameters.values()):
                setting = str(error.option_name).lstrip("-").replace("-", "_")  # type: ignore[attr-defined]
                error.message += f"; a setting would be given as --set {setting}=VALUE"  # type: ignore[attr-defined]
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run, unless files would be replaced that every run writes."""
        out = ctx.params.get("out")
        if isinstance(out, Path):
            repeating.check_own(out, overwrite=ctx.params.get("overwrite"))
        return super().invoke(ctx)

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """What the command does, without its example."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(self._parts()[0])

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then the options of each panel."""
        panels: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", *PANELS)}
        for parameter in self.get_params(ctx):
            argument = parameter.param_type_name == "argument"
            panel = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or ADVANCED
            if (record := parameter.get_help_record(ctx)) is not None:
                shown, description = record
                if parameter.default is None:  # of a flag that a resumed run keeps: its opposite is of little use
                    shown = shown.partition(" / ")[0]
                description = re.sub(r"\s*\[x>=[\d.]+\]$|; x>=[\d.]+(?=\])", "", description)
                panels[panel].append(((parameter.metavar if argument else None) or shown, description))
        for name, records in panels.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The example, line by line as it was written."""
        with formatter.section("Example"):
            for line in self._parts()[1].splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def _parts(self) -> tuple[str, str]:
        """Description and example of the docstring."""
        text, _, example = inspect.cleandoc(self.help or "").partition("\n\nExample:\n")
        return text, textwrap.dedent(example)


class CommandGroup(TyperGroup):
    """A group whose help lists its commands under headings, each with the whole first sentence of its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; without a command the help is all there is to say."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            raise typer.Exit(USAGE)
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands, by heading."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            first = (command.help or "").partition("\n\n")[0]
            panels.setdefault(command.rich_help_panel or "Commands", []).append((name, first))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


class Commands(CommandGroup):
    """The command group that turns our errors into one line on stderr and a documented exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run as a program; processes that have met leave without tearing down libraries.

        At exit, threads of gloo and pyarrow now and then abort a process that has done all its work, and the launcher
        would call the run failed.
        """
        # Where a stream is closed the next file would take its place, and be written to by whoever has a word to say.
        sys.stdout, sys.stderr = (each or open(os.devnull, "w") for each in (sys.stdout, sys.stderr))  # noqa: SIM115, PTH123
        try:
            return super().main(*args, **kwargs)
        except SystemExit as stop:
            if not is_connected():
                raise
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stop.code if isinstance(stop.code, int) else int(stop.code is not None))

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse what stands before the command, with errors in the same format."""
        with _reported():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; fixable errors end with their own code, Ctrl-C with 130.

        Of several processes the first that fails says why, and the others end with its code.
        """
        before, warnings.formatwarning = warnings.formatwarning, _one_line
        try:
            with _reported():
                with failing_together(explain, _say_error), _early_exit() as exits:
                    return super().invoke(ctx)
                raise exits[0]
        finally:
            warnings.formatwarning = before

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; one that knows nothing of launchers would run, and write, once in every process."""
        found = super().resolve_command(ctx, args)
        count = this_process().count
        if count > 1 and not _is_launchable(found[1]):
            able = ", ".join(name for name in self.list_commands(ctx) if _is_launchable(self.get_command(ctx, name)))
            raise ValueError(
                f"{found[0]} cannot share its work between {count} processes; run it without the launcher "
                f"(these can: {able})"
            )
        return found


def launchable(command: Callable[..., None]) -> Callable[..., None]:
    """Mark a command whose processes, under a launcher, share the work."""
    command.launchable = True  # type: ignore[attr-defined]
    return command


def _is_launchable(command: Any) -> bool:
    """Whether a command, or one of a group's commands, is marked :func:`launchable`."""
    inner = getattr(command, "commands", {}).values()
    return getattr(command.callback, "launchable", False) or any(map(_is_launchable, inner))


def _say_error(message: str) -> None:
    typer.echo(f"mto-analyze: error: {message}", err=True)


@contextmanager
def _reported() -> Iterator[None]:
    """Turn an error that can be explained into one line and an exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except BrokenPipeError:  # whoever read what is printed has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit would fail again
        raise typer.Exit(CLOSED_PIPE) from None
    except (Exception, KeyboardInterrupt) as error:
        found = explain(error)
        if found is None:
            raise
        if this_process().count == 1:
            _say_error(found[0])
        raise typer.Exit(found[1]) from error


@contextmanager
def _early_exit() -> Iterator[list[typer.Exit]]:
    """Take the exit that ``--help`` asks for, which is no failure."""
    found: list[typer.Exit] = []
    try:
        yield found
    except typer.Exit as error:
        found.append(error)


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning without the line of code that gave it."""
    return f"mto-analyze: warning: {' '.join(str(message).split())}\n"


def explain(error: BaseException) -> tuple[str, int] | None:
    """A fixable error as one line and an exit code; ``None`` for a mistake in the program."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {str(error) or 'nothing half-written was left behind'}", INTERRUPTED
    if (found := explained(error)) is not None:
        return found if found[0] != "out of memory" else ("out of memory; use a smaller --batch-size", found[1])
    # A usage error: typer brings its own click, whose exceptions have no public name but this method.
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return None
    path = getattr(getattr(error, "ctx", None), "command_path", "mto-analyze")
    message = format_message().replace("Value error, ", "").replace("Input should be", "must be")
    message = re.sub(r", unable to parse string as an? \w+|[.?]$", "", message).replace(". Did you", "; did you")
    return " ".join(f"{message}; see `{path} --help`".split()), USAGE


def as_text(table: pd.DataFrame) -> str:
    """The columns of a heterogeneity table that fit a terminal."""
    columns = ["model", "stack", "layer_depth", "heterogeneity", "ci_low", "ci_high", "normalized", "num_visible"]
    return table[columns].to_string(index=False, float_format=lambda value: f"{value:.6g}")


# Where bars are shown just now, whose lines would be glued to whatever is written past them.
_shown: list[Any] = []


def note(message: str, *, quiet: bool = False) -> None:
    """Say something on stderr, unless told to be quiet; of several processes the main one speaks."""
    if quiet or not this_process().main:
        return
    with suppress(OSError):  # results matter more than words that nobody reads
        if _shown:
            _shown[-1].print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            typer.echo(message, err=True)


@contextmanager
def bars(*columns: Any, quiet: bool = False) -> Iterator[Any]:
    """Rich progress bars on stderr, with notes above them; ``None`` where stderr is no terminal.

    Args:
        columns: Of each bar; by default its description, itself, the count, and the time left.
        quiet: Show none.
    """
    if quiet or not this_process().main or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = columns or (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        _shown.append(progress.console)
        try:
            yield progress
        finally:
            _shown.pop()


def progress(items: Iterable[Item], total: int | None, label: str, *, quiet: bool = False) -> Iterator[Item]:
    """Show a bar on stderr while items pass by; nothing when stderr is not a terminal."""
    with bars(quiet=quiet) as shown:
        yield from items if shown is None else shown.track(items, total=total, description=label)


def settings_of(texts: Sequence[str]) -> dict[str, str]:
    """What ``--set key=value`` gave, by key."""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes key=value, got {text!r}")
        pairs[key.strip()] = value
    return pairs
