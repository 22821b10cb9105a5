"""Each equation and rule again, as slow plain loops written from the paper and the original papers alone.

Nothing is shared with the package: lists and numbers, no tensors, no vectorized tricks. A vision transformer's forward
is here too (NumPy, float64), for architectures without golden files.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np

Matrix = Sequence[Sequence[float]]


def softmax(row: Sequence[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    return [weight / sum(weights) for weight in weights]


def entropy(probabilities: Sequence[float]) -> float:
    """In nats; p log p tends to 0 where p underflows."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def heterogeneity(tokens: Matrix, mask: Sequence[bool]) -> float:
    """Eq. (2) for one image: mean over masked rows of the entropy of softmax over visible columns."""
    masked = [token for token, is_masked in zip(tokens, mask, strict=True) if is_masked]
    visible = [token for token, is_masked in zip(tokens, mask, strict=True) if not is_masked]
    return sum(entropy(softmax([dot(query, key) for key in visible])) for query in masked) / len(masked)


def affinity(tokens: Matrix, mask: Sequence[bool], kind: str = "softmax") -> list[list[float]]:
    """Fig. 2 for one image: masked tokens first, then visible ones, each kind in its old order."""
    order = [i for i in range(len(mask)) if mask[i]] + [i for i in range(len(mask)) if not mask[i]]
    x = [tokens[i] for i in order]
    if kind == "cosine":
        x = [[value / math.sqrt(dot(token, token)) for value in token] for token in x]
    products = [[dot(query, key) for key in x] for query in x]
    return [softmax(row) for row in products] if kind == "softmax" else products


def quadrants(matrix: Matrix, num_masked: int) -> list[list[list[float]]]:
    """1st masked-masked, 2nd masked-visible, 3rd visible-masked, 4th visible-visible (rows are queries)."""
    four: list[list[list[float]]] = [[], [], [], []]
    for i, row in enumerate(matrix):
        above = 0 if i < num_masked else 2
        four[above].append([value for j, value in enumerate(row) if j < num_masked])
        four[above + 1].append([value for j, value in enumerate(row) if j >= num_masked])
    return four


def random_mask(noise: Sequence[float], ratio: float) -> list[bool]:
    """MAE: int(N (1 - ratio)) patches with the smallest noise stay visible."""
    keep = int(len(noise) * (1 - ratio))
    visible = sorted(range(len(noise)), key=lambda i: noise[i])[:keep]
    return [i not in visible for i in range(len(noise))]


