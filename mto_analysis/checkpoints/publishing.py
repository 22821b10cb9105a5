"""Writing models in the layout of their method's original code, so that other people's code reads our files.

What these layouts have no place for (head counts, pixel statistics) lies beside the weights under ``mto_analysis``, so
that :func:`~mto_analysis.checkpoints.load_checkpoint` is told nothing more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mto_analysis.models import MaskedImageModel
from mto_analysis.models.vit import relative_position_index
from mto_analysis.runtime.pixels import IMAGENET_MEAN

_TABLE = "relative_position_bias_table"
#: Rows of ConMIM's head for visual tokens, which its pre-training never uses but its files hold.
_VOCABULARY = 8192


def published_families() -> tuple[str, ...]:
    """Families that :func:`published_state` can write."""
    return tuple(_LAYOUTS)


def published_state(model: MaskedImageModel) -> dict[str, Tensor]:
    """A model's weights under the names of its method's original code; renamed ones share their storage.

    Layouts: facebookresearch/mae, microsoft/SimMIM (ViT), LightDXY/BootMAE, TencentARC/ConMIM.

    Args:
        model: Of one of :func:`published_families`.

    Raises:
        ValueError: If the original layout cannot hold the model.
    """
    family = model.info.family
    if family not in _LAYOUTS:
        raise ValueError(f"family must be one of {', '.join(_LAYOUTS)} to be published, got {family!r}")
    with torch.no_grad():
        return _LAYOUTS[family](model, {name: tensor.detach() for name, tensor in model.state_dict().items()})


def published_metadata(model: MaskedImageModel) -> dict[str, Any]:
    """What lies beside ``model`` in a file of the original's trainer: its ``args`` or ``config``, as plain values.

    And all that our reader needs to know, under ``mto_analysis``.
    """
    info, config = model.info, model.config
    imagenet = tuple(info.mean) == IMAGENET_MEAN
    about = {"mto_analysis": {"config": asdict(config), "info": asdict(info)}}
    if info.family == "simmim_vit":
        vit = {
            "PATCH_SIZE": config.patch_size,
            "EMBED_DIM": config.dim,
            "DEPTH": config.depth,
            "NUM_HEADS": config.num_heads,
            "MLP_RATIO": config.mlp_dim / config.dim,
            "INIT_VALUES": config.layer_scale,
            "USE_APE": config.absolute_positions,
            "USE_RPB": config.position_bias == "per_block",
            "USE_SHARED_RPB": config.position_bias == "shared",
        }
        data = {"IMG_SIZE": info.image_size, "MASK_PATCH_SIZE": info.mask_unit, "MASK_RATIO": info.mask_ratio}
        return {"config": {"DATA": data, "MODEL": {"TYPE": "vit", "VIT": vit}}, **about}
    arguments: dict[str, Any] = {"input_size": info.image_size, "mask_ratio": info.mask_ratio}
    if info.family == "mae":
        arguments["norm_pix_loss"] = info.target == "normalized_pixels"
    else:
        arguments["imagenet_default_mean_and_std"] = imagenet
    if info.family == "bootmae":
        arguments["mask_num"] = info.num_patches - int(info.num_patches * (1 - info.mask_ratio))
    return {"args": arguments, **about}


def _mae(model: MaskedImageModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if model.config.feature_dim is not None:
        raise ValueError("the layout of facebookresearch/mae is for models that predict pixels")
    return state


def _simmim(model: MaskedImageModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    head = {name: state.pop(name) for name in list(state) if name.startswith("decoder.")}
    encoder = {f"encoder.{name}": tensor for name, tensor in _beit(model, state).items()}
    return encoder | {name.replace("decoder.", "decoder.0."): tensor for name, tensor in head.items()}


def _conmim(model: MaskedImageModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if "projectors.0.weight" not in state:
        raise ValueError("the layout of TencentARC/ConMIM needs projectors, which reading a file leaves out")
    head = {"lm_head.weight": torch.zeros(_VOCABULARY, model.config.dim), "lm_head.bias": torch.zeros(_VOCABULARY)}
    return _beit(model, state) | head


def _beit(model: MaskedImageModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of the BEiT code base: one or many tables with their indices, layer scales, no key biases."""
    if not model.config.final_norm:
        raise ValueError("the original layout needs the final norm")
    shared = model.config.position_bias == "shared"
    index = relative_position_index(model.info.grid)
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(rf"position_biases\.(\d+)\.{_TABLE}", name):
            stem = "rel_pos_bias" if shared else f"blocks.{match[1]}.attn"
            published |= {f"{stem}.{_TABLE}": tensor, f"{stem}.relative_position_index": index}
        else:
            published |= _without_key_bias(re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name), tensor)
    return published


def _bootmae(model: MaskedImageModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    for stem in {name.rpartition(".k.")[0] for name in state if name.endswith(".k.weight")}:
        for kind in ("weight", "bias"):
            query, key, value = (state.pop(f"{stem}.{part}.{kind}") for part in "qkv")
            if not stem.endswith(".c_attn"):
                state[f"{stem}.qkv.{kind}"] = torch.cat([query, key, value])
            elif kind == "weight":
                state |= {f"{stem}.q.weight": query, f"{stem}.kv.weight": torch.cat([key, value])}
            else:
                _check_zero(f"{stem}.k.bias", key)
                state |= {f"{stem}.q_bias": query, f"{stem}.v_bias": value}
    rules = (
        (r"^pixel_blocks\.", "decode_blocks."),
        (r"^feature_blocks\.", "decode_blocks_1."),
        (r"^pixel_norm\.", "decode_norm."),
        (r"^feature_norm\.", "decode_norm_1."),
        (r"^pixel_embed\.", "down."),
        (r"^feature_embed\.", "down_1."),
        (r"^pixel_pred\.", "lm_head.proj."),
        (r"^feature_pred\.", "lm_head_1."),
        (r"^pixel_mask_token$", "mask_token"),
        (r"^feature_mask_token$", "mask_token_1"),
        (r"^pixel_pos_embed$", "de_pos_embed"),
    )
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        published |= _without_key_bias(name, tensor)
    return published


def _without_key_bias(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """A fused bias as the BEiT code base has it: ``q_bias`` and ``v_bias``; anything else as it is."""
    if not name.endswith(".qkv.bias"):
        return {name: tensor}
    query, key, value = tensor.chunk(3)
    _check_zero(name, key)
    stem = name.removesuffix("qkv.bias")
    return {f"{stem}q_bias": query, f"{stem}v_bias": value}


def _check_zero(name: str, key: Tensor) -> None:
    if bool(key.count_nonzero()):
        raise ValueError(f"{name} has a bias of keys, for which the original layout has no place")


_LAYOUTS: dict[str, Callable[[MaskedImageModel, dict[str, Tensor]], dict[str, Tensor]]] = {
    "mae": _mae,
    "simmim_vit": _simmim,
    "bootmae": _bootmae,
    "conmim": _conmim,
}
