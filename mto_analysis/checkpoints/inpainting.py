"""What the converters to :class:`InpaintingViT` share: names of the BEiT code base, the architecture, mask rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mto_analysis.checkpoints.conversion import ENCODER_HEADS, Conversion, Given, StateDict, block_numbers
from mto_analysis.checkpoints.metadata import flag, whole
from mto_analysis.checkpoints.positions import Grid, fit_positions, fit_relative_positions
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import InpaintingConfig, InpaintingViT, ModelInfo
from mto_analysis.models.interface import ImageSize
from mto_analysis.runtime.pixels import HALF, IMAGENET

_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"
# The published ViT-B masks 2 x 2 patches at once (32 px of 16 px patches); files of other sizes that do not say follow.
_UNIT_IN_PATCHES = 2
# Published for 14 x 14 patches.
_PUBLISHED_PATCHES = 196
# Patches of the smallest rectangle of BEiT's masks.
_MIN_BLOCK = 16


def rename_beit(state: StateDict) -> None:
    """From names of the BEiT code base (after its prefix is gone) to ours.

    Where blocks share a table and have their own, both are added to the logits: the shared one is added to theirs.
    """
    own = [name for name in state.tensors if re.fullmatch(rf"blocks\.\d+\.attn\.{_TABLE}", name)]
    if own and f"rel_pos_bias.{_TABLE}" in state.tensors:
        shared = state.tensors[f"rel_pos_bias.{_TABLE}"].float()
        for name in own:
            if state.tensors[name].shape != shared.shape:
                raise CheckpointError(f"{state.origin[name]} and the table that all blocks share differ in shape")
            state.tensors[name] = state.tensors[name].float() + shared
        state.drop(r"rel_pos_bias\..*")
    state.rename(
        (rf"^rel_pos_bias\.({_TABLE}|{_INDEX})$", r"position_biases.0.\1"),
        (rf"^blocks\.(\d+)\.attn\.({_TABLE}|{_INDEX})$", r"position_biases.\1.\2"),
        (r"\.gamma_([12])$", r".ls\1.gamma"),
    )
    state.fuse_qkv()


@dataclass(frozen=True)
class Encoder:
    """An encoder with masked tokens inside, as a file describes it.

    Args:
        state: Tensors under the model's names.
        model: Its architecture.
        notes: What had to be assumed, as printed.
        rule: How it was masked, and where that comes from.
        statistics: Means and standard deviations of its images.
    """

    state: StateDict
    model: InpaintingConfig
    notes: tuple[str, ...] = ()
    rule: tuple[MaskRule, str] | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET

    def published(
        self, rule: tuple[MaskRule, str], statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    ) -> Encoder:
        """With the mask rule and statistics of a published model."""
        return replace(self, rule=rule, statistics=statistics)

    def trained_with(
        self, settings: Mapping[str, Any], *, own: tuple[tuple[float, ...], tuple[float, ...]] = HALF
    ) -> Encoder:
        """With what the arguments of a training script of the BEiT code base say instead.

        Args:
            settings: The arguments.
            own: The statistics that the script uses unless it is told to use ImageNet's.
        """
        changed, total = self, num_patches(self.model)
        if (imagenet := flag(settings, "imagenet_default_mean_and_std")) is not None:
            changed = replace(changed, statistics=IMAGENET if imagenet else own)
        masked = whole(settings, "num_mask_patches")
        if masked is not None and masked < total:
            least = whole(settings, "min_mask_patches_per_block") or _MIN_BLOCK
            changed = replace(
                changed, rule=(MaskRule("blockwise", masked / total, self.model.patch_size, least), "file")
            )
        return changed

    def conversion(self, family: str) -> Conversion:
        """An :class:`InpaintingViT` that predicts no pixels."""
        if self.rule is None:
            raise CheckpointError("its mask rule is not known")
        info = ModelInfo(
            family=family,
            style="inpainting",
            image_size=self.model.image_size,
            patch_size=self.model.patch_size,
            mask_rule=self.rule[0],
            mean=self.statistics[0],
            std=self.statistics[1],
            target="features",
            mask_rule_source=self.rule[1],
            assumptions=self.notes,
        )
        return Conversion(InpaintingViT, self.model, info, self.state)


def read_encoder(
    state: StateDict,
    given: Given,
    *,
    stated: object = None,
    image_size: ImageSize | None = None,
    published: Mapping[int, int] = ENCODER_HEADS,
    eps: float = 1e-6,
    overshoot: float = 0.0,
    mlp_dim: int | None = None,
) -> Encoder:
    """The encoder, its architecture from shapes under our names.

    Args:
        state: Tensors under the model's names.
        given: Given by the user.
        stated: Number of heads that a config states, where no table does.
        image_size: That a config states.
        published: Heads by width.
        eps: Of the layer norms.
        overshoot: Of resized positions.
        mlp_dim: Width of the hidden layers, where no ``fc1`` tells.
    """
    dim, channels, patch_size, _ = state.shape("patch_embed.proj.weight", 4)
    table = f"position_biases.0.{_TABLE}"
    bias: Literal["shared", "per_block"] | None = None
    if table in state.tensors:
        stated = state.shape(table, 2)[1]
        index = f"position_biases.0.{_INDEX}"
        grid = fit_relative_positions(state, given, table, index=index, patch_size=patch_size, stated=image_size)
        image_size = grid.image_size
        # The table of one block has that block's number in its name, a shared one has none.
        bias = "per_block" if re.search(r"\.\d+\.", state.origin[table]) else "shared"
        state.drop(rf"position_biases\.\d+\.{_INDEX}")
    if "pos_embed" in state.tensors:
        grid = fit_positions(state, given, "pos_embed", patch_size=patch_size, stated=image_size, overshoot=overshoot)
    elif bias is None:
        if (size := given.image_size or image_size) is None:
            raise CheckpointError("nothing in the file tells the image size; give --image-size")
        grid = Grid.of(size, patch_size)
    config = InpaintingConfig(
        image_size=grid.image_size,
        patch_size=patch_size,
        channels=channels,
        dim=dim,
        depth=block_numbers(state.tensors, "blocks."),
        num_heads=given.choose("num_heads", dim, stated=stated, published=published),
        mlp_dim=mlp_dim or state.shape("blocks.0.mlp.fc1.weight", 2)[0],
        layer_scale=0.1 if "blocks.0.ls1.gamma" in state.tensors else None,
        position_bias=bias,
        absolute_positions="pos_embed" in state.tensors,
        final_norm="norm.weight" in state.tensors,
        eps=eps,
    )
    return Encoder(state, config, grid.notes)


def num_patches(model: InpaintingConfig) -> int:
    """Patches of an image."""
    return Grid.of(model.image_size, model.patch_size).num_patches


def block_rule(ratio: float, published: str, model: InpaintingConfig) -> tuple[MaskRule, str]:
    """Square units of 32 px, and where that comes from; for other sizes than the published one 2 x 2 patches."""
    if any(side % _UNIT_IN_PATCHES for side in Grid.of(model.image_size, model.patch_size).sides):
        return MaskRule("block", ratio, model.patch_size), f"rule: the ratio of the published {published}"
    rule = MaskRule("block", ratio, _UNIT_IN_PATCHES * model.patch_size)
    if (model.image_size, model.patch_size) == (224, 16):
        return rule, f"published {published}"
    return rule, f"rule: units of 2 x 2 patches, as in the published {published}"


def blockwise_rule(
    num_masked: int,
    published: str,
    model: InpaintingConfig,
    *,
    of: int = _PUBLISHED_PATCHES,
    min_block: int = _MIN_BLOCK,
) -> tuple[MaskRule, str]:
    """BEiT's blockwise mask of ``num_masked`` of ``of`` patches, and where that comes from; in proportion elsewhere."""
    rule = MaskRule("blockwise", num_masked / of, model.patch_size, min_block)
    if num_patches(model) == of:
        return rule, f"published {published}"
    return rule, f"rule: the fraction of patches of the published {published}"
