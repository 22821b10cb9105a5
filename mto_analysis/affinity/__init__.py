"""Eq. (2), affinity matrices and their quadrants: tensors in, tensors out."""

from mto_analysis.affinity.matrix import (
    Quadrants,
    affinity_matrix,
    entropy_from_sums,
    heterogeneity,
    quadrant_mass,
    row_entropy,
    split_quadrants,
)
from mto_analysis.affinity.split import TokenSplit, masked_first_order

__all__ = [
    "Quadrants",
    "TokenSplit",
    "affinity_matrix",
    "entropy_from_sums",
    "heterogeneity",
    "masked_first_order",
    "quadrant_mass",
    "row_entropy",
    "split_quadrants",
]
