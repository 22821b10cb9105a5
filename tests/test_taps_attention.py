"""Attention is met however a block writes it: the same queries and keys give the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mto_analysis.probe.attention import attention_statistics, patch_distances
from mto_analysis.taps.attention import tap_attention

DIM, HEADS, TOKENS = 12, 3, 17
MASK = torch.arange(16).expand(2, -1) % 3 == 0


class Written(nn.Module):
    """Attention of given projections in one of the ways that public code has."""

    def __init__(self, way: str, source: nn.MultiheadAttention, bias: Tensor | None = None) -> None:
        super().__init__()
        self.way, self.source, self.bias = way, source, bias

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        if self.way == "multi head":
            weights = {"need_weights": len(x) % 2 == 0, "attn_mask": None if self.bias is None else self.bias[0]}
            return self.source(x, x, x, **weights)[0]
        q, k, v = (
            each.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for each in F.linear(x, self.source.in_proj_weight, self.source.in_proj_bias).chunk(3, dim=2)
        )
        if self.way == "scaled":
            mixed = F.scaled_dot_product_attention(q, k, v, self.bias)
        else:
            logits = q @ k.mT / (DIM // HEADS) ** 0.5
            logits = logits if self.bias is None else logits + self.bias
            weights = logits.softmax(dim=-1) if self.way == "method" else F.softmax(logits, -1, dtype=torch.float32)
            mixed = weights @ v
        return self.source.out_proj(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("biased", [False, True])
def test_attention__is_the_same_however_it_is_written(biased: bool) -> None:
    torch.manual_seed(0)
    source = nn.MultiheadAttention(DIM, HEADS, batch_first=True).eval()
    nn.init.normal_(source.in_proj_bias)
    x, bias = torch.randn(2, TOKENS, DIM), torch.randn(1, TOKENS, TOKENS) if biased else None
    found, outputs = {}, []
    for way in ("scaled", "method", "function", "multi head"):
        block = Written(way, source, bias)
        seen: list[Tensor] = []

        def listen(number: int, met: object, seen: list[Tensor] = seen) -> None:
            (one,) = met  # type: ignore[misc]
            seen.append(attention_statistics(*one[:2], MASK, one.bias, patch_distances((4, 4))))

        with torch.no_grad(), tap_attention([block], listen):
            outputs.append(block(x))
        (found[way],) = seen
        assert not block._forward_hooks
        assert not block._forward_pre_hooks
    for way, values in found.items():
        torch.testing.assert_close(values, found["scaled"], rtol=1e-4, atol=1e-5, msg=way)
        assert values.shape == (2, HEADS, 8)
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)


def test_attention__of_others_than_all_tokens_is_not_taken_for_it() -> None:
    met = []

    class Cross(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """To fewer tokens, causal, and a softmax over channels."""
            few = F.scaled_dot_product_attention(x[:, :3], x, x)
            causal = F.scaled_dot_product_attention(x, x, x, is_causal=True)
            return few.sum() + causal.sum() + x.softmax(dim=1).sum()

    block = Cross()
    with torch.no_grad(), tap_attention([block], lambda number, all_of_it: met.extend(all_of_it)):
        block(torch.zeros(1, 4, 5))
    assert not met
    failing = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), tap_attention([failing], lambda number, all_of_it: met.append(1)):
        failing(torch.zeros(1, 3))
    assert not met
    assert torch._C._len_torch_function_stack() == 0
