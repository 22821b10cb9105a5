"""What the terminal sees: errors as one line and an exit code, notes on stderr, progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup

from mto_analysis.errors import MTOAnalysisError

Item = TypeVar("Item")

INTERRUPTED = 130


class Commands(TyperGroup):
    """The command group that turns our errors into one line on stderr and a documented exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; mendable errors end with their own code, Ctrl-C with 130."""
        try:
            return super().invoke(ctx)
        except MTOAnalysisError as error:
            self._stop(str(error), error.exit_code)
        except KeyboardInterrupt:
            self._stop("interrupted; nothing half-written was left behind", INTERRUPTED)
        except OSError as error:
            self._stop(f"{error.strerror or error}: {error.filename or 'output'}", 2)

    @staticmethod
    def _stop(message: str, code: int) -> None:
        typer.echo(f"mto-analyze: error: {' '.join(message.split())}", err=True)
        raise typer.Exit(code)


def note(message: str, *, quiet: bool = False) -> None:
    """Say something on stderr, unless told to be quiet."""
    if not quiet:
        typer.echo(message, err=True)


def progress(items: Iterable[Item], total: int | None, label: str, *, quiet: bool = False) -> Iterator[Item]:
    """Show a bar on stderr while items pass by; nothing when stderr is not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(items, total=total, description=label)
