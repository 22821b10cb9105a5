"""Small images, in files of several kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, names: tuple[str, ...] | None = None) -> Path:
    random = np.random.default_rng(0)
    for name in names or ("b/x.png", "b/y.png", "a/z.jpg", "a/deep/w.png", "c.png", "A.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((30, 24), Image.Resampling.BICUBIC).save(path)
    return folder
