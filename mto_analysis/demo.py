"""The bundled small models and images: what ``mto-analyze demo`` measures, offline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mto_analysis.images import ImageBatch, image_batches, open_images
from mto_analysis.masks import load_masks
from mto_analysis.models import ModelInfo

if TYPE_CHECKING:
    import pandas as pd

    from mto_analysis.probe.quadrants import AffinityMap

_ASSETS = Path(__file__).parent / "assets"

#: MAE and SimMIM, trained for about ten epochs on CIFAR-10 with the original code; early means 2 % of that.
DEMO_CHECKPOINTS = {
    "MAE": _ASSETS / "mae_cifar10_final.safetensors",
    "MAE, early": _ASSETS / "mae_cifar10_early.safetensors",
    "SimMIM": _ASSETS / "simmim_cifar10_final.safetensors",
    "SimMIM, early": _ASSETS / "simmim_cifar10_early.safetensors",
}
#: 256 CIFAR-10 test images.
DEMO_IMAGES = _ASSETS / "cifar10_test_256.parquet"
#: One mask per image for each method.
DEMO_MASKS = {"MAE": _ASSETS / "masks_mae.npz", "SimMIM": _ASSETS / "masks_simmim.npz"}


def demo_batches(info: ModelInfo, *, limit: int | None = None, batch_size: int = 64) -> Iterator[ImageBatch]:
    """The bundled images, preprocessed for a model.

    Args:
        info: Of the model.
        limit: Number of images; all 256 by default.
        batch_size: Images in a batch.
    """
    return image_batches(open_images(DEMO_IMAGES), info, limit=limit, batch_size=batch_size)


@dataclass(frozen=True)
class DemoTables:
    """Rows of ``heterogeneity.csv`` for Fig. 1(a), final models, and Fig. 1(b), early against final; Fig. 2.

    Fig. 2 is ``quadrants.csv`` of the final models, and their mean maps.
    """

    fig1a: pd.DataFrame
    fig1b: pd.DataFrame
    fig2: pd.DataFrame
    maps: dict[str, list[AffinityMap]]
    models: list[dict[str, Any]]


def measure_demo(*, limit: int | None = None, say: Callable[[str], None] = lambda message: None) -> DemoTables:
    """Measure the bundled models on the bundled images and masks."""
    import pandas as pd

    from mto_analysis.probe.maps import MapRecorders, quadrant_table
    from mto_analysis.probe.request import Request, Settings
    from mto_analysis.probe.study import measure_checkpoints
    from mto_analysis.runtime.listener import Listener

    recorders = MapRecorders()
    tables, quadrants, models = [], [], []
    for method, masks in DEMO_MASKS.items():
        labels = [label for label in DEMO_CHECKPOINTS if label.startswith(method)]
        settings = Settings(limit=limit, masks=load_masks(masks), batch_size=64)
        sources = [DEMO_CHECKPOINTS[label] for label in labels]
        # Early checkpoints are hardly trained on purpose, of which a warning would be no news.
        listener = Listener(say, lambda words: None if "early: " in words else say(words))
        request = Request(sources, open_images(DEMO_IMAGES), settings, labels, listener=listener)
        study = measure_checkpoints(request, watch=recorders.watch)
        tables.append(study.table)
        quadrants.append(quadrant_table(study.measured))
        models += study.models
    table = pd.concat(tables, ignore_index=True)
    early = table["model"].str.endswith("early")
    fig2 = pd.concat(quadrants, ignore_index=True)
    return DemoTables(
        fig1a=table[~early].reset_index(drop=True),
        fig1b=table,
        fig2=fig2[~fig2["model"].str.endswith("early")].reset_index(drop=True),
        maps={label: maps for label, maps in recorders.maps.items() if not label.endswith("early")},
        models=models,
    )


def demo_sentences(tables: DemoTables) -> list[str]:
    """What the demo's numbers show, in three sentences: the models, the effect of training, and what H does not show.

    Percentages are of the maximum of H, the logarithm of the number of visible patches. ``exp(H)`` is the number of
    visible tokens that an even affinity would be spread over.
    """
    curves = {str(model): curve for model, curve in tables.fig1b.groupby("model", sort=False)}
    share = {model: (100 * curve["normalized"]).tolist() for model, curve in curves.items()}
    spread = {
        model: f"{math.exp(curve['heterogeneity'].iloc[-1]):.1f} of {curve['num_visible'].iloc[-1]:.0f}"
        for model, curve in curves.items()
    }
    mae, early, simmim, simmim_early = (share[label] for label in DEMO_CHECKPOINTS)
    falls = early[-1] < early[0]
    return [
        f"After the last block the affinity of a masked token is spread over effectively {spread['MAE']} visible "
        f"tokens in MAE (H at {mae[-1]:.1f} % of its maximum) and over {spread['SimMIM']} in SimMIM "
        f"({simmim[-1]:.1f} %).",
        f"Training changed H there by {mae[-1] - early[-1]:+.1f} points in MAE (from {early[-1]:.1f} % at the early "
        f"checkpoint) and by {simmim[-1] - simmim_early[-1]:+.1f} in SimMIM (from {simmim_early[-1]:.1f} %).",
        f"MAE's early checkpoint, at 2 % of training, goes from {early[0]:.1f} % to {early[-1]:.1f} % over layer "
        "depth: "
        + (
            "a falling curve alone does not show that a model has converged."
            if falls
            else "on these images its curve does not fall."
        ),
    ]
