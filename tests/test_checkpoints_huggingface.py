"""Folders of transformers' own classes: tokens equal its plain hidden states, or the folder is refused."""

import copy
import dataclasses
import inspect
import json
import sys
import warnings
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from test_cli import ok, run
from test_mto_attach import CONFIG, assert_near, assert_same, attached_way, slow_way
from test_mto_attach_libraries import installed
from training_models import Case

from mto_analysis import heterogeneity, image_batches, load_checkpoint, measure, open_images
from mto_analysis.checkpoints import inspect_checkpoint
from mto_analysis.demo import DEMO_IMAGES
from mto_analysis.errors import CheckpointError
from mto_analysis.images import choose_images
from mto_analysis.masks import MaskRule, mask_keys
from mto_analysis.models.interface import ModelInfo, height_and_width
from mto_analysis.models.live import inferred_info
from mto_analysis.mto import attach_mto

hf = installed("transformers")

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
}
PADDED = {"image_size": 40, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "window_size": 2}

DECODER = {
    "decoder_hidden_size": 12,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}
HIERA = {
    "embed_dim": 8,
    "image_size": [32, 32],
    "depths": [1, 1],
    "num_heads": [1, 2],
    "num_query_pool": 1,
    "masked_unit_size": [2, 2],
    "masked_unit_attention": [True, False],
    "decoder_hidden_size": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "mask_ratio": 0.5,
}
JEPA = {
    "patch_size": 4,
    "crop_size": 16,
    "frames_per_clip": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pred_hidden_size": 24,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 3,
    "pred_num_mask_tokens": 3,
}

# name: class, its configuration, prefix tokens, settings
CLASSES = {
    "vit": ("ViTForMaskedImageModeling", "ViTConfig", 1, VIT | {"encoder_stride": 4}),
    "vit_rect": ("ViTForMaskedImageModeling", "ViTConfig", 1, VIT | {"image_size": [16, 24], "encoder_stride": 4}),
    "deit": ("DeiTForMaskedImageModeling", "DeiTConfig", 2, VIT | {"encoder_stride": 4}),
    "data2vec": (
        "Data2VecVisionModel",
        "Data2VecVisionConfig",
        1,
        VIT | {"use_mask_token": True, "use_shared_relative_position_bias": True},
    ),
    "data2vec_classifier": (
        "Data2VecVisionForImageClassification",
        "Data2VecVisionConfig",
        1,
        VIT | {"use_mask_token": True, "use_relative_position_bias": True, "use_absolute_position_embeddings": True},
    ),
    "vit_mae": ("ViTMAEForPreTraining", "ViTMAEConfig", 1, VIT | DECODER),
    "hiera": ("HieraForPreTraining", "HieraConfig", 0, HIERA),
    "videomae": ("VideoMAEForPreTraining", "VideoMAEConfig", 0, VIT | DECODER | {"num_frames": 4, "tubelet_size": 2}),
    "vjepa2": ("VJEPA2Model", "VJEPA2Config", 0, JEPA),
    "beit_pretraining": (
        "BeitForMaskedImageModeling",
        "BeitConfig",
        1,
        VIT | {"use_mask_token": True, "use_shared_relative_position_bias": True, "vocab_size": 8192},
    ),
    "beit": ("BeitModel", "BeitConfig", 1, VIT | {"use_mask_token": True, "use_absolute_position_embeddings": True}),
    "dinov2": ("Dinov2Model", "Dinov2Config", 1, VIT | {"mlp_ratio": 2}),
    "dinov2_classifier": ("Dinov2ForImageClassification", "Dinov2Config", 1, VIT | {"use_swiglu_ffn": True}),
    "dinov2_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        4,
        VIT | {"num_register_tokens": 3},
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", 3, VIT | {"num_register_tokens": 2}),
    "flava": ("FlavaImageModel", "FlavaImageConfig", 1, VIT | {"mask_token": True}),
    "vit_msn": ("ViTMSNModel", "ViTMSNConfig", 1, VIT),
    "ijepa": ("IJepaModel", "IJepaConfig", 0, VIT | {"use_mask_token": True}),
    "sapiens2": ("Sapiens2Model", "Sapiens2Config", 9, VIT | {"use_mask_token": True}),
    "tipsv2": ("Tipsv2VisionModel", "Tipsv2VisionConfig", 2, VIT),
    "internvl": (
        "InternVLVisionModel",
        "InternVLVisionConfig",
        1,
        VIT | {"use_mask_token": True, "image_size": [16, 16], "patch_size": [4, 4]},
    ),
    "swin": ("SwinModel", "SwinConfig", 0, SWIN | {"num_heads": [2, 2]}),
    "swinv2": ("Swinv2Model", "Swinv2Config", 0, SWIN | {"num_heads": [2, 2]}),
    "swin_padded": ("SwinForMaskedImageModeling", "SwinConfig", 0, PADDED | {"encoder_stride": 8}),
    "swinv2_padded": ("Swinv2ForMaskedImageModeling", "Swinv2Config", 0, PADDED | {"encoder_stride": 8}),
    "donut_swin": ("DonutSwinModel", "DonutSwinConfig", 0, SWIN | {"num_heads": [2, 2]}),
    "focalnet": (
        "FocalNetForMaskedImageModeling",
        "FocalNetConfig",
        0,
        SWIN | {"focal_levels": [2, 2], "focal_windows": [3, 3], "encoder_stride": 8},
    ),
}


