"""Which rows masked tokens may have where they enter a stack, and where tokens equal such a row.

A masked token that enters a stack is the mask token plus, in most models, a position. So tokens that equal that sum bit
for bit, for any position, are the masked ones: in every code base, whatever form the caller's own mask has and in
whatever order the tokens are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from mto_analysis.errors import StackError
from mto_analysis.taps.stacks import StackSpec


def is_far(tokens: Tensor) -> bool:
    """Whether to ask for a value is to wait for a device."""
    return tokens.is_cuda


class MaskedRows:
    """What the masked tokens of one stack may be: its mask token with each position, and with each rounding.

    Args:
        model: Around the stack.
        spec: The stack.
        paths: Of its mask tokens in the model.
        where: The stack, for messages.
    """

    def __init__(self, model: nn.Module, spec: StackSpec, paths: Sequence[str], where: str) -> None:
        self._spec, self._where = spec, where
        self.positions = 1  # rows of one mask token, of the candidate that fits
        owners = [path.rpartition(".") for path in paths] if "?" not in paths else []
        self._names = [(model.get_submodule(owner), name) for owner, _, name in owners]

    def find(self, tokens: Tensor, known: int | None) -> tuple[Tensor | None, int]:
        """Rows that tokens equal, of the known candidate or the first that fits, and which one it is."""
        device = tokens.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if half is None and tokens.element_size() == 2:
            half = tokens.dtype
        if known is not None:
            candidates = enumerate(rounded_rows(self._candidates, self.mask_tokens(), half))
            if (row := next((row for index, row in candidates if index == known), None)) is not None:
                places = find_rows(tokens, row)
                if is_far(tokens) or bool((places >= 0).any()):
                    return places, known
        most, widths = 0, set()
        chosen: tuple[Tensor | None, int] = None, -1
        for index, row in enumerate(rounded_rows(self._candidates, self.mask_tokens(), half)):
            widths.add(row.shape[-1])
            if row.shape[-1] == tokens.shape[-1]:
                row = row[:1] if len(row) > 1 and bool((row == row[:1]).all()) else row  # positions that are all zero
                places = find_rows(tokens, row)
                if (count := int((places >= 0).sum())) > most:
                    most, chosen = count, (places, index)
                    self.positions = self._count_positions(len(row))
        if tokens.shape[-1] not in widths:
            raise StackError(
                f"{self._where}: its masked rows have a width of {sorted(widths)}, its tokens {list(tokens.shape)} "
                f"one of {tokens.shape[-1]}; give the blocks that masked tokens enter"
            )
        return chosen

    def _count_positions(self, rows: int) -> int:
        several = sum(token.numel() // token.shape[-1] for token in self._spec.mask_tokens)
        return rows // several if several and rows % several == 0 else rows

    def sizes(self) -> list[int]:
        """Numbers of positions of the candidates, where all have some."""
        return [len(row) for row in rounded_rows(self._candidates, (), None) if len(row) > 1]

    def _candidates(self) -> Iterator[Tensor]:
        """Candidates for masked rows, made one by one: most often the first is the right one."""
        if self._spec.masked_row is not None:
            found = self._spec.masked_row()
            yield from [found] if isinstance(found, Tensor) else found
            return
        vectors = torch.cat([token.reshape(-1, token.shape[-1]) for token in self.mask_tokens()])
        for table in self.tables():
            yield vectors if table is None else with_position(vectors, table)

    def tables(self) -> list[Tensor | None]:
        """What may be added to the mask token: tables of positions ``num_positions dim``, or nothing."""
        found = self._spec.position() if callable(self._spec.position) else self._spec.position
        tables = [found] if found is None or isinstance(found, Tensor) else [*found, None]
        return [None if table is None else table.reshape(-1, table.shape[-1]) for table in tables]

    def mask_tokens(self) -> list[Tensor]:
        """The learned vectors as they are now: sharded parameters are replaced while a model runs."""
        return [getattr(owner, name) for owner, name in self._names] or list(self._spec.mask_tokens)

    def is_zero(self) -> Tensor:
        """Whether a mask token is all zeros: a bool of no dimensions, on its device."""
        zeros = [~token.any() for token in self.mask_tokens()]
        return torch.stack(zeros).any() if zeros else torch.tensor(False)


class _Rounding(TorchFunctionMode):
    """Round learned tensors to half precision wherever a function takes them, as models under autocast do."""

    def __init__(self, dtype: torch.dtype, only: Sequence[Tensor]) -> None:
        super().__init__()
        self._dtype, self._only = dtype, only
        self._made: list[Any] = []  # results of functions, which are not learned; kept, so that no id is used again

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*tree_map(self.round, args), **tree_map(self.round, kwargs or {}))
        self._made.append(result)
        return result

    def round(self, value: Any) -> Any:
        """A learned tensor in half precision; anything else as it is."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        with torch._C.DisableTorchFunction():
            if self._only:
                chosen = any(value is each for each in self._only)
            else:
                chosen = not any(value is each for each in self._made)
            return value.detach().to(self._dtype) if chosen else value


