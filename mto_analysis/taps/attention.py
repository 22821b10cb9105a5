"""Queries and keys that attention makes anyway, handed over during a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["has_known_attention", "tap_attention"]

_NEEDED = ("qkv", "num_heads", "scale", "q_norm", "k_norm")

#: Gets the block's number, counted from 1, then its queries (scaled), keys and bias.
AttentionListener = Callable[[int, Tensor, Tensor, Tensor | None], None]


def has_known_attention(block: nn.Module) -> bool:
    """Whether the queries and keys of a block can be read: timm's ``attn.qkv``, without rotary positions."""
    attention = getattr(block, "attn", None)
    known = all(hasattr(attention, name) for name in _NEEDED) and not hasattr(attention, "rotate_half")
    return known and isinstance(attention, nn.Module)


@contextmanager
def tap_attention(blocks: Sequence[nn.Module], listener: AttentionListener) -> Iterator[None]:
    """Hand over the queries and keys of every block that runs inside; no hook is left behind, also after an error.

    Shapes:
        queries, keys: batch num_heads num_tokens head_dim
        bias: as the block passes it to its attention, or ``None``

    Args:
        blocks: In order; those without :func:`has_known_attention` are left out.
        listener: Called in the forward of each block.
    """
    handles: list[RemovableHandle] = []
    try:
        for number, block in enumerate(blocks, start=1):
            if has_known_attention(block):
                handles += _tap(block.attn, number, listener)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tap(attention: Any, number: int, listener: AttentionListener) -> list[RemovableHandle]:
    bias: Tensor | None = None

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal bias
        bias = kwargs.get("attn_mask", args[1] if len(args) > 1 else None)

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal bias
        batch, tokens, _ = output.shape
        split = output.reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys = attention.q_norm(split[0]), attention.k_norm(split[1])
        listener(number, queries * attention.scale, keys, bias)
        bias = None  # else the last one would be kept until the hooks go

    return [
        attention.register_forward_pre_hook(before, with_kwargs=True),
        attention.qkv.register_forward_hook(after),
    ]