def random_model(name, **more):
    """A model with random mask token, biases, norms and scales."""
    cls, config, _, settings = CLASSES[name]
    cls = getattr(hf, cls)
    options = {"use_mask_token": True} if "use_mask_token" in inspect.signature(cls).parameters else {}
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls(getattr(hf, config)(**settings | more), **options).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            near_one = parameter.ndim == 1 and path.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if near_one else 0.3 * noise)
    return model


def tower_of(model):
    """The part of a model that takes a mask: a classifier's encoder, or itself."""
    arguments = {"bool_masked_pos", "noise", "target_mask"}
    return model if arguments & set(inspect.signature(model.forward).parameters) else model.base_model


def hidden_states(model, images, mask):
    """Tokens that an encoder itself gives out."""
    inner = model.base_model if "MaskedImage" in type(model).__name__ else tower_of(model)
    with torch.no_grad():
        return inner(images, bool_masked_pos=mask, output_hidden_states=True, return_dict=True).hidden_states


def numbers(mask):
    return mask.nonzero()[:, 1].view(len(mask), -1)


def noise(mask):
    return {"noise": mask + torch.linspace(0, 0.5, mask.shape[1])}


# name: a decoder's layers, what the model is called with
DECODERS = {
    "vit_mae": (lambda model: model.decoder.decoder_layers, noise),
    "hiera": (lambda model: model.decoder.decoder_block.layers, noise),
    "videomae": (lambda model: model.decoder.decoder_layers, lambda mask: {"bool_masked_pos": mask}),
    "vjepa2": (
        lambda model: model.predictor.layer,
        lambda mask: {"context_mask": [numbers(~mask)], "target_mask": [numbers(mask)]},
    ),
}


def decoder_tokens(name, model, images, mask):
    """Tokens of each layer depth of a decoder, from its plain layers."""
    layers_of, arguments = DECODERS[name]
    layers, seen = layers_of(model), []
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    hooks += [layer.register_forward_hook(lambda _, args, out: seen.append(out)) for layer in layers]
    with torch.no_grad():
        model(images, **arguments(mask))
    for hook in hooks:
        hook.remove()
    return [each[0] if isinstance(each, tuple) else each for each in seen]


