"""Our own layout: safetensors with the model's family, architecture and settings as metadata, so nothing is guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mto_analysis.checkpoints.conversion import Conversion, Given, StateDict
from mto_analysis.checkpoints.positions import fit_positions
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import (
    CAE,
    EVA02,
    MAE,
    MCMAE,
    MFF,
    MILAN,
    BootMAE,
    BootMAEConfig,
    CAEConfig,
    ConMIM,
    ConMIMConfig,
    EVA02Config,
    GreenMIM,
    GreenMIMConfig,
    Hiera,
    HieraConfig,
    HiViT,
    HiViTConfig,
    InpaintingConfig,
    InpaintingViT,
    MAEConfig,
    MaskedImageModel,
    MCMAEConfig,
    MFFConfig,
    ModelInfo,
    SimMIM,
    SimMIMConfig,
    SimMIMSwin,
    SwinConfig,
)
from mto_analysis.runtime.outputs import write_atomically
from mto_analysis.runtime.plugins import plugins

_VERSION = 1
_POSITIONS = ("pos_embed", "decoder_pos_embed", "pixel_pos_embed")
_FAMILIES: dict[str, tuple[type[MaskedImageModel], type]] = {
    "mae": (MAE, MAEConfig),
    "simmim_vit": (SimMIM, SimMIMConfig),
    "simmim_swin": (SimMIMSwin, SwinConfig),
    "simmim_swinv2": (SimMIMSwin, SwinConfig),
    "bootmae": (BootMAE, BootMAEConfig),
    "mff": (MFF, MFFConfig),
    "milan": (MILAN, MAEConfig),
    "cae": (CAE, CAEConfig),
    "hiera": (Hiera, HieraConfig),
    "beit": (InpaintingViT, InpaintingConfig),
    "beit_v2": (InpaintingViT, InpaintingConfig),
    "data2vec_vision": (InpaintingViT, InpaintingConfig),
    "eva": (InpaintingViT, InpaintingConfig),
    "eva02": (EVA02, EVA02Config),
    "ibot": (InpaintingViT, InpaintingConfig),
    "ibot_swin": (SimMIMSwin, SwinConfig),
    "ijepa": (MAE, MAEConfig),
    "hivit": (HiViT, HiViTConfig),
    "mcmae": (MCMAE, MCMAEConfig),
    "greenmim": (GreenMIM, GreenMIMConfig),
    "maskfeat": (InpaintingViT, InpaintingConfig),
    "conmim": (InpaintingViT, InpaintingConfig),
}


def _families() -> dict[str, tuple[type[MaskedImageModel], type]]:
    """Model and configuration of each family, those of plugins too, ``name = module:(Model, Config)``."""
    return {plugin.name: plugin.value for plugin in plugins("families")} | _FAMILIES


def save_checkpoint(
    model: MaskedImageModel,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a model in our own layout, whole or not at all; it loads back without being told more.

    Args:
        model: A model of one of our families.
        path: File to write, by habit ``*.safetensors``; an existing one is replaced.
        dtype: Of the stored weights; ``torch.float16`` halves the file. Buffers and weights load as float32.
        notes: Text to keep with the weights, such as how the model was trained.

    Raises:
        ValueError: If the model is not of one of our families.
    """
    if model.info.family not in _families():
        raise ValueError(f"family must be one of {', '.join(_families())}, got {model.info.family!r}")
    about = {
        "version": _VERSION,
        "family": model.info.family,
        "config": asdict(model.config),
        "info": asdict(model.info),
        "notes": dict(notes or {}),
    }
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(Path(path), save(tensors, metadata={"format": "pt", "mto_analysis": json.dumps(about)}))


def convert_native(raw: RawCheckpoint, given: Given) -> Conversion:
    """Files that :func:`save_checkpoint` wrote."""
    try:
        about = json.loads(raw.metadata["mto_analysis"])
        if about["version"] > _VERSION:
            raise CheckpointError("the file was written by a newer mto-analysis; upgrade to read it")
        make, settings = _families()[about["family"]]
        if "projector_dim" in about["config"]:  # a ConMIM as it is trained
            make, settings = ConMIM, ConMIMConfig
        # JSON has lists where a config has tuples.
        values = {name: tuple(each) if isinstance(each, list) else each for name, each in about["config"].items()}
        config = settings(**values)
        info = stored_info(about["info"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"its mto_analysis metadata is not readable ({error!r})") from error
    stated = config.num_heads if isinstance(config.num_heads, int) else config.num_heads[0]
    given.choose("num_heads", config.dim, stated=stated)
    if isinstance(config, (MAEConfig, CAEConfig, HieraConfig)):
        given.choose("decoder_num_heads", config.decoder_dim, stated=config.decoder_num_heads)
    state = StateDict(dict(raw.tensors))
    if given.image_size not in (None, info.image_size):
        tables = [name for name in _POSITIONS if name in state.tensors]
        if not tables or isinstance(config, HieraConfig) or getattr(config, "position_bias", None):
            raise CheckpointError(f"positions of a {info.family} model are not resized; leave --image-size out")
        prefix = int("cls_token" in state.tensors)
        grid = fit_positions(
            state, given, *tables, patch_size=info.patch_size, prefix_tokens=prefix, stated=info.image_size
        )
        config = replace(config, image_size=grid.image_size)
        info = replace(info, image_size=grid.image_size, assumptions=info.assumptions + grid.notes)
    return Conversion(make, config, info, state)


def stored_info(stored: Mapping[str, Any]) -> ModelInfo:
    """The :class:`ModelInfo` in plain values; names that a newer version may have added are left out."""
    known = {field.name for field in fields(ModelInfo)}
    values = {name: value for name, value in stored.items() if name in known}
    values["mask_rule"] = MaskRule(**values["mask_rule"])
    values |= {
        name: tuple(values[name]) for name in ("mean", "std", "assumptions", "unsettled_heads") if name in values
    }
    if isinstance(values.get("image_size"), list):
        values["image_size"] = tuple(values["image_size"])
    return ModelInfo(**values)
