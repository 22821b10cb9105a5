"""Writes random tiny models of every family in every published layout: real names, and the real things around them.

Weights are drawn under the names of the original repositories, for :mod:`reference_families`, and renamed on writing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import reference_families as reference
import torch
from safetensors.torch import save_file
from torch import Tensor

from mto_analysis.models.vit import relative_position_index

Weights = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]
Reference = Callable[[Weights, Tensor, Tensor], list[Tensor]]

DIM, DEPTH, HEADS, MLP, PATCH, GRID = 24, 2, 3, 40, 4, 6
DECODER, DECODER_HEADS, DECODER_MLP = 16, 2, 28


@dataclass(frozen=True)
class Published:
    """One layout: how to write it, and what it must give."""

    name: str
    family: str
    weights: Callable[[], Weights]
    publish: Callable[[Weights], Weights]
    write: Callable[[Path, Weights], Path]
    references: dict[str, Reference]
    heads: dict[str, int] = field(default_factory=dict)
    probe_key: str = ""
    mask_token: str = "mask_token"

    def save(self, folder: Path, change: Callable[[Weights], None] = lambda _: None) -> Path:
        """Write the file, after a change to its tensors."""
        tensors = self.publish(self.weights())
        change(tensors)
        return self.write(folder, tensors)


# Weights under original names


class Draw:
    """Random tensors, each large enough to show when it is used wrongly."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weights: Weights = {}

    def put(self, name: str, *shape: int) -> None:
        drawn = torch.randn(shape, generator=self.generator) * 0.3
        self.weights[name] = drawn + 1 if re.search(r"norm\d?\.weight$|norm_\d\.weight$|gamma", name) else drawn

    def norm(self, name: str, dim: int) -> None:
        self.put(f"{name}.weight", dim)
        self.put(f"{name}.bias", dim)

    def linear(self, name: str, dim: int, out: int, *, bias: bool = True) -> None:
        self.put(f"{name}.weight", out, dim)
        if bias:
            self.put(f"{name}.bias", out)

    def conv(self, name: str, channels: int, out: int, side: int) -> None:
        self.put(f"{name}.weight", out, channels, side, side)
        self.put(f"{name}.bias", out)

    def mlp(self, name: str, dim: int, hidden: int) -> None:
        self.linear(f"{name}.fc1", dim, hidden)
        self.linear(f"{name}.fc2", hidden, dim)

    def qkv(self, name: str, dim: int, attn: int, *, fused: bool) -> None:
        self.linear(f"{name}.qkv", dim, 3 * attn, bias=fused)
        if not fused:
            self.put(f"{name}.q_bias", attn)
            self.put(f"{name}.v_bias", attn)
        self.linear(f"{name}.proj", attn, dim)

    def block(self, name: str, dim: int, hidden: int, *, fused: bool, gamma: bool = False) -> None:
        if gamma:
            self.put(f"{name}.gamma_1", dim)
            self.put(f"{name}.gamma_2", dim)
        self.norm(f"{name}.norm1", dim)
        self.qkv(f"{name}.attn", dim, dim, fused=fused)
        self.norm(f"{name}.norm2", dim)
        self.mlp(f"{name}.mlp", dim, hidden)

    def embedding(self, dim: int, *, positions: bool) -> None:
        self.put("cls_token", 1, 1, dim)
        self.conv("patch_embed.proj", 3, dim, PATCH)
        if positions:
            self.put("pos_embed", 1, GRID * GRID + 1, dim)


def beit_weights(
    *, shared: bool = False, per_block: bool = False, positions: bool = False, gamma: bool = True, fused: bool = False
) -> Weights:
    draw = Draw()
    rows = (2 * GRID - 1) ** 2 + 3
    draw.embedding(DIM, positions=positions)
    draw.put("mask_token", 1, 1, DIM)
    if shared:
        draw.put("rel_pos_bias.relative_position_bias_table", rows, HEADS)
    for number in range(DEPTH):
        draw.block(f"blocks.{number}", DIM, MLP, fused=fused, gamma=gamma)
        if per_block:
            draw.put(f"blocks.{number}.attn.relative_position_bias_table", rows, HEADS)
    draw.norm("norm", DIM)
    return draw.weights


def mae_weights(*, predicted: int = 3 * PATCH * PATCH) -> Weights:
    draw = Draw()
    draw.embedding(DIM, positions=True)
    for number in range(DEPTH):
        draw.block(f"blocks.{number}", DIM, MLP, fused=True)
    draw.norm("norm", DIM)
    mae_decoder(draw, DIM, GRID * GRID + 1, predicted, depth=3)
    return draw.weights


def without_class_token(weights: Weights) -> Weights:
    """The same with positions of patches alone."""
    for name in ("pos_embed", "decoder_pos_embed"):
        weights[name] = weights[name][:, 1:].contiguous()
    del weights["cls_token"]
    return weights


def mae_decoder(draw: Draw, encoded: int, places: int, values: int, *, depth: int = 2) -> None:
    """MAE's decoder; ``places`` counts the class token, where there is one."""
    draw.linear("decoder_embed", encoded, DECODER)
    draw.put("mask_token", 1, 1, DECODER)
    draw.put("decoder_pos_embed", 1, places, DECODER)
    for number in range(depth):
        draw.block(f"decoder_blocks.{number}", DECODER, DECODER_MLP, fused=True)
    draw.norm("decoder_norm", DECODER)
    draw.linear("decoder_pred", DECODER, values)


def ijepa_weights() -> Weights:
    mae = without_class_token(mae_weights(predicted=DIM))
    rules = (
        (r"^decoder_(embed|pos_embed|blocks|norm)", r"predictor.predictor_\1"),
        (r"^decoder_pred", "predictor.predictor_proj"),
        (r"^mask_token", "predictor.mask_token"),
        (r"^(?!predictor)", "encoder."),
    )
    return rename(mae, *rules)


