"""Heterogeneity under other definitions of similarity and of tokens, side by side with Eq. (2), from the same pass.

H is always the mean row entropy of a softmax of similarities between masked and visible tokens; what changes is the
similarity and what is done to the tokens before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from mto_analysis.affinity import TokenSplit, row_entropy
from mto_analysis.models import LayerTokens, MaskedImageModel

#: Cosines lie between -1 and 1; divided by this, a softmax can tell them apart.
COSINE_TEMPERATURE = 0.1

Similarity = Literal["dot", "scaled_dot", "cosine", "centred_cosine"]
TokenForm = Literal["raw", "layer_norm", "matched_each", "matched_kind"]


@dataclass(frozen=True)
class Definition:
    """One way to define heterogeneity.

    Args:
        similarity: ``dot``; ``scaled_dot``, divided by the square root of the width; ``cosine``; ``centred_cosine``, of
            tokens minus the mean token of their image.
        tokens: ``raw``; ``layer_norm``, each centred and scaled over its channels, without learned factors;
            ``matched_each``, each rescaled to the mean norm that its kind (masked, visible) has at layer depth 0 of the
            image; ``matched_kind``, all tokens of a kind times one factor that gives the kind that mean norm.
    """

    similarity: Similarity
    tokens: TokenForm

    @property
    def name(self) -> str:
        """As in the column ``definition``: ``dot``, ``cosine_layer_norm`` ..."""
        return self.similarity if self.tokens == "raw" else f"{self.similarity}_{self.tokens}"

    @property
    def temperature(self) -> str:
        """What similarities are divided by before the softmax."""
        if self.similarity == "dot":
            return "1"
        return "sqrt(dim)" if self.similarity == "scaled_dot" else f"{COSINE_TEMPERATURE:g}"

    @property
    def centring(self) -> str:
        """What is taken off the tokens."""
        over = "channel mean of each token" if self.tokens == "layer_norm" else ""
        return (
            "; ".join(filter(None, (over, "mean token of the image" if "centred" in self.similarity else ""))) or "none"
        )


#: Eq. (2) first. A cosine does not see norms, so there are none of tokens whose norms are matched.
DEFINITIONS = (
    *(Definition(similarity, "raw") for similarity in ("dot", "scaled_dot", "cosine", "centred_cosine")),
    *(Definition(similarity, "layer_norm") for similarity in ("dot", "scaled_dot", "cosine", "centred_cosine")),
    *(Definition(similarity, "matched_each") for similarity in ("dot", "scaled_dot")),
    *(Definition(similarity, "matched_kind") for similarity in ("dot", "scaled_dot")),
)


class DefinitionMeasure:
    """All definitions at every layer depth, as a layer measure of a probe.

    Columns are the definitions' names, and for models whose position embedding can be taken off, the same with
    ``_without_position``. These hold at layer depth 0 only: after a block positions cannot be told apart, and the
    columns repeat those with position.

    Args:
        model: Whose position embedding is taken off.
    """

    SUFFIX = "_without_position"

    def __init__(self, model: MaskedImageModel) -> None:
        self._positions = {stack: model.position_embedding(stack) for stack in model.stacks}
        self._norms = torch.empty(0)
        self._norms_without = torch.empty(0)

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """H of each image under every definition."""
        position = self._positions[stack]
        if layer.depth == 0:
            self._norms = _mean_norms(layer.tokens, split)
        found = _measured(layer.tokens, split, self._norms)
        if position is None:
            return found
        plain = found
        if layer.depth == 0:
            tokens = layer.tokens - position
            plain = _measured(tokens, split, _mean_norms(tokens, split))
        return {**found, **{name + self.SUFFIX: value for name, value in plain.items()}}


def _mean_norms(tokens: Tensor, split: TokenSplit) -> Tensor:
    """Mean norm of masked and of visible tokens: ``batch 2``."""

    def means(x: Tensor, num_masked: int) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1)
        return torch.stack([norms[:, :num_masked].mean(dim=1), norms[:, num_masked:].mean(dim=1)], dim=1)

    return split.map(tokens, means)


def _measured(tokens: Tensor, split: TokenSplit, norms: Tensor) -> dict[str, Tensor]:
    table = split.map(tokens, _all_definitions, norms)
    return dict(zip((each.name for each in DEFINITIONS), table.unbind(dim=-1), strict=True))


def _all_definitions(x: Tensor, num_masked: int, norms: Tensor) -> Tensor:
    """H in the order of ``DEFINITIONS``: ``some len(DEFINITIONS)``."""
    return torch.stack([row_entropy(z).mean(dim=1) for z in _logits(x, num_masked, norms)], dim=-1)


def _logits(x: Tensor, num_masked: int, norms: Tensor) -> Iterator[Tensor]:
    root = x.shape[-1] ** 0.5
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
    masked_lengths, visible_lengths = lengths[:, :num_masked], lengths[:, num_masked:]

    def across(tokens: Tensor) -> Tensor:
        return tokens[:, :num_masked] @ tokens[:, num_masked:].mT

    def of_directions(tokens: Tensor) -> Tensor:
        return across(normalize(tokens, dim=-1))

    dots = across(x)
    cosines = dots / masked_lengths / visible_lengths.mT
    yield from (dots, dots / root, cosines / COSINE_TEMPERATURE)
    yield of_directions(x - x.mean(dim=1, keepdim=True)) / COSINE_TEMPERATURE

    normed = layer_norm(x, x.shape[-1:])
    normed_dots = across(normed)
    yield from (normed_dots, normed_dots / root)
    # All layer-normalized tokens have the norm sqrt(dim).
    yield normed_dots / (root**2 * COSINE_TEMPERATURE)
    yield of_directions(normed - normed.mean(dim=1, keepdim=True)) / COSINE_TEMPERATURE

    target = norms.prod(dim=1)[:, None, None]
    each = cosines * target
    yield from (each, each / root)
    kind = dots * (target / (masked_lengths.mean(dim=1, keepdim=True) * visible_lengths.mean(dim=1, keepdim=True)))
    yield from (kind, kind / root)
