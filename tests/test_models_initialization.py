"""Scales of the originals' first weights, computed from their own rules."""

from __future__ import annotations

import math

import pytest
import torch

from mto_analysis.training import load_recipe
from mto_analysis.training.methods import build_student


def bound_of(values):
    """Of a uniform distribution, from its largest value; or an error where it is not uniform."""
    bound = values.abs().max().item()
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    return bound


def student(name):
    return build_student(load_recipe(name), seed=0)


def test_initialize__mae():
    model = student("mae_cifar10")
    assert bound_of(model.patch_embed.proj.weight) == pytest.approx(math.sqrt(6 / (128 + 48)), rel=0.01)
    assert bound_of(model.blocks[0].attn.qkv.weight) == pytest.approx(math.sqrt(6 / (4 * 128)), rel=0.01)
    # PyTorch's own start of a convolution: the original's rules leave this bias out.
    assert bound_of(model.patch_embed.proj.bias) == pytest.approx(1 / math.sqrt(48), rel=0.05)
    assert model.decoder_pred.bias.count_nonzero() == 0
    tokens = [build_student(load_recipe("mae_cifar10"), seed=seed).mask_token.flatten() for seed in range(8)]
    assert torch.cat(tokens).std().item() == pytest.approx(0.02, rel=0.1)


def test_initialize__simmim_and_conmim():
    for name in ("simmim_cifar10", "conmim_cifar10"):
        model = student(name)
        for weight in (model.patch_embed.proj.weight, model.blocks[3].attn.qkv.weight, model.mask_token):
            assert 0.0195 < weight.abs().max() <= 0.02
            assert weight.std().item() == pytest.approx(0.02 * 0.5396, rel=0.1)  # of a normal cut at one deviation
        assert model.blocks[3].attn.proj.weight.abs().max() <= 0.02 / math.sqrt(8)
        assert torch.equal(model.blocks[0].ls1.gamma, torch.full((128,), 0.1))
        assert model.position_biases[0].relative_position_bias_table.count_nonzero() == 0
    assert model.projectors[3].weight.abs().max() <= 0.02
    assert torch.equal(model.projectors[1].weight, torch.ones(256))
    assert bound_of(student("simmim_cifar10").decoder.weight) == pytest.approx(1 / math.sqrt(128), rel=0.01)


def test_initialize__bootmae():
    model = student("bootmae_cifar10")
    assert bound_of(model.patch_embed.proj.weight) == pytest.approx(math.sqrt(6 / (48 + 128)), rel=0.01)
    assert bound_of(model.blocks[0].attn.qkv.weight) == pytest.approx(math.sqrt(6 / 256), rel=0.01)
    assert bound_of(model.blocks[0].mlp.fc1.weight) == pytest.approx(math.sqrt(6 / 640), rel=0.01)
    block = model.pixel_blocks[0]
    assert bound_of(block.attn.k.weight) == pytest.approx(math.sqrt(6 / 192), rel=0.01)
    assert bound_of(block.c_attn.q.weight) == pytest.approx(math.sqrt(6 / 192), rel=0.01)
    assert bound_of(block.c_attn.v.weight) == pytest.approx(math.sqrt(6 / (2 * 96 + 128)), rel=0.01)
    assert bound_of(model.pixel_pred.weight) == pytest.approx(1 / math.sqrt(48), rel=0.01)
    assert model.cls_token.abs().max() < 1e-5
    assert 0.015 < model.pixel_mask_token.abs().max() <= 0.02


def test_bootmae__positions_encode_the_row_first():
    """As in the original: the first half of the channels changes from row to row only."""
    table = student("bootmae_cifar10").pos_embed[0, 1:].reshape(8, 8, 128)
    assert torch.equal(table[3, 0, :64], table[3, 5, :64])
    assert not torch.equal(table[3, 0, :64], table[4, 0, :64])
    assert torch.equal(table[0, 5, 64:], table[7, 5, 64:])
    assert table[2, 0, 0].item() == pytest.approx(math.sin(2))
    assert table[2, 0, 32].item() == pytest.approx(math.cos(2))