def hivit_weights(*, hierarchical: bool = True) -> Weights:
    draw = Draw()
    width, number = DIM // 4, 0
    draw.conv("patch_embed.proj", 3, width, 2)
    draw.norm("patch_embed.norm", width)
    draw.put("absolute_pos_embed", 1, GRID * GRID, DIM)
    for depth in (2, 1):
        for number in range(number, number + depth):  # noqa: B020 - goes on counting
            draw.norm(f"blocks.{number}.norm2", width)
            draw.mlp(f"blocks.{number}.mlp", width, 3 * width)
        draw.norm(f"blocks.{number + 1}.norm", 4 * width)
        draw.linear(f"blocks.{number + 1}.reduction", 4 * width, 2 * width, bias=False)
        width, number = 2 * width, number + 2
    for number in range(number, number + DEPTH):  # noqa: B020
        draw.block(f"blocks.{number}", DIM, MLP, fused=True)
    encoded = 7 * DIM if hierarchical else DIM
    draw.norm("norm", encoded)
    mae_decoder(draw, encoded, GRID * GRID, 3 * 8 * 8)
    return draw.weights


def mcmae_weights() -> Weights:
    draw = Draw()
    widths = (3, 8, 12, DIM)
    for stage, stride in enumerate((4, 2, 2), start=1):
        draw.conv(f"patch_embed{stage}.proj", widths[stage - 1], widths[stage], stride)
        draw.norm(f"patch_embed{stage}.norm", widths[stage])
    for stage, dim in ((1, 8), (2, 12)):
        for number in range(2):
            name = f"blocks{stage}.{number}"
            draw.norm(f"{name}.norm1", dim)
            draw.norm(f"{name}.norm2", dim)
            draw.conv(f"{name}.conv1", dim, dim, 1)
            draw.conv(f"{name}.conv2", dim, dim, 1)
            draw.conv(f"{name}.attn", 1, dim, 5)  # each channel by itself
            draw.conv(f"{name}.mlp.fc1", dim, 20, 1)
            draw.conv(f"{name}.mlp.fc2", 20, dim, 1)
        draw.conv(f"stage{stage}_output_decode", dim, DIM, 8 >> stage)
    draw.linear("patch_embed4", DIM, DIM)
    draw.put("pos_embed", 1, 16, DIM)
    for number in range(DEPTH):
        draw.block(f"blocks3.{number}", DIM, MLP, fused=True)
    draw.norm("norm", DIM)
    mae_decoder(draw, DIM, 16, 3 * 16 * 16)
    return draw.weights


def greenmim_weights() -> Weights:
    swin = swin_weights(grids=(16, 8, 4), window=4, depths=(2, 2, 1), heads=(1, 2, 2))
    swin = {name: tensor for name, tensor in swin.items() if name != "mask_token" and not name.startswith("decoder.")}
    draw = Draw(2)
    mae_decoder(draw, swin["norm.weight"].shape[0], 16, 3 * 16 * 16)
    return {f"encoder.{name}": tensor for name, tensor in swin.items()} | draw.weights


def eva02_weights(*, separate: bool) -> Weights:
    """Small models pack query, key, value and gate, value; larger ones have a matrix for each, and one more norm."""
    draw = Draw()
    draw.embedding(DIM, positions=True)
    draw.put("mask_token", 1, 1, DIM)
    for number in range(DEPTH):
        name = f"blocks.{number}"
        draw.norm(f"{name}.norm1", DIM)
        draw.norm(f"{name}.norm2", DIM)
        for part in ("q_proj", "k_proj", "v_proj") if separate else ("qkv",):
            draw.linear(f"{name}.attn.{part}", DIM, DIM if separate else 3 * DIM, bias=False)
        draw.put(f"{name}.attn.q_bias", DIM)
        draw.put(f"{name}.attn.v_bias", DIM)
        draw.linear(f"{name}.attn.proj", DIM, DIM)
        for part in ("w1", "w2") if separate else ("w12",):
            draw.linear(f"{name}.mlp.{part}", DIM, MLP if separate else 2 * MLP)
        if separate:
            draw.norm(f"{name}.mlp.ffn_ln", MLP)
        draw.linear(f"{name}.mlp.w3", MLP, DIM)
    draw.norm("norm", DIM)
    return draw.weights


