"""How the tokens of a stack lie, and which are masked: found from all that tells it, or refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mto_analysis.errors import StackError
from mto_analysis.taps.rows import MaskedRows
from mto_analysis.taps.search import hinted_patches, hinted_prefix
from mto_analysis.taps.stacks import StackSpec

#: More prefix tokens than any published model has; beyond, the size of a forward does not fit.
MOST_PREFIX = 64

_BEHIND = "are not in front of the patches; pass suffix_tokens=... where they are behind, among them they cannot be"

# More first axes are those of a grid of tokens, not of images.
_MOST_CHANNELS = 4

#: Name of a mask that we ask a model for, among the arguments of its call.
REQUESTED = "requested mask"

# Arguments whose name says that they tell masked patches from visible ones, and those that say something else.
_MASK_NAME = re.compile(r"mask|visible|keep", re.IGNORECASE)
_OTHER_NAME = re.compile(r"att|pad|head|key|causal|ratio|(^|_)ids?(_|$)|token|noise|loss", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
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

    def in_patch_order(self, places: Tensor, positions: int) -> Tensor:
        """Which patches are masked, by the positions of masked tokens, or where these have none by their order."""
        if positions == 1:
            return places[:, self.prefix :] >= 0
        at = torch.where(places >= 0, places % positions - self.offset, self.num_patches)
        at = torch.where(at < 0, self.num_patches, at)
        found = places.new_zeros(len(places), self.num_patches + 1, dtype=torch.bool)
        return found.scatter_(1, at, value=True)[:, : self.num_patches]


class LayoutFinder:
    """Finds the layout of a stack's tokens, and its mask in the arguments of the running calls.

    Args:
        model: Around the stack.
        spec: The stack.
        rows: What its masked tokens may be.
        where: The stack, for messages.
    """

    def __init__(self, model: nn.Module, spec: StackSpec, rows: MaskedRows, where: str) -> None:
        self._spec, self._rows, self._where = spec, rows, where
        self._said_patches = hinted_patches(model)
        self._hint = hinted_prefix(model, [*spec.mask_tokens, *(module for module, _ in spec.points[:1])])

    def find(self, tokens: Tensor, places: Tensor, row: int, arguments: Mapping[str, Tensor]) -> Layout:
        """The layout of tokens from all that is known of it, or an error that says what would settle it."""
        total, positions = tokens.shape[1], self._rows.positions
        told = self.told_by(tokens, arguments)
        rows = {len(value) for value in arguments.values() if value.ndim > 3}
        if not told and positions == 1 and rows and len(tokens) not in rows:
            raise self.error(
                f"its tokens {list(tokens.shape)} are of {min(rows)} images: several images in a row, or windows, "
                "frames or copies of an image; pass mask=... with a function that returns the mask of these rows"
            )
        prefix, patches = self._sizes(tokens, told, arguments)
        offset = positions - patches if positions > 1 else 0
        # Positions are for patches alone, for one class token too, or for all prefix tokens.
        fits = self._spec.present == "subset" or offset in {0, 1, prefix}
        if prefix < 0:
            raise self.error(
                f"tokens {list(tokens.shape)} are fewer than its {patches} patches; pass present='subset' where some "
                "are missing"
            )
        if patches < 1 or offset < 0 or not fits:
            raise self.error(
                f"tokens {list(tokens.shape)} with {prefix} prefix tokens are {patches} patches, its masked rows have "
                f"{positions} positions; pass prefix_tokens=..., or present='subset' where some patches are missing"
            )
        layout = Layout(total, prefix, patches, offset, row)
        if int((places[:, prefix:] >= 0).sum()) != int(layout.in_patch_order(places, self._rows.positions).sum()):
            raise self.error(
                "several masked tokens of an image have one position; pass position=... or masked_row=..., or "
                "suffix_tokens=... where tokens behind those of patches are class tokens or padding"
            )
        self._refuse_shift(layout, places, tokens)
        if positions > 1 and self._spec.present == "all":
            in_place = torch.equal(places[:, prefix:] >= 0, layout.in_patch_order(places, self._rows.positions))
            layout = replace(layout, in_place=in_place)
        for name, mask in told.items():
            if mask.shape[1] == patches:
                # What we ask for is the model's mask only where it got it as it is: noise, say, may give another.
                others = [_as_mask(value, len(places)) for key, value in arguments.items() if key != REQUESTED]
                passed = name != REQUESTED or any(each is not None and _same(each, mask) for each in others)
                if (fit := self._fit(layout, places, name, mask, passed=passed)) is not None:
                    layout = fit
                    break
                if name == self._spec.argument or mask.any(dim=1).all():
                    raise self.disagree(name, mask, layout.in_patch_order(places, self._rows.positions))
            elif name == self._spec.argument or (
                self._spec.prefix_tokens != "auto" and 0 < total - mask.shape[1] <= 64
            ):
                raise self.error(
                    f"tokens {list(tokens.shape)} with {prefix} prefix tokens are {patches} patches, but the mask in "
                    f"{name!r} has {mask.shape[1]}; pass prefix_tokens={total - mask.shape[1]}"
                )
        if self._spec.argument is not None and layout.argument is None:
            raise self.error(f"no call has an argument {self._spec.argument!r} with a mask; {seen_in_words(arguments)}")
        if layout.argument is None and not callable(self._spec.mask):
            self._refuse_zeros()
        return layout

    def _sizes(self, tokens: Tensor, told: Mapping[str, Tensor], arguments: Mapping[str, Tensor]) -> tuple[int, int]:
        """Numbers of prefix tokens and of patches: as the user gives them, as the mask tells, or guessed."""
        total, positions = tokens.shape[1], self._rows.positions
        if self._spec.present == "subset":
            prefix = (self._hint or 0) if self._spec.prefix_tokens == "auto" else self._spec.prefix_tokens
            known = positions if positions > 1 else total - prefix
            return prefix, next(iter(told.values())).shape[1] if told else known
        if self._spec.prefix_tokens != "auto":
            prefix = self._spec.prefix_tokens
            patches = total - prefix
            said = self._hint
            if not told and said not in (None, prefix) and not _is_square(patches) and _is_square(total - (said or 0)):
                raise self.error(
                    f"{prefix} prefix tokens of {total} leave {patches} patches, which are no square, and the model "
                    f"says that it has {said}; pass prefix_tokens={said}, or mask=... with a mask of the patches"
                )
            return prefix, patches
        if told:
            name, mask = next(iter(told.items()))
            patches = mask.shape[1]
            prefix = total - patches
            if prefix == 0 and self._hint:
                self._refuse_mask_of_all(tokens, name, mask, self._hint)
            return prefix, patches
        prefix = self._guess_prefix(total, positions, arguments)
        return prefix, total - prefix

    def _refuse_mask_of_all(self, tokens: Tensor, name: str, mask: Tensor, hint: int) -> None:
        """A mask as long as the tokens, whose first entries seem to be of class or register tokens."""
        total, first = tokens.shape[1], tokens[:, :hint]
        alike = len(tokens) > 1 and bool((first == first[:1]).all())
        grid = _is_square(total - hint) and not _is_square(total)
        if not bool(mask[:, :hint].any()) and (alike or grid):
            raise self.error(
                f"the mask in {name!r} is of all {total} tokens, and masks none of the first {hint}, which the model "
                f"says to be class or register tokens; pass prefix_tokens={hint}, or 0 where these are patches"
            )

    def _refuse_shift(self, layout: Layout, places: Tensor, tokens: Tensor) -> None:
        """Masked tokens in order, but not behind the prefix tokens: others are among or after those of patches."""
        if self._rows.positions == 1 and layout.prefix and len(tokens) > 1:
            alike = (tokens == tokens[:1]).all(dim=-1).all(dim=0) & (places < 0).all(dim=0)  # as class tokens are
            if int(alike.sum()) >= layout.prefix and not bool(alike[: layout.prefix].any()):
                raise self.error(
                    f"its tokens {alike.nonzero().flatten().tolist()} are equal in all images, its first are not: "
                    f"class or register tokens {_BEHIND}"
                )
        if self._rows.positions > 1 and self._spec.present == "all":
            slots = torch.arange(places.shape[1], device=places.device).expand_as(places)
            shifts, masked = slots - places % self._rows.positions + layout.offset, places >= 0
            shift = torch.unique(shifts[masked]) - layout.offset
            if len(shift) == 1 and int(shift) != layout.prefix - layout.offset:
                raise self.error(
                    f"masked tokens are {int(shift)} behind their positions, not {layout.prefix - layout.offset}: its "
                    f"class or register tokens {_BEHIND}"
                )
            # Shifts that grow along the tokens, up to the number of prefix tokens: one of these is among the patches.
            # Where visible or masked tokens come first, shifts get smaller.
            grown = torch.where(masked, shifts, -1).cummax(dim=1).values
            within = bool(((shifts >= 0) & (shifts <= layout.prefix))[masked].all())
            if len(shift) > 1 and within and bool((shifts == grown)[masked].all()):
                raise self.error(f"masked tokens are {shift.tolist()} behind their positions: class tokens {_BEHIND}")

    def _fit(self, layout: Layout, places: Tensor, name: str, mask: Tensor, *, passed: bool) -> Layout | None:
        """The layout with an argument that tells the same mask, inverted or not."""
        found = layout.in_patch_order(places, self._rows.positions)
        slots = places[:, layout.prefix :] >= 0
        given = self._spec.argument is not None or callable(self._spec.mask) or name == REQUESTED
        for inverted in (self._spec.inverted,) if given else (False, True):
            expected = ~mask if inverted else mask
            fits = replace(layout, argument=name, inverted=inverted)
            in_place = slots.shape == found.shape and torch.equal(slots, found)
            if torch.equal(found, expected):
                return replace(fits, in_place=in_place)
            blank = in_place and passed and bool(self._rows.is_zero()) and bool(expected.any())
            if blank and not bool((expected & ~found).any()):
                return fits  # blank patches that equal the mask token
            shifts = range(places.shape[1] - expected.shape[1] + 1)
            if any(torch.equal(places[:, at : at + expected.shape[1]] >= 0, expected) for at in shifts):
                return None  # in order, but prefix tokens are not in front
            if self._rows.positions == 1 and torch.equal(slots.sum(dim=1), expected.sum(dim=1)):
                return layout  # in another order, and nothing tells which
        return None

    def told_by(self, tokens: Tensor, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks among the arguments of the running calls, or that of the user."""
        batch, total = len(tokens), tokens.shape[1]
        if callable(self._spec.mask):
            mask = _as_mask(self._spec.mask(), batch)
            if mask is None:
                raise self.error(f"mask gives no bool tensor for {batch} images [batch, num_patches]")
            return {"mask": mask.to(tokens.device)}
        if (name := self._spec.argument) is not None:
            if name not in arguments or (mask := _as_mask(arguments[name], batch)) is None:
                seen = seen_in_words(arguments)
                raise self.error(f"no call has an argument {name!r} with a mask of {batch} images; {seen}")
            return {name: mask.to(tokens.device)}
        if REQUESTED in arguments:  # the model's own arguments may hold it in another form
            mask = _as_mask(arguments[REQUESTED], batch)
            return {} if mask is None else {REQUESTED: mask.to(tokens.device)}
        found: dict[str, Tensor] = {}
        if self._spec.mask == "tokens":
            return found
        for name, value in reversed(list(arguments.items())):  # inner calls first: outer ones may be for all views
            if not _MASK_NAME.search(name) or _OTHER_NAME.search(name):
                continue
            mask = _as_mask(value, batch)
            if (
                mask is None
                or not 0 <= total - mask.shape[1] <= MOST_PREFIX
                or bool(mask.all())
                or not bool(mask.any())
            ):
                continue
            if value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all()):
                found[name] = mask.to(tokens.device)
        return found

    def expected(self, layout: Layout, arguments: Mapping[str, Tensor], batch: int) -> Tensor | None:
        """The mask that the arguments of a call hold, in the order of patches, where the layout is known."""
        if callable(self._spec.mask):
            return _as_mask(self._spec.mask(), batch)
        if layout.argument is None or layout.argument not in arguments:
            return None
        mask = _as_mask(arguments[layout.argument], batch)
        if mask is None or mask.shape[1] != layout.num_patches:
            return None
        return ~mask if layout.inverted else mask

    def told_alone(
        self, tokens: Tensor, arguments: Mapping[str, Tensor], layout: Layout | None
    ) -> tuple[Tensor, Layout, list[str]]:
        """The mask as the user tells it, where no masked row is known; the layout; and what could not be verified.

        Masked tokens of one position must be equal in all images.
        """
        ((_, mask),) = self.told_by(tokens, arguments).items()
        mask = ~mask if self._spec.inverted else mask
        prefix = tokens.shape[1] - mask.shape[1]
        given = self._spec.prefix_tokens
        if prefix < 0 or prefix > MOST_PREFIX or given not in ("auto", prefix):
            raise self.error(
                f"tokens {list(tokens.shape)} do not fit the mask {list(mask.shape)} with {given} prefix tokens; "
                "pass prefix_tokens=..."
            )
        doubts = []
        if layout is None:
            layout = Layout(tokens.shape[1], prefix, mask.shape[1])
            if _spread(tokens[:, prefix:], mask) != 0:
                if _spread(tokens[:, prefix:], ~mask) == 0:
                    raise self.error(
                        "tokens that the mask calls visible are equal at one position in all images, those that it "
                        "calls masked are not: it is inverted: pass 'argument:~NAME' or the opposite mask"
                    )
                if given == "auto" and prefix not in (0, self._hint):
                    raise self.error(
                        f"{prefix} of its tokens {list(tokens.shape)} are beside the {mask.shape[1]} patches of the "
                        "mask, and nothing tells which; pass prefix_tokens=..., or suffix_tokens=..."
                    )
                doubts.append(
                    f"{self._where}: the mask could not be verified, as masked tokens differ at one position between "
                    "images (dropout?) or no position is masked twice; mask_token=... and position=... would verify it"
                )
        return mask, layout, doubts

    def _guess_prefix(self, total: int, positions: int, arguments: Mapping[str, Tensor]) -> int:
        """Prefix tokens by what the model says of itself; the number of patches must agree with positions or a square.

        Where there are no positions, square patches of that number must fill the images too.
        """
        possible = [prefix for prefix in dict.fromkeys((self._hint or 0, 0)) if total - prefix >= 0]
        if positions > 1:
            # Positions are for patches alone, for one class token too, or for all prefix tokens.
            possible = [prefix for prefix in possible if positions - (total - prefix) in {0, 1, prefix}]
            if total - positions > 0 and self._hint is None:
                possible = [total - positions]
        agreed = [prefix for prefix in possible if total - prefix in self._said_patches]
        if self._hint not in agreed:  # both must agree, or the grid is a square
            images = [value for value in arguments.values() if value.ndim == 4 and value.shape[1] <= _MOST_CHANNELS]
            free = positions > 1 or not images
            squares = [prefix for prefix in possible if _is_square(total - prefix)]
            agreed = [each for each in squares if free or any(_fill(total - each, x) for x in images)] or agreed
        if agreed:
            return agreed[0]
        if possible == [self._hint]:  # the grid is no square, and only one number agrees with the positions
            return possible[0]
        missing = ", or present='subset' where some patches are missing" if total < positions else ""
        raise self.error(
            f"nothing tells how many of its {total} tokens are class or register tokens (its masked rows have "
            f"{positions} positions); pass prefix_tokens=... or suffix_tokens=...{missing}"
        )

    def _refuse_zeros(self) -> None:
        if bool(self._rows.is_zero()):
            raise self.error(
                "its mask token is all zeros, so that blank patches equal it, and no argument holds the mask; "
                "pass mask='argument:NAME' or a function that returns the mask, or initialize the mask token"
            )

    def error(self, what: str) -> StackError:
        """What is wrong with the stack."""
        return StackError(f"{self._where}: {what}")

    def disagree(self, name: str, expected: Tensor, found: Tensor) -> StackError:
        """An argument and the tokens tell different masks."""
        inverted = "; it is inverted: pass mask='argument:~...'" if torch.equal(~expected, found) else ""
        masked = f"{counts_in_words(expected)} of {expected.shape[1]} patches"
        return self.error(
            f"the mask in {name!r} masks {masked}, but tokens that equal the mask token are {counts_in_words(found)}, "
            f"or others{inverted}; pass mask=..., prefix_tokens=..., suffix_tokens=... or position=... "
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


def counts_in_words(mask: Tensor) -> str:
    """How many patches of each image are masked."""
    counts = mask.sum(dim=1)
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def seen_in_words(arguments: Mapping[str, Tensor]) -> str:
    """Which arguments a call had."""
    seen = ", ".join(f"{name} {list(value.shape)}" for name, value in arguments.items())
    return f"seen: {seen}" if seen else "no argument was seen (is the model called by other methods than forward?)"
