"""The real models of Hugging Face and lightly, where these are installed."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from test_mto_attach import CONFIG, assert_near, assert_same, attached_way, build, slow_way, traces
from torch import nn
from training_models import BATCH, Case, draw_mask, make_images, patches_of

from mto_analysis.mto import attach_mto

SIDE, PATCH = 16, 4  # 4 x 4 patches


def installed(name):
    """The module, or a skip; its own import may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


# ---- Hugging Face


def vit_settings(**more):
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    return small | {"image_size": SIDE, "patch_size": PATCH, "hidden_dropout_prob": 0.0} | more


def hf_vitmae():
    hf = installed("transformers")
    decoder = {"decoder_hidden_size": 12, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
    return hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**vit_settings(decoder_intermediate_size=16, **decoder)))


def hf_beit(**more):
    hf = installed("transformers")
    settings = {"vocab_size": 7, "use_mask_token": True, "use_shared_relative_position_bias": True}
    return hf.BeitForMaskedImageModeling(hf.BeitConfig(**vit_settings(drop_path_rate=0.0, **settings | more)))


def hf_swin(which="Swin"):
    hf = installed("transformers")
    settings = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
    config = getattr(hf, f"{which}Config")(**settings, window_size=2, drop_path_rate=0.0, encoder_stride=8)
    return getattr(hf, f"{which}ForMaskedImageModeling")(config)


def hf_vit():
    hf = installed("transformers")
    return hf.ViTForMaskedImageModeling(hf.ViTConfig(**vit_settings(encoder_stride=PATCH)))


def run_hf_vitmae(model, seed):
    torch.manual_seed(seed)
    out = model(pixel_values=make_images(seed))
    return out.loss, out.mask.bool()


def run_hf_beit(model, seed):
    mask = draw_mask(seed, masked=(9, 4, 12))  # blockwise masks differ in number
    labels = torch.arange(int(mask.sum())) % 7
    return model(make_images(seed), bool_masked_pos=mask, labels=labels).loss, mask


def run_hf_vit(model, seed):
    mask = draw_mask(seed)
    return model(make_images(seed), bool_masked_pos=mask).loss, mask


def run_hf_swin(model, seed):
    mask = draw_mask(seed, masked=(9, 9, 9), grid=8, unit=2)
    return model(make_images(seed, 32), bool_masked_pos=mask).loss, mask


def layers_of(*paths):
    """Blocks at the first path that exists: transformers 4 and 5 differ."""

    def stacks(model):
        for path in paths:
            found = model
            for name in path.split("."):
                found = getattr(found, name, None)
            if found is not None:
                return [list(found)]
        raise AttributeError(paths)

    return stacks


def stages_of(base):
    return lambda model: [[block for stage in getattr(model, base).encoder.layers for block in stage.blocks]]


# ---- lightly: parts, put together by the user's own class, as in its examples


class LightlyMAE(nn.Module):
    def __init__(self, kind):
        super().__init__()
        modules = installed("lightly.models.modules")
        if kind == "current":
            self.backbone = timm_backbone(depth=1)
            self.embed, self.predict = nn.Linear(16, 12), nn.Linear(12, PATCH * PATCH * 3)
            self.decoder = modules.MaskedVisionTransformerDecoderTIMM(16, embed_dim=12, depth=2, num_heads=2)
        else:
            self.backbone = torchvision_backbone()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated there
                self.decoder = modules.MAEDecoderTIMM(
                    16, PATCH, embed_dim=16, decoder_embed_dim=12, decoder_depth=2, decoder_num_heads=2
                )
        self.kind = kind

    def forward(self, images):
        utils = installed("lightly.models").utils
        keep, masked = utils.random_token_mask((len(images), 17), mask_ratio=0.75, device=images.device)
        x = self.backbone.encode(images, idx_keep=keep)
        if self.kind == "current":
            whole = utils.repeat_token(self.decoder.mask_token, (len(images), 17))
            whole = utils.set_at_index(whole, keep, self.embed(x).to(whole.dtype))
            out = self.predict(self.decoder(whole, idx_mask=masked))
        else:
            whole = utils.repeat_token(self.decoder.mask_token, (len(images), 17))
            whole = utils.set_at_index(whole, keep, self.decoder.embed(x).to(whole.dtype))
            out = self.decoder.predict(self.decoder.decode(whole))
        mask = mask_of(masked)
        return (out[:, 1:] - patches_of(images))[mask].square().mean(), mask


class LightlySimMIM(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.backbone = timm_backbone(depth=2) if kind == "timm" else torchvision_backbone()
        self.head = nn.Linear(16, PATCH * PATCH * 3)

    def forward(self, images):
        utils = installed("lightly.models").utils
        _, masked = utils.random_token_mask((len(images), 17), mask_ratio=0.6, device=images.device)
        out = self.head(self.backbone.encode(images, idx_mask=masked))
        mask = mask_of(masked)
        return (out[:, 1:] - patches_of(images))[mask].abs().mean(), mask


def mask_of(masked):
    """The mask of patches from indices of masked tokens, of which the first is the class token."""
    return torch.zeros(len(masked), 17, dtype=torch.bool).scatter_(1, masked, True)[:, 1:]


def timm_backbone(depth):
    modules, timm = installed("lightly.models.modules"), installed("timm")
    small = {"embed_dim": 16, "depth": depth, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, patch_size=PATCH, **small)
    return modules.MaskedVisionTransformerTIMM(vit=vit)


def torchvision_backbone():
    modules, vit = installed("lightly.models.modules"), installed("torchvision.models.vision_transformer")
    small = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24}
    return modules.MaskedVisionTransformerTorchvision(vit=vit.VisionTransformer(SIDE, PATCH, **small))


