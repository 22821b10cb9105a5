"""The figure of a run, drawn from the tables in its folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.figures.files import write_figure
from mto_analysis.training.metrics import heterogeneity_by_layer, layer_of
from mto_analysis.training.state import RunFolder

# With fewer epochs, means over them would be a line of few points: single steps say more.
_FEW_EPOCHS = 10


def draw_run_folder(path: str | Path) -> list[Path]:
    """Draw loss, H per layer depth and score of a run to its figure ``run``, finished or not.

    Of a run of ten epochs or more the means of epochs are drawn, of a shorter one the logged steps.

    Raises:
        DataError: If the folder holds no ``metrics.csv`` of a run, or one without rows.
    """
    from mto_analysis.figures.plots.training_curves import draw_run

    folder = RunFolder(path)
    try:
        metrics = pd.read_csv(folder.metrics)
        curve = pd.read_csv(folder.curves) if folder.curves.exists() else None
        epochs, steps = (metrics[metrics["kind"] == kind] for kind in ("epoch", "step"))
        names = list(metrics.columns)
        terms = [name for name in names[names.index("loss") + 1 : names.index("lr")] if _is_term(name)]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder.metrics} is not the table of a run ({error})") from error
    few = len(epochs) < _FEW_EPOCHS
    rows = steps if few else epochs
    if rows.empty:
        raise DataError(f"{folder.metrics} has no rows yet")
    figure = draw_run(
        rows,
        heterogeneity_by_layer(rows),
        curve,
        terms=terms,
        what=f"{rows['method'].iloc[0]}, seed {rows['seed'].iloc[0]}; {'logged steps' if few else 'means of epochs'},"
        " H while training",
    )
    return write_figure(folder.path, "run", figure)


def _is_term(column: str) -> bool:
    """Whether a column before ``lr`` is a weighted term: not H, and none of the unweighted losses of MTO."""
    return layer_of(column) is None and "mto_" not in column and "mask_token_grad_norm" not in column
