"""The families again, slowly: one image at a time, in float64, from the rules of the original code bases alone.

Weights are dicts under the names of the original repositories, so nothing of our converters or models is used.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return (
        centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
    )


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    return linear(gelu(linear(x, w, f"{name}.fc1")), w, f"{name}.fc2")


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention head by head; ``bias`` is heads queries keys."""
    width = q.shape[1] // heads
    parts = []
    for h in range(heads):
        cut = slice(h * width, (h + 1) * width)
        logits = q[:, cut] @ k[:, cut].T * (width**-0.5 if scale is None else scale)
        parts.append((logits if bias is None else logits + bias[h]).softmax(dim=1) @ v[:, cut])
    return torch.cat(parts, dim=1)


def qkv(x: Tensor, w: Weights, name: str) -> tuple[Tensor, ...]:
    y = x @ w[f"{name}.qkv.weight"].T
    if f"{name}.q_bias" in w:  # the BEiT code base: no key bias
        zero = torch.zeros_like(w[f"{name}.q_bias"])
        y = y + torch.cat([w[f"{name}.q_bias"], zero, w[f"{name}.v_bias"]])
    else:
        y = y + w[f"{name}.qkv.bias"]
    return y.chunk(3, dim=1)


def block(x: Tensor, w: Weights, name: str, heads: int, eps: float, bias: Tensor | None = None) -> Tensor:
    y = linear(attend(*qkv(norm(x, w, f"{name}.norm1", eps), w, f"{name}.attn"), heads, bias), w, f"{name}.attn.proj")
    x = x + w.get(f"{name}.gamma_1", torch.ones(1)) * y
    return x + w.get(f"{name}.gamma_2", torch.ones(1)) * mlp(norm(x, w, f"{name}.norm2", eps), w, f"{name}.mlp")


def patches(image: Tensor, w: Weights, name: str = "patch_embed.proj") -> Tensor:
    kernel = w[f"{name}.weight"]
    p = kernel.shape[-1]
    rows, columns = image.shape[1] // p, image.shape[2] // p
    cut = [image[:, p * y : p * y + p, p * x : p * x + p] for y in range(rows) for x in range(columns)]
    return torch.stack([(kernel * piece).sum(dim=(1, 2, 3)) for piece in cut]) + w[f"{name}.bias"]


def count(w: Weights, prefix: str) -> int:
    return 1 + max(int(match[1]) for name in w if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name)))


def table_bias(table: Tensor, grid: int) -> Tensor:
    """BEiT's table with its three entries for the class token: heads tokens tokens."""
    total, offsets = grid * grid + 1, (2 * grid - 1) ** 2
    bias = torch.zeros(table.shape[1], total, total, dtype=table.dtype)
    for i in range(total):
        for j in range(total):
            if i and j:
                dy, dx = (i - 1) // grid - (j - 1) // grid, (i - 1) % grid - (j - 1) % grid
                row = (dy + grid - 1) * (2 * grid - 1) + dx + grid - 1
            else:
                row = offsets + (2 if i == j else 0 if i == 0 else 1)
            bias[:, i, j] = table[row]
    return bias


def beit_tokens(w: Weights, image: Tensor, mask: Tensor, heads: int, eps: float = 1e-6) -> list[Tensor]:
    """BEiT, data2vec, ConMIM, SimMIM's ViT without its prefix, MaskFeat."""
    x = patches(image, w)
    x = torch.where(mask[:, None], w["mask_token"][0], x)
    x = torch.cat([w["cls_token"][0], x])
    if "pos_embed" in w:
        x = x + w["pos_embed"][0]
    grid = math.isqrt(len(mask))
    shared = w.get("rel_pos_bias.relative_position_bias_table")
    tokens = [x[1:]]
    for number in range(count(w, "blocks.")):
        table = w.get(f"blocks.{number}.attn.relative_position_bias_table", shared)
        x = block(x, w, f"blocks.{number}", heads, eps, None if table is None else table_bias(table, grid))
        tokens.append(x[1:])
    return tokens


