"""Attention that timm's blocks do not offer: other tokens as keys and values, heads that do not fill the width."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class CrossAttention(nn.Module):
    """Multi-head attention of queries over keys and values from elsewhere.

    Args:
        dim: Width of the queries and of the result.
        num_heads: Attention heads.
        head_dim: Width of a head; ``num_heads * head_dim`` may be less than ``dim``.
        memory_dim: Width of what keys and values are made from, by default ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, memory_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = True  # the name that timm has for it
        self.q = nn.Linear(dim, num_heads * head_dim)
        self.k = nn.Linear(memory_dim or dim, num_heads * head_dim)
        self.v = nn.Linear(memory_dim or dim, num_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, dim)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor | None = None, attended: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Shapes:
            query: batch num_queries dim
            key: batch num_tokens memory_dim
            value: batch num_tokens memory_dim
            attended: batch num_tokens (True = may be attended to)
            returns: batch num_queries dim
        """
        q, k, v = (
            project(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for project, x in ((self.q, query), (self.k, key), (self.v, key if value is None else value))
        )
        attn_mask = None if attended is None else attended[:, None, None]
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        else:
            logits = (q * q.shape[-1] ** -0.5) @ k.mT
            x = (logits if attn_mask is None else logits.masked_fill(~attn_mask, float("-inf"))).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
