"""An experiment small enough for any test: two blocks, 64 images, 2 epochs."""

from __future__ import annotations

from pathlib import Path

from labelled_images import write_parquet

TINY = """
summary = "A tiny one."
seeds = [0, 1]
device = "cpu"
log_every = 1

[[recipes]]
recipe = "mae_cifar10"
label = "MAE"

[recipes.set]
patch_size = 8
mask_unit = 8
epochs = 2
batch_size = 16
warmup_epochs = 0.5
"model.dim" = 32
"model.depth" = 2
"model.num_heads" = 2
"model.mlp_dim" = 64
"model.decoder_dim" = 16
"model.decoder_depth" = 2
"model.decoder_num_heads" = 2
"model.decoder_mlp_dim" = 32

[[arms]]
name = "no MTO"

[[arms]]
name = "MTO"
mto = "chosen"

[evaluation]
protocol = "knn"
points = 2
neighbours = 3

[choose]
seeds = [100]
share = 0.5

[[choose.candidates]]
name = "small"

[[choose.candidates]]
name = "large"
sparsity_weight = 0.5
include_self = false
"""


def write_experiment(folder: Path, text: str = TINY) -> Path:
    """The file, with its images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(folder / "train.parquet", 64, side=32)
    write_parquet(folder / "test.parquet", 12, seed=1, side=32)
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path