def with_rotations(weights: Weights) -> Weights:
    """The buffers of rotary positions, once for the model and once for each block, and the head."""
    frequency = 10000.0 ** (-torch.arange(0, DIM // HEADS // 2, 2) / (DIM // HEADS // 2))
    angle = (torch.arange(GRID)[:, None] * frequency).repeat_interleave(2, dim=1)
    angle = torch.cat([angle[:, None].expand(-1, GRID, -1), angle[None].expand(GRID, -1, -1)], dim=2).flatten(0, 1)
    stored = {"rope.freqs_cos": angle.cos(), "rope.freqs_sin": angle.sin()}
    of_blocks = {f"blocks.{number}.attn.{name}": tensor for number in range(DEPTH) for name, tensor in stored.items()}
    return weights | stored | of_blocks | {"lm_head.weight": torch.ones(8, DIM), "lm_head.bias": torch.ones(8)}


def deepspeed(folder: Path, tensors: Weights) -> Path:
    path = folder / "mp_rank_00_model_states.pt"
    torch.save({"module": tensors, "epoch": 240, "args": argparse.Namespace(input_size=PATCH * GRID)}, path)
    return path


def mff_weights() -> Weights:
    draw = Draw(3)
    draw.put("proj_weights", DEPTH, 1, 1, 1)
    for number in range(DEPTH - 1):
        draw.linear(f"proj_layers.{number}", DIM, DIM)
    return mae_weights() | draw.weights


def hiera_weights() -> Weights:
    draw = Draw()
    dim, side = 8, 3  # 3 x 3 mask units of 32 px
    draw.conv("patch_embed.proj", 3, dim, 7)
    draw.put("pos_embed", 1, (8 * side) ** 2, dim)
    number = 0
    for stage, depth in enumerate((1, 2, 2, 1)):
        for first in (True, *(False,) * (depth - 1)):
            name, before = f"blocks.{number}", dim // 2 if stage and first else dim
            draw.norm(f"{name}.norm1", before)
            draw.linear(f"{name}.attn.qkv", before, 3 * dim)
            draw.linear(f"{name}.attn.proj", dim, dim)
            if before != dim:
                draw.linear(f"{name}.proj", before, dim)
            draw.norm(f"{name}.norm2", dim)
            draw.mlp(f"{name}.mlp", dim, 2 * dim)
            number += 1
        dim *= 2 if stage < 3 else 1
    for head in range(2):
        draw.conv(f"multi_scale_fusion_heads.{head}", 8 << head, dim, 4 >> head)
    draw.norm("encoder_norm", dim)
    mae_decoder(draw, dim, (2 * side) ** 2, 3 * 16 * 16)
    return draw.weights


def milan_weights() -> Weights:
    weights = mae_weights(predicted=20)
    for name in [name for name in weights if re.match(r"decoder_blocks\.\d+\.attn\.qkv\.", name)]:
        tensor = weights.pop(name)
        weights[name.replace("qkv", "q")] = tensor[:DECODER].clone()
        weights[name.replace("qkv", "kv")] = tensor[DECODER:].clone()
    return weights


def cae_weights(*, same_positions: bool = False) -> Weights:
    draw = Draw()
    draw.embedding(DIM, positions=True)
    for number in range(DEPTH):
        draw.block(f"blocks.{number}", DIM, MLP, fused=False, gamma=True)
    draw.norm("norm", DIM)
    draw.weights = {f"encoder.{name}": tensor for name, tensor in draw.weights.items()}
    draw.put("mask_token", 1, 1, DIM)
    draw.put("rd_pos_embed", 1, GRID * GRID + 1, DIM)
    if same_positions:
        draw.weights["rd_pos_embed"] = draw.weights["encoder.pos_embed"]
    for number in range(2):
        name = f"regresser.regressor_blocks.{number}"
        for norm in ("norm1_q", "norm1_k", "norm1_v", "norm2_cross"):
            draw.norm(f"{name}.{norm}", DIM)
        for part in "qkv":
            draw.linear(f"{name}.cross_attn.{part}", DIM, DIM, bias=False)
        draw.put(f"{name}.cross_attn.q_bias", DIM)
        draw.put(f"{name}.cross_attn.v_bias", DIM)
        draw.linear(f"{name}.cross_attn.proj", DIM, DIM)
        draw.mlp(f"{name}.mlp_cross", DIM, DECODER_MLP)
        draw.put(f"{name}.gamma_1_cross", DIM)
        draw.put(f"{name}.gamma_2_cross", DIM)
    draw.norm("regresser.norm", DIM)
    return draw.weights


def bootmae_weights() -> Weights:
    draw = Draw()
    draw.embedding(DIM, positions=True)
    for number in range(DEPTH):
        draw.block(f"blocks.{number}", DIM, MLP, fused=False)
    draw.norm("norm", DIM)
    draw.put("mask_token", 1, 1, DECODER)
    draw.put("mask_token_1", 1, 1, DIM)
    draw.put("de_pos_embed", 1, GRID * GRID + 1, DECODER)
    for suffix, dim in (("", DECODER), ("_1", DIM)):
        attn = dim // HEADS * HEADS  # 15 of 16 in the pixel decoder
        draw.linear(f"down{suffix}", DIM, dim)
        for number in range(2):
            name = f"decode_blocks{suffix}.{number}"
            for norm, width in (("norm1", dim), ("norm2", dim), ("norm3", dim), ("norm4", DIM)):
                draw.norm(f"{name}.{norm}", width)
            draw.qkv(f"{name}.attn", dim, attn, fused=False)
            draw.put(f"{name}.c_attn.q_bias", attn)
            draw.put(f"{name}.c_attn.v_bias", attn)
            draw.linear(f"{name}.c_attn.q", dim, attn, bias=False)
            draw.linear(f"{name}.c_attn.kv", DIM, 2 * attn, bias=False)
            draw.linear(f"{name}.c_attn.proj", attn, dim)
            draw.mlp(f"{name}.mlp", dim, DECODER_MLP)
        draw.norm(f"decode_norm{suffix}", dim)
    draw.put("lm_head.proj.weight", DECODER, 3, PATCH, PATCH)
    draw.put("lm_head.proj.bias", 3)
    draw.linear("lm_head_1", DIM, DIM)
    return draw.weights


def swin_weights(
    *, grids: tuple[int, ...], window: int, depths: tuple[int, ...], heads: tuple[int, ...], version: int = 1
) -> Weights:
    draw = Draw()
    dim = 8
    draw.put("mask_token", 1, 1, dim)
    draw.conv("patch_embed.proj", 3, dim, PATCH)
    draw.norm("patch_embed.norm", dim)
    for stage, grid in enumerate(grids):
        for number in range(depths[stage]):
            name = f"layers.{stage}.blocks.{number}"
            draw.block(name, dim, 2 * dim, fused=version == 1)
            if version == 1:
                rows = (2 * min(window, grid) - 1) ** 2
                draw.put(f"{name}.attn.relative_position_bias_table", rows, heads[stage])
            else:
                draw.put(f"{name}.attn.logit_scale", heads[stage], 1, 1)
                draw.linear(f"{name}.attn.rpe_mlp.0", 2, 512)
                draw.linear(f"{name}.attn.rpe_mlp.2", 512, heads[stage], bias=False)
                draw.weights[f"{name}.attn.rpe_mlp.2.weight"] *= 0.1
        if stage + 1 < len(grids):
            draw.linear(f"layers.{stage}.downsample.reduction", 4 * dim, 2 * dim, bias=False)
            draw.norm(f"layers.{stage}.downsample.norm", (4 if version == 1 else 2) * dim)
            dim *= 2
    draw.norm("norm", dim)
    stride = PATCH * 2 ** (len(grids) - 1)
    draw.put("decoder.0.weight", 3 * stride**2, dim, 1, 1)
    draw.put("decoder.0.bias", 3 * stride**2)
    return draw.weights


# Names as published


def rename(weights: Weights, *rules: tuple[str, str]) -> Weights:
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def under_encoder(weights: Weights) -> Weights:
    """SimMIM: everything but the head is in ``encoder.``, and index buffers are stored."""
    tensors = rename(weights, (r"^(?!decoder\.)", "encoder."))
    for name in [name for name in tensors if name.endswith("relative_position_bias_table")]:
        tensors[name.replace("bias_table", "index")] = stored_index(tensors[name])
    return tensors


def stored_index(table: Tensor) -> Tensor:
    """What lies beside a table of relative positions of a square grid with class token; Swin's has none."""
    width = math.isqrt(len(table))
    return relative_position_index(((width + 1) // 2,) * 2)


def with_head(weights: Weights, rows: int, **more: tuple[int, ...]) -> Weights:
    """BEiT's linear head, and what else lies there."""
    shapes = {"lm_head.weight": (rows, DIM), "lm_head.bias": (rows,)}
    tensors = weights | {name: torch.ones(shape) for name, shape in shapes.items()}
    for name in [name for name in tensors if name.endswith("relative_position_bias_table")]:
        tensors[name.replace("bias_table", "index")] = stored_index(tensors[name])
    return tensors | {name.replace("__", "."): torch.ones(shape) for name, shape in more.items()}


def with_projectors(weights: Weights) -> Weights:
    tensors = with_head(weights, 32, projectors__0__weight=(8, DIM), projectors__1__running_mean=(8,))
    return tensors | {"projectors.1.num_batches_tracked": torch.tensor(3)}


def with_cls_layers(weights: Weights) -> Weights:
    draw = Draw(1)
    for number in range(2):
        draw.block(f"cls_pt_layers.{number}", DIM, MLP, fused=False, gamma=True)
    return with_head(weights | draw.weights, 8192)


HF_OLD: Rules = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.(query|key|value)\.", r".attention.ATTN.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.gamma_", ".lambda_"),
)
HF_NEW: Rules = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.(q|k|v)[a-z]+\.", r".attention.\1_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.mlp\.", ".mlp."),
    (r"\.gamma_", ".lambda_"),
)


def apart(weights: Weights) -> Weights:
    """Query, key and value as Hugging Face keeps them."""
    tensors: Weights = {}
    for name, tensor in weights.items():
        stem, _, last = name.rpartition(".")
        if stem.endswith(".qkv"):
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[f"{stem.removesuffix('qkv')}{part}.{last}"] = piece.clone()
        elif last in ("q_bias", "v_bias"):
            tensors[f"{stem}.{'query' if last == 'q_bias' else 'value'}.bias"] = tensor
        else:
            tensors[name] = tensor
    return tensors


def hf_mae(weights: Weights, *, new: bool) -> Weights:
    blocks = "vit.layers." if new else "vit.encoder.layer."
    return rename(
        apart(weights),
        *(HF_NEW if new else HF_OLD),
        (r"ATTN", "attention"),
        (r"^blocks\.", blocks),
        (r"^norm\.", "vit.layernorm."),
        (r"^cls_token$", "vit.embeddings.cls_token"),
        (r"^pos_embed$", "vit.embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
        (r"^mask_token$", "decoder.mask_token"),
        (r"^decoder_blocks\.", "decoder.decoder_layers."),
        (r"^decoder_", "decoder.decoder_"),
        (r"^decoder\.decoder_layers\.", "decoder.decoder_encoder.layer." if new else "decoder.decoder_layers."),
    )


def hf_beit(weights: Weights, *, new: bool) -> Weights:
    table = "relative_position_bias_table"
    per_block = (
        rf"blocks.\1.relative_position_bias.{table}"
        if new
        else rf"blocks.\1.attention.attention.relative_position_bias.{table}"
    )
    shared = "beit.shared_position_bias." if new else "beit.encoder.relative_position_bias."
    tensors = rename(
        apart(weights),
        (rf"^blocks\.(\d+)\.attn\.{table}$", per_block),
        *(HF_NEW if new else HF_OLD),
        (r"ATTN", "attention"),
        (r"^rel_pos_bias\.", shared),
        (r"^blocks\.", "beit.layers." if new else "beit.encoder.layer."),
        (r"^norm\.", "layernorm."),
        (r"^(cls_token|mask_token)$", r"beit.embeddings.\1"),
        (r"^pos_embed$", "beit.embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "beit.embeddings.patch_embeddings.projection."),
    )
    return tensors | {"lm_head.weight": torch.ones(32, DIM), "lm_head.bias": torch.ones(32)}


def hf_swin(weights: Weights, *, new: bool, name: str = "swin") -> Weights:
    table = "relative_position_bias_table"
    return rename(
        apart(weights),
        (
            rf"\.attn\.{table}$",
            f".attention.relative_position_bias.{table}" if new else f".attention.self.{table}",
        ),
        (r"\.attn\.logit_scale$", ".attention.self.logit_scale"),
        (r"\.attn\.rpe_mlp\.", ".attention.self.continuous_position_bias_mlp."),
        *(HF_NEW if new else HF_OLD),
        (r"ATTN", "self"),
        (r"^layers\.", f"{name}.encoder.layers."),
        (r"^norm\.", f"{name}.layernorm."),
        (r"^mask_token$", f"{name}.embeddings.mask_token"),
        (r"^patch_embed\.proj\.", f"{name}.embeddings.patch_embeddings.projection."),
        (r"^patch_embed\.norm\.", f"{name}.embeddings.norm."),
    )


MM: Rules = (
    (r"^blocks\.", "backbone.layers."),
    (r"^decoder_blocks\.", "neck.decoder_blocks."),
    (r"\.(\d+)\.norm([12])\.", r".\1.ln\2."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    (r"^norm\.", "backbone.ln1."),
    (r"^patch_embed\.proj\.", "backbone.patch_embed.projection."),
    (r"^decoder_norm\.", "neck.ln1."),
    (r"^(decoder_embed|decoder_pos_embed|decoder_pred)", r"neck.\1"),
    (r"^(cls_token|pos_embed|rel_pos_bias|proj_layers|proj_weights)", r"backbone.\1"),
)
HIERA_STAGES = {0: "0.layers.0", 1: "1.layers.0", 2: "1.layers.1", 3: "2.layers.0", 4: "2.layers.1", 5: "3.layers.0"}


def hf_hiera(weights: Weights) -> Weights:
    return rename(
        weights,
        *((rf"^blocks\.{number}\.", f"hiera.encoder.stages.{name}.") for number, name in HIERA_STAGES.items()),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"^decoder_blocks\.(\d+)\.", r"decoder.decoder_block.layers.\1."),
        (r"^patch_embed\.proj\.", "hiera.embeddings.patch_embeddings.projection."),
        (r"^pos_embed$", "hiera.embeddings.position_embeddings"),
        (r"^multi_scale", "multiscale_fusion.multi_scale"),
        (r"^decoder_pos_embed$", "decoder.decoder_position_embeddings"),
        (r"^decoder_embed\.", "decoder.decoder_embeddings."),
        (r"^(decoder_norm|decoder_pred|mask_token)", r"decoder.\1"),
    )


MASK_IN_NECK = ((r"^mask_token$", "neck.mask_token"),)
MASK_IN_BACKBONE = ((r"^mask_token$", "backbone.mask_token"),)
TARGETS = {"target_generator.encoder.weight": torch.ones(2, 2)}


def mm_beit(weights: Weights) -> Weights:
    return rename(weights, *MM, *MASK_IN_BACKBONE) | TARGETS | {"head.cls_head.weight": torch.ones(8, DIM)}


def mm_beit_v2(weights: Weights) -> Weights:
    tensors = mm_beit(weights)
    for last in ("weight", "bias"):
        tensors[f"neck.norm.{last}"] = tensors.pop(f"backbone.ln1.{last}")
    return tensors | {"neck.patch_aggregation.0.gamma_1": torch.ones(DIM)}


def mm_swin(weights: Weights) -> Weights:
    tensors = rename(
        weights,
        (r"\.attn\.", ".attn.w_msa."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp\.fc2\.", ".ffn.layers.1."),
        (r"^layers\.", "backbone.stages."),
        (r"^mask_token$", "backbone.mask_token"),
        (r"^patch_embed\.proj\.", "backbone.patch_embed.projection."),
        (r"^patch_embed\.norm\.", "backbone.patch_embed.norm."),
        (r"^norm\.", "backbone.norm3."),
        (r"^decoder\.0\.", "neck.decoder.0."),
    )
    for name in [name for name in tensors if ".downsample." in name]:  # unfold: channel, row, column
        last = tensors[name]
        tensors[name] = last.reshape(*last.shape[:-1], 2, 2, -1).transpose(-1, -3).flatten(-3).contiguous()
    return tensors


def cae_around(weights: Weights) -> Weights:
    names = ("decoder.decoder_blocks.0.gamma_1", "decoder.head.weight", "alignment_encoder.cls_token")
    return weights | {name: torch.ones(DIM) for name in names}


def mm_cae(weights: Weights) -> Weights:
    tensors = {name.removeprefix("encoder."): tensor for name, tensor in weights.items() if name != "rd_pos_embed"}
    tensors = rename(
        tensors,
        (r"^blocks", "backbone.layers"),
        (r"^regresser\.regressor_blocks\.", "neck.regressors."),
        (r"^regresser\.norm\.", "neck.norm_regressor."),
        (r"\.norm1_([qkv])\.", r".norm1_\1_cross."),
        (r"\.norm([12])\.", r".ln\1."),
        (r"\.mlp(_cross)?\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp(_cross)?\.fc2\.", ".ffn.layers.1."),
        (r"^norm\.", "backbone.ln1."),
        (r"^patch_embed\.proj\.", "backbone.patch_embed.projection."),
        (r"^(cls_token|pos_embed)$", r"backbone.\1"),
        *MASK_IN_NECK,
    )
    return tensors | TARGETS | {"neck.decoders.0.gamma_1": torch.ones(DIM), "teacher.cls_token": torch.ones(1, 1, DIM)}


def openmixup(weights: Weights) -> Weights:
    head = {
        "neck.decoder.0.weight": torch.ones(3 * PATCH**2, DIM, 1, 1),
        "neck.decoder.0.bias": torch.ones(3 * PATCH**2),
    }
    return rename(weights, *MM, *MASK_IN_BACKBONE) | head


# The things around the weights


@contextmanager
def foreign(module: str, *names: str, base: type = dict) -> Iterator[list[Any]]:
    """Classes of a package that is not installed, importable while a file is written and not afterwards."""
    made = [".".join(module.split(".")[: depth + 1]) for depth in range(module.count(".") + 1)]
    kept = {part: sys.modules.get(part) for part in made}
    for part in made:
        sys.modules[part] = types.ModuleType(part)
    kinds = [type(name, (base,), {"__module__": module, "__qualname__": name}) for name in names]
    for kind in kinds:
        setattr(sys.modules[module], kind.__name__, kind)
    try:
        yield kinds
    finally:
        for part, before in kept.items():
            sys.modules.pop(part)
            if before is not None:
                sys.modules[part] = before


def optimizer_of(tensors: Weights) -> dict[str, Any]:
    """What AdamW keeps after a step."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    return optimizer.state_dict()


def simmim_trainer(folder: Path, tensors: Weights, **config: Any) -> Path:
    """As microsoft/SimMIM saves: a yacs CfgNode, a numpy score."""
    path = folder / "ckpt_epoch_99.pth"
    with foreign("yacs.config", "CfgNode") as (node,):
        settings = node({name: node(value) if isinstance(value, dict) else value for name, value in config.items()})
        settings.__dict__["__immutable__"] = True
        root = {
            "model": OrderedDict(tensors),
            "optimizer": optimizer_of(tensors),
            "lr_scheduler": {"t": 3},
            "epoch": 99,
        }
        torch.save(root | {"max_accuracy": np.float64(0.0), "config": settings, "amp": {}}, path)
    return path


def simmim_model_only(folder: Path, tensors: Weights) -> Path:
    path = folder / "swinv2.pth"
    torch.save({"model": OrderedDict(tensors)}, path)
    return path


def mae_trainer(folder: Path, tensors: Weights, **arguments: Any) -> Path:
    """As MAE, BootMAE, ConMIM, BEiT and data2vec save: an argparse.Namespace, an averaged copy of the model."""
    path = folder / "checkpoint-799.pth"
    args = argparse.Namespace(lr=np.float64(1.5e-4), output_dir=Path("out"), **arguments)
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    root = {"model": tensors, "optimizer": optimizer_of(tensors), "epoch": 799, "scaler": {"scale": 65536.0}}
    torch.save(root | {"args": args, "model_ema": other}, path)
    return path


def mm_trainer(folder: Path, tensors: Weights) -> Path:
    """As mmengine saves: its own classes in the meta data."""
    path = folder / "mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.pth"
    with foreign("mmengine.logging.history_buffer", "HistoryBuffer") as (buffer,):
        hub = {"log_scalars": OrderedDict(loss=buffer(values=np.zeros(3)))}
        meta = {"epoch": 300, "experiment_name": "mae", "cfg": "model = dict()"}
        torch.save({"meta": meta, "state_dict": OrderedDict(tensors), "message_hub": hub}, path)
    return path


def hf_folder(folder: Path, tensors: Weights, **config: Any) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_act": "gelu", **config}))
    return folder


def hiera_file(folder: Path, tensors: Weights) -> Path:
    path = folder / "mae_hiera_base_224.pth"
    torch.save({"epoch": 1600, "model_state": tensors}, path)
    return path


def ibot_file(folder: Path, tensors: Weights) -> Path:
    """As bytedance/ibot saves: student, teacher, losses."""
    path = folder / "checkpoint.pth"
    args = argparse.Namespace(arch="vit_base", pred_ratio=[0.0, 0.3])
    teacher = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    torch.save({"student": tensors, "teacher": teacher, "epoch": 400, "args": args}, path)
    return path


def ibot(weights: Weights) -> Weights:
    tensors = rename(weights, (r"^mask_token$", "masked_embed"), (r"^", "module.backbone."))
    tensors["module.backbone.masked_embed"] = tensors["module.backbone.masked_embed"][0]
    return tensors | {"module.head.mlp.0.weight": torch.ones(4, DIM)}


def flat(folder: Path, tensors: Weights) -> Path:
    path = folder / "weights.pth"
    torch.save(tensors, path)
    return path


def ijepa_file(folder: Path, tensors: Weights) -> Path:
    """As facebookresearch/ijepa saves: each part by itself, with the prefix of distributed training."""
    path = folder / "jepa-latest.pth.tar"
    root: dict[str, Any] = {"opt": optimizer_of({}), "scaler": None, "epoch": 300, "loss": 0.1, "world_size": 16}
    for part in ("encoder", "predictor"):
        of_part = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
        root[part] = {name.replace(f"{part}.", "module.", 1): tensor for name, tensor in of_part.items()}
    root["target_encoder"] = {name: tensor + 1 for name, tensor in root["encoder"].items()}
    torch.save(root, path)
    return path


# All of them

SHARED = partial(beit_weights, shared=True)
SIMMIM_HEAD = {"decoder.0.weight": torch.ones(3 * PATCH**2, DIM, 1, 1), "decoder.0.bias": torch.ones(3 * PATCH**2)}
BEIT = partial(reference.beit_tokens, heads=HEADS)
BEIT_HF = partial(reference.beit_tokens, heads=HEADS, eps=1e-4)
MAE_TOKENS = partial(reference.mae_tokens, heads=HEADS, decoder_heads=DECODER_HEADS)
MAE_HEADS = {"num_heads": HEADS, "decoder_num_heads": DECODER_HEADS}
SWIN = partial(swin_weights, grids=(16, 8, 4), window=4, depths=(2, 2, 1), heads=(1, 2, 2))
SWIN_SHRUNK = partial(swin_weights, grids=(16, 8, 4), window=8, depths=(2, 2, 2), heads=(1, 2, 2))
SWIN_192 = partial(swin_weights, grids=(48, 24, 12, 6), window=6, depths=(1, 2, 1, 2), heads=(1, 1, 2, 2))
HF_MAE_CONFIG = {
    "layer_norm_eps": 1e-4,
    "num_attention_heads": HEADS,
    "decoder_num_attention_heads": DECODER_HEADS,
    "mask_ratio": 0.6,
    "norm_pix_loss": False,
}
HF_BEIT_CONFIG = {"layer_norm_eps": 1e-4, "num_attention_heads": HEADS, "image_size": PATCH * GRID}
HF_SWIN_CONFIG = {"layer_norm_eps": 1e-4, "image_size": 64, "window_size": 4}


def _swin(window: int, eps: float = 1e-5) -> dict[str, Reference]:
    return {"encoder": partial(reference.swin_tokens, window=window, eps=eps)}


def _published() -> Iterator[Published]:
    yield Published(
        "microsoft/SimMIM ViT",
        "simmim_vit",
        SHARED,
        lambda w: under_encoder(w | SIMMIM_HEAD),
        partial(simmim_trainer, DATA={"MASK_RATIO": 0.5, "MASK_PATCH_SIZE": 8}),
        {"encoder": BEIT},
        probe_key="encoder.blocks.0.mlp.fc2.weight",
        mask_token="encoder.mask_token",
    )
    for name, weights, window in (("whole windows", SWIN, 4), ("window larger than the last map", SWIN_SHRUNK, 8)):
        yield Published(
            f"SimMIM Swin, {name}",
            "simmim_swin",
            weights,
            under_encoder,
            partial(simmim_trainer, DATA={"MASK_RATIO": 0.6, "MASK_PATCH_SIZE": 16}),
            _swin(window),
            probe_key="encoder.layers.0.blocks.0.mlp.fc2.weight",
            mask_token="encoder.mask_token",
        )
    yield Published(
        "SimMIM SwinV2",
        "simmim_swinv2",
        partial(SWIN_SHRUNK, version=2),
        under_encoder,
        partial(
            simmim_trainer,
            DATA={"IMG_SIZE": 64, "MASK_RATIO": 0.6, "MASK_PATCH_SIZE": 16},
            MODEL={"SWINV2": {"WINDOW_SIZE": 8}},
        ),
        _swin(8),
        probe_key="encoder.layers.0.blocks.0.mlp.fc2.weight",
        mask_token="encoder.mask_token",
    )
    for new in (False, True):
        generation = "transformers 5" if new else "hub"
        inner = "mlp.fc2" if new else "output.dense"
        yield Published(
            f"Hugging Face ViTMAE, {generation}",
            "mae",
            mae_weights,
            partial(hf_mae, new=new),
            partial(hf_folder, **HF_MAE_CONFIG),
            {"decoder": partial(MAE_TOKENS, eps=1e-4)},
            probe_key=f"vit.{'layers' if new else 'encoder.layer'}.0.{inner}.weight",
            mask_token="decoder.mask_token",
        )
        for name, weights in (
            ("shared bias", SHARED),
            ("positions and a bias per layer", partial(beit_weights, per_block=True, positions=True)),
            ("positions only", partial(beit_weights, positions=True, gamma=False)),
        ):
            yield Published(
                f"Hugging Face BEiT, {name}, {generation}",
                "beit",
                weights,
                partial(hf_beit, new=new),
                partial(hf_folder, **HF_BEIT_CONFIG),
                {"encoder": BEIT_HF},
                probe_key=f"beit.{'layers' if new else 'encoder.layer'}.0.{inner}.weight",
                mask_token="beit.embeddings.mask_token",
            )
        yield Published(
            f"Hugging Face Swin, {generation}",
            "simmim_swin",
            SWIN,
            partial(hf_swin, new=new),
            partial(hf_folder, **HF_SWIN_CONFIG),
            _swin(4, 1e-4),
            probe_key=f"swin.encoder.layers.0.blocks.0.{inner}.weight",
            mask_token="swin.embeddings.mask_token",
        )
    yield Published(
        "Hugging Face SwinV2",
        "simmim_swinv2",
        partial(SWIN, version=2),
        partial(hf_swin, new=False, name="swinv2"),
        partial(hf_folder, **HF_SWIN_CONFIG, pretrained_window_sizes=[0, 0, 0]),
        _swin(4, 1e-4),
        probe_key="swinv2.encoder.layers.0.blocks.0.output.dense.weight",
        mask_token="swinv2.embeddings.mask_token",
    )
    yield Published(
        "facebookresearch/mae",
        "mae",
        mae_weights,
        dict,
        partial(mae_trainer, mask_ratio=0.75, norm_pix_loss=True),
        {"decoder": MAE_TOKENS},
        MAE_HEADS,
        "blocks.0.mlp.fc2.weight",
    )
    yield Published(
        "facebookresearch/mae, no class token",
        "mae",
        lambda: without_class_token(mae_weights()),
        dict,
        mae_trainer,
        {"decoder": MAE_TOKENS},
        MAE_HEADS,
        "blocks.0.mlp.fc2.weight",
    )
    yield Published(
        "I-JEPA",
        "ijepa",
        ijepa_weights,
        dict,
        ijepa_file,
        {"decoder": partial(reference.ijepa_tokens, heads=2)},
        {"num_heads": 2},
        "encoder.blocks.0.mlp.fc2.weight",
        "predictor.mask_token",
    )
    for name, weights in (("", hivit_weights), (", one level", partial(hivit_weights, hierarchical=False))):
        yield Published(
            f"HiViT MAE{name}",
            "hivit",
            weights,
            dict,
            mae_trainer,
            {"decoder": partial(reference.hivit_tokens, heads=HEADS, decoder_heads=DECODER_HEADS)},
            MAE_HEADS,
            "blocks.0.mlp.fc2.weight",
        )
    yield Published(
        "MCMAE / ConvMAE",
        "mcmae",
        mcmae_weights,
        dict,
        mae_trainer,
        {"decoder": partial(reference.mcmae_tokens, heads=HEADS, decoder_heads=DECODER_HEADS)},
        MAE_HEADS,
        "blocks3.0.mlp.fc2.weight",
    )
    yield Published(
        "GreenMIM",
        "greenmim",
        greenmim_weights,
        dict,
        mae_trainer,
        {"decoder": partial(reference.greenmim_tokens, window=4, decoder_heads=DECODER_HEADS)},
        {"decoder_num_heads": DECODER_HEADS},
        "encoder.layers.0.blocks.0.mlp.fc2.weight",
    )
    for size, separate in (("tiny and small", False), ("base and large", True)):
        yield Published(
            f"EVA-02, {size}",
            "eva02",
            partial(eva02_weights, separate=separate),
            with_rotations,
            deepspeed,
            {"encoder": partial(reference.eva02_tokens, heads=HEADS)},
            {},
            "blocks.0.mlp.w3.weight",
        )
    yield Published(
        "iBOT Swin",
        "ibot_swin",
        lambda: {name: each for name, each in SWIN().items() if not name.startswith("decoder.")},
        ibot,
        ibot_file,
        {"encoder": partial(reference.swin_tokens, window=4, eps=1e-6, outer_eps=1e-6)},
        {},
        "backbone.layers.0.blocks.0.mlp.fc2.weight",
        "module.backbone.masked_embed",
    )
    yield Published(
        "MAE-Lite",
        "mae",
        mae_weights,
        lambda w: rename(w, (r"^", "module.model.")) | {"module.tch_model.cls_token": torch.ones(1, 1, 8)},
        mae_trainer,
        {"decoder": MAE_TOKENS},
        MAE_HEADS,
        "model.blocks.0.mlp.fc2.weight",
        "module.model.mask_token",
    )
    yield Published(
        "BootMAE",
        "bootmae",
        bootmae_weights,
        dict,
        mae_trainer,
        {
            stack: partial(reference.bootmae_tokens, heads=HEADS, stack=stack)
            for stack in ("pixel_decoder", "feature_decoder")
        },
        {"num_heads": HEADS},
        "blocks.0.mlp.fc2.weight",
    )
    for name, family, weights, publish in (
        ("ConMIM", "conmim", SHARED, with_projectors),
        ("BEiT", "beit", SHARED, partial(with_head, rows=8192)),
        ("BEiT, per-block tables", "beit", partial(beit_weights, per_block=True), partial(with_head, rows=8192)),
        ("BEiT v2", "beit_v2", SHARED, with_cls_layers),
        ("data2vec vision", "data2vec_vision", SHARED, partial(with_head, rows=DIM)),
    ):
        yield Published(
            name, family, weights, publish, mae_trainer, {"encoder": BEIT}, probe_key="blocks.0.mlp.fc2.weight"
        )
    yield Published(
        "BEiT, positions only",
        "beit",
        partial(beit_weights, positions=True, gamma=False),
        partial(with_head, rows=8192),
        flat,
        {"encoder": BEIT},
        {"num_heads": HEADS},
        "blocks.0.mlp.fc2.weight",
    )
    yield Published(
        "mmpretrain MAE",
        "mae",
        mae_weights,
        lambda w: rename(w, *MM, *MASK_IN_NECK),
        mm_trainer,
        {"decoder": MAE_TOKENS},
        MAE_HEADS,
        "backbone.layers.0.ffn.layers.1.weight",
        "neck.mask_token",
    )
    yield Published(
        "mmpretrain MAE, features of EVA",
        "mae",
        partial(mae_weights, predicted=20),
        lambda w: rename(w, *MM, *MASK_IN_NECK) | TARGETS,
        mm_trainer,
        {"decoder": MAE_TOKENS},
        MAE_HEADS,
        "backbone.layers.0.ffn.layers.1.weight",
        "neck.mask_token",
    )
    yield Published(
        "iBOT",
        "ibot",
        partial(beit_weights, positions=True, gamma=False, fused=True),
        ibot,
        ibot_file,
        {"encoder": BEIT},
        {"num_heads": HEADS},
        "backbone.blocks.0.mlp.fc2.weight",
        "module.backbone.masked_embed",
    )
    milan = {"decoder": partial(reference.milan_tokens, heads=HEADS, decoder_heads=DECODER_HEADS)}
    cae = {"regressor": partial(reference.cae_tokens, heads=HEADS, decoder_heads=2)}
    key, mm_key = "blocks.0.mlp.fc2.weight", "backbone.layers.0.ffn.layers.1.weight"
    yield Published("MILAN", "milan", milan_weights, dict, mae_trainer, milan, MAE_HEADS, key)
    yield Published(
        "mmpretrain MILAN",
        "milan",
        milan_weights,
        lambda w: rename(w, *MM, *MASK_IN_NECK),
        mm_trainer,
        milan,
        MAE_HEADS,
        mm_key,
        "neck.mask_token",
    )
    yield Published(
        "mmpretrain MFF",
        "mff",
        mff_weights,
        lambda w: rename(w, *MM, *MASK_IN_NECK),
        mm_trainer,
        {"decoder": partial(reference.mff_tokens, heads=HEADS, decoder_heads=DECODER_HEADS)},
        MAE_HEADS,
        mm_key,
        "neck.mask_token",
    )
    hiera = {"decoder": partial(reference.hiera_tokens, heads=2, decoder_heads=DECODER_HEADS)}
    hiera_heads = {"num_heads": 2, "decoder_num_heads": DECODER_HEADS}
    yield Published("Hiera MAE", "hiera", hiera_weights, dict, hiera_file, hiera, hiera_heads, key)
    yield Published(
        "Hugging Face Hiera MAE",
        "hiera",
        hiera_weights,
        hf_hiera,
        partial(
            hf_folder, depths=[1, 2, 2, 1], num_heads=[2, 4, 8, 16], decoder_num_heads=DECODER_HEADS, mask_ratio=0.6
        ),
        hiera,
        probe_key="hiera.encoder.stages.0.layers.0.mlp.fc2.weight",
        mask_token="decoder.mask_token",
    )
    yield Published("CAE", "cae", cae_weights, cae_around, mae_trainer, cae, MAE_HEADS, f"encoder.{key}")
    yield Published(
        "mmpretrain CAE",
        "cae",
        partial(cae_weights, same_positions=True),
        mm_cae,
        mm_trainer,
        cae,
        MAE_HEADS,
        mm_key,
        "neck.mask_token",
    )
    yield Published(
        "mmpretrain SimMIM Swin",
        "simmim_swin",
        SWIN_192,
        mm_swin,
        mm_trainer,
        _swin(6),
        probe_key="backbone.stages.0.blocks.0.ffn.layers.1.weight",
        mask_token="backbone.mask_token",
    )
    for name, family, weights, publish, heads in (
        ("mmpretrain BEiT", "beit", SHARED, mm_beit, {}),
        ("mmpretrain BEiT v2", "beit_v2", SHARED, mm_beit_v2, {}),
        (
            "mmpretrain MaskFeat",
            "maskfeat",
            partial(beit_weights, positions=True, gamma=False, fused=True),
            lambda w: rename(w, *MM, *MASK_IN_BACKBONE) | {"neck.fc.weight": torch.ones(108, DIM)},
            {"num_heads": HEADS},
        ),
        (
            "OpenMixup SimMIM ViT",
            "simmim_vit",
            partial(beit_weights, per_block=True, positions=True),
            openmixup,
            {},
        ),
    ):
        yield Published(
            name,
            family,
            weights,
            publish,
            mm_trainer,
            {"encoder": BEIT},
            heads,
            "backbone.layers.0.ffn.layers.1.weight",
            "backbone.mask_token",
        )


PUBLISHED = tuple(_published())
