"""What a method trains and minimises: its student, its loss terms (in the place of Eq. 1) and its slow branch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mto_analysis.models import MaskedImageModel, ModelInfo
from mto_analysis.models.initialization import initialize
from mto_analysis.training.recipes import Recipe

__all__ = ["Method", "build_method", "build_student"]


class Method(nn.Module, ABC):
    """A pre-training method.

    Args:
        student: The model that is trained.
        recipe: Settings.
    """

    #: Whether an image's loss depends on those beside it (batch norms): then micro-batches do not average exactly.
    depends_on_batch: ClassVar[bool] = False

    def __init__(self, student: MaskedImageModel, recipe: Recipe) -> None:
        super().__init__()
        #: What is trained, saved and probed, and what ``attach_mto`` is attached to.
        self.student = student
        self.recipe = recipe
        #: Fraction of the run's optimizer steps that are done.
        self.progress = 0.0

    @abstractmethod
    def forward(self, images: Tensor, mask: Tensor, second_images: Tensor | None = None) -> dict[str, Tensor]:
        """The weighted terms of the loss, by name; their sum is the model's own loss, a mean over images.

        Shapes:
            images: batch channels height width
            mask: batch num_patches
            second_images: batch channels height width (of methods with ``second_view``)
            returns: scalars
        """

    def after_step(self, progress: float) -> None:
        """Follow the student after an optimizer step.

        Args:
            progress: Fraction of the run's optimizer steps that are done, this one counted: the first call of a run of
                100 steps gets 0.01, the last one 1.
        """
        self.progress = progress

    def teacher_state(self) -> dict[str, Tensor] | None:
        """The slow branch's weights in the original's layout, for methods that have one."""
        return None

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run needs beside tensors."""
        return {"progress": self.progress}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The opposite of :meth:`get_extra_state`."""
        self.progress = float(state["progress"])


def build_student(recipe: Recipe, *, seed: int) -> MaskedImageModel:
    """The model of a recipe with the weights that its method starts from, ready to be trained.

    Args:
        recipe: Settings.
        seed: Of the weights; the global random state stays as it is.
    """
    from mto_analysis.models import MAE, BootMAE, ConMIM, SimMIM
    from mto_analysis.models.adapting import fix_key_biases, set_drop_path

    families: dict[str, tuple[str, type[MaskedImageModel]]] = {
        "mae": ("mae", MAE),
        "simmim": ("simmim_vit", SimMIM),
        "bootmae": ("bootmae", BootMAE),
        "conmim": ("conmim", ConMIM),
    }
    family, make = families[recipe.method]
    info = ModelInfo(
        family=family,
        style="inpainting" if recipe.method in ("simmim", "conmim") else "decoder",
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        mask_rule=recipe.mask_rule,
        mean=recipe.mean,
        std=recipe.std,
        target=recipe.target,
        criterion={"mae": "l2", "simmim": "l1", "bootmae": "l2"}.get(recipe.method),  # type: ignore[arg-type]
        mask_rule_source=f"recipe {recipe.name}",
    )
    with torch.random.fork_rng(devices=[]):  # PyTorch's layers draw weights when they are made
        model = make(recipe.model_config(), info)
    initialize(model, seed)
    if recipe.method != "mae":
        fix_key_biases(model)
    if recipe.drop_path:
        set_drop_path(model, recipe.drop_path)
    return model


def build_method(recipe: Recipe, *, seed: int) -> Method:
    """The method of a recipe, on the CPU, in training mode, before its first step.

    Args:
        recipe: Settings.
        seed: Of the weights; the global random state stays as it is.

    Example:
        >>> from mto_analysis.training import load_recipe
        >>> method = build_method(load_recipe("mae_cifar10"), seed=0)
        >>> images = torch.zeros(1, 3, 32, 32)
        >>> list(method(images, torch.arange(64)[None] >= 16))
        ['pixels']
    """
    from mto_analysis.training.methods.bootmae import BootMAEMethod
    from mto_analysis.training.methods.conmim import ConMIMMethod
    from mto_analysis.training.methods.mae import MAEMethod
    from mto_analysis.training.methods.simmim import SimMIMMethod

    methods: dict[str, Callable[[Any, Recipe], Method]] = {
        "mae": MAEMethod,
        "simmim": SimMIMMethod,
        "bootmae": BootMAEMethod,
        "conmim": ConMIMMethod,
    }
    return methods[recipe.method](build_student(recipe, seed=seed), recipe).train()
