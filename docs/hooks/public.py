"""The public names, by page of the reference; everything else of the package is internal."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache

#: Names of ``mto_analysis.rauc`` and ``mto_analysis.training`` that a page shows; the others serve the commands.
RAUC = ("Ratio", "final_gap", "rauc", "share_saved")
TRAINING = ("Method", "Recipe", "build_method", "load_recipe", "pretrain", "recipe_names")


@dataclass(frozen=True)
class Page:
    """A page of the reference: names of one package."""

    title: str
    package: str
    summary: str
    chosen: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The page's place on the site."""
        return f"reference/{self.title.lower().replace(' ', '-')}.md"

    def names(self, *, types: bool = False) -> dict[str, str]:
        """Each function with the path at which it is defined; or each type, errors last.

        Args:
            types: Those that functions take, return and raise, which have a page of their own.
        """
        package = importlib.import_module(self.package)
        values = {name: getattr(package, name) for name in self.chosen or package.__all__}
        wanted = [name for name, value in values.items() if isinstance(value, type) == types]
        ordered = sorted(wanted, key=lambda name: (types and issubclass(values[name], Exception), name.lower()))
        return {name: f"{values[name].__module__}.{values[name].__qualname__}" for name in ordered}


PAGES = (
    Page("Measuring", "mto_analysis", "Checkpoints, images, masks, and heterogeneity layer by layer."),
    Page(
        "Masked token optimization", "mto_analysis.mto", "The losses (Eqs. 3-5), as functions or attached to a model."
    ),
    Page("RAUC", "mto_analysis.rauc", "The ratio of areas under two learning curves (Eq. 6).", RAUC),
    Page("Pre-training", "mto_analysis.training", "Recipes, methods and the training loop.", TRAINING),
)


@cache
def public_paths() -> frozenset[str]:
    """The full paths of all public names."""
    return frozenset(path for page in PAGES for types in (False, True) for path in page.names(types=types).values())
