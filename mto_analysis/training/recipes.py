"""Recipes by name or file: those of the paper (supplementary Tables 3-6), small ones, and a user's own.

Those that come with the package lie in ``assets/recipes``; each says for every value where it comes from.
"""

from __future__ import annotations

from pathlib import Path

from mto_analysis.errors import RecipeError
from mto_analysis.runtime.settings import bundled_names, open_settings
from mto_analysis.training.methods import METHODS
from mto_analysis.training.methods.recipe import Recipe

__all__ = ["Recipe", "load_recipe", "recipe_names"]


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package.

    Example:
        >>> "mae_cifar10" in recipe_names()
        True
    """
    return bundled_names("recipes")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe that comes with the package, by name, or one of the user's own, by the path of its TOML file.

    Raises:
        RecipeError: If there is none, or its file is not a whole recipe.

    Example:
        >>> load_recipe("mae_vit_base").batch_size
        4096
    """
    reader, _ = open_settings("recipes", name_or_path, error=RecipeError)
    method = reader.raw("method")
    if method not in METHODS:
        raise reader.error(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    kind = METHODS[method].settings_class
    model = reader.table("model").given(kind.model_types())
    return reader.read(kind, method=method, model=model)
