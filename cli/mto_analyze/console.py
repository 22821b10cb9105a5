"""What the terminal sees: errors as one line and an exit code, notes on stderr, progress bars."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from typer.core import TyperGroup

from mto_analysis.errors import MTOAnalysisError

if TYPE_CHECKING:
    import pandas as pd

Item = TypeVar("Item")

USAGE = 2
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
        except ValueError as error:  # an argument out of range
            self._stop(str(error), USAGE)
        except OSError as error:
            self._stop(f"{error.strerror or error}: {error.filename or 'while writing results'}", USAGE)
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or "out of memory" in str(error).lower()):
                raise
            self._stop("out of memory; use a smaller --batch-size", USAGE)
        except Exception as error:
            # A usage error: typer brings its own click, whose exceptions have no public name but this method.
            format_message = getattr(error, "format_message", None)
            if format_message is None:
                raise
            path = getattr(getattr(error, "ctx", None), "command_path", "mto-analyze")
            self._stop(f"{format_message().rstrip('.')}; see `{path} --help`", USAGE)

    @staticmethod
    def _stop(message: str, code: int) -> None:
        typer.echo(f"mto-analyze: error: {' '.join(message.split())}", err=True)
        raise typer.Exit(code)


def as_text(table: pd.DataFrame) -> str:
    """The columns of a heterogeneity table that fit a terminal."""
    columns = ["model", "stack", "layer_depth", "heterogeneity", "ci_low", "ci_high", "normalized", "num_visible"]
    return table[columns].to_string(index=False, float_format=lambda value: f"{value:.6g}")


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


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-")
