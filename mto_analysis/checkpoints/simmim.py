"""Converters of microsoft/SimMIM and SwinV2 files: to :class:`SimMIM` (ViT) and :class:`SimMIMSwin`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mto_analysis.checkpoints.beit import HF_BLOCK_NAMES
from mto_analysis.checkpoints.conversion import Conversion, Given, StateDict
from mto_analysis.checkpoints.huggingface import convert_library
from mto_analysis.checkpoints.inpainting import Encoder, block_rule, read_encoder, rename_beit
from mto_analysis.checkpoints.metadata import (
    count,
    hf_config,
    numbers,
    ratio,
    refuse_other,
    section,
    size,
    whole,
    within,
)
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.checkpoints.windows import OUR_SWIN_NAMES, PixelTarget, convert_windows
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import ModelInfo, SimMIM, SimMIMConfig
from mto_analysis.models.interface import ImageSize, height_and_width
from mto_analysis.models.targets import NEIGHBOURHOOD

_PUBLISHED_RATIO = 0.6


def convert_simmim(raw: RawCheckpoint, given: Given) -> Conversion:
    """ViT files of microsoft/SimMIM: shared or per-block relative position bias, or absolute positions.

    Mask unit and ratio come from the pickled config where the file has one.

    Source:
        microsoft/SimMIM, ``models/vision_transformer.py``, ``models/simmim.py``.
    """
    config = raw.extras.get("config")
    data = section(config, "DATA")
    state = StateDict(dict(raw.tensors))
    # fc_norm belongs to classification and is not used in pre-training.
    state.drop(r"encoder\.fc_norm\..*", r"encoder\.head\..*")
    state.rename((r"^encoder\.", ""), (r"^decoder\.0\.", "decoder."))
    rename_beit(state)
    refuse_other(section(config, "MODEL", "VIT"), "its config", QK_SCALE=None)
    encoder = read_encoder(
        state, given, stated=section(config, "MODEL", "VIT").get("NUM_HEADS"), image_size=size(data, "IMG_SIZE")
    )
    return simmim_vit(encoder, data, given)


def simmim_vit(encoder: Encoder, data: Mapping[str, Any], given: Given) -> Conversion:
    """A :class:`SimMIM`; ``data`` may hold ``MASK_RATIO`` and ``MASK_PATCH_SIZE`` of a config."""
    model = encoder.model
    rule, source = mask_rule(data, given) or block_rule(_PUBLISHED_RATIO, "SimMIM ViT-B", model)
    info = ModelInfo(
        family="simmim_vit",
        style="inpainting",
        image_size=model.image_size,
        patch_size=model.patch_size,
        mask_rule=rule,
        target="pixels",
        criterion="l1",
        mask_rule_source=source,
        assumptions=encoder.notes,
    )
    return Conversion(SimMIM, SimMIMConfig(**asdict(model)), info, encoder.state)


def convert_simmim_swin(raw: RawCheckpoint, given: Given) -> Conversion:
    """Swin files of microsoft/SimMIM, and SwinV2 files of microsoft/Swin-Transformer and the hub's zdaxie/SimMIM.

    Source:
        microsoft/SimMIM, ``models/swin_transformer.py``; microsoft/Swin-Transformer, ``models/swin_transformer_v2.py``.
    """
    config = raw.extras.get("config")
    data = section(config, "DATA")
    state = StateDict(dict(raw.tensors))
    state.drop(r"encoder\.head\..*")
    state.rename((r"^encoder\.", ""), *OUR_SWIN_NAMES)
    swin = section(config, "MODEL", "SWINV2") or section(config, "MODEL", "SWIN")
    refuse_other(swin, "its config", QK_SCALE=None)
    return convert_windows(
        state,
        given,
        image_size=size(data, "IMG_SIZE"),
        window=whole(swin, "WINDOW_SIZE"),
        pretrained=numbers(swin.get("PRETRAINED_WINDOW_SIZES")),
        rule=mask_rule(data, given),
        target=_target(config),
    )


def _target(config: Any) -> PixelTarget:
    """Pixels, or pixels normalized by their neighbourhood, of which only the default size is known."""
    settings = section(config, "MODEL", "SIMMIM", "NORM_TARGET")
    if settings.get("ENABLE") is not True:
        return "pixels"
    refuse_other(settings, "its config (NORM_TARGET)", PATCH_SIZE=NEIGHBOURHOOD)
    return "locally_normalized_pixels"


def mask_rule(data: Mapping[str, Any], given: Given) -> tuple[MaskRule, str] | None:
    """The rule that the file's own config states, if any."""
    stated, unit = ratio(data, given, "MASK_RATIO"), whole(data, "MASK_PATCH_SIZE")
    return (MaskRule("block", stated, unit), "file") if stated and unit else None


