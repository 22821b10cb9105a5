"""Reads ``golden/``: inputs, and what the original code makes of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mto_analysis import load_checkpoint
from mto_analysis.models import MaskedImageModel

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One family: a checkpoint in its published layout, images, masks, and the original's numbers."""

    name: str
    source: Path
    heads: dict[str, int]
    images: Tensor
    mask: Tensor
    expected: dict[str, np.ndarray]
    meta: dict[str, Any]

    def load(self) -> MaskedImageModel:
        return load_checkpoint(self.source, **self.heads)


def read_golden(name: str) -> Golden:
    folder = GOLDEN / name
    with np.load(folder / "inputs.npz") as file:
        inputs = dict(file)
    with np.load(folder / "expected.npz") as file:
        expected = dict(file)
    meta = json.loads((folder / "meta.json").read_text())
    # Only MAE's files lack their head counts.
    heads = {key: meta[key] for key in ("num_heads", "decoder_num_heads")} if name == "mae" else {}
    return Golden(
        name=name,
        source=folder / ("model" if name == "hf_vitmae" else "checkpoint.pth"),
        heads=heads,
        images=torch.from_numpy(inputs["images"]),
        mask=torch.from_numpy(inputs["mask"]),
        expected=expected,
        meta=meta,
    )
