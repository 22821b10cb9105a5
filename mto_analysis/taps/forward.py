"""Which tokens of a running forward are masked, and the checks of that."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from mto_analysis.errors import StackError
from mto_analysis.taps import rows
from mto_analysis.taps.layout import MOST_PREFIX, Layout, LayoutFinder, counts_in_words, seen_in_words
from mto_analysis.taps.rows import MaskedRows
from mto_analysis.taps.search import path_of
from mto_analysis.taps.stacks import Found, StackSpec


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
        usual = stack.usual if stack.may_assume and rows.is_far(mask) else None
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
        self.layout: Layout | None = None
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
        self.doubts: list[str] = []  # what could not be verified, to be said once
        self.skipped = 0  # forwards of a size that does not fit
        self.unmasked = 0  # forwards in which no token is masked
        paths = [path_of(model, token) for token in spec.mask_tokens]
        self.token_path = ", ".join(paths) or "no mask token"
        self.first_path, self.last_path = (path_of(model, spec.points[at][0]) for at in (0, -1))
        self.where = f"{spec.name} ({self.token_path} into {self.first_path})"
        self._rows = MaskedRows(model, spec, paths, self.where)
        self._finder = LayoutFinder(model, spec, self._rows, self.where)

    def orient(self, tokens: Tensor, arguments: Mapping[str, Tensor]) -> None:
        """Find out whether tokens are ``num_tokens batch dim``, from the number of images in the call."""
        batches = {len(value) for value in arguments.values() if value.ndim > 2}
        if callable(self.spec.mask):
            batches = {len(self.spec.mask())}
        first, second = tokens.shape[:2]
        self._transposed = self._may_be_transposed and batches == {second} and first != second
        if not self._surely_batch_first and not self._transposed and (batches != {first} or first == second):
            raise self._finder.error(
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
            raise self._finder.error(
                f"one of its first {self.layout and self.layout.prefix} tokens is masked, so these are "
                "not class or register tokens; pass prefix_tokens=..."
            )
        layout = self.layout
        if layout is not None and layout.argument is not None and not torch.equal(found, expected):
            raise self._finder.disagree(layout.argument, expected, found)
        return mask

    def _find(self, tokens: Tensor, arguments: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
        """The mask in the order of the tokens, what is to be checked of it, and the mask in the order of patches."""
        layout = self.layout
        if not self.spec.mask_tokens and self.spec.masked_row is None:
            mask, self.layout, doubts = self._finder.told_alone(tokens, arguments, layout)
            self.doubts += doubts
            return mask, torch.stack([mask, mask, mask, torch.zeros_like(mask)]), mask
        if (
            layout is not None
            and layout.num_tokens != tokens.shape[1]
            and self._rows.positions > 1
            and self.spec.present == "all"
        ):
            self.skipped += 1
            return None
        places, row = self._rows.find(tokens, None if layout is None else layout.row)
        if places is None or (self.layout is None and not bool((places >= 0).any())):
            self._nothing(tokens, arguments)
            return None
        if layout is None or layout.num_tokens != tokens.shape[1] or (row != layout.row and not rows.is_far(tokens)):
            layout = self.layout = self._finder.find(tokens, places, row, arguments)
        return self._masks(places, layout, arguments)

    def _masks(self, places: Tensor, layout: Layout, arguments: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        masked = places[:, layout.prefix :] >= 0
        found = layout.in_patch_order(places, self._rows.positions)
        expected = self._finder.expected(layout, arguments, len(places))
        if expected is None:
            if self.spec.argument is not None:
                raise self._finder.error(
                    f"this forward got no argument {self.spec.argument!r}; {seen_in_words(arguments)}"
                )
            expected = found
        elif layout.in_place:
            # A blank patch may equal a mask token of zeros; what equals any other is masked.
            possible = expected | ~self._rows.is_zero()
            masked, found = masked & possible, found & possible
        prefix = places[:, : layout.prefix].ge(0).any().expand(found.shape)
        full = masked if masked.shape == found.shape else found
        return masked, torch.stack([full, found, expected, prefix]), expected

    @property
    def position(self) -> Tensor | None:
        """What is added to a masked patch for its place, where tokens are in the order of patches.

        Shapes:
            returns: 1 num_patches dim
        """
        layout = self.layout
        if layout is None or not self.in_order or self.spec.masked_row is not None or not self.spec.mask_tokens:
            return None
        tables = self._rows.tables()  # candidates for rows are these, then these with each rounding
        table = tables[layout.row % len(tables)]
        fits = table is not None and len(table) == layout.offset + layout.num_patches
        return table[None, layout.offset :] if table is not None and fits else None

    @property
    def in_order(self) -> bool:
        """Whether tokens are known to be in the order of patches."""
        return self.layout is None or (self.layout.in_place and self.spec.present == "all")

    def _nothing(self, tokens: Tensor, arguments: Mapping[str, Tensor]) -> None:
        """No token equals a masked row: no mask, a size that does not fit, or a fault."""
        total = tokens.shape[1]
        if not all(bool(torch.isfinite(token).all()) for token in self._rows.mask_tokens()):
            self.unmasked += 1  # loss() has the message
        elif (sizes := self._rows.sizes()) and not any(0 <= total - n <= MOST_PREFIX or total + 1 == n for n in sizes):
            self.skipped += 1
        elif told := self._finder.told_by(tokens, arguments):
            name, mask = next(iter(told.items()))
            raise NotEntered(
                f"{self.where}: {name!r} masks {counts_in_words(mask)} patches, but none of its tokens "
                f"{list(tokens.shape)} equals the mask token plus a position: dropout changed the mask token, a norm "
                "or something unknown was applied (pass position=... or masked_row=..., or mask='argument:NAME' alone "
                "where rows are not known bit for bit), or it enters other blocks (pass blocks or taps)"
            )
        else:
            self.unmasked += 1
