"""The weights of a checkpoint to begin with: what does not fit is refused, and what is new is listed."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mto_analysis.checkpoints import load_checkpoint, open_checkpoint
from mto_analysis.checkpoints.conversion import StateDict, check_finite, some_names
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.errors import CheckpointError, HeadCountError, OptionNeededError
from mto_analysis.models import MaskedImageModel

#: Of a config, but held by tensors of the checkpoint or by other parts of the model than those that are read.
_NO_ARCHITECTURE = ("layer_scale", "feature_dim")


class InitialWeights:
    """The weights of a checkpoint, for a model of the same architecture.

    Attributes:
        notes: What a user should know after :meth:`give_to`, one line each.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = source
        self._raw: RawCheckpoint = open_checkpoint(source)
        self.notes: list[str] = []

    def give_to(self, model: MaskedImageModel) -> None:
        """Put the weights into a model, whose others stay as they are."""
        own, tensors = model.state_dict(), self._tensors(model)
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        odd = [
            f"{name} is {'x'.join(map(str, tensor.shape))} and not {'x'.join(map(str, shapes[name]))}"
            if name in shapes
            else f"{name} has no place"
            for name, tensor in tensors.items()
            if tuple(tensor.shape) != shapes.get(name)
        ]
        if odd:
            raise CheckpointError(f"{self.source} is not of the recipe's architecture: {some_names(odd)}")
        try:
            check_finite(StateDict(tensors))
        except CheckpointError as error:
            raise CheckpointError(f"{self.source}: {error}") from error
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        new = [name for name in own if name not in tensors]
        listed = f"{len(tensors)} of {len(own)} tensors; new: {some_names(new) or 'none'}"
        self.notes.insert(0, f"weights from {self.source}: {listed}")

    def _tensors(self, model: MaskedImageModel) -> dict[str, Tensor]:
        """The checkpoint's tensors by the model's names."""
        raw, names = self._raw.tensors, model.state_dict().keys()
        try:
            loaded = self._loaded(model)
        except CheckpointError:
            if not raw.keys() <= names:
                raise
            self.notes.append(
                f"{self.source} is no whole model that can be read: its tensors are taken by their names, and the "
                "attention heads are those of the recipe"
            )
            return raw
        self._compare(loaded, model)
        found = dict(loaded.state_dict())
        # Heads that only training uses are left out where a model is read to be measured.
        return found | {name: raw[name] for name in names if name not in found and name in raw}

    def _loaded(self, model: MaskedImageModel) -> MaskedImageModel:
        config: Any = model.config
        given: dict[str, Any] = {}
        while True:
            try:
                return load_checkpoint(self._raw, **given)
            except HeadCountError as error:
                if error.option in given:
                    raise
                self.notes.append(f"{self.source} does not hold its attention heads: those of the recipe are taken")
                given |= {name: getattr(config, name, None) for name in ("num_heads", "decoder_num_heads")}
            except OptionNeededError as error:
                if error.option != "mask_ratio" or error.option in given:
                    raise
                given["mask_ratio"] = model.info.mask_rule.ratio  # of no effect on the weights

    def _compare(self, loaded: MaskedImageModel, model: MaskedImageModel) -> None:
        """Whether both are of one architecture, also where no shape tells."""
        if not isinstance(model, type(loaded)):
            raise CheckpointError(
                f"{self.source} holds a {loaded.info.family}, and the recipe trains a {model.info.family}"
            )
        theirs, ours = loaded.config, model.config
        names = [each.name for each in fields(theirs) if each.name not in _NO_ARCHITECTURE]
        differ = [
            f"{name} is {getattr(theirs, name)} and not {getattr(ours, name)}"
            for name in names
            if hasattr(ours, name) and getattr(theirs, name) != getattr(ours, name)
        ]
        if differ:
            raise CheckpointError(f"{self.source} is not of the recipe's architecture: {some_names(differ)}")
        for name in ("mean", "std"):
            before, now = getattr(loaded.info, name), getattr(model.info, name)
            if tuple(before) != tuple(now):
                self.notes.append(
                    f"{self.source} was trained with {name} {_numbers(before)}, the recipe has {_numbers(now)}"
                )


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