def eva02_tokens(w: Weights, image: Tensor, mask: Tensor, heads: int) -> list[Tensor]:
    """Rotations written out pair by pair of channels; the class token is not turned."""
    x = torch.where(mask[:, None], w["mask_token"][0], patches(image, w))
    x = torch.cat([w["cls_token"][0], x]) + w["pos_embed"][0]
    grid, width = math.isqrt(len(mask)), x.shape[1] // heads
    place = torch.arange(len(mask), dtype=torch.float64)
    pairs = width // 4  # of each axis
    frequency = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = torch.cat([(place // grid)[:, None] * frequency, (place % grid)[:, None] * frequency], dim=1)

    def turned(y: Tensor) -> Tensor:
        parts = y[1:].reshape(len(mask), heads, width // 2, 2)
        sine, cosine = angle.sin()[:, None], angle.cos()[:, None]
        first, second = parts[..., 0], parts[..., 1]
        rotated = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
        return torch.cat([y[:1], rotated.reshape(len(mask), -1)])

    tokens = [x[1:]]
    for number in range(count(w, "blocks.")):
        name = f"blocks.{number}"
        y = norm(x, w, f"{name}.norm1", 1e-6)
        if f"{name}.attn.q_proj.weight" in w:
            q, k, v = (y @ w[f"{name}.attn.{part}_proj.weight"].T for part in "qkv")
            q, v = q + w[f"{name}.attn.q_bias"], v + w[f"{name}.attn.v_bias"]
        else:
            q, k, v = qkv(y, w, f"{name}.attn")
        x = x + linear(attend(turned(q), turned(k), v, heads), w, f"{name}.attn.proj")
        y = norm(x, w, f"{name}.norm2", 1e-6)
        if f"{name}.mlp.w12.weight" in w:
            gate, value = linear(y, w, f"{name}.mlp.w12").chunk(2, dim=1)
        else:
            gate, value = linear(y, w, f"{name}.mlp.w1"), linear(y, w, f"{name}.mlp.w2")
        y = gate / (1 + (-gate).exp()) * value
        if f"{name}.mlp.ffn_ln.weight" in w:
            y = norm(y, w, f"{name}.mlp.ffn_ln", 1e-6)
        x = x + linear(y, w, f"{name}.mlp.w3")
        tokens.append(x[1:])
    return tokens


def merged(x: Tensor) -> Tensor:
    """Swin's merge of a square map ``num_tokens dim``: four tokens side by side, before norm and reduction."""
    square = x.reshape(math.isqrt(len(x)), math.isqrt(len(x)), -1)
    four = [square[row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    return torch.cat(four, dim=-1).flatten(0, 1)


def enlarged(mask: Tensor, side: int, factor: int) -> Tensor:
    """A square mask on a finer grid: ``rows columns``."""
    return mask.reshape(side, side).repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def window_pairs(grid: int, window: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """For all pairs of tokens of a map: what to add to logits, and row and column offset inside the window.

    No map is shifted or cut: a pair in different windows of the shifted map is barred.
    """
    place = torch.arange(grid)
    shifted = (place - shift) % grid
    band = (shifted >= grid - window).long() + (shifted >= grid - shift).long() if shift else torch.zeros_like(place)
    y, x = place.repeat_interleave(grid), place.repeat(grid)
    window_id = torch.stack([shifted[y] // window, shifted[x] // window])
    region = torch.stack([band[y], band[x]])
    apart = (window_id[:, :, None] != window_id[:, None, :]).any(dim=0)
    foreign = (region[:, :, None] != region[:, None, :]).any(dim=0)
    added = torch.zeros(grid * grid, grid * grid, dtype=torch.float64)
    added[foreign] = -100.0
    added[apart] = -math.inf
    inside = torch.stack([shifted[y] % window, shifted[x] % window])
    dy, dx = inside[:, :, None] - inside[:, None, :]
    return added, dy, dx


def swin_tokens(
    w: Weights, image: Tensor, mask: Tensor, window: int, eps: float = 1e-5, outer_eps: float = 1e-5
) -> list[Tensor]:
    """SimMIM's Swin and SwinV2, without the prefix ``encoder.``."""
    x = patches(image, w)
    x = norm(x, w, "patch_embed.norm", outer_eps)
    x = torch.where(mask[:, None], w["mask_token"][0], x)
    if "absolute_pos_embed" in w:
        x = x + w["absolute_pos_embed"][0]
    tokens = [x]
    for stage in range(count(w, "layers.")):
        grid = math.isqrt(len(x))
        for number in range(count(w, f"layers.{stage}.blocks.")):
            name = f"layers.{stage}.blocks.{number}"
            side = min(window, grid)
            shift = window // 2 if number % 2 and grid > window else 0
            added, dy, dx = window_pairs(grid, side, shift)
            inside = ~added.isinf()
            row = ((dy + side - 1) * (2 * side - 1) + dx + side - 1).where(inside, torch.zeros_like(dy))
            if f"{name}.attn.logit_scale" in w:
                x = swin_v2_block(x, w, name, row, added, side, eps)
            else:
                table = w[f"{name}.attn.relative_position_bias_table"]
                x = block(x, w, name, table.shape[1], eps, table[row].permute(2, 0, 1) + added)
            tokens.append(x)
        if f"layers.{stage}.downsample.reduction.weight" in w:
            x = merged(x)
            name = f"layers.{stage}.downsample"
            if len(w[f"{name}.norm.weight"]) == x.shape[1]:
                x = linear(norm(x, w, f"{name}.norm", outer_eps), w, f"{name}.reduction")
            else:
                x = norm(linear(x, w, f"{name}.reduction"), w, f"{name}.norm", outer_eps)
    return tokens


def swin_v2_block(x: Tensor, w: Weights, name: str, row: Tensor, added: Tensor, side: int, eps: float) -> Tensor:
    scale = w[f"{name}.attn.logit_scale"].clamp(max=math.log(100)).exp().flatten()
    heads = len(scale)
    q, k, v = qkv(x, w, f"{name}.attn")
    unit = [
        (part / part.norm(dim=-1, keepdim=True)).flatten(1)
        for part in (q.unflatten(1, (heads, -1)), k.unflatten(1, (heads, -1)))
    ]
    d = torch.arange(-(side - 1), side, dtype=torch.float64) * 8 / (side - 1)
    d = d.sign() * torch.log2(d.abs() + 1) / math.log2(8)
    coords = torch.stack([d.repeat_interleave(2 * side - 1), d.repeat(2 * side - 1)], dim=1)
    table = linear(linear(coords, w, f"{name}.attn.rpe_mlp.0").clamp(min=0), w, f"{name}.attn.rpe_mlp.2")
    bias = 16 / (1 + (-table).exp())
    parts = []
    width = q.shape[1] // heads
    for h in range(heads):
        cut = slice(h * width, (h + 1) * width)
        logits = unit[0][:, cut] @ unit[1][:, cut].T * scale[h] + bias[:, h][row] + added
        parts.append(logits.softmax(dim=1) @ v[:, cut])
    x = x + norm(linear(torch.cat(parts, dim=1), w, f"{name}.attn.proj"), w, f"{name}.norm1", eps)
    return x + norm(mlp(x, w, f"{name}.mlp"), w, f"{name}.norm2", eps)


def mae_encode(w: Weights, image: Tensor, mask: Tensor, heads: int, eps: float) -> list[Tensor]:
    """Class and visible tokens before the first and after every block of an encoder that sees nothing else."""
    if "cls_token" in w:
        x = patches(image, w) + w["pos_embed"][0, 1:]
        x = torch.cat([w["cls_token"][0] + w["pos_embed"][0, :1], x[~mask]])
    else:
        x = (patches(image, w) + w["pos_embed"][0])[~mask]
    outputs = [x]
    for number in range(count(w, "blocks.")):
        x = block(x, w, f"blocks.{number}", heads, eps)
        outputs.append(x)
    return outputs


def mae_input(w: Weights, encoded: Tensor, mask: Tensor, eps: float) -> Tensor:
    x = linear(norm(encoded, w, "norm", eps), w, "decoder_embed")
    prefix = len(x) - int((~mask).sum())
    full = w["mask_token"][0].expand(len(mask), -1).clone()
    full[~mask] = x[prefix:]
    return torch.cat([x[:prefix], full]) + w["decoder_pos_embed"][0]


def mae_tokens(
    w: Weights, image: Tensor, mask: Tensor, heads: int, decoder_heads: int, eps: float = 1e-6
) -> list[Tensor]:
    return mae_decode(w, mae_encode(w, image, mask, heads, eps)[-1], mask, decoder_heads, eps)


def mae_decode(w: Weights, encoded: Tensor, mask: Tensor, heads: int, eps: float = 1e-6) -> list[Tensor]:
    """From class and visible tokens, if there is a class token, before the encoder's norm."""
    x = mae_input(w, encoded, mask, eps)
    prefix = len(x) - len(mask)
    tokens = [x[prefix:]]
    for number in range(count(w, "decoder_blocks.")):
        x = block(x, w, f"decoder_blocks.{number}", heads, eps)
        tokens.append(x[prefix:])
    return tokens


def ijepa_tokens(w: Weights, image: Tensor, mask: Tensor, heads: int) -> list[Tensor]:
    """Encoder of the context, then the predictor over context tokens followed by those to predict."""
    x = (patches(image, w, "encoder.patch_embed.proj") + w["encoder.pos_embed"][0])[~mask]
    for number in range(count(w, "encoder.blocks.")):
        x = block(x, w, f"encoder.blocks.{number}", heads, 1e-6)
    places = w["predictor.predictor_pos_embed"][0]
    x = linear(norm(x, w, "encoder.norm", 1e-6), w, "predictor.predictor_embed") + places[~mask]
    x = torch.cat([x, w["predictor.mask_token"][0] + places[mask]])
    seen = int((~mask).sum())
    tokens = []
    for number in range(count(w, "predictor.predictor_blocks.") + 1):
        if number:
            x = block(x, w, f"predictor.predictor_blocks.{number - 1}", heads, 1e-6)
        placed = torch.empty_like(x)
        placed[~mask], placed[mask] = x[:seen], x[seen:]
        tokens.append(placed)
    return tokens


def hivit_tokens(w: Weights, image: Tensor, mask: Tensor, heads: int, decoder_heads: int) -> list[Tensor]:
    """One visible patch after the other through the blocks without attention; then all of them."""
    kernel = w["patch_embed.proj.weight"].shape[-1]
    side = 4 * kernel
    columns = image.shape[2] // side
    merges = [int(match[1]) for name in w if (match := re.match(r"blocks\.(\d+)\.reduction\.weight", name))]
    last, finer = [], []
    for place in (~mask).nonzero().flatten().tolist():
        top, left = side * (place // columns), side * (place % columns)
        x = norm(patches(image[:, top : top + side, left : left + side], w), w, "patch_embed.norm", 1e-6)
        kept = []
        for number in range(max(merges) + 1):
            name = f"blocks.{number}"
            if number in merges:
                kept.append(x.flatten())
                x = linear(norm(merged(x), w, f"{name}.norm", 1e-6), w, f"{name}.reduction")
            else:
                x = x + mlp(norm(x, w, f"{name}.norm2", 1e-6), w, f"{name}.mlp")
        last.append(x[0])
        finer.append(torch.cat(kept))
    x = torch.stack(last) + w["absolute_pos_embed"][0][~mask]
    for number in range(max(merges) + 1, count(w, "blocks.")):
        x = block(x, w, f"blocks.{number}", heads, 1e-6)
    if w["decoder_embed.weight"].shape[1] > x.shape[1]:
        x = torch.cat([torch.stack(finer), x], dim=1)
    return mae_decode(w, x, mask, decoder_heads)


def mcmae_tokens(w: Weights, image: Tensor, mask: Tensor, heads: int, decoder_heads: int) -> list[Tensor]:
    """Convolutions written out over padded maps, in which masked places are zero."""

    def over_channels(x: Tensor, name: str) -> Tensor:
        return norm(x.permute(1, 2, 0), w, name, 1e-5).permute(2, 0, 1)

    def pointwise(x: Tensor, name: str) -> Tensor:
        return torch.einsum("oi,ihw->ohw", w[f"{name}.weight"][:, :, 0, 0], x) + w[f"{name}.bias"][:, None, None]

    def embed(x: Tensor, name: str) -> Tensor:
        rows = x.shape[1] // w[f"{name}.proj.weight"].shape[2]
        tokens = norm(patches(x, w, f"{name}.proj"), w, f"{name}.norm", 1e-5)
        return gelu(tokens).T.reshape(tokens.shape[1], rows, -1)

    def depthwise(x: Tensor, name: str) -> Tensor:
        padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
        y = w[f"{name}.bias"][:, None, None].expand_as(x).clone()
        for row in range(5):
            for column in range(5):
                weight = w[f"{name}.weight"][:, 0, row, column, None, None]
                y += weight * padded[:, row : row + x.shape[1], column : column + x.shape[2]]
        return y

    grid = math.isqrt(len(mask))
    x, added = image, torch.zeros(1, dtype=torch.float64)
    for stage in (1, 2):
        x = embed(x, f"patch_embed{stage}")
        factor = x.shape[1] // grid
        seen = enlarged(~mask, grid, factor)
        for number in range(count(w, f"blocks{stage}.")):
            name = f"blocks{stage}.{number}"
            y = pointwise(over_channels(x, f"{name}.norm1"), f"{name}.conv1") * seen
            x = x + pointwise(depthwise(y, f"{name}.attn"), f"{name}.conv2")
            y = gelu(pointwise(over_channels(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
            x = x + pointwise(y, f"{name}.mlp.fc2")
        added = added + patches(x, w, f"stage{stage}_output_decode")
    x = linear(embed(x, "patch_embed3").flatten(1).T, w, "patch_embed4") + w["pos_embed"][0]
    x = x[~mask]
    for number in range(count(w, "blocks3.")):
        x = block(x, w, f"blocks3.{number}", heads, 1e-6)
    return mae_decode(w, x + added[~mask], mask, decoder_heads)


def greenmim_tokens(w: Weights, image: Tensor, mask: Tensor, window: int, decoder_heads: int) -> list[Tensor]:
    """Swin on visible tokens alone: pairs of tokens of one window attend, whatever lies between them."""
    w = {name.removeprefix("encoder."): tensor for name, tensor in w.items()}
    x = norm(patches(image, w), w, "patch_embed.norm", 1e-6)
    stages, side = count(w, "layers."), math.isqrt(len(mask))
    for stage in range(stages):
        factor = 2 ** (stages - 1 - stage)
        grid = side * factor
        seen = enlarged(~mask, side, factor).flatten()
        for number in range(count(w, f"layers.{stage}.blocks.")):
            name = f"layers.{stage}.blocks.{number}"
            width = min(window, grid)
            shift = window // 2 if number % 2 and grid > window else 0
            table = w[f"{name}.attn.relative_position_bias_table"]
            place = torch.arange(grid * grid)[seen]
            row, column = place // grid, place % grid
            # Windows that start before the map: a shift to the other edge, where nothing may attend, comes to the same.
            own = (row + (width - shift) % width) // width * 2 * grid + (column + (width - shift) % width) // width
            together = own[:, None] == own
            dy, dx = row[:, None] - row, column[:, None] - column
            index = ((dy + width - 1) * (2 * width - 1) + dx + width - 1).where(together, torch.zeros_like(dy))
            bias = table[index].permute(2, 0, 1).masked_fill(~together, -math.inf)
            x = x.clone()
            x[seen] = block(x[seen], w, name, table.shape[1], 1e-6, bias)
        if stage + 1 < stages:
            x = norm(merged(x), w, f"layers.{stage}.downsample.norm", 1e-6)
            x = linear(x, w, f"layers.{stage}.downsample.reduction")
    return mae_decode(w, x[~mask], mask, decoder_heads)


def bootmae_tokens(w: Weights, image: Tensor, mask: Tensor, heads: int, stack: str, eps: float = 1e-6) -> list[Tensor]:
    outputs = mae_encode(w, image, mask, heads, eps)
    encoded = norm(outputs[-1], w, "norm", eps)
    if stack == "pixel_decoder":
        name, memory, x = "decode_blocks", outputs[1], linear(encoded, w, "down")
        masked = w["mask_token"][0] + w["de_pos_embed"][0, 1:]
    else:
        name, memory, x = "decode_blocks_1", outputs[-1], linear(encoded, w, "down_1")
        masked = w["mask_token_1"][0] + w["pos_embed"][0, 1:]
    full = masked.clone()
    full[~mask] = x[1:]
    x = torch.cat([x[:1], full])
    tokens = [x[1:]]
    for number in range(count(w, f"{name}.")):
        each = f"{name}.{number}"
        y = qkv(norm(x, w, f"{each}.norm1", eps), w, f"{each}.attn")
        x = x + linear(attend(*y, heads), w, f"{each}.attn.proj")
        q = norm(x, w, f"{each}.norm3", eps) @ w[f"{each}.c_attn.q.weight"].T + w[f"{each}.c_attn.q_bias"]
        k, v = (norm(memory, w, f"{each}.norm4", eps) @ w[f"{each}.c_attn.kv.weight"].T).chunk(2, dim=1)
        x = x + linear(attend(q, k, v + w[f"{each}.c_attn.v_bias"], heads), w, f"{each}.c_attn.proj")
        x = x + mlp(norm(x, w, f"{each}.norm2", eps), w, f"{each}.mlp")
        tokens.append(x[1:])
    return tokens


def milan_tokens(
    w: Weights, image: Tensor, mask: Tensor, heads: int, decoder_heads: int, eps: float = 1e-6
) -> list[Tensor]:
    x = mae_input(w, mae_encode(w, image, mask, heads, eps)[-1], mask, eps)
    masked = torch.cat([torch.zeros(1, dtype=torch.bool), mask])
    constant, moving = x[~masked], x[masked]
    tokens = [x[1:]]
    for number in range(count(w, "decoder_blocks.")):
        name = f"decoder_blocks.{number}"
        y = norm(moving, w, f"{name}.norm1", eps)
        k, v = linear(torch.cat([constant, y]), w, f"{name}.attn.kv").chunk(2, dim=1)
        moving = moving + linear(attend(linear(y, w, f"{name}.attn.q"), k, v, decoder_heads), w, f"{name}.attn.proj")
        moving = moving + mlp(norm(moving, w, f"{name}.norm2", eps), w, f"{name}.mlp")
        x = x.clone()
        x[masked] = moving
        tokens.append(x[1:])
    return tokens


def cae_tokens(
    w: Weights, image: Tensor, mask: Tensor, heads: int, decoder_heads: int, eps: float = 1e-6
) -> list[Tensor]:
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in w.items() if name.startswith("encoder.")}
    visible = norm(mae_encode(encoder, image, mask, heads, eps)[-1], encoder, "norm", eps)[1:]
    moving = w["mask_token"][0].expand(int(mask.sum()), -1)
    positions = w["rd_pos_embed"][0, 1:]
    tokens = []
    for number in range(count(w, "regresser.regressor_blocks.") + 1):
        x = torch.zeros(len(mask), moving.shape[1], dtype=moving.dtype)
        x[mask], x[~mask] = moving, visible
        tokens.append(x)
        name = f"regresser.regressor_blocks.{number}"
        if f"{name}.norm1_q.weight" not in w:
            break
        everything = torch.cat([visible, moving])
        places = torch.cat([positions[~mask], positions[mask]])
        attn = f"{name}.cross_attn"
        q = linear(norm(moving + positions[mask], w, f"{name}.norm1_q", eps), w, f"{attn}.q") + w[f"{attn}.q_bias"]
        k = linear(norm(everything + places, w, f"{name}.norm1_k", eps), w, f"{attn}.k")
        v = linear(norm(everything, w, f"{name}.norm1_v", eps), w, f"{attn}.v") + w[f"{attn}.v_bias"]
        y = moving + w[f"{name}.gamma_1_cross"] * linear(attend(q, k, v, decoder_heads), w, f"{attn}.proj")
        y = norm(y, w, f"{name}.norm2_cross", eps)
        moving = y + w[f"{name}.gamma_2_cross"] * mlp(y, w, f"{name}.mlp_cross")
    return tokens


def mff_tokens(
    w: Weights, image: Tensor, mask: Tensor, heads: int, decoder_heads: int, eps: float = 1e-6
) -> list[Tensor]:
    outputs = mae_encode(w, image, mask, heads, eps)[1:]
    weights = w["proj_weights"].flatten().softmax(dim=0)
    fused = weights[-1] * outputs[-1]
    for number in range(len(weights) - 1):
        at = (number + 1) * len(outputs) // len(weights) - 1
        fused = fused + weights[number] * linear(outputs[at], w, f"proj_layers.{number}")
    return mae_decode(w, fused, mask, decoder_heads, eps)


def hiera_tokens(
    w: Weights, image: Tensor, mask: Tensor, heads: int, decoder_heads: int, pools: int = 2, eps: float = 1e-6
) -> list[Tensor]:
    """Facebook's Hiera MAE; each visible mask unit of 8 x 8 tokens is a small map of its own."""
    side = image.shape[1] // 32  # mask units
    inner = 8 >> pools  # decoder tokens of a unit
    unit_mask = mask.reshape(side, inner, side, inner)[:, 0, :, 0]
    hidden = enlarged(unit_mask, side, 32)
    kernel = w["patch_embed.proj.weight"]
    x = torch.nn.functional.conv2d(image[None] * ~hidden, kernel, w["patch_embed.proj.bias"], stride=4, padding=3)[0]
    x = x.permute(1, 2, 0) + w["pos_embed"][0].reshape(8 * side, 8 * side, -1)
    places = [(row, column) for row in range(side) for column in range(side) if not unit_mask[row, column]]
    units = [x[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] for row, column in places]

    def pool(y: Tensor) -> Tensor:
        four = [y[row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return torch.stack(four).amax(dim=0)

    blocks = count(w, "blocks.")
    stage, kept = 0, []
    for number in range(blocks):
        name = f"blocks.{number}"
        local = stage < 2  # a stage's first block still attends as the stage before
        pooled = False
        if f"{name}.proj.weight" in w:
            kept.append(units)
            stage += 1
            pooled = stage <= pools
        normed = [norm(unit, w, f"{name}.norm1", eps) for unit in units]
        parts = [linear(unit, w, f"{name}.attn.qkv").chunk(3, dim=-1) for unit in normed]
        queries = [pool(q) if pooled else q for q, _, _ in parts]
        every = [torch.cat([part[each].flatten(0, 1) for part in parts]) for each in (1, 2)]
        new = []
        for unit, y, q, (_, k, v) in zip(units, normed, queries, parts, strict=True):
            if f"{name}.proj.weight" in w:
                unit = linear(y, w, f"{name}.proj")
                unit = pool(unit) if pooled else unit
            keys, values = (k.flatten(0, 1), v.flatten(0, 1)) if local else every
            seen = attend(q.flatten(0, 1), keys, values, heads << stage).reshape(q.shape)
            unit = unit + linear(seen, w, f"{name}.attn.proj")
            new.append(unit + mlp(norm(unit, w, f"{name}.norm2", eps), w, f"{name}.mlp"))
        units = new
    width = w["mask_token"].shape[-1]
    full = w["mask_token"][0, 0].expand(side * inner, side * inner, width).clone()
    for number, (row, column) in enumerate(places):
        y = units[number]
        for head in range(pools):
            weight = w[f"multi_scale_fusion_heads.{head}.weight"]
            bias = w[f"multi_scale_fusion_heads.{head}.bias"]
            unit = kept[head][number].permute(2, 0, 1)[None]
            y = y + torch.nn.functional.conv2d(unit, weight, bias, stride=weight.shape[-1])[0].permute(1, 2, 0)
        placed = linear(norm(y, w, "encoder_norm", eps), w, "decoder_embed")
        full[inner * row : inner * (row + 1), inner * column : inner * (column + 1)] = placed
    x = full.flatten(0, 1) + w["decoder_pos_embed"][0]
    tokens = [x]
    for number in range(count(w, "decoder_blocks.")):
        x = block(x, w, f"decoder_blocks.{number}", decoder_heads, eps)
        tokens.append(x)
    return tokens
