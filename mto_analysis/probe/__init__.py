"""One pass of a model over images: the tokens of every layer depth reduced to a few numbers per image."""

from mto_analysis.probe.engine import (
    LayerMeasure,
    MaskSource,
    Measure,
    ProbeResult,
    masks_from_file,
    masks_from_rule,
    mean_and_interval,
    probe,
    undisturbed,
)

__all__ = [
    "LayerMeasure",
    "MaskSource",
    "Measure",
    "ProbeResult",
    "masks_from_file",
    "masks_from_rule",
    "mean_and_interval",
    "probe",
    "undisturbed",
]