def run_lightly(model, seed):
    torch.manual_seed(seed)
    return model(0.3 * make_images(seed))  # or visible tokens are so long that L_spa is dead


LIBRARIES = {
    "hf vitmae": Case(hf_vitmae, run_hf_vitmae, layers_of("decoder.decoder_layers", "decoder.layers")),
    "hf beit": Case(hf_beit, run_hf_beit, layers_of("beit.layers", "beit.encoder.layer")),
    "hf beit, absolute positions": Case(
        lambda: hf_beit(use_absolute_position_embeddings=True, use_shared_relative_position_bias=False),
        run_hf_beit,
        layers_of("beit.layers", "beit.encoder.layer"),
    ),
    "hf vit": Case(hf_vit, run_hf_vit, layers_of("vit.layers", "vit.encoder.layer")),
    "hf swin": Case(hf_swin, run_hf_swin, stages_of("swin"), prefix=0),
    "hf swinv2": Case(lambda: hf_swin("Swinv2"), run_hf_swin, stages_of("swinv2"), prefix=0),
    "lightly mae": Case(lambda: LightlyMAE("current"), run_lightly, layers_of("decoder.blocks")),
    "lightly mae, older": Case(lambda: LightlyMAE("older"), run_lightly, layers_of("decoder.decoder_blocks")),
    "lightly simmim": Case(lambda: LightlySimMIM("torchvision"), run_lightly, layers_of("backbone.vit.encoder.layers")),
    "lightly simmim, timm": Case(lambda: LightlySimMIM("timm"), run_lightly, layers_of("backbone.vit.blocks")),
}
EACH = pytest.mark.parametrize("case", LIBRARIES.values(), ids=LIBRARIES)


@EACH
@pytest.mark.parametrize("precision", ["float32", "bf16 autocast"])
def test_attach__equals_the_slow_way_and_leaves_no_trace(case, precision):
    model = build(case)
    twin, before = copy.deepcopy(model), traces(model)
    mto = attach_mto(model, CONFIG)
    bf16 = precision == "bf16 autocast"

    def autocast():
        return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()

    for seed in range(2):
        found, expected = attached_way(case, model, mto, seed, autocast), slow_way(case, twin, seed, autocast=autocast)
        if bf16:
            assert_near(found, expected)
        else:
            assert_same(found, expected, rtol=1e-4, atol=1e-5)
    mto.detach()
    assert traces(model) == before


def checkpointing(model, reentrant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the name changes in transformers 6
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


@pytest.mark.parametrize(
    ("name", "reentrant"),
    # BEiT's shared position bias enters blocks from outside, which reentrant checkpointing cannot differentiate at all.
    [("hf vitmae", True), ("hf vitmae", False), ("hf beit", False)],
)
def test_hf__gradient_checkpointing_equals_the_slow_way(name, reentrant):
    case = LIBRARIES[name]
    model = build(case)
    twin = copy.deepcopy(model)
    checkpointing(model, reentrant)
    found = attached_way(case, model, attach_mto(model, CONFIG), 0)
    assert_same(found, slow_way(case, twin, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of checkpoints inside checkpoints
def test_hf_swin__gradient_checkpointing_of_whole_stages():
    case = LIBRARIES["hf swin"]
    model = build(case)
    twin = copy.deepcopy(model)
    mto = attach_mto(model, CONFIG)
    checkpointing(model, reentrant=False)
    assert_same(attached_way(case, model, mto, 0), slow_way(case, twin, 0), rtol=1e-4, atol=1e-5)
    checkpointing(model, reentrant=True)
    case.run(model, 0)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        mto.loss()


def test_hf__evaluation_is_not_counted():
    case = LIBRARIES["hf vitmae"]
    model = build(case).eval()
    mto = attach_mto(model)
    with torch.no_grad():
        case.run(model, 0)
    with pytest.raises(RuntimeError, match="no forward"):
        mto.loss()


def test_hf_trainer__compute_loss_with_accumulation(tmp_path):
    hf = installed("transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs it")

    class WithMTO(hf.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return loss + mto.loss() if model.training else loss

    model = build(LIBRARIES["hf vitmae"])
    mto = attach_mto(model)
    rows = [{"pixel_values": image} for image in torch.cat([make_images(seed) for seed in range(4)])]
    settings = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True}
    batches = {"max_steps": 2, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 2}
    arguments = hf.TrainingArguments(tmp_path, **batches, **settings)
    WithMTO(model, arguments, train_dataset=rows).train()
    assert mto.step == 4
