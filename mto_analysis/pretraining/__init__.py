"""Pre-training of MAE, SimMIM, BootMAE and ConMIM: recipes, methods with their losses, and the engine."""

from mto_analysis.pretraining.loop import pretrain
from mto_analysis.pretraining.methods import Method, build_method
from mto_analysis.pretraining.optimization import learning_rate, parameter_groups, peak_learning_rate
from mto_analysis.pretraining.planning import Plan, plan
from mto_analysis.pretraining.recipes import Recipe, load_recipe, recipe_names
from mto_analysis.pretraining.settings import EpochRecord, RunSettings, StepRecord, mto_config
from mto_analysis.pretraining.state import RunFolder

__all__ = [
    "EpochRecord",
    "Method",
    "Plan",
    "Recipe",
    "RunFolder",
    "RunSettings",
    "StepRecord",
    "build_method",
    "learning_rate",
    "load_recipe",
    "mto_config",
    "parameter_groups",
    "peak_learning_rate",
    "plan",
    "pretrain",
    "recipe_names",
]
