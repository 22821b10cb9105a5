"""What the softmax of attention is made of, handed over during a forward: queries and keys, or the logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

#: Functions whose last dimension are the weights of keys, where attention is written out.
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
#: Arguments of ``multi_head_attention_forward`` by name.
MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


class Attended(NamedTuple):
    """One attention of every token to every token: the softmax is that of ``queries @ keys.mT + bias``.

    Where a model writes attention out, its logits are the bias, and queries and keys have no channels.

    Shapes:
        queries, keys: batch num_heads num_tokens head_dim (queries scaled)
        bias: broadcasts to batch num_heads num_tokens num_tokens (bool: True = may attend), or ``None``
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor | None


#: Gets the number of a block, counted from 1, and all attention over as many queries as keys that it made.
AttentionListener = Callable[[int, Sequence[Attended]], None]


class _Watch(TorchFunctionMode):
    """Takes note of attention where implementations of it pass."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[Attended] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            self._multi_head(MULTI_HEAD.bind(*args, **kwargs).arguments)
        elif func is F.scaled_dot_product_attention:
            self._scaled(*args, **kwargs)
        elif func in SOFTMAX:
            self._softmax(*args, **kwargs)
        return func(*args, **kwargs)

    def _scaled(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **more: Any,
    ) -> None:
        if is_causal or query.shape[:-1] != key.shape[:-1] or query.ndim not in (3, 4):
            return
        bias = attn_mask
        while bias is not None and bias.ndim < query.ndim:
            bias = bias[None]
        self._add(query * (query.shape[-1] ** -0.5 if scale is None else scale), key, bias)

    def _multi_head(self, given: Mapping[str, Any]) -> None:
        """Project queries and keys again: the function makes them inside."""
        query, key, heads = given["query"], given["key"], given["num_heads"]  # num_tokens batch dim
        more = any(given.get(name) is not None for name in ("key_padding_mask", "bias_k")) or given.get("add_zero_attn")
        if more or query.shape != key.shape or query.ndim != 3:
            return
        separate = given.get("use_separate_proj_weight", False)
        weights = [given[f"{name}_proj_weight"] for name in "qk"] if separate else given["in_proj_weight"].chunk(3)[:2]
        biases = (None, None) if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)[:2]
        q, k = (
            F.linear(x, weight, bias).reshape(*x.shape[:2], heads, -1).permute(1, 2, 0, 3)
            for x, weight, bias in zip((query, key), weights, biases, strict=True)
        )
        bias = given.get("attn_mask")
        if bias is not None:
            bias = bias[None, None] if bias.ndim == 2 else bias.reshape(-1, heads, *bias.shape[1:])
            bias = ~bias if bias.dtype == torch.bool else bias
        self._add(q * q.shape[-1] ** -0.5, k, bias)

    def _softmax(self, input: Tensor, *args: Any, **kwargs: Any) -> None:
        dim = args[0] if args else kwargs.get("dim")
        if input.ndim in (3, 4) and dim in (-1, input.ndim - 1) and input.shape[-1] == input.shape[-2]:
            nothing = input.new_empty(*input.shape[:-1], 0)
            self._add(nothing, nothing, input)

    def _add(self, queries: Tensor, keys: Tensor, bias: Tensor | None) -> None:
        if queries.ndim == 3:  # one head
            queries, keys, bias = queries[:, None], keys[:, None], None if bias is None else bias[:, None]
        self.met.append(Attended(queries, keys, bias))


@contextmanager
def tap_attention(blocks: Sequence[nn.Module], listener: AttentionListener) -> Iterator[None]:
    """Hand over the attention of every block that runs inside; no hook is left behind, also after an error.

    It is met in ``scaled_dot_product_attention``, ``multi_head_attention_forward`` or a softmax over pairs of tokens,
    so after rotary positions and norms of queries and keys. No function of torch is replaced.

    Example:
        >>> block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
        >>> with torch.no_grad(), tap_attention([block], lambda number, met: print(number, list(met[0].queries.shape))):
        ...     _ = block(torch.zeros(1, 3, 4))
        1 [1, 2, 3, 2]
    """
    handles: list[RemovableHandle] = []
    try:
        for number, block in enumerate(blocks, start=1):
            handles += _tap(block, number, listener)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tap(block: nn.Module, number: int, listener: AttentionListener) -> list[RemovableHandle]:
    modes: list[_Watch] = []

    def before(module: nn.Module, args: Any) -> None:
        modes.append(_Watch())
        modes[-1].__enter__()  # type: ignore[no-untyped-call]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        mode = modes.pop()
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is not None:  # else the block has raised an error
            listener(number, mode.met)

    return [
        block.register_forward_pre_hook(before),
        block.register_forward_hook(after, always_call=True),
    ]