def inputs_of(info, dtype=torch.float32):
    """Images, or videos whose frames have masks of their own."""
    size, frames = height_and_width(info.image_size), (info.frames,) * (info.frames > 1)
    grid = (info.num_patches, 1) if frames else info.grid
    mask = info.mask_rule.sample(mask_keys("abc", seed=5), grid, info.patch_size)
    return torch.randn(3, *frames, info.channels, *size, dtype=dtype), mask


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-8), (torch.float32, 2e-4)])
@pytest.mark.parametrize("name", CLASSES)
def test_load_checkpoint__gives_the_hidden_states_of_the_library(name, dtype, near, tmp_path):
    model = random_model(name)
    model.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path).to(dtype)
    model, info = model.to(dtype), loaded.info
    if name not in ("vit_mae", "hiera", "beit_pretraining"):  # of these we have builders of our own
        assert info.family == CLASSES[name][0]
        assert info.layout == "Hugging Face transformers" or name in ("swin_padded", "swinv2_padded")
        assert any("config.json does not say how the model was masked" in each for each in info.assumptions)
    images, mask = inputs_of(info, dtype)
    (stack,) = loaded.stacks
    with torch.no_grad():
        layers = list(loaded.layer_tokens(images, mask, stack))
    expected = decoder_tokens(name, model, images, mask) if name in DECODERS else hidden_states(model, images, mask)
    assert len(layers) == loaded.depth(stack) + 1
    assert torch.equal(layers[0].mask, mask.sort(dim=1).values if name == "videomae" else mask)  # visible ones first
    # Hidden states of hierarchical models are those between stages: the first and the last are tokens of blocks too.
    depths = range(len(layers)) if len(expected) == len(layers) else (0, -1)
    for depth in depths:
        tokens, whole = layers[depth].tokens, expected[depth]
        assert whole.shape[1] - tokens.shape[1] == CLASSES[name][2]
        assert (tokens - whole[:, CLASSES[name][2] :]).abs().max() <= near * whole.abs().max()
    by_hand = [heterogeneity(layer.tokens, layer.mask).mean().item() for layer in layers]
    live = model.base_model if name == "vit_rect" else tower_of(model)  # whose own prediction is for squares
    for measured in (loaded, live):
        found = measure(measured, images, mask).summary()["heterogeneity"].tolist()
        assert found == pytest.approx(by_hand, rel=1e-6 if dtype == torch.float64 else 1e-3)


def blocks_of(name, model):
    """The blocks that masked tokens go through."""
    if name in DECODERS:
        return list(DECODERS[name][0](model))
    base = model.base_model
    holder = getattr(base, "encoder", getattr(base, "model", base))
    layers = next(found for each in ("layers", "layer", "stages") if (found := getattr(holder, each, None)) is not None)
    inner = [getattr(layer, "blocks", getattr(layer, "layers", None)) for layer in layers]
    return list(layers) if None in inner else [block for stage in inner for block in stage]


def run_training(name, model, dtype, seed):
    """A forward with a loss, and the mask in the order of tokens."""
    torch.manual_seed(seed)
    if name == "hiera":  # masked in units of 2 x 2 patches of 4 px, half of them
        info = ModelInfo("hiera", "decoder", 32, 8, MaskRule("random", 0.5, 8))
    else:
        info = inferred_info(model)
        merged = 2 ** (len(getattr(model.config, "depths", (1,))) - 1)
        rule = MaskRule("block", 0.5, merged * info.patch_size) if merged > 1 else MaskRule("random", 0.75, 4)
        info = dataclasses.replace(info, mask_rule=rule)
    images, mask = inputs_of(info, dtype)
    arguments = DECODERS[name][1](mask) if name in DECODERS else {"bool_masked_pos": mask}
    output = next(each for each in model(images, **arguments).to_tuple() if isinstance(each, torch.Tensor))
    return output.float().square().mean(), mask.sort(dim=1).values if name == "videomae" else mask


