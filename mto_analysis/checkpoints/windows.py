"""What the converters to :class:`SimMIMSwin` share: names, the architecture from shapes, the image size."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import torch

from mto_analysis.checkpoints.conversion import Conversion, Given, StateDict, block_numbers
from mto_analysis.checkpoints.positions import Grid, fit_positions
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import ModelInfo, SimMIMSwin, SwinConfig
from mto_analysis.models.interface import ImageSize, as_image_size, height_and_width
from mto_analysis.models.windows import shift_mask, window_coordinates

PixelTarget = Literal["pixels", "locally_normalized_pixels"]

_TABLE = "relative_position_bias_table"
_PUBLISHED_RATIO = 0.6
# No tensor of version 2 tells the window or the image size; all published pre-training files have these.
_V2_WINDOW = 12
_V2_IMAGE = 192
# Indices grow with the fourth power of the window's side: a damaged file must not fill the memory.
_MOST_WINDOW = 24
_MOST_IMAGE = 768

#: From the original's names (after its prefix is gone) to ours; the position network has had two names.
OUR_SWIN_NAMES = (
    (rf"^layers\.(\d+)\.blocks\.(\d+)\.attn\.{_TABLE}$", rf"stages.\1.\2.position_bias.{_TABLE}"),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.attn\.(rpe_mlp|cpb_mlp)\.", r"stages.\1.\2.position_bias.mlp."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2.block."),
    (r"^layers\.(\d+)\.downsample\.", r"merges.\1."),
    (r"^absolute_pos_embed$", "pos_embed"),
    (r"^decoder\.0\.", "decoder."),
)


def convert_windows(
    state: StateDict,
    given: Given,
    *,
    image_size: ImageSize | None = None,
    window: int | None = None,
    pretrained: Sequence[float] | None = None,
    rule: tuple[MaskRule, str] | None = None,
    target: PixelTarget = "pixels",
    criterion: Literal["l1", "l2"] = "l1",
    eps: float = 1e-5,
    outer_eps: float = 1e-5,
) -> Conversion:
    """A :class:`SimMIMSwin` from tensors under our names.

    Args:
        state: Tensors; index buffers may still be there and are dropped, to be recomputed.
        given: Given by the user.
        image_size: That a config states.
        window: That a config states, for version 2, whose tensors do not tell.
        pretrained: Windows of the stages by which a config says that version 2 scales offsets.
        target: What a config says that the decoder predicts.
        criterion: Error of its loss.
        rule: Mask rule that a config states, and where it comes from.
        eps: Of the layer norms.
        outer_eps: Of those of patches and merges.
    """
    dim, channels, patch_size, _ = state.shape("patch_embed.proj.weight", 4)
    num_stages = block_numbers(state.tensors, "stages.")
    depths = tuple(block_numbers(state.tensors, f"stages.{stage}.") for stage in range(num_stages))
    version_2 = "stages.0.0.block.attn.logit_scale" in state.tensors
    notes: list[str] = []
    sides: list[int] = []
    if version_2:
        num_heads = tuple(state.shape(f"stages.{stage}.0.block.attn.logit_scale", 3)[0] for stage in range(num_stages))
        window = _window_of_version_2(state, window, notes)
    else:
        tables = bias_tables(state)
        num_heads = tuple(columns for _, columns in tables)
        sides = [window_of_table(rows) for rows, _ in tables]
        window = sides[0]
    if window > _MOST_WINDOW:
        raise CheckpointError(f"a window of {window} tokens is not of a published kind")
    size = _image_size(state, given, window, patch_size, image_size, sides, notes)
    if "pos_embed" in state.tensors:
        grid = fit_positions(state, given, "pos_embed", patch_size=patch_size, prefix_tokens=0, stated=size)
        size = grid.image_size
        notes += grid.notes
    windows = _windows(size, window, patch_size, num_stages)
    size = size if given.image_size is None else Grid.of(given.image_size, patch_size).image_size
    if _windows(size, window, patch_size, num_stages) != windows:
        raise CheckpointError(f"images of {size} px have other windows than {windows}; leave --image-size out")
    pretrained = _pretrained_windows(state, windows, pretrained) if version_2 else ()
    state.drop(r".*\.relative_position_index", r".*\.relative_coords_table", r".*\.attn_mask")
    state.fuse_qkv()
    given.choose("num_heads", dim, stated=num_heads[0])
    try:
        model = SwinConfig(
            image_size=size,
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
            outer_eps=outer_eps,
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
        criterion=criterion if model.decoder else None,
        mask_rule_source=source,
        assumptions=tuple(notes),
    )
    return Conversion(SimMIMSwin, model, info, state)


def bias_tables(state: StateDict) -> list[tuple[int, ...]]:
    """Rows and columns (heads) of the relative position table of each stage's first block, under our names."""
    stages = range(block_numbers(state.tensors, "stages."))
    return [state.shape(f"stages.{stage}.0.position_bias.{_TABLE}", 2) for stage in stages]


