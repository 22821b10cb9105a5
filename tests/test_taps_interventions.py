"""Attention cut in anybody's blocks, against slow loops; what cannot be reached is refused with the block's name."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from mto_analysis.errors import StackError
from mto_analysis.taps.interventions import blocked, intervene

BATCH, TOKENS, DIM, HEADS = 2, 5, 12, 3


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, TOKENS, DIM, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cut() -> Tensor:
    """Random pairs, others in each image; nothing is taken from itself."""
    found = torch.rand(BATCH, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.5
    return found & ~torch.eye(TOKENS, dtype=torch.bool)


def slow_attention(x: Tensor, weight: Tensor, bias: Tensor, cut: Tensor, added: Tensor) -> Tensor:
    """Heads' values averaged by weights over the pairs that are left, one query at a time: ``batch num_tokens dim``."""
    result, size = torch.zeros_like(x), DIM // HEADS
    for image in range(len(x)):
        q, k, v = (x[image] @ weight.T + bias).split(DIM, dim=1)
        for head in range(HEADS):
            at = slice(head * size, (head + 1) * size)
            for query in range(TOKENS):
                kept = [key for key in range(TOKENS) if not cut[image, query, key]]
                logits = [
                    (q[query, at] @ k[key, at]).item() / math.sqrt(size) + added[head, query, key].item()
                    for key in kept
                ]
                shares = [math.exp(logit) for logit in logits]
                assert sum(share / sum(shares) for share in shares) == pytest.approx(1)
                for key, share in zip(kept, shares, strict=True):
                    result[image, query, at] += share / sum(shares) * v[key, at]
    return result


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_intervene__cuts_attention_of_timm(x: Tensor, cut: Tensor, fused: bool, with_bias: bool) -> None:
    torch.manual_seed(0)
    block = Block(DIM, HEADS, qkv_bias=True).eval()
    block.attn.fused_attn = fused
    added = torch.randn(HEADS, TOKENS, TOKENS) if with_bias else torch.zeros(HEADS, TOKENS, TOKENS)
    with torch.no_grad():
        with intervene([block], cut=lambda number, tokens: cut) as seen:
            found = block(x, attn_mask=added[None]) if with_bias else block(x)
        attention = block.attn
        mixed = slow_attention(block.norm1(x), attention.qkv.weight, attention.qkv.bias, cut, added)
        expected = x + attention.proj(mixed)
        expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert seen.ran == [1]
    torch.testing.assert_close(seen.output, found)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_intervene__cuts_attention_of_torch(x: Tensor, cut: Tensor, mask: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 8, batch_first=True).eval()
    own = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    own[0, 1] = mask == "bool"
    added = torch.randn(TOKENS, TOKENS) if mask == "float" else torch.zeros(TOKENS, TOKENS)
    given = {"none": None, "bool": own, "float": added}[mask]
    with torch.no_grad():
        with intervene([layer], cut=lambda number, tokens: cut):
            found = layer(x, src_mask=given)
        attention = layer.self_attn
        mixed = slow_attention(
            x, attention.in_proj_weight, attention.in_proj_bias, cut | own, added.expand(HEADS, -1, -1)
        )
        expected = layer.norm1(x + attention.out_proj(mixed))
        expected = layer.norm2(expected + layer.linear2(layer.linear1(expected).relu()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_intervene__in_hugging_face_a_complete_cut_is_a_removal(x: Tensor, implementation: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = pytest.importorskip("transformers", exc_type=ImportError)
    size = {"hidden_size": DIM, "num_attention_heads": HEADS, "intermediate_size": 8, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = hf.ViTModel(hf.ViTConfig(**size, attn_implementation=implementation)).eval()
    blocks = next(each for each in model.modules() if isinstance(each, nn.ModuleList))
    gone = torch.tensor([False, True, False, True, False])

    def run(tokens: Tensor) -> Tensor:
        for block in blocks:
            found = block(tokens)
            tokens = found[0] if isinstance(found, tuple) else found
        return tokens

    with torch.no_grad():
        with intervene(blocks, cut=lambda number, tokens: (~gone[:, None] & gone).expand(BATCH, -1, -1)):
            found = run(x)
        torch.testing.assert_close(found[:, ~gone], run(x[:, ~gone]), rtol=1e-4, atol=1e-6)


class Plain(nn.Module):
    """Attention without weights; how it is written decides whether it can be cut."""

    def __init__(self, way: str = "softmax") -> None:
        super().__init__()
        self.way = way
        self.weights = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ x.mT
        if self.way == "hidden":
            self.weights = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
        elif self.way == "windows":  # of one token, as many windows
            return F.scaled_dot_product_attention(*(x.reshape(-1, 1, 1, DIM),) * 3).reshape(x.shape)
        elif self.way == "joined":
            self.weights = logits.repeat_interleave(2, dim=0).softmax(dim=-1)[::2]
        elif self.way == "twice":
            self.weights = logits.softmax(dim=-1).softmax(dim=-1)
        elif self.way == "causal":
            return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]
        else:
            self.weights = (torch if self.way == "torch" else F).softmax(logits, dim=-1)
        return self.weights @ x


@pytest.mark.parametrize("way", ["softmax", "torch"])
def test_intervene__rows_still_sum_to_one(x: Tensor, cut: Tensor, way: str) -> None:
    block = Plain(way)
    with intervene([block], cut=lambda number, tokens: cut):
        block(x)
    torch.testing.assert_close(block.weights.sum(dim=-1), torch.ones(BATCH, TOKENS))
    assert not block.weights[cut].any()
    assert (block.weights[~cut] > 0).all()


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("hidden", "was met 0 times"),
        ("windows", "shapes 10 x 1 x 1 x 1: windowed"),
        ("joined", "shapes 4 x 5 x 5: windowed, cross or joined heads"),
        ("twice", "was met 2 times"),
        ("causal", "attention is causal"),
    ],
)
def test_intervene__refuses_what_it_cannot_cut_and_leaves_no_hook(
    x: Tensor, cut: Tensor, way: str, message: str
) -> None:
    blocks = [Plain(), Plain(way)]
    with pytest.raises(StackError, match=message) as error, intervene(blocks, cut=lambda *_: cut, where="encoder"):
        blocks[1](blocks[0](x))
    assert way == "causal" or "block 2 of encoder" in str(error.value)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)
    assert torch.equal(torch.softmax(x, dim=-1), x.softmax(dim=-1))  # no mode is left active
    with intervene(blocks, cut=lambda *_: None):  # nothing to cut, so nothing to refuse
        blocks[1](x)


