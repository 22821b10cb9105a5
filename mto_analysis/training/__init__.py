"""Pre-training of MAE, SimMIM, BootMAE and ConMIM: recipes, methods with their losses, and the engine."""

from mto_analysis import mto
from mto_analysis.mto import *
from mto_analysis.training.methods import Method, build_method, learning_rate
from mto_analysis.training.methods.method import parameter_groups, peak_learning_rate
from mto_analysis.training.planning import Plan, plan
from mto_analysis.training.pretraining import pretrain
from mto_analysis.training.recipes import Recipe, load_recipe, recipe_names
from mto_analysis.training.settings import EpochRecord, RunSettings, StepRecord, mto_config
from mto_analysis.training.state import RunFolder

#: Those of the modules: each name is listed once, where it is defined.
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
__all__ += mto.__all__