def with_position(vectors: Tensor, position: Tensor) -> Tensor:
    """Rows of masked tokens: each vector with each position, vectors first.

    Shapes:
        vectors: num_tokens dim
        position: num_positions dim
        returns: num_tokens * num_positions, dim
    """
    return (vectors[:, None] + position).flatten(0, 1)


def rounded_rows(
    rows: Callable[[], Iterable[Tensor]], mask_tokens: Sequence[Tensor], half: torch.dtype | None
) -> Iterator[Tensor]:
    """What a masked token may be, ``num_rows dim`` each: as it is, then with the roundings of a model under autocast.

    Some models bring the mask token to the dtype of the patches that it joins, some the position too.

    Args:
        rows: Makes them from learned tensors.
        mask_tokens: The learned vectors among these, where they are known.
        half: The dtype of half precision, if there is any.
    """
    yield from _as_rows(rows())
    if half is not None:
        for only in (mask_tokens, ()) if mask_tokens else ((),):
            mode = _Rounding(half, only)
            with mode:
                found = list(rows())
            yield from _as_rows(map(mode.round, found))


def _as_rows(found: Iterable[Tensor]) -> Iterator[Tensor]:
    for each in found:
        yield each.detach().reshape(-1, each.shape[-1])


def find_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """Which of some rows each token equals, bit for bit; -1 where it equals none.

    Shapes:
        tokens: batch num_tokens dim
        rows: num_rows dim
        returns: batch num_tokens

    Example:
        >>> find_rows(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[ 1, -1]])
    """
    tokens, rows = tokens.detach(), rows.detach().to(tokens.device, tokens.dtype)
    if len(rows) == 1:
        return _equal(tokens, rows).to(torch.int64) - 1
    # Rows are looked up by a number made of their bits; then the candidate itself is compared. On a CPU a part of the
    # width is enough to tell rows apart and saves time; to ask a GPU whether it is would be to wait for it.
    step = 1 if tokens.is_cuda else max(1, tokens.shape[-1] // 32)
    keys, order = _keys(rows[:, ::step]).sort()
    if step > 1 and bool((keys[1:] == keys[:-1]).any()):
        step = 1
        keys, order = _keys(rows).sort()
    wanted = _keys(tokens[..., ::step])
    at = torch.searchsorted(keys, wanted).clamp_(max=len(rows) - 1)
    near, places = keys[at] == wanted, order[at]
    if not tokens.is_cuda and not bool(near.any()):
        return torch.full_like(places, -1)
    same = _equal(tokens, rows.index_select(0, places.flatten()).view(tokens.shape))
    return torch.where(near & same, places, -1)


def _equal(tokens: Tensor, rows: Tensor) -> Tensor:
    if tokens.is_cuda:  # a third of the memory to pass over
        return torch.eq(tokens, rows).all(dim=-1)
    return torch.sub(tokens, rows).abs_().amax(dim=-1) == 0  # on a CPU four times as fast


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _keys(x: Tensor) -> Tensor:
    """A number for each row, made of its bits."""
    bits = (x + 0.0).contiguous().view(_BITS[x.element_size()]).to(torch.int64)  # + 0.0: the same for -0.0 and 0.0
    weights = torch.arange(1, 2 * bits.shape[-1], 2, device=x.device) * 0x9E3779B97F4A7C1 + 0x632BE59BD9B4E019
    return (bits * weights).sum(dim=-1)
