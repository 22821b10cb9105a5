"""Interventions on blocks in a model's own forward: tokens replaced where they enter, attention cut between pairs.

Attention is met where implementations of it pass, in ``scaled_dot_product_attention``, ``multi_head_attention_forward``
or a softmax over pairs of tokens, by a ``TorchFunctionMode`` that is active only while one block runs. No function of
torch is replaced, and a block in which attention is not met exactly once is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mto_analysis.errors import StackError
from mto_analysis.taps.attention import MULTI_HEAD, SOFTMAX

#: From a block's number, counted from 1, and its tokens ``batch num_tokens dim`` to what it gets in their place.
BlockChange = Callable[[int, Tensor], Tensor]
#: From the same to the pairs that are cut, ``batch num_tokens num_tokens`` (query, key), or ``None`` for none.
BlockCut = Callable[[int, Tensor], Tensor | None]


@dataclass
class StackPass:
    """What was seen of a stack in one forward.

    Attributes:
        ran: Numbers of the blocks that ran, in their order.
        output: Tokens that the last block gave, ``batch num_tokens dim``; ``None`` where it did not run.
    """

    ran: list[int] = field(default_factory=list)
    output: Tensor | None = None


def blocked(attn_mask: Tensor | None, cut: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The mask of ``scaled_dot_product_attention`` with more pairs left out.

    Shapes:
        attn_mask: ... num_queries num_keys (bool: True = may attend; else added to the logits), or ``None``
        cut: ... num_queries num_keys (True = may not attend)
        returns: as both broadcast

    Args:
        attn_mask: Of a model.
        cut: What else to leave out.
        dtype: Of the mask where the model has none.

    Example:
        >>> blocked(torch.zeros(1, 2), torch.tensor([[False, True]]))
        tensor([[0., -inf]])
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        return attn_mask & ~cut
    # A sum, as torch.where over broadcast axes takes six times as long on a CPU.
    added = cut.new_zeros(cut.shape, dtype=dtype if attn_mask is None else attn_mask.dtype)
    added.masked_fill_(cut, float("-inf"))
    return added if attn_mask is None else attn_mask + added


class _Cut(TorchFunctionMode):
    """Leaves pairs out of the softmax of attention over so many tokens, and counts how often it met one."""

    def __init__(self, cut: Tensor) -> None:
        super().__init__()
        self._cut = cut
        self.met = 0
        self.others: list[str] = []  # shapes of attention that is not over all tokens of each image

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._scaled(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(MULTI_HEAD.bind(*args, **kwargs))
        if func in SOFTMAX:
            return self._softmax(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _scaled(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> Tensor:
        cut = self._for(query.shape[:-1] + key.shape[-2:-1])
        if cut is not None:
            if is_causal:
                raise StackError("attention is causal: cuts are for attention over all tokens of an image")
            attn_mask = blocked(attn_mask, cut, query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **more)

    def _multi_head(self, call: inspect.BoundArguments) -> Any:
        given = call.arguments
        query, key, heads = given["query"], given["key"], given["num_heads"]  # num_tokens batch dim
        batch = query.shape[1] if query.ndim == 3 else 1
        if self._for((batch, heads, query.shape[0], key.shape[0])) is not None:
            cut = self._cut.repeat_interleave(heads, dim=0)  # batch * num_heads, as documented
            before = given.get("attn_mask")
            boolean = before is None or before.dtype == torch.bool  # here True = may not attend
            given["attn_mask"] = (cut if before is None else cut | before) if boolean else blocked(before, cut)
        return F.multi_head_attention_forward(*call.args, **call.kwargs)

    def _softmax(self, func: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dim = args[0] if args else kwargs.get("dim")
        if input.ndim > 2 and dim in (-1, input.ndim - 1):
            cut = self._for(input.shape)
            if cut is not None:
                input = blocked(input, cut)
        return func(input, *args, **kwargs)

    def _for(self, shape: Sequence[int]) -> Tensor | None:
        """The cut as it broadcasts to logits ``batch num_heads num_tokens num_tokens`` of one image each, else none."""
        batch, tokens, _ = self._cut.shape
        if tuple(shape[-2:]) == (tokens, tokens) and shape[0] == batch and len(shape) in (3, 4):
            self.met += 1
            return self._cut if len(shape) == 3 else self._cut[:, None]
        self.others.append(" x ".join(map(str, shape)))
        return None


class _Block:
    """One block of a stack in a forward: changes its tokens, cuts its attention, and verifies that it did."""

    def __init__(
        self,
        number: int,
        where: str,
        seen: StackPass,
        last: bool,
        transposed: bool,
        change: BlockChange | None,
        cut: BlockCut | None,
    ) -> None:
        self._number, self._where, self._seen, self._last = number, f"block {number} of {where}", seen, last
        self._transposed, self._change, self._cut = transposed, change, cut
        self._mode: _Cut | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Tokens enter."""
        if self._number in self._seen.ran:
            raise StackError(f"{self._where} runs several times in one forward; interventions need one run of each")
        self._seen.ran.append(self._number)
        place, x = _tokens_among(args, kwargs, self._where)
        tokens = self._batch_first(x)
        if self._change is not None and (changed := self._change(self._number, tokens)) is not tokens:
            tokens = changed
            new = changed.transpose(0, 1) if self._transposed else changed.view(x.shape)
            if isinstance(place, int):
                args = (*args[:place], new, *args[place + 1 :])
            else:
                kwargs = {**kwargs, place: new}
        pairs = None if self._cut is None else self._cut(self._number, tokens)
        if pairs is not None:
            if bool(pairs.all(dim=-1).any()):
                raise ValueError(f"{self._where}: a token may attend to nothing, as all of its pairs are cut")
            self._mode = _Cut(pairs)
            self._mode.__enter__()  # type: ignore[no-untyped-call]
        return args, kwargs

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The block has run, or raised an error: then ``output`` is ``None``."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if output is not None and mode.met != 1:
                raise self._refusal(mode)
        if self._last and output is not None:
            outputs = output if isinstance(output, tuple) else (output,)
            self._seen.output = self._batch_first(_tokens_among(outputs, {}, self._where)[1])

    def _batch_first(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self._transposed else x.flatten(1, -2)

    def _refusal(self, mode: _Cut) -> StackError:
        batch, tokens, _ = mode._cut.shape
        met = f"attention over the {tokens} tokens of each of {batch} images was met {mode.met} times, not once"
        if mode.others:
            met += f" (attention of shapes {', '.join(dict.fromkeys(mode.others))}: windowed, cross or joined heads?)"
        return StackError(
            f"{self._where}: {met}; attention is cut where it is one softmax over all tokens in "
            "scaled_dot_product_attention, multi_head_attention_forward or softmax (for Hugging Face models "
            "attn_implementation='eager' or 'sdpa')"
        )


def _tokens_among(args: Sequence[Any], kwargs: Mapping[str, Any], where: str) -> tuple[int | str, Tensor]:
    """Place and value of the first floating tensor of 3 to 5 dimensions."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor) and value.is_floating_point() and 3 <= value.ndim <= 5:
            return place, value
    raise StackError(f"{where} has no tokens [batch, num_tokens, dim] among its arguments or in what it returns")


@contextmanager
def intervene(
    blocks: Sequence[nn.Module],
    *,
    change: BlockChange | None = None,
    cut: BlockCut | None = None,
    where: str = "the stack",
    transposed: bool = False,
) -> Iterator[StackPass]:
    """Change what enters each block, and cut its attention, in the forward that runs inside.

    No hook is left behind, also after an error. A pair is cut by the logit ``-inf``: the weights of a query over the
    other keys still sum to 1.

    Args:
        blocks: In order; their first tensor argument are the tokens, ``batch num_tokens dim`` or on a grid.
        change: Called with the tokens of each block.
        cut: Called with each block's tokens, as changed.
        where: Name of the stack, for messages.
        transposed: The blocks' tokens are ``num_tokens batch dim``; what is called still gets the batch first.

    Yields:
        What was seen; filled by the forward.

    Example:
        >>> block = nn.TransformerEncoderLayer(4, 1, 8, batch_first=True).eval()
        >>> x, diagonal = torch.randn(1, 3, 4), torch.eye(3, dtype=torch.bool)[None]
        >>> with torch.no_grad(), intervene([block], cut=lambda number, tokens: ~diagonal) as seen:
        ...     _ = block(x)
        >>> seen.ran, list(seen.output.shape)
        ([1], [1, 3, 4])
    """
    seen = StackPass()
    handles = []
    try:
        for number, block in enumerate(blocks, start=1):
            each = _Block(number, where, seen, number == len(blocks), transposed, change, cut)
            handles.append(block.register_forward_pre_hook(each.before, with_kwargs=True))
            handles.append(block.register_forward_hook(each.after, with_kwargs=True, always_call=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