def window_of_table(rows: int) -> int:
    """Side of a window from the rows of its bias table: ``(2 side - 1)^2``."""
    width = math.isqrt(rows)
    if width * width != rows or width % 2 == 0:
        raise CheckpointError(f"a relative position table of {rows} rows fits no square window")
    return (width + 1) // 2


def _window_of_version_2(state: StateDict, stated: int | None, notes: list[str]) -> int:
    """The window of the first stage: stated, or of its table of coordinates ``1 x (2w - 1) x (2w - 1) x 2``."""
    name = "stages.0.0.block.attn.relative_coords_table"
    stored = (state.shape(name, 4)[1] + 1) // 2 if name in state.tensors else None
    if stated and stored and max(stated, stored) != stated:
        raise CheckpointError(f"its config states a window of {stated} tokens, its coordinates have {stored}")
    if not (stated or stored):
        notes.append(f"the window has {_V2_WINDOW} tokens, as in the published models: the file does not say")
    return stated or stored or _V2_WINDOW


def _image_size(
    state: StateDict,
    given: Given,
    window: int,
    patch_size: int,
    stated: ImageSize | None,
    sides: Sequence[int],
    notes: list[str],
) -> ImageSize:
    """The image size that the file is for: of stored shift masks, stated, of shrunk windows, given, or assumed."""
    masked = _grids_of_shift_mask(state, window)
    of_masks = [(rows * patch_size, columns * patch_size) for rows, columns in masked]
    if of_masks and stated is not None and height_and_width(stated) not in of_masks:
        raise CheckpointError(f"its config states images of {stated} px, its shift masks are for {of_masks[0]}")
    shrunk = next((stage for stage, side in enumerate(sides) if side < window), None)
    size = stated if stated is not None else of_masks[0] if of_masks else None
    if size is None and shrunk is not None:  # a stage whose window is smaller than the first is one window
        size = sides[shrunk] * patch_size << shrunk
    if size is None and (size := given.image_size) is None:
        # Unless shift masks or sizes tell: version 1 ends with one window, published models of version 2 have 192 px.
        size = sides[-1] * patch_size << (len(sides) - 1) if sides else _V2_IMAGE
        notes.append(f"the image size is {size} px, as of the published models: the file does not say")
    height, width = height_and_width(size)
    if max(height, width) > _MOST_IMAGE:
        raise CheckpointError(f"images of {height} x {width} px are not of a published kind")
    return as_image_size(height, width)


def _windows(size: ImageSize, window: int, patch_size: int, num_stages: int) -> list[int]:
    """The window of each stage: the first one, or the shorter side of the stage's grid."""
    return [min(window, min(height_and_width(size)) // (patch_size << stage)) for stage in range(num_stages)]


def _pretrained_windows(state: StateDict, windows: Sequence[int], stated: Sequence[float] | None) -> list[int]:
    """For each stage the window by which offsets are scaled, 0 for its own: what is stated must give what is stored."""
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


def _grids_of_shift_mask(state: StateDict, window: int) -> list[tuple[int, int]]:
    """Grids of the first stage that a stored shift mask fits, ``num_windows x window^2 x window^2``."""
    for name in sorted(state.tensors):
        if (match := re.fullmatch(r"stages\.(\d+)\.\d+\.block\.attn_mask", name)) is not None:
            stored, stage = state.tensors[name], int(match[1])
            count = state.shape(name, 3)[0]
            pairs = [(rows * window, count // rows * window) for rows in range(1, count + 1) if count % rows == 0]
            fitting = [
                grid for grid in pairs if torch.equal(shift_mask(grid, window, window // 2).squeeze(1), stored.float())
            ]
            if not fitting:
                raise CheckpointError(f"{state.origin[name]} is no shift mask of windows of {window} tokens")
            return [(rows << stage, columns << stage) for rows, columns in fitting]
    return []
