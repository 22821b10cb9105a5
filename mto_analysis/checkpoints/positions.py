"""The patch grid that a file's positions are for, found from evidence, and positions for another grid."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from mto_analysis.checkpoints.conversion import Given, StateDict
from mto_analysis.errors import CheckpointError
from mto_analysis.models.interface import ImageSize, as_image_size, height_and_width
from mto_analysis.models.vit import relative_position_index, sincos_table

# Indices grow with the fourth power of the side: a damaged file must not fill the memory.
_MOST_OFFSET_PATCHES = 40 * 40
# Beyond it a single image's affinities fill tens of gigabytes; published models have up to 64 x 64 patches.
_MOST_PATCHES = 256 * 256
_MOST_COMPARED = 256 * 256
# Two means of cosines of random vectors lie this many standard deviations apart once in ten million tables.
_CLEAR = 5.0
#: The option that settles what a file does not tell.
ADVICE = "give --image-size (HEIGHTxWIDTH in pixels)"


@dataclass(frozen=True)
class Grid:
    """Rows and columns of patches, as a model is to be built."""

    rows: int
    columns: int
    patch_size: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, image_size: ImageSize, patch_size: int) -> Grid:
        """The grid of an image."""
        height, width = height_and_width(image_size)
        if height < 1 or width < 1 or height % patch_size or width % patch_size:
            raise CheckpointError(f"patches of {patch_size} px do not divide an image of {height} x {width} px")
        if (patches := height // patch_size * (width // patch_size)) > _MOST_PATCHES:
            raise CheckpointError(
                f"an image of {height} x {width} px has {patches} patches of {patch_size} px, of which no more than "
                f"{_MOST_PATCHES} are read; give a smaller --image-size"
            )
        return cls(height // patch_size, width // patch_size, patch_size)

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.columns

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.rows * self.columns

    @property
    def image_size(self) -> ImageSize:
        """In pixels."""
        return as_image_size(self.rows * self.patch_size, self.columns * self.patch_size)


def fit_positions(
    state: StateDict,
    given: Given,
    *tables: str,
    patch_size: int,
    prefix_tokens: int = 1,
    stated: ImageSize | None = None,
    overshoot: float = 0.0,
) -> Grid:
    """The patch grid of a model with absolute positions; tables of another grid than the wanted one are resized.

    Evidence for the grid is, in this order: the image size that the file states, the values of a sin-cos table, the
    size that the user gives, rows of a learned table that resemble each other. Without any, a square is assumed and
    said. Resizing is bicubic, as in the fine-tuning code of MAE, BEiT and DINO; sin-cos tables of decoders, which
    those do not touch, are computed anew.

    Args:
        state: Tensors under the model's names; resized tables replace theirs.
        given: By the user.
        tables: Names of the tables, ``1 num_tokens dim``, the encoder's first.
        patch_size: Side of a patch in pixels.
        prefix_tokens: Rows of a table that belong to no patch.
        stated: Image size that the file states.
        overshoot: What DINO's code adds to the new sides before it divides by the old ones.
    """
    counts = {name: state.shape(name, 3)[1] - prefix_tokens for name in tables}
    if len(set(counts.values())) > 1:
        raise CheckpointError(f"position tables differ in length: {', '.join(f'{n} {c}' for n, c in counts.items())}")
    stored = _Stored(
        tuple(state.tensors[name][:, prefix_tokens:] for name in tables), state.origin[tables[0]], patch_size
    )
    wanted = _in_patches(given.image_size, patch_size)
    base, note = stored.grid(_in_patches(stated, patch_size), wanted)
    if wanted is None or wanted == base:
        return Grid(*base, patch_size, (note,) if note else ())
    for name in tables:
        table = state.tensors[name]
        rows_first = _sincos_order(table[:, prefix_tokens:], base) if name != tables[0] else None
        if rows_first is None:
            state.tensors[name] = _resized(table, base, wanted, prefix_tokens, overshoot)
        else:
            places = sincos_table(wanted, table.shape[2], rows_first=rows_first)[:, 1:]
            state.tensors[name] = torch.cat([table[:, :prefix_tokens].float(), places], dim=1)
    resized = f"positions of {_by(base)} patches are resized to {_by(wanted)} as --image-size asks"
    return Grid(*wanted, patch_size, (*((note,) if note else ()), resized))


def fit_relative_positions(
    state: StateDict, given: Given, table: str, *, index: str, patch_size: int, stated: ImageSize | None = None
) -> Grid:
    """The patch grid of a table of relative positions with three rows for a class token: ``(2h - 1)(2w - 1) + 3``.

    The index stored beside it settles the sides; else the image size that the file states or the user gives. Such
    tables are not resized.

    Args:
        state: Tensors under the model's names; the index is taken out, to be computed anew.
        given: By the user.
        table: Name of the table.
        index: Name of its index, ``num_tokens num_tokens``, which may be missing.
        patch_size: Side of a patch in pixels.
        stated: Image size that the file states.
    """
    rows = state.shape(table, 2)[0]
    origin, offsets = state.origin[table], rows - 3
    widths = range(1, 2 * _MOST_OFFSET_PATCHES, 2)
    grids = [((offsets // width + 1) // 2, (width + 1) // 2) for width in widths if width <= offsets % 2 * offsets]
    grids = [each for each in grids if (2 * each[0] - 1) * (2 * each[1] - 1) == offsets]
    grids = [each for each in grids if math.prod(each) <= _MOST_OFFSET_PATCHES]
    if not grids:
        raise CheckpointError(f"{origin} has {rows} rows, which fit no grid of up to {_MOST_OFFSET_PATCHES} patches")
    sizes = {"the file states": stated, "--image-size gives": given.image_size}
    if index in state.tensors:
        stored = state.tensors[index]
        state.drop(re.escape(index))
        grids = [each for each in grids if stored.shape == (math.prod(each) + 1,) * 2]
        grids = [each for each in grids if torch.equal(stored, relative_position_index(each))]
        if not grids:
            raise CheckpointError(f"{origin} and the index stored beside it fit no grid")
    for who, size in sizes.items():
        if (wanted := _in_patches(size, patch_size)) is not None and wanted not in grids:
            raise CheckpointError(
                f"{origin} is not for the {_by(wanted)} patches of the size that {who}: tables of relative positions "
                "are not resized"
            )
        grids = [wanted] if wanted else grids
    sides = next((each for each in grids if each[0] == each[1]), grids[0])
    rivals = [each for each in grids if each != sides and min(each) > 1]
    note = f"the patch grid is square, {_by(sides)}: its table of relative positions does not tell; else {ADVICE}"
    return Grid(*sides, patch_size, (note,) if rivals else ())


def _in_patches(size: ImageSize | None, patch_size: int) -> tuple[int, int] | None:
    return None if size is None else Grid.of(size, patch_size).sides


def _by(sides: tuple[int, int]) -> str:
    return f"{sides[0]} x {sides[1]}"


@dataclass(frozen=True)
class _Stored:
    """Stored tables of positions of one grid, ``1 num_patches dim`` each, and the first one's name in the file."""

    tables: tuple[Tensor, ...]
    origin: str
    patch_size: int

    def grid(self, stated: tuple[int, int] | None, wanted: tuple[int, int] | None) -> tuple[tuple[int, int], str]:
        """The grid that the table is for, and what must be said about it."""
        count = self.tables[0].shape[1]
        if stated is not None and math.prod(stated) != count and wanted is None:
            height, width = (side * self.patch_size for side in stated)
            raise CheckpointError(
                f"the file states images of {height} x {width} px, {self.origin} is for {count} patches; {ADVICE}"
            )
        if stated is not None and math.prod(stated) == count:
            return stated, ""
        for table in self.tables:  # a decoder's is often computed where the encoder's was learned
            orders = {each: _sincos_order(table, each) for each in self._rectangles}
            if computed := {each: order for each, order in orders.items() if order is not None}:
                # A single row has the table of a single column in the other order: the original's, False, decides.
                return min(computed, key=lambda each: computed[each]), ""
        if wanted is not None and math.prod(wanted) == count:
            return wanted, ""
        likenesses = map(self._of_alike_rows, self.tables)
        if (alike := next((each for each in likenesses if each is not None), None)) is not None:
            square = alike[0] == alike[1]
            return alike, "" if square else f"patches are {_by(alike)}, by the likeness of neighbouring positions"
        side = math.isqrt(count)
        if side < 1 or side * side != count:
            raise CheckpointError(f"{self.origin} is for {count} patches, which is not a square grid; {ADVICE}")
        return (side, side), f"the patch grid is square, {_by((side, side))}: positions do not tell; else {ADVICE}"

    @cached_property
    def _rectangles(self) -> list[tuple[int, int]]:
        count = self.tables[0].shape[1]
        return [(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0]

    def _of_alike_rows(self, table: Tensor) -> tuple[int, int] | None:
        """The grid under which patches above each other have the most similar positions, if one is clearly ahead."""
        places = table[0].float()
        count, dim = places.shape
        if count > _MOST_COMPARED:
            return None
        places = F.normalize(places - places.mean(dim=0), dim=1)
        ranked = sorted(
            (
                ((places[:-columns] * places[columns:]).sum(dim=1).mean().item(), rows, columns)
                for rows, columns in self._rectangles
                if rows > 1 and columns > 1
            ),
            reverse=True,
        )
        if len(ranked) < 2:
            return None
        (best, rows, columns), (second, other, _) = ranked[:2]
        noise = math.sqrt((1 / (count - columns) + 1 / (count - count // other)) / dim)
        return (rows, columns) if best - second > _CLEAR * noise else None


def _sincos_order(table: Tensor, grid: tuple[int, int]) -> bool | None:
    """Whether a table is MAE's sin-cos table with rows first, or columns first; ``None`` if it is neither."""
    dim = table.shape[2]
    if dim % 4 or math.prod(grid) != table.shape[1]:
        return None
    # The first position is the same for all grids and both orders: a learned table is told by it alone.
    if not torch.allclose(table[:, :1].float(), sincos_table((1, 1), dim)[:, 1:], atol=1e-3):
        return None
    for rows_first in (False, True):
        if torch.allclose(table.float(), sincos_table(grid, dim, rows_first=rows_first)[:, 1:], atol=1e-3):
            return rows_first
    return None


def _resized(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix_tokens: int, overshoot: float) -> Tensor:
    places = table[:, prefix_tokens:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    if overshoot:
        scale = tuple((side + overshoot) / of for side, of in zip(new, old, strict=True))
        places = F.interpolate(places, scale_factor=scale, mode="bicubic")
    else:
        places = F.interpolate(places, size=new, mode="bicubic")
    return torch.cat([table[:, :prefix_tokens].float(), places.flatten(2).mT], dim=1)
