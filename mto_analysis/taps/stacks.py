"""What a stack is, and the tokens among what its modules take and give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from mto_analysis.errors import StackError

#: A point where tokens are read: a module's input or its output.
Tap = tuple[nn.Module, Literal["input", "output"]]


@dataclass(frozen=True)
class StackSpec:
    """A stack of blocks through which masked and visible tokens pass together, and how its masked tokens are known.

    Give ``blocks`` or ``taps``, and at least one of ``mask_token``, ``masked_row`` and ``mask``. Where both tokens and
    ``mask`` are given, each verifies the other.

    Args:
        name: For logs: ``encoder``, ``decoder``, ``pixel_decoder`` ...
        blocks: In the order they run; each takes tokens ``batch num_tokens dim`` (or ``batch height width dim``) and
            returns them, or a tuple that starts with them. The number of tokens may shrink by merging (Swin).
        taps: Instead of ``blocks``, for models that add residuals outside of modules: the points where tokens of layer
            depth 0, 1, ... are read, ``(module, "input")`` or ``(module, "output")``.
        mask_token: The learned vector, or several of them.
        position: What is added to the mask token, ``num_positions dim`` or a function that returns it, or several of
            which one fits or none; nothing by default. It may hold rows for prefix tokens before those for patches.
        masked_row: Instead of ``mask_token`` plus ``position``: a function that returns what a masked token is where
            it enters the stack, ``num_positions dim`` or anything that reshapes to it; or several such.
        mask: The mask of the running forward, True = masked: a function that returns it, ``batch num_patches`` in the
            order of the tokens, or an argument of the caller, ``"argument:bool_masked_pos"``, inverted
            ``"argument:~visible"``; or ``"tokens"`` alone, where an argument that looks like a mask is something else.
        prefix_tokens: Class and register tokens in front of the patch tokens; ``"auto"`` finds their number.
        suffix_tokens: Tokens behind those of patches: class or register tokens, padding.
        present: ``"all"`` patches are among the tokens, or a ``"subset"`` of them, in any order (predictors).

    Raises:
        ValueError: If these do not fit together.
    """

    name: str
    blocks: Sequence[nn.Module] = ()
    mask_token: nn.Parameter | Sequence[nn.Parameter] | None = None
    prefix_tokens: int | Literal["auto"] = "auto"
    masked_row: Callable[[], Tensor | Sequence[Tensor]] | None = None
    mask: Callable[[], Tensor] | str | None = None
    taps: Sequence[Tap] = ()
    position: Tensor | Callable[[], Tensor | Sequence[Tensor]] | None = None
    present: Literal["all", "subset"] = "all"
    suffix_tokens: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if (len(self.blocks) == 0) == (len(self.taps) == 0):
            raise ValueError(f"stack {self.name} needs blocks or taps, one of them")
        if len(self.taps) == 1 or any(where not in ("input", "output") for _, where in self.taps):
            raise ValueError(f"stack {self.name} needs two taps or more, each (module, 'input') or (module, 'output')")
        for block in self.blocks:
            # A list is never called, and the output of a lone layer is a branch, to which a residual is added later.
            if isinstance(block, (nn.ModuleList, nn.ModuleDict)) or (len(self.blocks) == 1 and _is_layer(block)):
                raise ValueError(
                    f"stack {self.name} has a {type(block).__name__} among its blocks, which does not return whole "
                    "tokens; pass taps=[(module, 'input' or 'output'), ...] at the points where tokens are whole"
                )
        if self.prefix_tokens != "auto" and (isinstance(self.prefix_tokens, str) or self.prefix_tokens < 0):
            raise ValueError(
                f"stack {self.name} needs prefix_tokens of at least 0, or 'auto', got {self.prefix_tokens}"
            )
        if self.suffix_tokens < 0:
            raise ValueError(f"stack {self.name} needs suffix_tokens of at least 0, got {self.suffix_tokens}")
        if self.mask_token is None and self.masked_row is None and self.mask in (None, "tokens"):
            raise ValueError(f"stack {self.name} needs mask_token, masked_row or mask")
        if isinstance(self.mask, str) and not self.argument and self.mask != "tokens":
            raise ValueError(
                f"mask of stack {self.name} must be 'argument:NAME', 'argument:~NAME' or 'tokens', got {self.mask!r}"
            )
        if any(token.ndim > 1 and token.shape[-1] == 1 < token.numel() for token in self.mask_tokens):
            raise ValueError(
                f"mask_token of stack {self.name} has channels first, as of maps [batch, channels, height, width], "
                "which are not followed: give masked_row=... and taps=[...] where tokens have their width last"
            )
        if self.present not in ("all", "subset"):
            raise ValueError(f"present of stack {self.name} must be 'all' or 'subset', got {self.present!r}")

    @property
    def points(self) -> list[Tap]:
        """Where the tokens of layer depth 0, 1, ... are read."""
        if self.taps:
            return list(self.taps)
        return [(self.blocks[0], "input"), *((block, "output") for block in self.blocks)]

    @property
    def depth(self) -> int:
        """The last layer depth."""
        return len(self.taps) - 1 if self.taps else len(self.blocks)

    @property
    def argument(self) -> str | None:
        """Name of the argument that holds the mask, where ``mask`` names one."""
        if not isinstance(self.mask, str) or not self.mask.startswith("argument:"):
            return None
        return self.mask.removeprefix("argument:").removeprefix("~") or None

    @property
    def inverted(self) -> bool:
        """Whether True means visible in that argument."""
        return isinstance(self.mask, str) and self.mask.startswith("argument:~")

    @property
    def mask_tokens(self) -> tuple[nn.Parameter, ...]:
        """The learned vectors."""
        if self.mask_token is None:
            return ()
        return (self.mask_token,) if isinstance(self.mask_token, Tensor) else tuple(self.mask_token)


def _is_layer(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and any(True for _ in module.parameters())


class NoTokens(StackError):
    """A module took or gave nothing that can be tokens."""


class Found(NamedTuple):
    """Tokens among the arguments of a module, or in what it returned.

    Attributes:
        tokens: As they are there.
        others: More tensors of that shape.
        version: Counts changes in place; ``None`` in inference mode, where nothing does.
    """

    tokens: Tensor
    others: tuple[Tensor, ...] = ()
    version: int | None = None

    @property
    def flat(self) -> Tensor:
        """``batch num_tokens dim``, also where tokens have axes of a grid."""
        return self.tokens if self.tokens.ndim == 3 else self.tokens.flatten(1, -2)

    @property
    def grid(self) -> tuple[int, ...] | None:
        """Axes of a grid, if tokens have some."""
        return None if self.tokens.ndim == 3 else tuple(self.tokens.shape[1:-1])

    @property
    def changed(self) -> bool:
        """Whether the tokens were changed in place since they were found."""
        return self.version != version_of(self.tokens)

    def kept(self) -> Found:
        """To be compared later: as it is, or a copy where changes in place are not counted."""
        return self if self.version is not None else self._replace(tokens=self.tokens.clone())


def version_of(tokens: Tensor) -> int | None:
    """Counts changes in place, where torch does."""
    return None if tokens.is_inference() else tokens._version


def find_tokens(values: Any, before: Tensor | None = None) -> Found:
    """Tokens among the arguments of a module or in what it returned: a floating tensor of 3 to 5 dimensions.

    The first; but for one whose shape is that of the tokens before where the first (attention weights, say) has as many
    tokens or more.
    """
    tensors = [each for each in _tensors(values) if each.is_floating_point() and 3 <= each.ndim <= 5]
    if not tensors:
        raise NoTokens("a tap holds no tokens [batch, num_tokens, dim]; pass taps=[(module, 'input' or 'output'), ...]")
    chosen = tensors[0]
    if len(tensors) == 1:
        return Found(chosen, version=version_of(chosen))
    alike = [each for each in tensors if each.shape == (chosen if before is None else before).shape]
    if alike and chosen.shape != alike[0].shape and math.prod(chosen.shape[1:-1]) >= math.prod(alike[0].shape[1:-1]):
        chosen = alike[0]
    return Found(chosen, tuple(each for each in alike if each is not chosen), version_of(chosen))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list, Mapping)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _tensors(value)
