"""What the converters to :class:`SimMIMSwin` share: names, the architecture from shapes, the image size."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import torch

from mto_analysis.checkpoints.conversion import Conversion, Heads, StateDict, block_numbers, square_side
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import ModelInfo, SimMIMSwin, SwinConfig
from mto_analysis.models.windows import window_coordinates

PixelTarget = Literal["pixels", "locally_normalized_pixels"]
__all__ = ["OUR_SWIN_NAMES", "TABLE", "convert_windows", "window_of_table"]

TABLE = "relative_position_bias_table"
_PUBLISHED_RATIO = 0.6
# No tensor of version 2 tells the window or the image size; all published pre-training files have these.
_V2_WINDOW = 12
_V2_IMAGE = 192
# Indices grow with the fourth power of the window's side: a damaged file must not fill the memory.
_MOST_WINDOW = 24
_MOST_IMAGE = 768

#: From the original's names (after its prefix is gone) to ours; the position network has had two names.
OUR_SWIN_NAMES = (
    (rf"^layers\.(\d+)\.blocks\.(\d+)\.attn\.{TABLE}$", rf"stages.\1.\2.position_bias.{TABLE}"),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.attn\.(rpe_mlp|cpb_mlp)\.", r"stages.\1.\2.position_bias.mlp."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2.block."),
    (r"^layers\.(\d+)\.downsample\.", r"merges.\1."),
    (r"^absolute_pos_embed$", "pos_embed"),
    (r"^decoder\.0\.", "decoder."),
)


def convert_windows(
    state: StateDict,
    heads: Heads,
    *,
    image_size: int | None = None,
    window: int | None = None,
    pretrained: Sequence[float] | None = None,
    rule: tuple[MaskRule, str] | None = None,
    target: PixelTarget = "pixels",
    eps: float = 1e-5,
) -> Conversion:
    """A :class:`SimMIMSwin` from tensors under our names.

    Args:
        state: Tensors; index buffers may still be there and are dropped, to be recomputed.
        heads: Given by the user.
        image_size: That a config states.
        window: That a config states, for version 2, whose tensors do not tell.
        pretrained: Windows of the stages by which a config says that version 2 scales offsets.
        target: What a config says that the decoder predicts.
        rule: Mask rule that a config states, and where it comes from.
        eps: Of the layer norms.

    Raises:
        CheckpointError: If shapes fit no model.
    """
    dim, channels, patch_size, _ = state.shape("patch_embed.proj.weight", 4)
    assumptions: list[str] = []
    num_stages = block_numbers(state.tensors, "stages.")
    depths = tuple(block_numbers(state.tensors, f"stages.{stage}.") for stage in range(num_stages))
    version_2 = "stages.0.0.block.attn.logit_scale" in state.tensors
    if version_2:
        num_heads = tuple(state.shape(f"stages.{stage}.0.block.attn.logit_scale", 3)[0] for stage in range(num_stages))
        stored = _stored_window(state)
        if window and stored and max(window, stored) != window:
            raise CheckpointError(f"its config states a window of {window} tokens, its coordinates have {stored}")
        if not (window or stored):
            assumptions.append(f"the window has {_V2_WINDOW} tokens, as in the published models: the file does not say")
        window = window or stored or _V2_WINDOW
        image_size = image_size or _image_of_shift_mask(state, window, patch_size)
        if image_size is None and "pos_embed" not in state.tensors:
            assumptions.append(f"the image size is {_V2_IMAGE} px, as of the published models: the file does not say")
        image_size = image_size or _V2_IMAGE
    else:
        tables = [state.shape(f"stages.{stage}.0.position_bias.{TABLE}", 2) for stage in range(num_stages)]
        num_heads = tuple(columns for _, columns in tables)
        sides = [window_of_table(rows) for rows, _ in tables]
        window = sides[0]
        # Where a stage's window is smaller than the first, its grid is; where none is, the last grid is one window.
        shrunk = next((stage for stage, side in enumerate(sides) if side < window), num_stages - 1)
        image_size = (
            _image_of_shift_mask(state, window, patch_size) or image_size or sides[shrunk] * patch_size * 2**shrunk
        )
    if window > _MOST_WINDOW or image_size > _MOST_IMAGE:
        raise CheckpointError(f"a window of {window} tokens in an image of {image_size} px is not of a published kind")
    if "pos_embed" in state.tensors:
        image_size = square_side(state.shape("pos_embed", 3)[1], "absolute_pos_embed") * patch_size
    grids = [image_size // (patch_size << stage) for stage in range(num_stages)]
    windows = [min(window, grid) for grid in grids]
    pretrained = _pretrained_windows(state, windows, pretrained) if version_2 else ()
    state.drop(r".*\.relative_position_index", r".*\.relative_coords_table", r".*\.attn_mask")
    state.fuse_qkv()
    heads.choose("num_heads", dim, stated=num_heads[0])
    try:
        model = SwinConfig(
            image_size=image_size,
            patch_size=patch_size,
            channels=channels,
            dim=dim,
            depths=depths,
            num_heads=num_heads,
            mlp_dim=state.shape("stages.0.0.block.mlp.fc1.weight", 2)[0],
            window=window,
            version=2 if version_2 else 1,
            patch_norm="patch_embed.norm.weight" in state.tensors,
            absolute_positions="pos_embed" in state.tensors,
            decoder="decoder.weight" in state.tensors,
            eps=eps,
            pretrained_windows=tuple(pretrained) if any(pretrained) else (),
        )
    except ValueError as error:
        raise CheckpointError(f"the file describes no working Swin model: {error}") from error
    published = "published SimMIM Swin"
    mask_rule, source = rule or (MaskRule("block", _PUBLISHED_RATIO, model.stride), published)
    info = ModelInfo(
        family="simmim_swinv2" if version_2 else "simmim_swin",
        style="inpainting",
        image_size=model.image_size,
        patch_size=patch_size,
        mask_rule=mask_rule,
        target=target if model.decoder else None,
        criterion="l1" if model.decoder else None,
        mask_rule_source=source,
        assumptions=tuple(assumptions),
    )
    return Conversion(SimMIMSwin, model, info, state)


def window_of_table(rows: int) -> int:
    """Side of a window from the rows of its bias table: ``(2 side - 1)^2``."""
    width = math.isqrt(rows)
    if width * width != rows or width % 2 == 0:
        raise CheckpointError(f"a relative position table of {rows} rows fits no square window")
    return (width + 1) // 2


def _stored_window(state: StateDict) -> int | None:
    """The window of the first stage from its table of coordinates, 1 x (2 side - 1) x (2 side - 1) x 2."""
    name = "stages.0.0.block.attn.relative_coords_table"
    return (state.shape(name, 4)[1] + 1) // 2 if name in state.tensors else None


def _pretrained_windows(state: StateDict, windows: Sequence[int], stated: Sequence[float] | None) -> list[int]:
    """For each stage the window by which offsets are scaled, 0 for its own: what is stated must give what is stored.

    Raises:
        CheckpointError: If a table of coordinates is of no window.
    """
    found = []
    for stage, window in enumerate(windows):
        name = f"stages.{stage}.0.block.attn.relative_coords_table"
        told = int(stated[stage]) if stated and stage < len(stated) else 0
        if name not in state.tensors or window < 2:
            found.append(told)
            continue
        table = state.tensors[name].float().reshape(-1, 2)
        # The largest coordinate tells the window: log2(1 + 8 (window - 1) / (pretrained - 1)) / 3.
        largest = float(table.max()) if len(table) else 0.0
        scaled_by = round(8 * (window - 1) / (2 ** (3 * largest) - 1)) + 1 if 0 < largest < 5 else 0
        candidate = 0 if scaled_by == window else scaled_by
        expected = window_coordinates(window, candidate)
        if table.shape != expected.shape or not torch.allclose(table, expected, atol=1e-4):
            raise CheckpointError(f"{state.origin[name]} holds coordinates of no window of {window} tokens")
        if told not in (0, scaled_by):
            raise CheckpointError(
                f"its config states a pretrained window of {told}, {state.origin[name]} has {scaled_by}"
            )
        found.append(candidate)
    return found


def _image_of_shift_mask(state: StateDict, window: int, patch_size: int) -> int | None:
    """Side of the image from a stored shift mask, whose first axis counts the windows of its stage."""
    for name in sorted(state.tensors):
        if (match := re.fullmatch(r"stages\.(\d+)\.\d+\.block\.attn_mask", name)) is not None:
            side = square_side(state.shape(name, 3)[0], state.origin[name])
            return (side * window * patch_size) << int(match[1])
    return None
