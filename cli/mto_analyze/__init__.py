"""``mto-analyze``: parse, call one library function, print or write. Heavy imports wait until a command runs."""

from typing import Annotated

import typer

from mto_analyze.affinity import affinity
from mto_analyze.atlas import atlas
from mto_analyze.checkpoints import checkpoints
from mto_analyze.console import Command, Commands
from mto_analyze.demo import demo
from mto_analyze.evaluate import evaluate
from mto_analyze.experiment import experiment
from mto_analyze.figures import figures
from mto_analyze.heterogeneity import heterogeneity
from mto_analyze.inspect import inspect
from mto_analyze.intervene import intervene
from mto_analyze.plot import plot
from mto_analyze.pretrain import pretrain
from mto_analyze.rauc import rauc
from mto_analyze.reconstruct import reconstruct
from mto_analyze.relate import relate
from mto_analyze.report import report
from mto_analyze.tables import tables

__all__ = ["app"]

app = typer.Typer(
    name="mto-analyze",
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text within 80 columns, where nothing in brackets is taken for a style
    epilog="Exit codes: 0 success, 2 usage or output exists, 3 checkpoint, 4 data, 5 numerical, 130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    """The versions of this package and of torch, read from what is installed: torch is not imported."""
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mto-analyze {version('mto-analysis')} (torch {version('torch')}, timm {version('timm')})")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Measure masked tokens in masked image models (MAE, SimMIM, ...), layer by layer."""


#: Commands by their heading in the help.
COMMANDS = {
    "First look": (demo, inspect),
    "Measure": (heterogeneity, affinity, intervene, reconstruct, report, plot),
    "Train and compare": (pretrain, experiment, rauc, relate),
    "Paper": (figures, tables),
}
for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(cls=Command, rich_help_panel=panel)(command)
app.add_typer(checkpoints, name="checkpoints", rich_help_panel="First look")
app.add_typer(atlas, name="atlas", rich_help_panel="Measure")
app.add_typer(evaluate, name="evaluate", rich_help_panel="Train and compare")
