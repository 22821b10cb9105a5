"""A model that a function of the user's own code makes, in place of a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Self

from torch import Tensor, nn

from mto_analysis.checkpoints import RawCheckpoint, open_checkpoint
from mto_analysis.errors import CheckpointError
from mto_analysis.models import MaskedImageModel
from mto_analysis.models.live import LiveModel, inferred_info


class LiveSource(str):
    """``package.module:factory``, a function without arguments that returns a model, and the file of its weights.

    The module is imported and so its code runs. The file is read as any checkpoint, which runs nothing.
    """

    __slots__ = ("weights",)

    weights: Path | None

    def __new__(cls, factory: str, weights: Path | None = None) -> Self:
        """Check the form of the name."""
        module, _, name = factory.partition(":")
        if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"a live model is given as package.module:factory, got {factory!r}")
        self = super().__new__(cls, factory)
        self.weights = weights
        return self

    def open(self) -> RawCheckpoint | None:
        """The file of its weights, if there is one."""
        return None if self.weights is None else open_checkpoint(self.weights)

    def make(self) -> nn.Module:
        """Call the factory."""
        try:
            if (here := str(Path.cwd())) not in sys.path:
                sys.path.insert(0, here)  # as python -m does
            made = resolve_name(self)()
        except Exception as error:
            raise CheckpointError(f"{self} builds no model ({type(error).__name__}: {error})") from error
        if not isinstance(made, nn.Module):
            raise CheckpointError(f"{self} gives a {type(made).__name__}, which is no torch.nn.Module")
        return made

    def load(self, raw: RawCheckpoint | None) -> MaskedImageModel:
        """The model with its weights, in eval mode, its stacks found and verified on two images of noise."""
        model = self.make()
        if raw is not None:
            try:
                model.load_state_dict(_named_as_in(model, raw.tensors))
            except RuntimeError as error:
                first = " ".join(str(error).split())
                raise CheckpointError(f"{raw.path} does not hold the weights of {self}: {first[:300]}") from error
        if isinstance(model, MaskedImageModel):  # one of this package's own, whose layers and pixels are known
            return model.eval()
        live = LiveModel(model.eval(), inferred_info(model), factory=self.make)
        live.verify()
        return live


def _named_as_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the model's names, where all of it is in one part: reading took its prefix for a wrapper's."""
    names = model.state_dict().keys()
    first = next(iter(tensors), "")
    prefixes = ("", *(name.removesuffix(first) for name in names if name.endswith(f".{first}")))
    fitting = next((prefix for prefix in prefixes if {prefix + name for name in tensors} <= names), "")
    return {fitting + name: tensor for name, tensor in tensors.items()}