def block_mask(order: Sequence[int], grid: tuple[int, int], ratio: float, unit: int) -> list[bool]:
    """SimMIM: the first ceil(units ratio) units of an order are masked, each ``unit`` x ``unit`` patches."""
    columns = grid[1] // unit
    chosen = set(order[: math.ceil(len(order) * ratio)])
    return [(y // unit) * columns + x // unit in chosen for y in range(grid[0]) for x in range(grid[1])]


def blockwise_mask(
    generator: random.Random, grid: tuple[int, int], num_masked: int, min_block: int = 16, min_aspect: float = 0.3
) -> list[bool]:
    """BEiT (Algorithm 1 and its code): rectangles until the number is reached or ten attempts fail."""
    height, width = grid
    mask = [[False] * width for _ in range(height)]
    done = 0
    while done < num_masked:
        new = 0
        for _ in range(10):
            area = generator.uniform(min_block, num_masked - done)
            aspect = math.exp(generator.uniform(math.log(min_aspect), math.log(1 / min_aspect)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = generator.randint(0, height - h), generator.randint(0, width - w)
                cells = [(y, x) for y in range(top, top + h) for x in range(left, left + w) if not mask[y][x]]
                if 0 < len(cells) <= num_masked - done:
                    for y, x in cells:
                        mask[y][x] = True
                    new = len(cells)
                    break
        if not new:
            break
        done += new
    return [cell for row in mask for cell in row]


def sincos_entry(row: int, column: int, channel: int, dim: int) -> float:
    """MAE's position table: first half of the channels for the column; in each half sines, then cosines."""
    position = column if channel < dim // 2 else row
    within = channel % (dim // 2)
    quarter = dim // 4
    angle = position / 10000 ** ((within % quarter) / quarter)
    return math.sin(angle) if within < quarter else math.cos(angle)


def relative_position(query: int, key: int, grid: tuple[int, int]) -> int:
    """BEiT's row of the bias table for patches ``query`` and ``key`` (numbered row by row, no class token)."""
    down = query // grid[1] - key // grid[1] + grid[0] - 1
    right = query % grid[1] - key % grid[1] + grid[1] - 1
    return down * (2 * grid[1] - 1) + right


# A vision transformer, one block at a time, from "An Image is Worth 16x16 Words" and the BEiT position bias.

Weights = Mapping[str, np.ndarray]


def _layer_norm(x: np.ndarray, weights: Weights, name: str, eps: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def block(
    x: np.ndarray, weights: Weights, name: str, heads: int, eps: float, bias: np.ndarray | None = None
) -> np.ndarray:
    """One pre-norm block on ``tokens dim``; ``bias`` is ``heads tokens tokens``."""
    tokens, dim = x.shape
    width = dim // heads
    qkv = _linear(_layer_norm(x, weights, f"{name}.norm1", eps), weights, f"{name}.attn.qkv")
    query, key, value = qkv[:, :dim], qkv[:, dim : 2 * dim], qkv[:, 2 * dim :]
    out = np.zeros((tokens, dim))
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(tokens):
            logits = [dot(query[i, part], key[j, part]) / math.sqrt(width) for j in range(tokens)]
            if bias is not None:
                logits = [logit + bias[head, i, j] for j, logit in enumerate(logits)]
            out[i, part] = sum(p * value[j, part] for j, p in enumerate(softmax(logits)))
    out = _linear(out, weights, f"{name}.attn.proj")
    x = x + out * weights.get(f"{name}.ls1.gamma", np.ones(dim))
    hidden = _linear(_layer_norm(x, weights, f"{name}.norm2", eps), weights, f"{name}.mlp.fc1")
    out = _linear(_gelu(hidden), weights, f"{name}.mlp.fc2")
    return x + out * weights.get(f"{name}.ls2.gamma", np.ones(dim))


def _embed(image: np.ndarray, weights: Weights, patch: int) -> np.ndarray:
    kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    cells = [
        image[:, y * patch : y * patch + patch, x * patch : x * patch + patch]
        for y in range(rows)
        for x in range(columns)
    ]
    return np.array([[(cell * k).sum() for k in kernel] + bias for cell in cells])


def _bias(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """``heads tokens tokens``; the class token has the last three rows: its row, its column, itself."""
    count = grid[0] * grid[1]
    offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    bias = np.zeros((table.shape[1], count + 1, count + 1))
    for i in range(count + 1):
        for j in range(count + 1):
            if i == j == 0:
                row = offsets + 2
            elif i == 0:
                row = offsets
            elif j == 0:
                row = offsets + 1
            else:
                row = relative_position(i - 1, j - 1, grid)
            bias[:, i, j] = table[row]
    return bias


def simmim_tokens(
    image: np.ndarray, mask: Sequence[bool], weights: Weights, *, heads: int, patch: int, eps: float
) -> list[np.ndarray]:
    """SimMIM for one image: patch tokens at each layer depth."""
    grid = (image.shape[1] // patch, image.shape[2] // patch)
    x = _embed(image, weights, patch)
    x[np.array(mask)] = weights["mask_token"][0, 0]
    x = np.concatenate([weights["cls_token"][0], x])
    if "pos_embed" in weights:
        x = x + weights["pos_embed"][0]
    tables = sorted(name for name in weights if name.startswith("position_biases."))
    depths = [x[1:]]
    for depth in range(sum(name.endswith("norm1.weight") for name in weights)):
        table = tables[0] if len(tables) == 1 else f"position_biases.{depth}.relative_position_bias_table"
        x = block(x, weights, f"blocks.{depth}", heads, eps, _bias(weights[table], grid) if tables else None)
        depths.append(x[1:])
    return depths


def mae_tokens(
    image: np.ndarray,
    mask: Sequence[bool],
    weights: Weights,
    *,
    heads: int,
    decoder_heads: int,
    patch: int,
    eps: float,
) -> list[np.ndarray]:
    """MAE for one image: the decoder's patch tokens at each layer depth."""
    visible = [i for i, is_masked in enumerate(mask) if not is_masked]
    x = (_embed(image, weights, patch) + weights["pos_embed"][0, 1:])[visible]
    x = np.concatenate([weights["cls_token"][0] + weights["pos_embed"][0, :1], x])
    for depth in range(sum(name.startswith("blocks.") and name.endswith("norm1.weight") for name in weights)):
        x = block(x, weights, f"blocks.{depth}", heads, eps)
    x = _linear(_layer_norm(x, weights, "norm", eps), weights, "decoder_embed")
    tokens = np.repeat(weights["mask_token"][0], len(mask), axis=0)
    tokens[visible] = x[1:]
    x = np.concatenate([x[:1], tokens]) + weights["decoder_pos_embed"][0]
    depths = [x[1:]]
    for depth in range(sum(name.startswith("decoder_blocks.") and name.endswith("norm1.weight") for name in weights)):
        x = block(x, weights, f"decoder_blocks.{depth}", decoder_heads, eps)
        depths.append(x[1:])
    return depths


def weights_of(model: object) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}  # type: ignore[attr-defined]