def convert_hf_swin(raw: RawCheckpoint, given: Given) -> Conversion:
    """Hugging Face Swin and SwinV2 with a mask token, whatever the head: names of the hub's files and transformers 5.

    Where windows or merges do not divide the grid of tokens, transformers pads it, so its own code is asked.

    Source:
        huggingface/transformers, ``models/swin``, ``models/swinv2``.
    """
    config = hf_config(raw)
    image_size, window = size(config, "image_size"), count(config, "window_size")
    patch_size, depths = count(config, "patch_size"), numbers(config.get("depths"))
    if any(name.startswith("swin.") for name in raw.tensors):
        # Nothing but a table of absolute positions is made for the size that config.json states.
        resizable = "swin.embeddings.position_embeddings" not in raw.tensors
        image_size = given.image_size if given.image_size and resizable else image_size
        _refuse_small_maps(given.image_size or image_size, patch_size, window, depths, resizable=resizable)
    if _is_padded(given.image_size or image_size, patch_size, window, depths):
        return convert_library(raw, given)
    state = StateDict(dict(raw.tensors))
    state.drop(r"(?!swin(v2)?\.|decoder\.).*")  # heads of other tasks
    state.rename(
        (r"^swin(v2)?\.", ""),
        (r"^embeddings\.position_embeddings$", "absolute_pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^embeddings\.", ""),
        (r"^encoder\.", ""),
        (r"^layernorm\.", "norm."),
        (r"\.attention\.(self\.)?(relative_position_bias\.)?relative_position_", ".attn.relative_position_"),
        (r"\.attention\.(self\.)?relative_coords_table$", ".attn.relative_coords_table"),
        (r"\.attention\.(self\.)?logit_scale$", ".attn.logit_scale"),
        (r"\.attention\.(self\.)?(\w+\.)?continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
        *HF_BLOCK_NAMES,
        *OUR_SWIN_NAMES,
    )
    return convert_windows(
        state,
        given,
        image_size=image_size,
        window=window,
        pretrained=numbers(config.get("pretrained_window_sizes")),
        eps=within(config, "layer_norm_eps", 1e-5),
    )


def _refuse_small_maps(
    image_size: ImageSize | None,
    patch_size: int | None,
    window: int | None,
    depths: Sequence[float] | None,
    *,
    resizable: bool,
) -> None:
    """Refuse a Swin of version 1 with a map smaller than its window, whose table transformers does not shrink."""
    if image_size is None or patch_size is None or window is None or depths is None:
        return
    last = patch_size << len(depths) - 1
    smallest = -(-min(height_and_width(image_size)) // last)
    if smallest < window:
        advice = f"give --image-size, from {window * last}" if resizable else "its positions are for no larger ones"
        raise CheckpointError(
            f"its windows of {window} tokens are larger than the last map of images of {image_size} px "
            f"({smallest} tokens), which transformers does not run; {advice}"
        )


def _is_padded(
    image_size: ImageSize | None, patch_size: int | None, window: int | None, depths: Sequence[float] | None
) -> bool:
    """Whether a stage of windows, or a merge before it, does not divide its grid; not where nothing is stated."""
    if image_size is None or patch_size is None or window is None or depths is None:
        return False
    sides = height_and_width(image_size)
    strides = [patch_size << stage for stage in range(len(depths))]
    return any(
        side % stride or side // stride % min(window, min(sides) // stride or 1) for side in sides for stride in strides
    )
