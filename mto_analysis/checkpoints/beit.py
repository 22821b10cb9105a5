"""Converters to :class:`InpaintingViT`: BEiT, BEiT v2, data2vec vision and ConMIM, and Hugging Face BEiT."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from mto_analysis.checkpoints.conversion import ENCODER_HEADS, Conversion, Given, StateDict
from mto_analysis.checkpoints.inpainting import (
    Encoder,
    block_rule,
    blockwise_rule,
    read_encoder,
    rename_beit,
)
from mto_analysis.checkpoints.metadata import arguments, count, hf_config, ratio, size, within
from mto_analysis.checkpoints.positions import Grid
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import EVA02, EVA02Config
from mto_analysis.models.eva02 import rotary_table
from mto_analysis.runtime.pixels import CLIP, HALF, IMAGENET

_BEIT_MASKED = 75
_EVA_WIDTH, _EVA_HEADS = 1408, 16
_EVA_MASKED, _EVA_PATCHES = 105, 256
_EVA02_HEADS = {192: 3, 384: 6, **ENCODER_HEADS}
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


def convert_beit(raw: RawCheckpoint, given: Given) -> Conversion:
    """Pre-training files of BEiT and data2vec vision, told apart by the head, and of EVA giant, by its width.

    BEiT's head gives visual tokens, data2vec's features as wide as the model.

    The head is left out: it acts on nothing that is measured. BEiT's ImageNet-22k files were trained with mean and std
    0.5, those of ImageNet-1k (absolute positions, no bias tables) and data2vec's with ImageNet's statistics.

    Source:
        microsoft/unilm, ``beit/modeling_pretrain.py``; facebookresearch/data2vec_vision; baaivision/EVA, ``EVA-01``.
    """
    encoder, settings = _encoder(raw, given), arguments(raw, given)
    model = encoder.model
    head = raw.tensors.get("lm_head.weight")
    if model.dim == _EVA_WIDTH:
        encoder = encoder.published(blockwise_rule(_EVA_MASKED, "EVA", model, of=_EVA_PATCHES), CLIP)
        return encoder.trained_with(settings, own=CLIP).conversion("eva")
    if head is not None and head.ndim == 2 and head.shape[0] == head.shape[1] == model.dim:
        encoder = encoder.published(blockwise_rule(_DATA2VEC_MASKED, "data2vec vision", model))
        return encoder.trained_with(settings).conversion("data2vec_vision")
    encoder = encoder.published(
        blockwise_rule(_BEIT_MASKED, "BEiT", model), IMAGENET if model.absolute_positions else HALF
    )
    return encoder.trained_with(settings).conversion("beit")


def convert_beit_v2(raw: RawCheckpoint, given: Given) -> Conversion:
    """Pre-training files of BEiT v2; the extra layers before its head branch off and change no token of the encoder.

    Source:
        microsoft/unilm, ``beit2/modeling_pretrain.py``.
    """
    encoder = _encoder(raw, given)
    encoder = encoder.published(blockwise_rule(_BEIT_MASKED, "BEiT v2", encoder.model))
    return encoder.trained_with(arguments(raw, given)).conversion("beit_v2")


def convert_conmim(raw: RawCheckpoint, given: Given) -> Conversion:
    """A training run of TencentARC/ConMIM: the student. The published files are fine-tuned and hold no mask token.

    Source:
        TencentARC/ConMIM, ``models/modeling_conmim.py``.
    """
    encoder, settings = _encoder(raw, given), arguments(raw, given)
    rule, source = block_rule(_CONMIM_RATIO, "ConMIM", encoder.model)
    if (stated := ratio(settings, given)) is not None:
        rule, source = MaskRule(rule.kind, stated, rule.unit), f"ratio: file; unit: {source}"
    return replace(encoder.trained_with(settings), rule=(rule, source)).conversion("conmim")


def convert_hf_beit(raw: RawCheckpoint, given: Given) -> Conversion:
    """Hugging Face BEiT with a mask token, whatever its head: names of the hub's files and those of transformers 5.

    Layer norms use the config's epsilon (1e-12), so numbers are those of Hugging Face; the original has 1e-6.

    Source:
        huggingface/transformers, ``models/beit``.
    """
    config = hf_config(raw)
    state = StateDict(dict(raw.tensors))
    # The final norm and heads of any kind come after everything that is measured; which norm depends on the config.
    state.drop(r"(beit\.)?(layernorm|pooler\.layernorm)\..*", r"(?!beit\.).*")
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
    encoder = read_encoder(
        state,
        given,
        stated=count(config, "num_attention_heads"),
        image_size=size(config, "image_size"),
        eps=within(config, "layer_norm_eps", 1e-12),
    )
    if not isinstance(encoder.model.image_size, int):
        raise CheckpointError("transformers resizes the positions of grids that are not square, which is not read")
    return encoder.published(blockwise_rule(_BEIT_MASKED, "BEiT", encoder.model), HALF).conversion("beit")


def _encoder(raw: RawCheckpoint, given: Given) -> Encoder:
    """The encoder of a file of the BEiT code base."""
    state = StateDict(dict(raw.tensors))
    state.drop(r"lm_head\..*", r"cls_pt_(layers|norm|lm_head)\..*", r"projectors\..*")
    rename_beit(state)
    settings = arguments(raw, given)
    return read_encoder(
        state,
        given,
        stated=settings.get("num_heads"),
        image_size=size(settings, "input_size"),
        published={**ENCODER_HEADS, _EVA_WIDTH: _EVA_HEADS},
    )


def convert_eva02(raw: RawCheckpoint, given: Given) -> Conversion:
    """Pre-training files of EVA-02, of all sizes: query, key and value in one matrix or three, gate and value too.

    Source:
        baaivision/EVA, ``EVA-02/asuka/modeling_pretrain.py``, ``rope.py``.
    """
    state = StateDict(dict(raw.tensors))
    state.drop(r"lm_head\..*", r"blocks\.\d+\.attn\.rope\..*")
    stored = {
        name: state.take(f"rope.freqs_{name}") for name in ("cos", "sin") if f"rope.freqs_{name}" in state.tensors
    }
    state.rename(
        (r"\.attn\.([qkv])_proj\.", r".attn.\1."),
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    )
    state.fuse_qkv()
    if given.image_size is not None:
        wanted = Grid.of(given.image_size, state.shape("patch_embed.proj.weight", 4)[2])
        if wanted.num_patches + 1 != state.shape("pos_embed", 3)[1]:
            raise CheckpointError("rotary positions are not resized; leave --image-size out")
    # Rotations are as wide as a head.
    width = stored["cos"].shape[-1] if "cos" in stored and stored["cos"].ndim == 2 else 0
    dim = state.shape("cls_token", 3)[2]
    settings = arguments(raw, given)
    encoder = read_encoder(
        state,
        given,
        stated=dim // width if width and dim % width == 0 else settings.get("num_heads"),
        mlp_dim=state.shape("blocks.0.mlp.fc2.weight", 2)[1],
        published=_EVA02_HEADS,
        image_size=size(settings, "input_size"),
    )
    grid = Grid.of(encoder.model.image_size, encoder.model.patch_size).sides
    mlp_norm = "blocks.0.mlp.norm.weight" in state.tensors
    model = EVA02Config(**asdict(encoder.model), mlp_norm=mlp_norm, rotary_grid=grid)
    computed = dict(zip(("sin", "cos"), rotary_table(grid, model.dim // model.num_heads, grid), strict=True))
    for name, table in stored.items():
        if table.shape != computed[name].shape or not torch.allclose(table.float(), computed[name], atol=1e-3):
            raise CheckpointError(f"rope.freqs_{name} holds other rotations than {grid[0]} x {grid[1]} patches have")
    encoder = encoder.published(blockwise_rule(_EVA_MASKED, "EVA-02", model, of=_EVA_PATCHES), CLIP)
    conversion = encoder.trained_with(settings, own=CLIP).conversion("eva02")
    return replace(conversion, make=EVA02, config=model)
