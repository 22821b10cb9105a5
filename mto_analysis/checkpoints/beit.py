"""Converters to :class:`InpaintingViT`: BEiT, BEiT v2, data2vec vision and ConMIM, and Hugging Face BEiT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mto_analysis.checkpoints.conversion import ENCODER_HEADS, Conversion, Heads, StateDict
from mto_analysis.checkpoints.inpainting import block_rule, blockwise_rule, inpainting_config, rename_beit
from mto_analysis.checkpoints.metadata import count, hf_config, section, within
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.masks import MaskRule
from mto_analysis.models import InpaintingConfig, InpaintingViT, ModelInfo
from mto_analysis.models.interface import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["HF_BLOCK_NAMES", "convert_beit", "convert_beit_v2", "convert_conmim", "convert_hf_beit", "inpainting_model"]

#: Mean and standard deviation of pixels scaled to -1..1.
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

_BEIT_MASKED = 75
_EVA_WIDTH, _EVA_HEADS = 1408, 16
_EVA_MASKED, _EVA_PATCHES = 105, 256
_DATA2VEC_MASKED = 120
_CONMIM_RATIO = 0.75

#: Inner names of a block, of the hub's files and as transformers 5 saves them.
HF_BLOCK_NAMES = (
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.((attention|self)\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.((attention|self)\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.((attention|self)\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def convert_beit(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """Pre-training files of BEiT and data2vec vision, told apart by the head, and of EVA giant, by its width.

    BEiT's head gives visual tokens, data2vec's features as wide as the model.

    The head is left out: it acts on nothing that is measured. BEiT's ImageNet-22k files were trained with mean and std
    0.5, those of ImageNet-1k (absolute positions, no bias tables) and data2vec's with ImageNet's statistics.

    Source:
        microsoft/unilm, ``beit/modeling_pretrain.py``; facebookresearch/data2vec_vision; baaivision/EVA, ``EVA-01``.
    """
    state, model = _state_and_model(raw, heads)
    if model.dim == _EVA_WIDTH:
        rule = blockwise_rule(_EVA_MASKED, "EVA", model, of=_EVA_PATCHES)
        return inpainting_model("eva", state, model, rule, _CLIP)
    head = raw.tensors.get("lm_head.weight")
    if head is not None and head.ndim == 2 and head.shape[0] == head.shape[1] == model.dim:
        rule = blockwise_rule(_DATA2VEC_MASKED, "data2vec vision", model)
        return inpainting_model("data2vec_vision", state, model, rule, _IMAGENET)
    arguments = section(raw.extras, "args")
    rule = _stated_rule(arguments, model) or blockwise_rule(_BEIT_MASKED, "BEiT", model)
    imagenet = arguments.get("imagenet_default_mean_and_std", model.absolute_positions) is True
    return inpainting_model("beit", state, model, rule, _IMAGENET if imagenet else _HALF)


def convert_beit_v2(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """Pre-training files of BEiT v2; the extra layers before its head branch off and change no token of the encoder.

    Source:
        microsoft/unilm, ``beit2/modeling_pretrain.py``.
    """
    state, model = _state_and_model(raw, heads)
    rule = _stated_rule(section(raw.extras, "args"), model)
    return inpainting_model("beit_v2", state, model, rule or blockwise_rule(_BEIT_MASKED, "BEiT v2", model), _IMAGENET)


def convert_conmim(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """A training run of TencentARC/ConMIM: the student. The published files are fine-tuned and hold no mask token.

    Source:
        TencentARC/ConMIM, ``models/modeling_conmim.py``.
    """
    state, model = _state_and_model(raw, heads)
    arguments = section(raw.extras, "args")
    rule, source = block_rule(_CONMIM_RATIO, "ConMIM", model)
    ratio = arguments.get("mask_ratio")
    if isinstance(ratio, float) and 0 < ratio < 1:
        rule, source = MaskRule(rule.kind, ratio, rule.unit), f"ratio: file; unit: {source}"
    imagenet = arguments.get("imagenet_default_mean_and_std", True) is not False
    return inpainting_model("conmim", state, model, (rule, source), _IMAGENET if imagenet else _HALF)


def convert_hf_beit(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """Hugging Face ``BeitForMaskedImageModeling``: names of the hub's files and those of transformers 5.

    Layer norms use the config's epsilon (1e-12), so numbers are those of Hugging Face; the original has 1e-6.

    Source:
        huggingface/transformers, ``models/beit``.
    """
    config = hf_config(raw)
    state = StateDict(dict(raw.tensors))
    # The final norm and the head come after everything that is measured; which norm it is depends on the config.
    state.drop(r"(beit\.)?(layernorm|pooler\.layernorm)\..*", r"lm_head\..*")
    state.rename(
        (r"^beit\.embeddings\.position_embeddings$", "pos_embed"),
        (r"^beit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^beit\.embeddings\.", ""),
        (r"^beit\.(encoder\.relative_position_bias|(encoder\.)?shared_position_bias)\.", "rel_pos_bias."),
        (r"^beit\.(encoder\.layer|encoder\.layers|layers)\.", "blocks."),
        (r"^(blocks\.\d+)\.(attention\.)*relative_position_bias\.", r"\1.attn."),
        *HF_BLOCK_NAMES,
        (r"\.lambda_([12])$", r".gamma_\1"),
    )
    rename_beit(state)
    model = inpainting_config(
        state,
        heads,
        stated=count(config, "num_attention_heads"),
        image_size=count(config, "image_size"),
        eps=within(config, "layer_norm_eps", 1e-12),
    )
    return inpainting_model("beit", state, model, blockwise_rule(_BEIT_MASKED, "BEiT", model), _HALF)


def inpainting_model(
    family: str,
    state: StateDict,
    model: InpaintingConfig,
    rule: tuple[MaskRule, str],
    statistics: tuple[tuple[float, float, float], tuple[float, float, float]],
) -> Conversion:
    """An :class:`InpaintingViT` that predicts no pixels."""
    info = ModelInfo(
        family=family,
        style="inpainting",
        image_size=model.image_size,
        patch_size=model.patch_size,
        mask_rule=rule[0],
        mean=statistics[0],
        std=statistics[1],
        target="features",
        mask_rule_source=rule[1],
    )
    return Conversion(InpaintingViT, model, info, state)


def _state_and_model(raw: RawCheckpoint, heads: Heads) -> tuple[StateDict, InpaintingConfig]:
    state = StateDict(dict(raw.tensors))
    state.drop(r"lm_head\..*", r"cls_pt_(layers|norm|lm_head)\..*", r"projectors\..*")
    rename_beit(state)
    size = section(raw.extras, "args").get("input_size")
    return state, inpainting_config(
        state,
        heads,
        image_size=size if isinstance(size, int) else None,
        published={**ENCODER_HEADS, _EVA_WIDTH: _EVA_HEADS},
    )


def _stated_rule(arguments: Mapping[str, Any], model: InpaintingConfig) -> tuple[MaskRule, str] | None:
    """Blockwise, with the numbers that the training script was given."""
    masked, least = arguments.get("num_mask_patches"), arguments.get("min_mask_patches_per_block", 16)
    num_patches = (model.image_size // model.patch_size) ** 2
    if isinstance(masked, int) and isinstance(least, int) and 0 < masked < num_patches and least > 0:
        return MaskRule("blockwise", masked / num_patches, model.patch_size, least), "file"
    return None