def test_intervene__refuses_a_query_without_keys_a_second_run_and_blocks_without_tokens(x: Tensor) -> None:
    block = Plain()
    nothing = torch.ones(BATCH, TOKENS, TOKENS, dtype=torch.bool)
    with pytest.raises(ValueError, match="attend to nothing"), intervene([block], cut=lambda *_: nothing):
        block(x)
    with pytest.raises(StackError, match="block 1 of the stack runs several times"), intervene([block]):
        block(block(x))
    with pytest.raises(StackError, match="has no tokens"), intervene([block]):
        block(x[0])


def test_intervene__changes_what_enters_by_position_or_name_and_on_a_grid(x: Tensor) -> None:
    class OnGrid(nn.Module):
        def forward(self, scale: float, hidden: Tensor) -> tuple[Tensor, float]:
            return scale * hidden, scale

    blocks = [OnGrid(), OnGrid()]
    grid = x[:, :4].reshape(BATCH, 2, 2, DIM)
    with intervene(blocks, change=lambda number, tokens: tokens + number) as seen:
        first, _ = blocks[0](2.0, grid)
        last, _ = blocks[1](2.0, hidden=first)
    torch.testing.assert_close(last, 2 * (2 * (grid + 1) + 2))
    torch.testing.assert_close(seen.output, last.flatten(1, 2))


def test_blocked__keeps_what_was_left_out_before() -> None:
    cut = torch.tensor([[False, True, False]])
    kept = torch.tensor([[False, True, True]])
    assert blocked(None, cut).tolist() == [[0.0, -math.inf, 0.0]]
    assert blocked(kept, cut).tolist() == [[False, False, True]]
    assert blocked(torch.tensor([[1.0, 2.0, -math.inf]]), cut).tolist() == [[1.0, -math.inf, -math.inf]]
