"""``mto-analyze``: parse, call one library function, print or write. Heavy imports wait until a command runs."""

import typer

from mto_analyze.affinity import affinity
from mto_analyze.checkpoints import checkpoints
from mto_analyze.console import Commands
from mto_analyze.demo import demo
from mto_analyze.evaluate import evaluate
from mto_analyze.experiment import experiment
from mto_analyze.figures import figures
from mto_analyze.heterogeneity import heterogeneity
from mto_analyze.inspect import inspect
from mto_analyze.plot import plot
from mto_analyze.pretrain import pretrain
from mto_analyze.rauc import rauc
from mto_analyze.reconstruct import reconstruct
from mto_analyze.report import report
from mto_analyze.tables import tables

__all__ = ["app"]

app = typer.Typer(
    name="mto-analyze",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure masked tokens in masked image models (MAE, SimMIM, ...), layer by layer.",
    epilog="Exit codes: 0 fine, 2 usage or output exists, 3 checkpoint, 4 data, 5 numerical, 130 interrupted.",
)
for command in (
    *(demo, inspect, heterogeneity, affinity, reconstruct, report, plot, rauc, tables),
    *(pretrain, experiment, figures),
):
    app.command()(command)
app.add_typer(checkpoints, name="checkpoints")
app.add_typer(evaluate, name="evaluate")
