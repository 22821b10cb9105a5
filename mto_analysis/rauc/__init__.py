"""From accuracy logs to RAUC, Eq. (6), with intervals."""

from mto_analysis.rauc.areas import (
    LARGEST_NUMBER,
    LARGEST_RATIO,
    Points,
    Ratio,
    area,
    area_difference,
    crossings,
    curve_points,
    epochs_to_score,
    final_gap,
    monotone_bounds,
    ratio_of_areas,
    rauc,
    reference_for,
    score_at,
    share_saved,
)

__all__ = [
    "LARGEST_NUMBER",
    "LARGEST_RATIO",
    "Points",
    "Ratio",
    "area",
    "area_difference",
    "crossings",
    "curve_points",
    "epochs_to_score",
    "final_gap",
    "monotone_bounds",
    "ratio_of_areas",
    "rauc",
    "reference_for",
    "score_at",
    "share_saved",
]
