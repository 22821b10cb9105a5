"""Every published layout: recognized from the file alone, tokens as the reference has them, damage refused by name."""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_files import PUBLISHED, Draw, Published, simmim_model_only, swin_weights, under_encoder

from mto_analysis import CheckpointError, inspect_checkpoint, load_checkpoint, own_loss, save_checkpoint
from mto_analysis.checkpoints.conversion import Given, build
from mto_analysis.checkpoints.layouts import recognize
from mto_analysis.checkpoints.reading import read_checkpoint
from mto_analysis.errors import HeadCountError
from mto_analysis.masks import mask_keys
from mto_analysis.models import MaskedImageModel

BY_NAME = {each.name: each for each in PUBLISHED}


@pytest.fixture(scope="module", params=BY_NAME)
def published(request: pytest.FixtureRequest) -> Published:
    return BY_NAME[request.param]


@pytest.fixture(scope="module")
def path(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As its authors save it."""
    return published.save(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def model(published: Published, path: Path) -> MaskedImageModel:
    return load_checkpoint(path, **published.heads)


def test_load_checkpoint__tokens_agree_with_the_reference_on_masks_of_different_counts(
    published: Published, model: MaskedImageModel
) -> None:
    assert not {"yacs", "mmengine"} & set(sys.modules)  # nothing foreign is imported
    assert model.info.family == published.family
    assert published.name.split(",")[0] in model.info.layout
    assert set(model.stacks) == set(published.references)
    batch = 1 if model.info.num_patches > 1000 else 2
    images = torch.randn(batch, 3, *(model.info.image_size,) * 2, generator=torch.Generator().manual_seed(1))
    mask = model.info.mask_rule.sample(mask_keys(["a", "b"][:batch]), model.info.grid, model.info.patch_size)
    if model.info.family == "hiera":
        mask[0] = (torch.arange(36) % 6 < 4) & (torch.arange(36) // 6 < 4)  # 4 of 9 units instead of 6
    elif batch > 1 and model.info.family not in ("simmim_swin", "simmim_swinv2", "ibot_swin"):
        mask[0, mask[0].nonzero()[0]] = False  # one masked patch less than in the second image
        assert len(set(mask.sum(dim=1).tolist())) > 1 or model.info.mask_rule.kind == "blockwise"
    weights = {name: tensor.double() for name, tensor in published.weights().items()}
    with torch.no_grad():
        for stack, reference in published.references.items():
            layers = list(model.layer_tokens(images, mask, stack))
            assert [layer.depth for layer in layers] == list(range(model.depth(stack) + 1))
            for row in range(batch):
                expected = reference(weights, images[row].double(), mask[row])
                for layer, tokens in zip(layers, expected, strict=True):
                    torch.testing.assert_close(layer.tokens[row].double(), tokens, atol=1e-4, rtol=1e-5)


def test_save_checkpoint__loads_back_bit_for_bit(model: MaskedImageModel, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path / "ours.safetensors")
    again = load_checkpoint(tmp_path / "ours.safetensors")
    assert again.config == model.config
    state, expected = again.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_inspect_checkpoint__names_the_head_counts_that_must_be_given(published: Published, path: Path) -> None:
    report = inspect_checkpoint(path)
    assert report.info.family == published.family
    assert set(report.needed) == set(published.heads)
    if published.heads:
        with pytest.raises(HeadCountError, match=r"--(decoder-)?num-heads"):
            load_checkpoint(path)


def test_load_checkpoint__refuses_a_missing_mask_token_by_name(published: Published, tmp_path: Path) -> None:
    path = published.save(tmp_path, lambda tensors: tensors.pop(published.mask_token))
    with pytest.raises(CheckpointError, match=r"mask[_ ]token"):
        load_checkpoint(path, **published.heads)


def test_load_checkpoint__refuses_an_unknown_key_by_name(published: Published, tmp_path: Path) -> None:
    name = f"{published.probe_key}_surprise"
    prefix = "module." if published.name in ("MAE-Lite", "iBOT", "iBOT Swin") else ""
    path = published.save(tmp_path, lambda tensors: tensors.update({prefix + name: torch.ones(2)}))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_checkpoint(path, **published.heads)


def test_load_checkpoint__refuses_a_wrong_shape_by_name(published: Published, tmp_path: Path) -> None:
    prefix = "module." if published.name in ("MAE-Lite", "iBOT", "iBOT Swin") else ""
    name = prefix + published.probe_key
    path = published.save(tmp_path, lambda tensors: tensors.update({name: tensors[name][1:].contiguous()}))
    with pytest.raises(CheckpointError, match=f"wrong shape: {re.escape(published.probe_key)} is"):
        load_checkpoint(path, **published.heads)


def refuse(folder: Path, *names: str, width: int = 768) -> str:
    """The message for a file that holds these tensors and a patch embedding."""
    tensors = {name: torch.ones(2, 2) for name in names}
    tensors["patch_embed.proj.weight"] = torch.ones(width, 3, 1, 1)
    torch.save({"model": tensors}, folder / "file.pth")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder / "file.pth")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("mmpretrain MixMIM", ("backbone.absolute_pos_embed", "neck.decoder_blocks.0.attn.qkv.weight")),
        ("OpenMixup A2MIM", ("backbone.layers.0.gamma_1", "neck.decoder_pred.0.weight")),
        ("CrossMAE", ("decoder_blocks.0.cross_attn.q.weight", "wfm.linear.weight")),
        ("UM-MAE", ("vis_mask_token", "mask_token")),
        ("MAE-pytorch", ("encoder_to_decoder.weight", "mask_token")),
        ("MixMIM", ("layers.0.blocks.0.norm1.weight", "decoder_blocks.0.attn.qkv.weight")),
        ("SatMAE of channel groups", ("channel_embed", "decoder_channel_embed", "mask_token")),
        ("DINOv2", ("mask_token", "blocks.0.ls1.gamma")),
    ],
)
def test_load_checkpoint__names_a_family_that_it_does_not_read(
    name: str, tensors: tuple[str, ...], tmp_path: Path
) -> None:
    message = refuse(tmp_path, *tensors)
    assert f"has tensor names of {name}, which is not read" in message
    token = next((each for each in tensors if each.endswith("mask_token")), None)
    assert (f"it holds {token}" if token else "none of its tensors is named mask_token") in message
    assert "get " not in message


def test_load_checkpoint__refuses_padded_maps_of_mmpretrain(tmp_path: Path) -> None:
    swin = BY_NAME["mmpretrain SimMIM Swin"]

    def pad(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("bias_table")]:
            tensors[name] = torch.zeros(529, tensors[name].shape[1])

    words = r"a window of 12 tokens on a map of 6 x 6 \(assumed: 192 px\), which mmpretrain pads"
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(swin.save(tmp_path, pad))


def test_load_checkpoint__takes_the_published_window_and_size_where_a_swin_v2_file_is_silent(tmp_path: Path) -> None:
    weights = swin_weights(grids=(48, 24, 12, 6), window=12, depths=(1, 2, 1, 1), heads=(1, 1, 2, 2), version=2)
    info = (model := load_checkpoint(simmim_model_only(tmp_path, under_encoder(weights)))).info
    assert (info.image_size, model.config.window, info.mask_rule.unit) == (192, 12, 32)
    assert info.mask_rule_source == "published SimMIM Swin"


def test_load_checkpoint__reads_a_swin_without_its_head(tmp_path: Path) -> None:
    swin = BY_NAME["Hugging Face Swin, hub"]
    model = load_checkpoint(swin.save(tmp_path, lambda t: [t.pop(f"decoder.0.{last}") for last in ("weight", "bias")]))
    assert model.info.criterion is None
    with pytest.raises(ValueError, match="no decoder"):
        model.reconstruct(torch.zeros(1, 3, 64, 64), torch.arange(256)[None] < 128)


def test_load_checkpoint__refuses_heads_that_contradict_bootmae(tmp_path: Path) -> None:
    path = BY_NAME["BootMAE"].save(tmp_path)
    with pytest.raises(CheckpointError, match=r"num_heads=4 contradicts the file.*attention 15 wide.*one of 3"):
        load_checkpoint(path, num_heads=4)
    with pytest.raises(CheckpointError, match="one number for both"):
        load_checkpoint(path, num_heads=3, decoder_num_heads=2)


@pytest.mark.parametrize("name", ["BEiT", "MILAN", "CAE", "mmpretrain MAE, features of EVA"])
def test_reconstruct__says_that_a_model_predicts_no_pixels(name: str, tmp_path: Path) -> None:
    model = load_checkpoint(BY_NAME[name].save(tmp_path), **BY_NAME[name].heads)
    images, mask = torch.zeros(1, 3, 24, 24), torch.arange(36)[None] < 20
    assert own_loss(model, images, mask) is None
    with pytest.raises(ValueError, match="nothing to reconstruct"):
        model.reconstruct(images, mask)


def test_load_checkpoint__tells_the_statistics_and_masks_of_beit_files_apart(tmp_path: Path) -> None:
    found = {}
    for name in ("BEiT", "BEiT, positions only", "BEiT v2", "data2vec vision", "mmpretrain BEiT", "ConMIM"):
        info = load_checkpoint(BY_NAME[name].save(tmp_path), **BY_NAME[name].heads).info
        found[name] = (info.mean[0], info.mask_rule.kind, round(info.mask_ratio, 4))
    assert found == {
        "BEiT": (0.5, "blockwise", 0.3827),
        "BEiT, positions only": (0.485, "blockwise", 0.3827),
        "BEiT v2": (0.485, "blockwise", 0.3827),
        "data2vec vision": (0.485, "blockwise", 0.6122),
        "mmpretrain BEiT": (0.485, "blockwise", 0.3827),
        "ConMIM": (0.485, "block", 0.75),
    }


@pytest.mark.parametrize("parts", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_load_checkpoint__never_fails_inside_torch_for_a_tensor_of_no_axes(
    published: Published, path: Path, parts: int
) -> None:
    raw = read_checkpoint(path)
    convert = recognize(raw)[1]
    for tensor in [*list(raw.tensors)[:: max(1, len(raw.tensors) // parts)], published.probe_key]:
        changed = replace(raw, tensors=raw.tensors | {tensor: torch.tensor(1.0)})
        # What is left out on purpose may hold anything; everything else is an error of ours, never of torch.
        with contextlib.suppress(CheckpointError):
            build(convert(changed, Given(**published.heads)), materialize=False)
            assert tensor != published.probe_key


def test_load_checkpoint__knows_eva_by_its_width(tmp_path: Path) -> None:
    draw = Draw()
    shapes = {"cls_token": (1, 1, 1408), "mask_token": (1, 1, 1408), "pos_embed": (1, 257, 1408)}
    shapes |= {"patch_embed.proj.weight": (1408, 3, 14, 14), "patch_embed.proj.bias": (1408,)}
    for name, shape in shapes.items():
        draw.put(name, *shape)
    draw.block("blocks.0", 1408, 8, fused=False)
    draw.norm("norm", 1408)
    torch.save({"module": draw.weights}, tmp_path / "eva.pt")
    report = inspect_checkpoint(tmp_path / "eva.pt")
    assert (report.info.family, report.config["num_heads"], report.info.image_size) == ("eva", 16, 224)
    assert (report.info.mean[0], int(report.info.mask_ratio * 256)) == (0.48145466, 105)


def test_info__says_where_visible_tokens_never_change(model: MaskedImageModel) -> None:
    never = "visible tokens are the same at every layer depth" in model.info.caveat
    assert never == (model.info.family in ("milan", "cae"))
