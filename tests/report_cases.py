"""Reports to test: small trained models, and one of the size of a ViT-B's maps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mto_analysis import save_checkpoint
from mto_analysis.masks import MaskRule
from mto_analysis.models import ModelInfo, SimMIM, SimMIMConfig


def explorer_data(html: str) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def read_products(depth: dict[str, Any]) -> np.ndarray:
    """Dot products of a layer depth, decoded byte by byte as the script does."""
    import base64

    stored, size = base64.b64decode(depth["levels"]), len(depth["mask"])
    products = np.empty((size, size))
    at = 0
    for i in range(size):
        for j in range(i + 1):
            level = stored[at] | stored[at + 1] << 8 | stored[at + 2] << 16
            products[i, j] = products[j, i] = depth["low"] + depth["step"] * level
            at += 3
    return products


def read_mask(depth: dict[str, Any]) -> np.ndarray:
    return np.array([character == "1" for character in depth["mask"]])


def save_twelve_layers(path: Path) -> Path:
    """A narrow random model with 12 layers of 196 patches: the size of a report does not depend on the width."""
    torch.manual_seed(0)
    info = ModelInfo(
        "simmim_vit", "inpainting", 224, 16, MaskRule("block", 0.6, 32), target="pixels", criterion="l1"
    )  # fmt: skip
    model = SimMIM(SimMIMConfig(dim=32, num_heads=2, mlp_dim=32, depth=12), info)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(model, path)
    return path
