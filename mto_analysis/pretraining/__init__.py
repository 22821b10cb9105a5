"""Pre-training of MAE, SimMIM, BootMAE and ConMIM: recipes, methods with their losses, optimisation."""

from mto_analysis.pretraining.methods import Method, build_method
from mto_analysis.pretraining.optimization import learning_rate, parameter_groups, peak_learning_rate
from mto_analysis.pretraining.recipes import Recipe, load_recipe, recipe_names

__all__ = [
    "Method",
    "Recipe",
    "build_method",
    "learning_rate",
    "load_recipe",
    "parameter_groups",
    "peak_learning_rate",
    "recipe_names",
]
