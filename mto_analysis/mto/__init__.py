"""Masked token optimization: the paper's three losses, attached to anyone's training code."""

from mto_analysis.mto.attach import MTO, attach_mto
from mto_analysis.mto.collapse import CollapseWarning
from mto_analysis.mto.losses import MTOConfig, MTOTerms, embedding_loss, mto_loss, ranking_loss, sparsity_loss
from mto_analysis.mto.watch import Watch, watch_mto
from mto_analysis.taps.stacks import StackSpec

__all__ = [
    "MTO",
    "CollapseWarning",
    "MTOConfig",
    "MTOTerms",
    "StackSpec",
    "Watch",
    "attach_mto",
    "embedding_loss",
    "mto_loss",
    "ranking_loss",
    "sparsity_loss",
    "watch_mto",
]
