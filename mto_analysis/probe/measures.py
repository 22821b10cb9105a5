"""The registry of measures: each by its name, made anew for every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from mto_analysis.affinity import TokenSplit, heterogeneity
from mto_analysis.models import LayerTokens
from mto_analysis.probe.accumulating import Setup, TokenMeasure
from mto_analysis.probe.attention import Attention
from mto_analysis.probe.frequencies import Frequency
from mto_analysis.probe.separability import Separability
from mto_analysis.probe.similarity import CKA
from mto_analysis.probe.spectra import Cosine, Lidar, Rank, RankMe
from mto_analysis.runtime.plugins import Plugin, plugins

#: A number per image from its tokens ``batch num_patches dim`` at one layer depth.
Measure = Callable[[Tensor, TokenSplit], Tensor]

#: Measures by name, or ``"all"``; or functions by the names of their columns.
Measures = str | Sequence[str] | Mapping[str, Measure]


class Function(TokenMeasure):
    """A function of tokens and their split as a measure.

    Args:
        name: Of its column.
        function: Gives a number per image.
        setup: What is known of the pass.
    """

    def __init__(self, name: str, function: Measure, setup: Setup) -> None:
        super().__init__(setup)
        self.columns = (name,)
        self._function = function

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Of each image."""
        return {self.columns[0]: self._function(layer.tokens, split)}


class PluginFunction(TokenMeasure):
    """A function of another distribution: where it fails, that is a warning which names the distribution, once."""

    tolerant = True

    def __init__(self, plugin: Plugin, setup: Setup) -> None:
        super().__init__(setup)
        self.columns = (plugin.name,)
        self._plugin = plugin
        self._failed = False

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Of each image; NaN where it failed."""
        values = None if self._failed else self._plugin.call(_one_each, self._plugin.value, layer.tokens, split)
        self._failed = values is None
        nothing = torch.full((len(names),), torch.nan, device=layer.tokens.device)
        return {self.columns[0]: nothing if values is None else values}


def _one_each(function: Measure, tokens: Tensor, split: TokenSplit) -> Tensor:
    values = function(tokens, split)
    if not isinstance(values, Tensor) or values.shape != tokens.shape[:1]:
        raise ValueError(f"it must give a tensor of {len(tokens)} numbers, one per image, got {type(values).__name__}")
    return values


#: What each name measures; :func:`known_measures` has those of plugins too.
MEASURES: Mapping[str, Callable[[Setup], TokenMeasure]] = {
    "h": partial(Function, "heterogeneity", heterogeneity),
    "cka": CKA,
    "rank": Rank,
    "rankme": RankMe,
    "lidar": Lidar,
    "attention": Attention,
    "frequency": Frequency,
    "cosine": Cosine,
    "separability": Separability,
}


def known_measures() -> dict[str, Callable[[Setup], TokenMeasure]]:
    """All measures by name: those of this package, and of plugins.

    An entry point of the group ``mto_analysis.measures`` names a function of tokens and
    :class:`~mto_analysis.affinity.TokenSplit` that gives a number per image; its name becomes the measure's.
    """
    added = {each.name: partial(PluginFunction, each) for each in plugins("measures") if each.name not in MEASURES}
    return {**MEASURES, **added}


def names_of(measures: str | Sequence[str]) -> tuple[str, ...]:
    """Names of measures in the order of the registry, H among them; ``"all"`` are all, without those after a minus.

    Args:
        measures: Names, or in one text with commas between.

    Example:
        >>> names_of("cka, rank"), names_of(["h"])
        (('h', 'cka', 'rank'), ('h',))
        >>> "cka" in names_of("all,-cka")
        False
    """
    asked, known = _asked(measures), known_measures()
    if unknown := [name for name in asked if name.removeprefix("-") not in known and name != "all"]:
        raise ValueError(f"measures are {', '.join(known)}, or all; got {', '.join(map(repr, unknown))}")
    if (less := [name for name in asked if name.startswith("-")]) and "all" not in asked:
        raise ValueError(f"{less[0]} leaves a measure out of all; say all,{less[0]}")
    wanted = [name for name in known if f"-{name}" not in asked and (name in asked or "all" in asked)]
    return tuple(name for name in known if name == "h" or name in wanted)


def _asked(measures: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in measures.split(",")] if isinstance(measures, str) else list(measures)


@contextmanager
def measuring(measures: Measures, setup: Setup, given: Sequence[object] = ()) -> Iterator[list[TokenMeasure]]:
    """Measures for one pass, watching the model inside; none of a class that the pass is given an object of already.

    With ``"all"``, those that the model does not allow are left out and say why in ``left_out``; those that were named
    raise.
    """
    if isinstance(measures, Mapping):
        made: list[TokenMeasure] = [Function(name, function, setup) for name, function in measures.items()]
    else:
        setup.strict = "all" not in _asked(measures)
        known = known_measures()
        there = set(map(type, given))
        made = [known[name](setup) for name in names_of(measures) if known[name] not in there]
    with ExitStack() as watched:
        watched.callback(setup.release)
        for each in made:
            watched.enter_context(each.watching())
        yield made
