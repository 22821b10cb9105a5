"""Tiny labelled images for tests of evaluation: each class has a colour of its own, or labels are shuffled."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COLOURS = ((230, 40, 40), (40, 200, 60), (50, 60, 220), (220, 220, 40), (30, 200, 220), (220, 60, 220))


def write_parquet(
    path: Path, count: int = 24, classes: int = 3, *, seed: int = 0, side: int = 16, shuffled: bool = False
) -> Path:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    rows = []
    for label in labels:
        pixels = np.asarray(COLOURS[label]) + random.normal(0, 25, (side, side, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, format="PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    written = random.permutation(labels) if shuffled else labels
    pq.write_table(pa.table({"image": rows, "label": written.tolist()}), path)
    return path
