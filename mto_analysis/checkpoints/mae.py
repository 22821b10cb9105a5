"""Converters to :class:`MAE`: files of facebookresearch/mae (published, trainer's) and Hugging Face ViTMAE folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from mto_analysis.checkpoints.beit import HF_BLOCK_NAMES
from mto_analysis.checkpoints.conversion import (
    ENCODER_HEADS,
    MAE_DECODER_HEADS,
    Conversion,
    Given,
    StateDict,
    block_numbers,
)
from mto_analysis.checkpoints.metadata import arguments, count, flag, hf_config, ratio, size, within
from mto_analysis.checkpoints.positions import fit_positions
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import MAE, MAEConfig, ModelInfo

_PUBLISHED_RATIO = 0.75
_HF_EPS = 1e-12
_LITE_HEADS = {192: 12, 384: 12, 768: 12}
_LITE_DECODER_HEADS = {96: 3, 192: 6, 512: 16}


def convert_mae(raw: RawCheckpoint, given: Given) -> Conversion:
    """Files of facebookresearch/mae: names are ours up to the original's; its own files do not hold head counts.

    SatMAE of three channels and files of Lightning have the same names; ``hyper_parameters`` may hold the head counts.

    Source:
        facebookresearch/mae, ``models_mae.py``.
    """
    return mae_model(StateDict(dict(raw.tensors)), given, arguments(raw, given))


def convert_split_mae(raw: RawCheckpoint, given: Given) -> Conversion:
    """MAE whose encoder and decoder are modules of their own (Prithvi of one frame; lightly's ``backbone.vit``)."""
    state = StateDict(dict(raw.tensors))
    state.rename((r"^(encoder|decoder|backbone\.vit)\.", ""))
    return mae_model(state, given, arguments(raw, given))


def convert_mae_lite(raw: RawCheckpoint, given: Given) -> Conversion:
    """Files of wangsr126/mae-lite: MAE's names; 12 heads in small encoders too. It always predicts normalized patches.

    Distilled models come with their teacher, which is left out.

    Source:
        wangsr126/mae-lite, ``projects/mae_lite/models_mae.py``.
    """
    state = StateDict(dict(raw.tensors))
    state.drop(r"(tch_model|attn_adapter|hidden_adapter)\..*")
    state.rename((r"^model\.", ""))
    stated = arguments(raw, given)
    settings = {"norm_pix_loss": True, **stated}
    conversion = mae_model(state, given, settings, published=_LITE_HEADS, decoder_published=_LITE_DECODER_HEADS)
    info, config = conversion.info, conversion.config
    assumed = {
        "num_heads": f"num_heads {config.num_heads}",
        "decoder_num_heads": f"decoder_num_heads {config.decoder_num_heads}",
        "norm_pix_loss": "normalized patches",
    }
    given_too = {name for name, origin in given.origins.items() if origin != "published"}
    words = ", ".join(each for name, each in assumed.items() if name not in stated and name not in given_too)
    if not words:
        return conversion
    note = f"{words}, as of published MAE-Lite: the file does not say, and is taken for one because of its start_epoch"
    return replace(conversion, info=replace(info, assumptions=(*info.assumptions, note)))


def convert_hf_vitmae(raw: RawCheckpoint, given: Given) -> Conversion:
    """Hugging Face ``ViTMAEForPreTraining``: public names and those of transformers 5; settings in ``config.json``.

    Layer norms use the config's epsilon (1e-12), so numbers are those of Hugging Face; the original has 1e-6.

    Source:
        huggingface/transformers, ``models/vit_mae``.
    """
    config = hf_config(raw)
    state = StateDict(dict(raw.tensors))
    state.rename(
        (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
        (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^vit\.embeddings\.", ""),
        (r"^vit\.layernorm\.", "norm."),
        (r"^vit\.(encoder\.layer|layers)\.", "blocks."),
        (r"^decoder\.(decoder_layers|decoder_encoder\.layer|decoder_encoder\.layers|layers)\.", "decoder_blocks."),
        (r"^decoder\.", ""),
        *HF_BLOCK_NAMES,
    )
    state.fuse_qkv()
    names = {"num_heads": "num_attention_heads", "decoder_num_heads": "decoder_num_attention_heads"}
    settings = {"layer_norm_eps": _HF_EPS, **config, **{ours: count(config, theirs) for ours, theirs in names.items()}}
    return mae_model(state, given, settings)


def mae_model(
    state: StateDict,
    given: Given,
    settings: Mapping[str, Any],
    *,
    published: Mapping[int, int] = ENCODER_HEADS,
    decoder_published: Mapping[int, int] = MAE_DECODER_HEADS,
    make: type[MAE] = MAE,
    architecture: type[MAEConfig] = MAEConfig,
    unit: int | None = None,
    **own: Any,
) -> Conversion:
    """An :class:`MAE`, or a family with its decoder, its architecture from shapes under our names.

    Args:
        state: Tensors under the model's names.
        given: By the user.
        settings: May hold head counts, ``image_size``, ``mask_ratio``, ``norm_pix_loss``, ``criterion``,
            ``layer_norm_eps``.
        published: Heads of the encoder by width.
        decoder_published: Heads of the decoder by width.
        make: The model.
        architecture: Its config.
        unit: Side in pixels of a token of the decoder, where the encoder's have another one.
        own: Fields of the config that are read in another way, or that MAE's does not have.
    """
    embedding = state.tensors.get("patch_embed.proj.weight")
    if embedding is not None and embedding.ndim == 5:  # of videos or series, as Prithvi's
        if embedding.shape[2] != 1:
            raise CheckpointError(f"its patches span {embedding.shape[2]} frames, only models of one are read")
        state.tensors["patch_embed.proj.weight"] = embedding[:, :, 0]
    if not {"dim", "channels", "patch_size"} <= own.keys():
        own = (
            dict(zip(("dim", "channels", "patch_size"), state.shape("patch_embed.proj.weight", 4), strict=False)) | own
        )
    dim, patch_size = own["dim"], unit or own["patch_size"]
    decoder_dim = state.shape("mask_token", 3)[2]
    predicted = state.shape("decoder_pred.weight", 2)[0]
    class_token = "cls_token" in state.tensors
    grid = fit_positions(
        state,
        given,
        *(name for name in ("pos_embed", "decoder_pos_embed") if name in state.tensors),
        patch_size=patch_size,
        prefix_tokens=int(class_token),
        stated=size(settings, "image_size", "img_size", "input_size"),
    )
    read = {
        "image_size": grid.image_size,
        "decoder_dim": decoder_dim,
        "decoder_depth": block_numbers(state.tensors, "decoder_blocks."),
        "decoder_mlp_dim": state.shape("decoder_blocks.0.mlp.fc1.weight", 2)[0],
        "feature_dim": None if predicted == patch_size**2 * own["channels"] else predicted,
        "eps": within(settings, "layer_norm_eps", 1e-6),
        "class_token": class_token,
    }
    if "depth" not in own:
        read |= {
            "depth": block_numbers(state.tensors, "blocks."),
            "mlp_dim": state.shape("blocks.0.mlp.fc1.weight", 2)[0],
        }
    heads = {
        "num_heads": (own.get("num_heads"), dim, published),
        "decoder_num_heads": (None, decoder_dim, decoder_published),
    }
    for option, (stored, width, known) in heads.items():
        stated_heads = stored or settings.get(option)
        read[option] = given.choose(option, width, stated=stated_heads, published=known)
    model = architecture(**{**read, **own})
    stated_ratio = ratio(settings, given)
    target: Literal["pixels", "normalized_pixels", "features"] | None = None
    if model.feature_dim is not None:
        target = "features"
    elif (normalized := flag(settings, "norm_pix_loss")) is not None:
        target = "normalized_pixels" if normalized else "pixels"
    info = ModelInfo(
        family=make.__name__.lower(),
        style="decoder",
        image_size=model.image_size,
        patch_size=patch_size,
        mask_rule=MaskRule("random", stated_ratio or _PUBLISHED_RATIO, patch_size),
        target=target,
        criterion=None if target == "features" else settings.get("criterion") or "l2",
        mask_rule_source="file" if stated_ratio else f"published {make.__name__}",
        assumptions=grid.notes,
    )
    return Conversion(make, model, info, state)
