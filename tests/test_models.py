"""Models: equal to the original code's tokens, to slow loops elsewhere, and to what the paper says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import reference
import torch
from tiny_models import NUM_PATCHES, PATCH, SIDE, make_mae, make_simmim, some_images, some_masks
from torch import Tensor, nn

from mto_analysis import LayerTokens, MaskRule, ModelInfo, heterogeneity
from mto_analysis.models import MAE, MAEConfig, MaskedImageModel, SimMIM, SimMIMConfig
from mto_analysis.models.vit import patchify, relative_position_index, sincos_table, unpatchify

SIMMIM_VARIANTS = {
    "shared": {},
    "per block": {"position_bias": "per_block"},
    "absolute": {"position_bias": None, "absolute_positions": True},
    "absolute and per block": {"position_bias": "per_block", "absolute_positions": True},
    "no layer scale": {"layer_scale": None},
    "no final norm": {"final_norm": False},
}


def layers(model: MaskedImageModel, images: Tensor, mask: Tensor, stack: str | None = None) -> list[LayerTokens]:
    with torch.no_grad():
        return list(model.layer_tokens(images, mask, stack))


# Equal to the original code.


def test_layer_tokens__equal_the_original_code(golden) -> None:
    tokens = layers(golden.load(), golden.images, golden.mask)
    expected = golden.expected["tokens"]
    assert [layer.depth for layer in tokens] == list(range(len(expected)))
    for layer, values in zip(tokens, expected, strict=True):
        np.testing.assert_allclose(layer.tokens.numpy(), values, atol=2e-5, rtol=0)
        assert torch.equal(layer.mask, golden.mask)


def test_heterogeneity__equals_the_original_code(golden) -> None:
    for layer, expected in zip(
        layers(golden.load(), golden.images, golden.mask), golden.expected["heterogeneity"], strict=True
    ):
        assert heterogeneity(layer.tokens, layer.mask).tolist() == pytest.approx(expected.tolist(), abs=5e-5)


@pytest.mark.parametrize("name", ["mae", "simmim_vit"])
def test_reconstruct__equals_the_original_code(name: str, golden_of) -> None:
    golden = golden_of(name)
    with torch.no_grad():
        image = golden.load().reconstruct(golden.images, golden.mask).numpy()
    expected = golden.expected["reconstruction"]
    if name == "mae":  # patches of 8 x 8 x 3 values, colour fastest
        grid = expected.reshape(2, 8, 8, 8, 8, 3)
        expected = np.zeros((2, 3, 64, 64), dtype=np.float32)
        for row in range(8):
            for column in range(8):
                cell = grid[:, row, column].transpose(0, 3, 1, 2)
                expected[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = cell
    np.testing.assert_allclose(image, expected, atol=5e-5, rtol=0)


def test_layer_norms__have_the_epsilon_of_their_family(golden) -> None:
    norms = [module for module in golden.load().modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) >= 9
    assert {norm.eps for norm in norms} == {golden.meta["layer_norm_eps"]}


def test_info__says_what_the_golden_files_say(golden) -> None:
    info, meta = golden.load().info, golden.meta
    assert info.style == meta["kind"]
    assert (info.image_size, info.patch_size) == (meta["img_size"], meta["patch_size"])
    assert info.grid == tuple(meta["grid"])
    assert info.mean == tuple(meta["normalization"]["mean"])
    assert info.std == tuple(meta["normalization"]["std"])
    assert info.mask_ratio == meta.get("mask_ratio_nominal", meta["mask_ratio"])
    assert info.mask_unit == meta.get("mask_patch_size", meta["patch_size"])


# Equal to slow loops, for what has no golden file.


@pytest.mark.parametrize("variant", SIMMIM_VARIANTS)
def test_simmim__agrees_with_the_reference(variant: str, generator: torch.Generator) -> None:
    model = make_simmim(depth=2, **SIMMIM_VARIANTS[variant]).double()
    images, mask = some_images(generator, 2).double(), some_masks(generator, 2, ragged=True)
    found = layers(model, images, mask)
    for row in range(2):
        expected = reference.simmim_tokens(
            images[row].numpy(), mask[row].tolist(), reference.weights_of(model), heads=3, patch=PATCH, eps=1e-6
        )
        assert len(found) == len(expected) == 3
        for layer, tokens in zip(found, expected, strict=True):
            np.testing.assert_allclose(layer.tokens[row].numpy(), tokens, atol=1e-10, rtol=0)


@pytest.mark.parametrize("ragged", [False, True])
def test_mae__agrees_with_the_reference(ragged: bool, generator: torch.Generator) -> None:
    model = make_mae().double()
    images, mask = some_images(generator, 3).double(), some_masks(generator, 3, ragged=ragged)
    found = layers(model, images, mask)
    for row in range(3):
        expected = reference.mae_tokens(
            images[row].numpy(),
            mask[row].tolist(),
            reference.weights_of(model),
            heads=3,
            decoder_heads=2,
            patch=PATCH,
            eps=1e-6,
        )
        assert len(found) == len(expected) == 4
        for layer, tokens in zip(found, expected, strict=True):
            np.testing.assert_allclose(layer.tokens[row].numpy(), tokens, atol=1e-10, rtol=0)


def test_reference__agrees_with_the_original_code(golden_of) -> None:
    golden = golden_of("simmim_vit")
    tokens = reference.simmim_tokens(
        golden.images[0].double().numpy(),
        golden.mask[0].tolist(),
        reference.weights_of(golden.load()),
        heads=golden.meta["num_heads"],
        patch=8,
        eps=1e-6,
    )
    np.testing.assert_allclose(np.stack(tokens), golden.expected["tokens"][:, 0], atol=2e-5, rtol=0)


@pytest.mark.parametrize(("grid", "dim"), [((3, 4), 16), ((7, 7), 48)])
def test_sincos_table__agrees_with_the_reference(grid: tuple[int, int], dim: int) -> None:
    table = sincos_table(grid, dim)
    assert table.shape == (1, 1 + grid[0] * grid[1], dim)
    assert not table[0, 0].any()
    expected = [
        [reference.sincos_entry(y, x, c, dim) for c in range(dim)] for y in range(grid[0]) for x in range(grid[1])
    ]
    np.testing.assert_allclose(table[0, 1:].numpy(), expected, atol=1e-6)


def test_sincos_table__is_what_the_original_stores(golden_of) -> None:
    model = golden_of("mae").load()
    assert torch.allclose(model.pos_embed, sincos_table((8, 8), 48), atol=1e-6)
    assert torch.allclose(model.decoder_pos_embed, sincos_table((8, 8), 32), atol=1e-6)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 4)])
def test_relative_position_index__agrees_with_the_reference(grid: tuple[int, int]) -> None:
    index, count = relative_position_index(grid), grid[0] * grid[1]
    offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    for query in range(count):
        for key in range(count):
            assert index[query + 1, key + 1] == reference.relative_position(query, key, grid)
    assert index[0, 0] == offsets + 2
    assert set(index[0, 1:].tolist()) == {offsets}
    assert set(index[1:, 0].tolist()) == {offsets + 1}


def test_patchify__orders_values_row_column_channel_and_unpatchify_undoes_it(generator: torch.Generator) -> None:
    images = torch.randn(2, 3, 8, 12, generator=generator)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    for row, column, y, x, channel in ((0, 0, 0, 0, 0), (1, 2, 3, 1, 2), (0, 1, 2, 3, 1)):
        value = patches[1, row * 3 + column, (y * 4 + x) * 3 + channel]
        assert value == images[1, channel, row * 4 + y, column * 4 + x]
    assert torch.equal(unpatchify(patches, 4, (2, 3)), images)


# What the paper says of masked tokens.


def test_layer_tokens__yields_every_depth_of_patch_tokens(tiny_model, generator: torch.Generator) -> None:
    stack = tiny_model.stacks[0]
    found = layers(tiny_model, some_images(generator, 2), some_masks(generator, 2))
    assert [layer.depth for layer in found] == list(range(tiny_model.depth(stack) + 1))
    for layer in found:
        assert layer.tokens.shape[:2] == (2, NUM_PATCHES)  # no class token
        assert layer.mask.shape == (2, NUM_PATCHES)


def test_layer_tokens__compute_a_depth_only_when_asked(tiny_model, generator: torch.Generator) -> None:
    blocks = tiny_model.decoder_blocks if isinstance(tiny_model, MAE) else tiny_model.blocks
    seen: list[int] = []
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: seen.append(number))
    tokens = tiny_model.layer_tokens(some_images(generator, 1), some_masks(generator, 1))
    next(tokens)
    assert seen == []
    next(tokens)
    assert seen == [0]


def test_simmim__masked_tokens_are_one_vector_at_depth_0(tiny_simmim, generator: torch.Generator) -> None:
    mask = some_masks(generator, 2)
    first = layers(tiny_simmim, some_images(generator, 2), mask)[0].tokens
    assert torch.equal(first[mask], tiny_simmim.mask_token[0].expand(20, -1))


def test_mae__masked_tokens_differ_by_their_position_alone_at_depth_0(tiny_mae, generator: torch.Generator) -> None:
    mask = some_masks(generator, 2)
    first = layers(tiny_mae, some_images(generator, 2), mask)[0].tokens
    expected = tiny_mae.mask_token + tiny_mae.decoder_pos_embed[:, 1:].expand(2, -1, -1)
    assert torch.equal(first[mask], expected[mask])
    assert len(first[0][mask[0]].unique(dim=0)) == 10


@pytest.mark.parametrize("make", [make_mae, make_simmim, lambda: make_simmim(**SIMMIM_VARIANTS["absolute"])])
def test_layer_tokens__do_not_see_masked_pixels(make, generator: torch.Generator) -> None:
    model, images, mask = make(), some_images(generator, 2), some_masks(generator, 2)
    hidden = mask.reshape(2, 1, 4, 4).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    other = torch.where(hidden, torch.randn(images.shape, generator=generator), images)
    assert not torch.equal(other, images)
    for before, after in zip(layers(model, images, mask), layers(model, other, mask), strict=True):
        assert torch.equal(before.tokens, after.tokens)


def test_simmim__a_visible_patch_moves_its_own_row_only_at_depth_0(tiny_simmim, generator: torch.Generator) -> None:
    images, mask = some_images(generator, 1), some_masks(generator, 1)
    patch = int((~mask[0]).nonzero()[2])
    other = images.clone()
    other[:, :, patch // 4 * 4 : patch // 4 * 4 + 4, patch % 4 * 4 : patch % 4 * 4 + 4] += 1
    moved = [
        (before.tokens != after.tokens).any(dim=2)[0].nonzero().flatten().tolist()
        for before, after in zip(layers(tiny_simmim, images, mask), layers(tiny_simmim, other, mask), strict=True)
    ]
    assert moved[0] == [patch]
    assert moved[1] == list(range(16))


def test_mae__a_visible_patch_moves_visible_rows_only_at_depth_0(tiny_mae, generator: torch.Generator) -> None:
    images, mask = some_images(generator, 1), some_masks(generator, 1)
    patch = int((~mask[0]).nonzero()[2])
    other = images.clone()
    other[:, :, patch // 4 * 4 : patch // 4 * 4 + 4, patch % 4 * 4 : patch % 4 * 4 + 4] += 1
    before, after = layers(tiny_mae, images, mask), layers(tiny_mae, other, mask)
    moved = (before[0].tokens != after[0].tokens).any(dim=2)
    assert torch.equal(moved, ~mask)
    assert bool((before[1].tokens != after[1].tokens).any(dim=2).all())


@pytest.mark.parametrize("ragged", [False, True])
def test_layer_tokens__of_an_image_do_not_depend_on_the_others(
    tiny_model, ragged: bool, generator: torch.Generator
) -> None:
    images, mask = some_images(generator, 5), some_masks(generator, 5, ragged=ragged)
    together = layers(tiny_model, images, mask)
    for row in range(5):
        for whole, alone in zip(together, layers(tiny_model, images[row : row + 1], mask[row : row + 1]), strict=True):
            assert torch.allclose(whole.tokens[row], alone.tokens[0], atol=2e-5)


def test_reconstruct__uses_the_last_depth(tiny_model, generator: torch.Generator) -> None:
    images, mask = some_images(generator, 2), some_masks(generator, 2)
    with torch.no_grad():
        image = tiny_model.reconstruct(images, mask)
        assert image.shape == images.shape
        assert torch.equal(tiny_model(images, mask), image)
        last = layers(tiny_model, images, mask)[-1].tokens
        if isinstance(tiny_model, MAE):
            patches = tiny_model.decoder_pred(tiny_model.decoder_norm(last))
            expected = patches[1, 6].reshape(PATCH, PATCH, 3).permute(2, 0, 1)  # row, column, colour
        else:
            values = tiny_model.decoder(tiny_model.norm(last).mT.reshape(2, -1, 4, 4))[1, :, 1, 2]
            expected = values.reshape(3, PATCH, PATCH)  # colour, row, column
    assert torch.allclose(image[1, :, 4:8, 8:12], expected, atol=1e-5)


# The interface.


def test_layer_tokens__names_the_stacks_when_there_are_several(two_stacks, generator: torch.Generator) -> None:
    images = some_images(generator, 1)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [0, 1, 4, 5]] = True
    with pytest.raises(ValueError, match="several stacks with masked tokens, name one: pixel_decoder, feature_decoder"):
        two_stacks.layer_tokens(images, mask)
    with pytest.raises(ValueError, match="stack must be one of pixel_decoder, feature_decoder, got 'decoder'"):
        two_stacks.layer_tokens(images, mask, "decoder")
    assert [layer.tokens.shape[1] for layer in layers(two_stacks, images, mask, "feature_decoder")] == [16, 4]
    assert [layer.mask.shape[1] for layer in layers(two_stacks, images, mask, "feature_decoder")] == [16, 4]


def test_layer_tokens__takes_the_only_stack_by_name_too(tiny_model, generator: torch.Generator) -> None:
    images, mask = some_images(generator, 1), some_masks(generator, 1)
    by_name = layers(tiny_model, images, mask, tiny_model.stacks[0])
    assert torch.equal(by_name[-1].tokens, layers(tiny_model, images, mask)[-1].tokens)
    with pytest.raises(ValueError, match="stack must be one of"):
        tiny_model.layer_tokens(images, mask, "pixel_decoder")


def test_layer_tokens__refuses_shapes_that_do_not_fit_at_the_call(tiny_model, generator: torch.Generator) -> None:
    images, mask = some_images(generator, 2), some_masks(generator, 2)
    for call in (tiny_model.layer_tokens, tiny_model.reconstruct):
        with pytest.raises(ValueError, match=r"images must be \[batch, 3, 16, 16\], got \[2, 3, 8, 16\]"):
            call(images[:, :, :8], mask)
        with pytest.raises(ValueError, match="mask must have 16 patches, got 8"):
            call(images, mask[:, :8])
        with pytest.raises(ValueError, match="same batch, got 2 and 1"):
            call(images, mask[:1])
        with pytest.raises(ValueError, match="mask must be bool"):
            call(images, mask.long())
        with pytest.raises(ValueError, match="mask must leave a patch visible"):
            call(images, torch.ones_like(mask))


def test_stacks__say_where_masked_tokens_live(tiny_mae, tiny_simmim) -> None:
    assert (tiny_mae.stacks, tiny_mae.info.style, tiny_mae.depth("decoder")) == (("decoder",), "decoder", 3)
    assert (tiny_simmim.stacks, tiny_simmim.info.style, tiny_simmim.depth("encoder")) == (("encoder",), "inpainting", 3)


def test_model_info__is_frozen_and_knows_its_grid() -> None:
    info = ModelInfo("mae", "decoder", 224, 16, MaskRule("random", 0.75, 16))
    assert (info.grid, info.num_patches, info.mask_ratio, info.mask_unit) == ((14, 14), 196, 0.75, 16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.patch_size = 8  # type: ignore[misc]


def test_model_info__refuses_impossible_values() -> None:
    rule = MaskRule("random", 0.75, 16)
    with pytest.raises(ValueError, match="a patch of 15 px does not divide an image of 224 px"):
        ModelInfo("mae", "decoder", 224, 15, rule)
    with pytest.raises(ValueError, match="style must be inpainting or decoder, got 'encoder'"):
        ModelInfo("mae", "encoder", 224, 16, rule)  # type: ignore[arg-type]


def test_configs__refuse_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ValueError, match="num_heads must divide the width 768, got 7"):
        MAEConfig(num_heads=7)
    with pytest.raises(ValueError, match="decoder_num_heads must divide the width 512, got 3"):
        MAEConfig(decoder_num_heads=3)
    with pytest.raises(ValueError, match="num_heads must divide the width 768, got 0"):
        SimMIMConfig(num_heads=0)


def test_configs__are_the_published_vit_b_by_default() -> None:
    with torch.device("meta"):
        mae = MAE(MAEConfig(), ModelInfo("mae", "decoder", 224, 16, MaskRule("random", 0.75, 16)))
        simmim = SimMIM(SimMIMConfig(), ModelInfo("simmim_vit", "inpainting", 224, 16, MaskRule("block", 0.6, 32)))
    # The published file: 111.9 M parameters with both position tables; SimMIM's ViT-B: 86 M and its one-layer head.
    assert sum(p.numel() for p in mae.parameters()) == 111_907_840
    assert 85e6 < sum(p.numel() for p in simmim.parameters()) < 88e6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layer_tokens__keep_the_models_precision(tiny_model, dtype: torch.dtype, generator: torch.Generator) -> None:
    images, mask = some_images(generator, 2), some_masks(generator, 2, ragged=True)
    found = layers(tiny_model.to(dtype), images.to(dtype), mask)
    assert {layer.tokens.dtype for layer in found} == {dtype}


def test_channels__may_differ_from_three(generator: torch.Generator) -> None:
    for model in (make_mae(channels=1), make_simmim(channels=1)):
        images, mask = torch.randn(2, 1, SIDE, SIDE, generator=generator), some_masks(generator, 2)
        assert model.reconstruct(images, mask).shape == images.shape
