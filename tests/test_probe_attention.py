"""The model's own attention, against an independent computation from the block's own tensors."""

from __future__ import annotations

import math

import pytest
import torch
from watched_models import Shrinking, batch_of, small_mae, small_simmim

from mto_analysis.models import MaskedImageModel
from mto_analysis.probe import masks_from_rule, probe
from mto_analysis.probe.accumulating import Setup
from mto_analysis.probe.attention import ATTENTION_STATISTICS, Attention


def slow_attention(model: MaskedImageModel, stack: str) -> dict[tuple[int, int], list[float]]:
    """(block, head) -> the eight numbers, from norm1, qkv and the bias table, query by query, outside the forward."""
    batch = batch_of(model)
    mask = masks_from_rule(model.info)(batch.names, 0)
    hidden = list(model._hidden(batch.images, mask, stack))
    found: dict[tuple[int, int], list[float]] = {}
    side = model.info.grid[1]
    for number, block in enumerate(model.stack_blocks(stack), start=1):
        x = block.norm1(hidden[number - 1])
        heads, dim = block.attn.num_heads, x.shape[-1]
        qkv = x @ block.attn.qkv.weight.T + block.attn.qkv.bias
        bias = model.position_biases[0]()[0] if stack == "encoder" else torch.zeros(heads, 1, 1)
        for head in range(heads):
            at = slice(head * dim // heads, (head + 1) * dim // heads)
            q, k = qkv[..., :dim][..., at], qkv[..., dim : 2 * dim][..., at]
            numbers = torch.zeros(8, dtype=torch.float64)
            for image in range(len(x)):
                every = (q[image] @ k[image].T / math.sqrt(dim // heads) + bias[head]).softmax(dim=-1)[1:].double()
                shares = every[:, 1:]
                for index, kind in enumerate((mask[image], ~mask[image])):
                    for query in kind.nonzero().flatten().tolist():
                        entropy = -sum(share * math.log(share) for share in every[query].tolist())
                        reach = sum(
                            share * math.hypot(query // side - key // side, query % side - key % side)
                            for key, share in enumerate(shares[query].tolist())
                        )
                        numbers[4 + index] += entropy / kind.sum().item()
                        numbers[6 + index] += reach / shares[query].sum().item() / kind.sum().item()
                for index, (queries, keys) in enumerate(((mask[image], ~mask[image]), (~mask[image], mask[image]))):
                    rows = shares[queries][:, keys]
                    numbers[index] += rows.sum(dim=1).mean()
                    rows = rows / rows.sum(dim=1, keepdim=True)
                    numbers[index + 2] += -(rows * rows.log()).sum(dim=1).mean()
            found[number, head + 1] = (numbers / len(x)).tolist()
    return found


@pytest.mark.parametrize(("make", "stack"), [(small_mae, "decoder"), (small_simmim, "encoder")])
def test_attention_watch__agrees_with_an_independent_computation(make: object, stack: str) -> None:
    model = make().eval()  # type: ignore[operator]
    with Attention(Setup(model, model.info.grid)).watching() as watch:
        probe(model, [batch_of(model)], layer_measures=[watch])
    with torch.no_grad():
        slow = slow_attention(model, stack)
    frame = watch.to_frame()
    assert len(frame) == len(slow)
    for row in frame.itertuples():
        values = [getattr(row, name) for name in ATTENTION_STATISTICS]
        assert values == pytest.approx(slow[row.block, row.head], rel=2e-4, abs=1e-6)


def test_attention_watch__leaves_no_hook_behind_after_an_error() -> None:
    model = small_mae()

    def raising(*args: object) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), Attention(Setup(model, model.info.grid)).watching() as watch:
        probe(model, [batch_of(model)], layer_measures=[watch, raising])  # type: ignore[list-item]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_attention_watch__models_without_such_blocks_give_no_rows() -> None:
    model = Shrinking()
    with Attention(Setup(model, model.info.grid)).watching() as watch:
        probe(model, [batch_of(model)], layer_measures=[watch])
    assert watch.to_frame().empty