@pytest.mark.parametrize("precision", ["float64", "bf16 autocast"])
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("vit_rect", "beit_pretraining")])
def test_attach__equals_the_slow_way(name, precision):
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = tower_of(random_model(name)).to(dtype).train()
    twin, mto = copy.deepcopy(model), attach_mto(model, CONFIG, check_every=0)
    case = Case(
        None,
        lambda each, seed: run_training(name, each, dtype, seed),
        lambda each: [blocks_of(name, each)],
        CLASSES[name][2],
    )

    def autocast():
        return nullcontext() if dtype == torch.float64 else torch.autocast("cpu", torch.bfloat16)

    for seed in range(2):
        found, expected = attached_way(case, model, mto, seed, autocast), slow_way(case, twin, seed, autocast=autocast)
        if dtype == torch.float64:
            assert_same(found, expected, rtol=1e-8, atol=1e-8)
        else:
            assert_near(found, expected)


@pytest.fixture
def folder(tmp_path):
    random_model("vit").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edited(folder, **settings):
    """The folder with other settings in its ``config.json``."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def test_command__measures_a_folder(folder, tmp_path):
    result = ok("heterogeneity", "--ckpt", folder, "--limit", 4, "--seed", 1, "--out", tmp_path / "out")
    assert "assumed that masks are random patches" in result.stderr
    live = load_checkpoint(folder)
    images = open_images(DEMO_IMAGES)
    chosen = choose_images(images, [images.names[row] for row in (0, 64, 128, 192)])
    expected = measure(live, image_batches(chosen, live.info), seed=1).summary()
    assert (table := pd.read_csv(tmp_path / "out" / "heterogeneity.csv"))["layer_depth"].tolist() == [0, 1, 2, 3]
    assert table["heterogeneity"].tolist() == pytest.approx(expected["heterogeneity"].tolist(), rel=1e-4)


def test_inspect_checkpoint__describes_it(folder):
    report = inspect_checkpoint(folder)
    assert (report.depths, report.config["architecture"]) == ({"encoder": 3}, "ViTForMaskedImageModeling")
    assert report.config["num_heads"] == 2
    assert report.needed == ()


def test_load_checkpoint__new_weights_are_of_the_same_class(folder):
    live = load_checkpoint(folder)
    fresh = live.with_new_weights(1)
    assert type(fresh.model) is type(live.model)
    assert not torch.equal(next(fresh.parameters()), next(live.parameters()))


def test_load_checkpoint__reads_statistics_beside_the_weights(folder):
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3], "size": {"height": 16, "width": 16}}'
    )
    info = load_checkpoint(folder).info
    assert (info.mean, info.std) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    assert not any("mean" in each for each in info.assumptions)


def test_load_checkpoint__an_untrained_mask_token_is_a_caveat(tmp_path):
    model = random_model("data2vec")
    torch.nn.init.zeros_(model.embeddings.mask_token)
    model.save_pretrained(tmp_path)
    live = load_checkpoint(tmp_path)
    assert any("probably never trained" in each for each in live.info.assumptions)
    mask = live.info.mask_rule.sample(mask_keys("ab"), live.info.grid, 4)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        last = [layer.tokens for layer in live.layer_tokens(images, mask)][-1]
    assert torch.allclose(last, hidden_states(model, images, mask)[-1][:, 1:], atol=1e-4)


def test_load_checkpoint__names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("heterogeneity", "--ckpt", folder, "--limit", 1)
    assert result.exit_code == 3
    assert "mto-analysis[libraries]" in result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["OwnViT"], "auto_map": {"AutoModel": "own.OwnViT"}}, "has no class OwnViT; code of a fol"),
        ({"architectures": ["ViTForImageClassification"]}, "ViTForImageClassification has no mask token"),
        ({"num_hidden_layers": 4}, "missing: .*layers.3"),
        ({"num_hidden_layers": 2}, "unexpected: .*layers.2"),
        ({"hidden_size": 20}, "mismatched: .*embeddings"),
        ({"hidden_size": "x"}, r"transformers builds no ViTForMaskedImageModeling from config\.json"),
        ({"hidden_act": "own"}, r"transformers builds no ViTForMaskedImageModeling from config\.json"),
        ({"num_hidden_layers": 10**7}, "is more than the file's"),
        ({"architectures": ["VideoMAEModel"]}, "VideoMAEModel has no mask token"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "its weights are quantized"),
        (
            {"backbone": "resnet18", "use_pretrained_backbone": True},
            "asks for a model of another library .backbone 'res",
        ),
        ({"vision_config": {"model_type": "timm_wrapper"}}, "another library .model_type 'timm_wrapper'"),
    ],
)
def test_load_checkpoint__refuses(settings, message, folder):
    (folder / "own.py").write_text("raise SystemExit('code of a folder ran')")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(edited(folder, **settings))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(("option", "message"), [({"num_heads": 4}, "contradicts"), ({"image_size": 32}, "match")])
def test_load_checkpoint__refuses_options_that_contradict(option, message, folder):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder, **option)


def test_layer_tokens__of_one_mask_again_and_of_other_images(folder):
    live = load_checkpoint(folder)
    mask = live.info.mask_rule.sample(mask_keys("ab"), live.info.grid, 4)
    images, others = torch.randn(2, 2, 3, 16, 16)
    with torch.no_grad():
        first, again, other = ([each.tokens for each in live.layer_tokens(x, mask)] for x in (images, images, others))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[-1], other[-1])


def test_load_checkpoint__ignores_attention_code_that_config_json_asks_for(folder):
    plain = load_checkpoint(folder)
    asked = load_checkpoint(edited(folder, _attn_implementation="somebody/attention"))
    assert asked.model.config._attn_implementation == plain.model.config._attn_implementation == "sdpa"


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = SMALL | {"vocab_size": 50, "max_position_embeddings": 16}


def flava():
    several = {"image_config": VIT, "text_config": TEXT, "multimodal_config": SMALL}
    return hf.FlavaModel(hf.FlavaConfig(**several, hidden_size=16, projection_dim=16))


def tipsv2():
    return hf.Tipsv2Model(hf.Tipsv2Config(vision_config=VIT, text_config=TEXT))


def internvl():
    vision = VIT | {"use_mask_token": True, "image_size": [16, 16], "patch_size": [4, 4]}
    text = TEXT | {"model_type": "qwen2", "num_key_value_heads": 2}
    return hf.InternVLForConditionalGeneration(hf.InternVLConfig(vision_config=vision, text_config=text))


@pytest.mark.parametrize(
    ("make", "tower"),
    [(flava, "image_model"), (tipsv2, "vision_model"), (internvl, "model.vision_tower")],
)
def test_load_checkpoint__measures_the_vision_tower_of_a_larger_model(make, tower, tmp_path):
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    live, images = load_checkpoint(tmp_path), torch.randn(2, 3, 16, 16)
    mask = live.info.mask_rule.sample(mask_keys("ab"), live.info.grid, 4)
    with torch.no_grad():
        layers = list(live.layer_tokens(images, mask))
    expected = hidden_states(model.get_submodule(tower), images, mask)
    assert len(layers) == len(expected)
    for layer, whole in zip(layers, expected, strict=True):
        assert torch.allclose(layer.tokens, whole[:, whole.shape[1] - 16 :], atol=1e-4)


def test_load_checkpoint__drops_the_heads_of_other_tasks(tmp_path):
    config = hf.BeitConfig(**VIT | {"vocab_size": 5, "use_relative_position_bias": True}, use_mask_token=True)
    model = hf.BeitForImageClassification(config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) * ("mask_token" not in name))
    model.save_pretrained(tmp_path)
    ours, images, mask = load_checkpoint(tmp_path), torch.randn(2, 3, 16, 16), torch.arange(16).gt(6).expand(2, -1)
    assert any("probably never trained" in each for each in ours.info.assumptions)
    assert {"classifier.weight", "classifier.bias"} <= set(inspect_checkpoint(tmp_path).dropped)
    with torch.no_grad():
        layers = list(ours.layer_tokens(images, mask))
    for layer, whole in zip(layers, hidden_states(model, images, mask), strict=True):
        assert torch.allclose(layer.tokens, whole[:, 1:], atol=1e-5)


def test_load_checkpoint__a_window_larger_than_its_map_needs_larger_images(tmp_path):
    config = hf.SwinConfig(**SWIN | {"window_size": 8, "num_heads": [2, 2], "encoder_stride": 8})
    hf.SwinForMaskedImageModeling(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"windows of 8 tokens are larger than .*; give --image-size, from 64"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, image_size=64).info.image_size == 64


@pytest.mark.parametrize("own", [True, False])
def test_load_checkpoint__adds_a_shared_table_of_positions_to_those_of_blocks(own, tmp_path):
    settings = VIT | {"vocab_size": 5, "use_shared_relative_position_bias": True, "use_relative_position_bias": own}
    torch.manual_seed(2)
    model = hf.BeitForMaskedImageModeling(hf.BeitConfig(**settings, use_mask_token=True)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    ours, images, mask = load_checkpoint(tmp_path), torch.randn(2, 3, 16, 16), torch.arange(16).gt(6).expand(2, -1)
    assert ours.config.position_bias == ("per_block" if own else "shared")
    with torch.no_grad():
        layers = list(ours.layer_tokens(images, mask))
    for layer, whole in zip(layers, hidden_states(model, images, mask), strict=True):
        assert torch.allclose(layer.tokens, whole[:, 1:], atol=1e-5)


def test_command__images_are_videos_that_stand_still(tmp_path):
    model = random_model("vjepa2")
    model.save_pretrained(tmp_path / "model")
    result = ok("heterogeneity", "--ckpt", tmp_path / "model", "--limit", 2, "--out", tmp_path)
    assert "4 frames of 16 px" in result.stderr
    assert "an image is a video of 4 frames that are all alike" in result.stderr
    live = load_checkpoint(tmp_path / "model")
    batch = next(image_batches(open_images(DEMO_IMAGES), live.info, limit=2, batch_size=2))
    mask = live.info.mask_rule.sample(mask_keys(batch.names), live.info.mask_grid, 4)
    assert torch.equal(*mask.chunk(2, dim=1))
    expected = measure(model, batch.images[:, None].expand(-1, 4, -1, -1, -1), mask).summary()["heterogeneity"].tolist()
    assert pd.read_csv(tmp_path / "heterogeneity.csv")["heterogeneity"].tolist() == pytest.approx(expected, rel=1e-4)
    videos = torch.randn(2, 4, 3, 16, 16)
    with pytest.raises(ValueError, match="need equally many masked patches"):
        measure(model, videos, torch.stack([mask[0], mask[1].logical_or(mask[0])]))
    with pytest.raises(ValueError, match="the mask has 32 patches, the videos have 64; pass grid="):
        measure(model, videos.repeat(1, 2, 1, 1, 1), mask)
    with pytest.raises(ValueError, match="samples no masks itself"):
        measure(model, videos)


def test_command__controls_with_new_weights(tmp_path):
    random_model("data2vec").save_pretrained(tmp_path / "model")
    options = ("--limit", 2, "--definitions", "all", "--controls", "--control-seeds", 1)
    ok("heterogeneity", "--ckpt", tmp_path / "model", *options, "--out", tmp_path / "out")
    controls = pd.read_csv(tmp_path / "out" / "controls.csv")
    assert {"random_weights", "random_token", "zero_token"} < set(controls["control"])


def test_load_checkpoint__another_size_where_positions_are_no_table(tmp_path):
    random_model("dinov3").save_pretrained(tmp_path / "rotary")
    info = load_checkpoint(tmp_path / "rotary", image_size=24).info
    assert info.image_size == 24
    assert any("images of 24 px in place of 16 px" in each for each in info.assumptions)
    random_model("dinov2").save_pretrained(tmp_path / "table")  # its rows would be between those of the table
    with pytest.raises(CheckpointError, match="pass position="):
        load_checkpoint(tmp_path / "table", image_size=24)
