"""Which tokens of a running forward are masked, and the checks of that."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from mto_analysis.errors import StackError
from mto_analysis.taps.search import hinted_patches, hinted_prefix, path_of
from mto_analysis.taps.stacks import Found, StackSpec, find_rows, rounded_rows, with_position

#: More prefix tokens than any published model has; beyond, the size of a forward does not fit.
_MOST_PREFIX = 64

_BEHIND = "are not in front of the patches; pass suffix_tokens=... where they are behind, among them they cannot be"

# More first axes are those of a grid of tokens, not of images.
_MOST_CHANNELS = 4

#: Name of a mask that we ask a model for, among the arguments of its call.
REQUESTED = "requested mask"

# Arguments whose name says that they tell masked patches from visible ones, and those that say something else.
_MASK_NAME = re.compile(r"mask|visible|keep", re.IGNORECASE)
_OTHER_NAME = re.compile(r"att|pad|head|key|causal|ratio|(^|_)ids?(_|$)|token|noise|loss", re.IGNORECASE)


def _is_far(mask: Tensor) -> bool:
    """Whether to ask for a value is to wait for a device."""
    return mask.is_cuda


class _Coming:
    """A mask on its way from a CUDA device to the CPU."""

    def __init__(self, mask: Tensor) -> None:
        self._copy = mask.to("cpu", non_blocking=True)
        self._here = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._here.record(torch.cuda.current_stream(mask.device))

    def wait(self) -> Tensor:
        """The mask, as soon as it is here."""
        self._here.synchronize()
        return self._copy


class NotEntered(StackError):
    """No token of a forward is masked, although a mask was passed; a later forward of the same call may have them."""


class Forward:
    """What one stack shows in one forward: its mask, and tokens one layer depth at a time.

    How many patches of an image are masked decides on the shapes of what is computed, and to ask a CUDA device for it
    is to wait for all that it still has to do. Where every image of a forward had the same number, the next one may be
    assumed to have it too; :meth:`settle` looks at the end, when the device has gone past it.
    """

    def __init__(self, stack: Stack[Forward], mask: Tensor, checked: Tensor, grid: tuple[int, ...] | None) -> None:
        self.stack, self.spec, self.grid = stack, stack.spec, grid
        self.prefix = stack.layout.prefix if stack.layout else 0
        self.mask: Tensor | None = None
        self.num_images = len(mask)
        self.depths: set[int] = set()  # those that ran
        self.last: Found | None = None  # tokens of the last of them
        self.carried: Sequence[Tensor] = ()  # what the last block took beside its tokens
        self._numbers: Sequence[int] = ()  # of masked patches of each image
        self._images: Tensor | None = None  # those with a masked and a visible patch, where not all have both
        self._on_cpu: Tensor | None = None  # the mask
        self._coming: _Coming | None = None  # the mask and its checks, where counts are assumed
        self._merged: set[int] = set()  # numbers of patches in a cell
        usual = stack.usual if stack.may_assume and _is_far(mask) else None
        if usual is not None and usual[0] == mask.shape[1]:
            self.mask, self._numbers, self._coming = mask, [usual[1]] * len(mask), _Coming(checked)
        else:
            self._look(mask, checked.cpu())

    @property
    def assuming(self) -> bool:
        """Whether counts are assumed, and not yet settled."""
        return self._coming is not None

    def settle(self) -> bool:
        """Look at the mask itself where counts were assumed, and say whether they are right."""
        if self.mask is None or self._coming is None:
            return True
        assumed, checked, self._coming = self._numbers, self._coming.wait(), None
        self._look(self.mask, checked)
        right = self.mask is not None and self._images is None and self._numbers == assumed
        if right:
            for cell in self._merged:
                self._check_cells(cell)
        else:
            self.stack.may_assume = False
        return right

    @property
    def leaves_images_out(self) -> bool:
        """Whether an image has no masked or no visible patch, so that nothing can be measured of it."""
        return self._images is not None

    def take(self, depth: int, tokens: Tensor) -> None:
        """Tokens of a layer depth."""
        raise NotImplementedError

    def images(self, tokens: Tensor) -> Tensor:
        """The tokens of those images that have a masked and a visible patch; of the others nothing can be measured."""
        return tokens if self._images is None else tokens.index_select(0, self._images)

    def mask_for(self, count: int) -> tuple[Tensor, Sequence[int]]:
        """The mask on a grid of ``count`` patches, and how many of each image are masked.

        Swin joins 2 x 2 tokens, masked or visible together.
        """
        if self.mask is None:
            raise StackError(f"{self.spec.name}: the forward has no mask")
        fine = self.mask.shape[1]
        if count == fine:
            return self.mask, self._numbers
        if not self.stack.in_order:
            raise StackError(
                f"{self.stack.where}: its {fine} tokens are not in the order of patches, so nothing tells which of "
                f"them became {count}; pass taps=[...] at points with one number of tokens"
            )
        cell = self._cell_of(count)
        self._merged.add(cell)
        if not self.assuming:
            self._check_cells(cell)
        numbers = [number // cell**2 for number in self._numbers]
        return self._cells(self.mask, cell).all(-1).flatten(1), numbers

    def _cell_of(self, count: int) -> int:
        """Side of a cell of patches that merge into one."""
        height, width = self._grid()
        cell = math.isqrt(max(height * width // max(count, 1), 1))
        if cell < 2 or height % cell or width % cell or count * cell**2 != height * width:
            raise StackError(
                f"{self.spec.name} goes from {height * width} to {count} tokens, which is no merging of cells; "
                "pass taps=[...] at points with one number of tokens"
            )
        return cell

    def _grid(self) -> tuple[int, int]:
        assert self.mask is not None
        fine = self.mask.shape[1]
        if self.grid is not None and math.prod(self.grid) == fine:
            return math.prod(self.grid[:-1]), self.grid[-1]
        side = math.isqrt(fine)
        return (side, side) if side * side == fine else (1, fine)

    def _look(self, mask: Tensor, checked: Tensor) -> None:
        """Check a mask; which images of it can be measured, and how many patches of each are masked."""
        on_cpu = self.stack.check(checked)
        self.mask, self.stack.usual = None, None
        num_masked = on_cpu.sum(dim=1).tolist()
        mixed = [image for image, count in enumerate(num_masked) if 0 < count < mask.shape[1]]
        if not mixed:  # evaluation code, a teacher or fine-tuning
            return
        self.num_images = len(mixed)
        self._numbers = [num_masked[image] for image in mixed]
        if len(mixed) < len(num_masked):
            self._images = torch.tensor(mixed, device=mask.device)
            mask, on_cpu = mask.index_select(0, self._images), on_cpu[mixed]
        elif min(self._numbers) == max(self._numbers):
            self.stack.usual = mask.shape[1], self._numbers[0]
        self.mask, self._on_cpu = mask, on_cpu

    def _check_cells(self, cell: int) -> None:
        """Whether merged tokens are masked or visible together."""
        if self._on_cpu is not None:
            cells = self._cells(self._on_cpu, cell)
            if not torch.equal(cells.all(-1), cells.any(-1)):
                raise StackError(
                    f"{self.spec.name}: the mask cuts through merged tokens; use mask units of at least {cell} tokens"
                )

    def _cells(self, mask: Tensor, cell: int) -> Tensor:
        """A mask in cells of ``cell`` x ``cell`` patches: ``batch height width cell * cell``."""
        height, width = self._grid()
        return mask.reshape(-1, height // cell, cell, width // cell, cell).transpose(2, 3).flatten(3)


@dataclass(frozen=True)
class _Layout:
    """How the tokens of a stack lie, found in the first forward with masked ones and verified in each.

    Args:
        num_tokens: Of an image, prefix tokens included.
        prefix: Tokens in front of those of patches.
        num_patches: Of an image, also where only some are present.
        offset: Masked rows for prefix tokens, in front of those for patches.
        row: Which of the candidates for masked rows fits.
        argument: The caller's argument that holds the mask.
        inverted: Whether True means visible there.
        in_place: Whether the tokens of patches are in the order of their positions, or of the mask in the call.
    """

    num_tokens: int
    prefix: int
    num_patches: int
    offset: int = 0
    row: int = 0
    argument: str | None = None
    inverted: bool = False
    in_place: bool = True


_Any = TypeVar("_Any", bound=Forward)


class Stack(Generic[_Any]):
    """A stack of a model that is watched: finds the mask of each forward and keeps those forwards that have one.

    Args:
        model: Around the stack.
        spec: Its description.
        forward: Makes a forward; gets this stack, the mask, what is to be checked of it, and the grid if known.
        may_assume: Whether counts of masked patches may be assumed.
    """

    def __init__(
        self, model: nn.Module, spec: StackSpec, forward: Callable[..., _Any], *, may_assume: bool = False
    ) -> None:
        self.spec, self._new = spec, forward
        self.may_assume = may_assume
        self.usual: tuple[int, int] | None = None  # patches, and masked ones, of every image of the last forward
        self.layout: _Layout | None = None
        self.forwards: list[_Any] = []
        self.running: _Any | None = None
        self.last_input: weakref.ref[Tensor] | None = None  # tokens with masked ones, at layer depth 0
        self.last_output: weakref.ref[Tensor] | None = None  # tokens of its last depth
        self.changes_in_place = True  # until a forward has shown that its blocks do not
        self.last_mask: Tensor | None = None
        modules = [module for module, where in spec.points if where == "output"]
        self.repeats = len({id(module) for module in modules}) < len(modules)
        said = {part.batch_first for module in modules for part in module.modules() if hasattr(part, "batch_first")}
        self._may_be_transposed = said != {True}
        self._surely_batch_first = False not in said
        self._transposed = False
        self._positions = 1  # rows of one mask token
        self.doubts: list[str] = []  # what could not be verified, to be said once
        self.skipped = 0  # forwards of a size that does not fit
        self.unmasked = 0  # forwards in which no token is masked
        self._said_patches = hinted_patches(model)
        self.hint = hinted_prefix(model, [*spec.mask_tokens, *(module for module, _ in spec.points[:1])])
        paths = [path_of(model, token) for token in spec.mask_tokens]
        inside = "?" not in paths
        split = [path.rpartition(".") for path in paths]
        self._token_names = [(model.get_submodule(owner), name) for owner, _, name in split] if inside else []
        self.token_path = ", ".join(paths) or "no mask token"
        self.first_path, self.last_path = (path_of(model, spec.points[at][0]) for at in (0, -1))
        self.where = f"{spec.name} ({self.token_path} into {self.first_path})"

    def orient(self, tokens: Tensor, arguments: Mapping[str, Tensor]) -> None:
        """Find out whether tokens are ``num_tokens batch dim``, from the number of images in the call."""
        batches = {len(value) for value in arguments.values() if value.ndim > 2}
        if callable(self.spec.mask):
            batches = {len(self.spec.mask())}
        first, second = tokens.shape[:2]
        self._transposed = self._may_be_transposed and batches == {second} and first != second
        if not self._surely_batch_first and not self._transposed and (batches != {first} or first == second):
            raise self._error(
                f"its blocks have batch_first=False, and nothing tells whether its tokens {list(tokens.shape)} are "
                "[num_tokens, batch, dim]; call the model itself with images of another number, or give mask=..."
            )

    def batch_first(self, tokens: Tensor) -> Tensor:
        """Tokens as ``batch num_tokens dim``, without those behind patches."""
        tokens = tokens.transpose(0, 1) if self._transposed else tokens
        return tokens[:, : tokens.shape[1] - self.spec.suffix_tokens] if self.spec.suffix_tokens else tokens

    def start(self, tokens: Tensor, grid: tuple[int, ...] | None, arguments: Mapping[str, Tensor]) -> None:
        """The tokens of layer depth 0: find the mask."""
        self.running = None
        found = self._find(tokens, arguments)
        if found is None:
            return
        mask, checked, in_order = found
        forward = self._new(self, mask, checked, grid)
        if forward.mask is None:
            self.unmasked += 1
            return
        self.last_mask = in_order
        self.running = forward
        self.forwards.append(forward)

    def drop(self) -> None:
        """Forget all forwards."""
        self.forwards.clear()
        self.running = None

    def check(self, checked: Tensor) -> Tensor:
        """The mask, on a CPU, after its checks.

        Shapes:
            checked: 4 batch num_patches (the mask, patches found to be masked, those expected to be, masked prefix)
        """
        mask, found, expected, prefix = checked.unbind()
        if prefix.any():
            raise self._error(
                f"one of its first {self.layout and self.layout.prefix} tokens is masked, so these are "
                "not class or register tokens; pass prefix_tokens=..."
            )
        layout = self.layout
        if layout is not None and layout.argument is not None and not torch.equal(found, expected):
            raise self._disagree(layout.argument, expected, found)
        return mask

    # ---- the mask

    def _find(self, tokens: Tensor, arguments: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
        """The mask in the order of the tokens, what is to be checked of it, and the mask in the order of patches."""
        layout = self.layout
        if not self.spec.mask_tokens and self.spec.masked_row is None:
            return self._told(tokens, arguments)
        if (
            layout is not None
            and layout.num_tokens != tokens.shape[1]
            and self._positions > 1
            and self.spec.present == "all"
        ):
            self.skipped += 1
            return None
        places, row = self._places(tokens)
        if places is None or (self.layout is None and not bool((places >= 0).any())):
            self._nothing(tokens, arguments)
            return None
        if layout is None or layout.num_tokens != tokens.shape[1] or (row != layout.row and not _is_far(tokens)):
            layout = self.layout = self._resolve(tokens, places, row, arguments)
        return self._masks(places, layout, arguments)

    def _masks(self, places: Tensor, layout: _Layout, arguments: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        masked = places[:, layout.prefix :] >= 0
        found = self._in_patch_order(places, layout)
        expected = self._expected(layout, arguments, len(places))
        if expected is None:
            if self.spec.argument is not None:
                raise self._error(f"this forward got no argument {self.spec.argument!r}; {_saw(arguments)}")
            expected = found
        elif layout.in_place:
            # A blank patch may equal a mask token of zeros; what equals any other is masked.
            possible = expected | ~self._is_zero()
            masked, found = masked & possible, found & possible
        prefix = places[:, : layout.prefix].ge(0).any().expand(found.shape)
        full = masked if masked.shape == found.shape else found
        return masked, torch.stack([full, found, expected, prefix]), expected

    def _is_zero(self) -> Tensor:
        """Whether a mask token is all zeros: a bool of no dimensions, on its device."""
        zeros = [~token.any() for token in self._mask_tokens()]
        return torch.stack(zeros).any() if zeros else torch.tensor(False)

    def _in_patch_order(self, places: Tensor, layout: _Layout) -> Tensor:
        """Which patches are masked, by the positions of masked tokens, or where these have none by their order."""
        if self._positions == 1:
            return places[:, layout.prefix :] >= 0
        at = torch.where(places >= 0, places % self._positions - layout.offset, layout.num_patches)
        at = torch.where(at < 0, layout.num_patches, at)
        found = places.new_zeros(len(places), layout.num_patches + 1, dtype=torch.bool)
        return found.scatter_(1, at, value=True)[:, : layout.num_patches]

    def _expected(self, layout: _Layout, arguments: Mapping[str, Tensor], batch: int) -> Tensor | None:
        if callable(self.spec.mask):
            return _as_mask(self.spec.mask(), batch)
        if layout.argument is None or layout.argument not in arguments:
            return None
        mask = _as_mask(arguments[layout.argument], batch)
        if mask is None or mask.shape[1] != layout.num_patches:
            return None
        return ~mask if layout.inverted else mask

    # ---- which row a masked token has

    def _places(self, tokens: Tensor) -> tuple[Tensor | None, int]:
        """Rows that tokens equal, of the first candidate that fits, and which one it is."""
        device = tokens.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if half is None and tokens.element_size() == 2:
            half = tokens.dtype
        known = self.layout.row if self.layout is not None else None
        if known is not None:
            candidates = enumerate(rounded_rows(self._rows, self._mask_tokens(), half))
            if (row := next((row for index, row in candidates if index == known), None)) is not None:
                places = find_rows(tokens, row)
                if _is_far(tokens) or bool((places >= 0).any()):
                    return places, known
        most, widths = 0, set()
        chosen: tuple[Tensor | None, int] = None, -1
        for index, row in enumerate(rounded_rows(self._rows, self._mask_tokens(), half)):
            widths.add(row.shape[-1])
            if row.shape[-1] == tokens.shape[-1]:
                row = row[:1] if len(row) > 1 and bool((row == row[:1]).all()) else row  # positions that are all zero
                places = find_rows(tokens, row)
                if (count := int((places >= 0).sum())) > most:
                    most, chosen = count, (places, index)
                    self._positions = self._count_positions(len(row))
        if tokens.shape[-1] not in widths:
            raise self._error(
                f"its masked rows have a width of {sorted(widths)}, its tokens {list(tokens.shape)} one of "
                f"{tokens.shape[-1]}; give the blocks that masked tokens enter"
            )
        return chosen

    def _count_positions(self, rows: int) -> int:
        several = sum(token.numel() // token.shape[-1] for token in self.spec.mask_tokens)
        return rows // several if several and rows % several == 0 else rows

    def _rows(self) -> Iterator[Tensor]:
        """Candidates for masked rows, made one by one: most often the first is the right one."""
        if self.spec.masked_row is not None:
            found = self.spec.masked_row()
            yield from [found] if isinstance(found, Tensor) else found
            return
        vectors = torch.cat([token.reshape(-1, token.shape[-1]) for token in self._mask_tokens()])
        for table in self._tables():
            yield vectors if table is None else with_position(vectors, table)

    def _tables(self) -> list[Tensor | None]:
        """What may be added to the mask token: tables of positions ``num_positions dim``, or nothing."""
        found = self.spec.position() if callable(self.spec.position) else self.spec.position
        tables = [found] if found is None or isinstance(found, Tensor) else [*found, None]
        return [None if table is None else table.reshape(-1, table.shape[-1]) for table in tables]

    @property
    def position(self) -> Tensor | None:
        """What is added to a masked patch for its place, where tokens are in the order of patches.

        Shapes:
            returns: 1 num_patches dim
        """
        layout = self.layout
        if layout is None or not self.in_order or self.spec.masked_row is not None or not self.spec.mask_tokens:
            return None
        tables = self._tables()  # candidates for rows are these, then these with each rounding
        table = tables[layout.row % len(tables)]
        fits = table is not None and len(table) == layout.offset + layout.num_patches
        return table[None, layout.offset :] if table is not None and fits else None

    @property
    def in_order(self) -> bool:
        """Whether tokens are known to be in the order of patches."""
        return self.layout is None or (self.layout.in_place and self.spec.present == "all")

    def _mask_tokens(self) -> list[Tensor]:
        """The learned vectors as they are now: sharded parameters are replaced while a model runs."""
        return [getattr(owner, name) for owner, name in self._token_names] or list(self.spec.mask_tokens)

    # ---- the first forward with masked tokens

    def _resolve(self, tokens: Tensor, places: Tensor, row: int, arguments: Mapping[str, Tensor]) -> _Layout:
        """The layout of tokens from all that is known of it, or an error that says what would settle it."""
        total, positions = tokens.shape[1], self._positions
        told = self._told_by(tokens, arguments)
        rows = {len(value) for value in arguments.values() if value.ndim > 3}
        if not told and positions == 1 and rows and len(tokens) not in rows:
            raise self._error(
                f"its tokens {list(tokens.shape)} are of {min(rows)} images: several images in a row, or windows, "
                "frames or copies of an image; pass mask=... with a function that returns the mask of these rows"
            )
        if self.spec.present == "subset":
            prefix = (self.hint or 0) if self.spec.prefix_tokens == "auto" else self.spec.prefix_tokens
            patches = next(iter(told.values())).shape[1] if told else positions if positions > 1 else total - prefix
        elif self.spec.prefix_tokens != "auto":
            prefix = self.spec.prefix_tokens
            patches = total - prefix
            said = self.hint
            if not told and said not in (None, prefix) and not _is_square(patches) and _is_square(total - (said or 0)):
                raise self._error(
                    f"{prefix} prefix tokens of {total} leave {patches} patches, which are no square, and the model "
                    f"says that it has {said}; pass prefix_tokens={said}, or mask=... with a mask of the patches"
                )
        elif told:
            name, mask = next(iter(told.items()))
            patches = mask.shape[1]
            prefix = total - patches
            if prefix == 0 and self.hint:
                self._refuse_mask_of_all(tokens, name, mask, self.hint)
        else:
            prefix = self._guess_prefix(total, positions, arguments)
            patches = total - prefix
        offset = positions - patches if positions > 1 else 0
        # Positions are for patches alone, for one class token too, or for all prefix tokens.
        fits = self.spec.present == "subset" or offset in {0, 1, prefix}
        if prefix < 0:
            raise self._error(
                f"tokens {list(tokens.shape)} are fewer than its {patches} patches; pass present='subset' where some "
                "are missing"
            )
        if patches < 1 or offset < 0 or not fits:
            raise self._error(
                f"tokens {list(tokens.shape)} with {prefix} prefix tokens are {patches} patches, its masked rows have "
                f"{positions} positions; pass prefix_tokens=..., or present='subset' where some patches are missing"
            )
        layout = _Layout(total, prefix, patches, offset, row)
        if int((places[:, prefix:] >= 0).sum()) != int(self._in_patch_order(places, layout).sum()):
            raise self._error(
                "several masked tokens of an image have one position; pass position=... or masked_row=..., or "
                "suffix_tokens=... where tokens behind those of patches are class tokens or padding"
            )
        self._refuse_shift(layout, places, tokens)
        if positions > 1 and self.spec.present == "all":
            in_place = torch.equal(places[:, prefix:] >= 0, self._in_patch_order(places, layout))
            layout = replace(layout, in_place=in_place)
        for name, mask in told.items():
            if mask.shape[1] == patches:
                # What we ask for is the model's mask only where it got it as it is: noise, say, may give another.
                others = [_as_mask(value, len(places)) for key, value in arguments.items() if key != REQUESTED]
                passed = name != REQUESTED or any(each is not None and _same(each, mask) for each in others)
                if (fit := self._fit(layout, places, name, mask, passed=passed)) is not None:
                    layout = fit
                    break
                if name == self.spec.argument or mask.any(dim=1).all():
                    raise self._disagree(name, mask, self._in_patch_order(places, layout))
            elif name == self.spec.argument or (self.spec.prefix_tokens != "auto" and 0 < total - mask.shape[1] <= 64):
                raise self._error(
                    f"tokens {list(tokens.shape)} with {prefix} prefix tokens are {patches} patches, but the mask in "
                    f"{name!r} has {mask.shape[1]}; pass prefix_tokens={total - mask.shape[1]}"
                )
        if self.spec.argument is not None and layout.argument is None:
            raise self._error(f"no call has an argument {self.spec.argument!r} with a mask; {_saw(arguments)}")
        if layout.argument is None and not callable(self.spec.mask):
            self._refuse_zeros()
        return layout

    def _refuse_mask_of_all(self, tokens: Tensor, name: str, mask: Tensor, hint: int) -> None:
        """A mask as long as the tokens, whose first entries seem to be of class or register tokens."""
        total, first = tokens.shape[1], tokens[:, :hint]
        alike = len(tokens) > 1 and bool((first == first[:1]).all())
        grid = _is_square(total - hint) and not _is_square(total)
        if not bool(mask[:, :hint].any()) and (alike or grid):
            raise self._error(
                f"the mask in {name!r} is of all {total} tokens, and masks none of the first {hint}, which the model "
                f"says to be class or register tokens; pass prefix_tokens={hint}, or 0 where these are patches"
            )

    def _refuse_shift(self, layout: _Layout, places: Tensor, tokens: Tensor) -> None:
        """Masked tokens in order, but not behind the prefix tokens: others are among or after those of patches."""
        if self._positions == 1 and layout.prefix and len(tokens) > 1:
            alike = (tokens == tokens[:1]).all(dim=-1).all(dim=0) & (places < 0).all(dim=0)  # as class tokens are
            if int(alike.sum()) >= layout.prefix and not bool(alike[: layout.prefix].any()):
                raise self._error(
                    f"its tokens {alike.nonzero().flatten().tolist()} are equal in all images, its first are not: "
                    f"class or register tokens {_BEHIND}"
                )
        if self._positions > 1 and self.spec.present == "all":
            slots = torch.arange(places.shape[1], device=places.device).expand_as(places)
            shifts, masked = slots - places % self._positions + layout.offset, places >= 0
            shift = torch.unique(shifts[masked]) - layout.offset
            if len(shift) == 1 and int(shift) != layout.prefix - layout.offset:
                raise self._error(
                    f"masked tokens are {int(shift)} behind their positions, not {layout.prefix - layout.offset}: its "
                    f"class or register tokens {_BEHIND}"
                )
            # Shifts that grow along the tokens, up to the number of prefix tokens: one of these is among the patches.
            # Where visible or masked tokens come first, shifts get smaller.
            grown = torch.where(masked, shifts, -1).cummax(dim=1).values
            within = bool(((shifts >= 0) & (shifts <= layout.prefix))[masked].all())
            if len(shift) > 1 and within and bool((shifts == grown)[masked].all()):
                raise self._error(f"masked tokens are {shift.tolist()} behind their positions: class tokens {_BEHIND}")

    def _fit(self, layout: _Layout, places: Tensor, name: str, mask: Tensor, *, passed: bool) -> _Layout | None:
        """The layout with an argument that tells the same mask, inverted or not."""
        found = self._in_patch_order(places, layout)
        slots = places[:, layout.prefix :] >= 0
        given = self.spec.argument is not None or callable(self.spec.mask) or name == REQUESTED
        for inverted in (self.spec.inverted,) if given else (False, True):
            expected = ~mask if inverted else mask
            fits = replace(layout, argument=name, inverted=inverted)
            in_place = slots.shape == found.shape and torch.equal(slots, found)
            if torch.equal(found, expected):
                return replace(fits, in_place=in_place)
            blank = in_place and passed and bool(self._is_zero()) and bool(expected.any())
            if blank and not bool((expected & ~found).any()):
                return fits  # blank patches that equal the mask token
            shifts = range(places.shape[1] - expected.shape[1] + 1)
            if any(torch.equal(places[:, at : at + expected.shape[1]] >= 0, expected) for at in shifts):
                return None  # in order, but prefix tokens are not in front
            if self._positions == 1 and torch.equal(slots.sum(dim=1), expected.sum(dim=1)):
                return layout  # in another order, and nothing tells which
        return None

    def _told_by(self, tokens: Tensor, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks among the arguments of the running calls, or that of the user."""
        batch, total = len(tokens), tokens.shape[1]
        if callable(self.spec.mask):
            mask = _as_mask(self.spec.mask(), batch)
            if mask is None:
                raise self._error(f"mask gives no bool tensor for {batch} images [batch, num_patches]")
            return {"mask": mask.to(tokens.device)}
        if (name := self.spec.argument) is not None:
            if name not in arguments or (mask := _as_mask(arguments[name], batch)) is None:
                raise self._error(f"no call has an argument {name!r} with a mask of {batch} images; {_saw(arguments)}")
            return {name: mask.to(tokens.device)}
        if REQUESTED in arguments:  # the model's own arguments may hold it in another form
            mask = _as_mask(arguments[REQUESTED], batch)
            return {} if mask is None else {REQUESTED: mask.to(tokens.device)}
        found: dict[str, Tensor] = {}
        if self.spec.mask == "tokens":
            return found
        for name, value in reversed(list(arguments.items())):  # inner calls first: outer ones may be for all views
            if not _MASK_NAME.search(name) or _OTHER_NAME.search(name):
                continue
            mask = _as_mask(value, batch)
            if (
                mask is None
                or not 0 <= total - mask.shape[1] <= _MOST_PREFIX
                or bool(mask.all())
                or not bool(mask.any())
            ):
                continue
            if value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all()):
                found[name] = mask.to(tokens.device)
        return found

    def _guess_prefix(self, total: int, positions: int, arguments: Mapping[str, Tensor]) -> int:
        """Prefix tokens by what the model says of itself; the number of patches must agree with positions or a square.

        Where there are no positions, square patches of that number must fill the images too.
        """
        possible = [prefix for prefix in dict.fromkeys((self.hint or 0, 0)) if total - prefix >= 0]
        if positions > 1:
            # Positions are for patches alone, for one class token too, or for all prefix tokens.
            possible = [prefix for prefix in possible if positions - (total - prefix) in {0, 1, prefix}]
            if total - positions > 0 and self.hint is None:
                possible = [total - positions]
        agreed = [prefix for prefix in possible if total - prefix in self._said_patches]
        if self.hint not in agreed:  # both must agree, or the grid is a square
            images = [value for value in arguments.values() if value.ndim == 4 and value.shape[1] <= _MOST_CHANNELS]
            free = positions > 1 or not images
            squares = [prefix for prefix in possible if _is_square(total - prefix)]
            agreed = [each for each in squares if free or any(_fill(total - each, x) for x in images)] or agreed
        if agreed:
            return agreed[0]
        if possible == [self.hint]:  # the grid is no square, and only one number agrees with the positions
            return possible[0]
        missing = ", or present='subset' where some patches are missing" if total < positions else ""
        raise self._error(
            f"nothing tells how many of its {total} tokens are class or register tokens (its masked rows have "
            f"{positions} positions); pass prefix_tokens=... or suffix_tokens=...{missing}"
        )

    def _refuse_zeros(self) -> None:
        if bool(self._is_zero()):
            raise self._error(
                "its mask token is all zeros, so that blank patches equal it, and no argument holds the mask; "
                "pass mask='argument:NAME' or a function that returns the mask, or initialize the mask token"
            )

    # ---- forwards without a mask, and masks that are only told

    def _nothing(self, tokens: Tensor, arguments: Mapping[str, Tensor]) -> None:
        """No token equals a masked row: no mask, a size that does not fit, or a fault."""
        total = tokens.shape[1]
        if not all(bool(torch.isfinite(token).all()) for token in self._mask_tokens()):
            self.unmasked += 1  # loss() has the message
        elif (sizes := self._sizes()) and not any(0 <= total - n <= _MOST_PREFIX or total + 1 == n for n in sizes):
            self.skipped += 1
        elif told := self._told_by(tokens, arguments):
            name, mask = next(iter(told.items()))
            raise NotEntered(
                f"{self.where}: {name!r} masks {_counts(mask)} patches, but none of its tokens {list(tokens.shape)} "
                "equals the mask token plus a position: dropout changed the mask token, a norm or something unknown "
                "was applied (pass position=... or masked_row=..., or mask='argument:NAME' alone where rows are not "
                "known bit for bit), or it enters other blocks (pass blocks or taps)"
            )
        else:
            self.unmasked += 1

    def _sizes(self) -> list[int]:
        """Numbers of positions of the candidates for masked rows, where all have some."""
        sizes = [len(row) for row in rounded_rows(self._rows, (), None)]
        return [size for size in sizes if size > 1]

    def _told(self, tokens: Tensor, arguments: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
        """The mask as the user tells it, where no masked row is known; masked tokens of one position must be equal."""
        ((_, mask),) = self._told_by(tokens, arguments).items()
        mask = ~mask if self.spec.inverted else mask
        prefix = tokens.shape[1] - mask.shape[1]
        given = self.spec.prefix_tokens
        if prefix < 0 or prefix > _MOST_PREFIX or given not in ("auto", prefix):
            raise self._error(
                f"tokens {list(tokens.shape)} do not fit the mask {list(mask.shape)} with {given} prefix tokens; "
                "pass prefix_tokens=..."
            )
        if self.layout is None:
            self.layout = _Layout(tokens.shape[1], prefix, mask.shape[1])
            if _spread(tokens[:, prefix:], mask) != 0:
                if _spread(tokens[:, prefix:], ~mask) == 0:
                    raise self._error(
                        "tokens that the mask calls visible are equal at one position in all images, those that it "
                        "calls masked are not: it is inverted: pass 'argument:~NAME' or the opposite mask"
                    )
                if given == "auto" and prefix not in (0, self.hint):
                    raise self._error(
                        f"{prefix} of its tokens {list(tokens.shape)} are beside the {mask.shape[1]} patches of the "
                        "mask, and nothing tells which; pass prefix_tokens=..., or suffix_tokens=..."
                    )
                self.doubts.append(
                    f"{self.where}: the mask could not be verified, as masked tokens differ at one position between "
                    "images (dropout?) or no position is masked twice; mask_token=... and position=... would verify it"
                )
        prefix_masked = torch.zeros_like(mask)
        return mask, torch.stack([mask, mask, mask, prefix_masked]), mask

    # ---- messages

    def _error(self, what: str) -> StackError:
        return StackError(f"{self.where}: {what}")

    def _disagree(self, name: str, expected: Tensor, found: Tensor) -> StackError:
        inverted = "; it is inverted: pass mask='argument:~...'" if torch.equal(~expected, found) else ""
        return self._error(
            f"the mask in {name!r} masks {_counts(expected)} of {expected.shape[1]} patches, but tokens that equal the "
            f"mask token are {_counts(found)}, or others{inverted}; pass mask=..., prefix_tokens=..., "
            "suffix_tokens=... or position=... "
            f"(mask='tokens' where {name!r} is something else)"
        )


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _fill(count: int, images: Tensor) -> bool:
    """Whether so many square patches fill images."""
    height, width = images.shape[-2:]
    side = math.isqrt(height * width // count)
    return side > 0 and height % side == 0 and width % side == 0 and height * width == count * side**2


def _as_mask(value: Tensor, batch: int) -> Tensor | None:
    """A mask ``batch num_patches`` from one with axes of a grid, or of numbers."""
    if value.ndim < 2 or len(value) != batch:
        return None
    return value.detach().flatten(1).bool()


def _same(mask: Tensor, other: Tensor) -> bool:
    return mask.shape == other.shape and torch.equal(mask.to(other.device), other)


def _spread(tokens: Tensor, mask: Tensor) -> float | None:
    """How far tokens of a kind differ from each other at one position; ``None`` where no position has two."""
    chosen = mask & (mask.sum(dim=0) > 1)
    if not bool(chosen.any()):
        return None
    x = tokens.detach().float()
    weight = chosen.unsqueeze(-1).float()
    top = x.masked_fill(weight == 0, float("-inf")).amax(dim=0)
    low = x.masked_fill(weight == 0, float("inf")).amin(dim=0)
    return float((top - low)[chosen.any(dim=0)].max())


def _counts(mask: Tensor) -> str:
    counts = mask.sum(dim=1)
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def _saw(arguments: Mapping[str, Tensor]) -> str:
    seen = ", ".join(f"{name} {list(value.shape)}" for name, value in arguments.items())
    return f"seen: {seen}" if seen else "no argument was seen (is the model called by other methods than forward?)"
