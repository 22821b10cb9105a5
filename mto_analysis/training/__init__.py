"""Pre-training of MAE, SimMIM, BootMAE and ConMIM: recipes, methods with their losses, and the engine."""

from mto_analysis.mto import (
    MTO,
    CollapseWarning,
    MTOConfig,
    MTOTerms,
    StackSpec,
    Watch,
    attach_mto,
    embedding_loss,
    mto_loss,
    ranking_loss,
    sparsity_loss,
    watch_mto,
)
from mto_analysis.training.methods import Method, build_method, learning_rate
from mto_analysis.training.methods.method import parameter_groups, peak_learning_rate
from mto_analysis.training.planning import Plan, plan
from mto_analysis.training.pretraining import pretrain
from mto_analysis.training.recipes import Recipe, load_recipe, recipe_names
from mto_analysis.training.settings import EpochRecord, RunSettings, StepRecord, mto_config
from mto_analysis.training.state import RunFolder

__all__ = [
    "MTO",
    "CollapseWarning",
    "EpochRecord",
    "MTOConfig",
    "MTOTerms",
    "Method",
    "Plan",
    "Recipe",
    "RunFolder",
    "RunSettings",
    "StackSpec",
    "StepRecord",
    "Watch",
    "attach_mto",
    "build_method",
    "embedding_loss",
    "learning_rate",
    "load_recipe",
    "mto_config",
    "mto_loss",
    "parameter_groups",
    "peak_learning_rate",
    "plan",
    "pretrain",
    "ranking_loss",
    "recipe_names",
    "sparsity_loss",
    "watch_mto",
]
