"""Memory that loading a ViT-B takes above the imports, as a multiple of the file: at most 1.5.

Peaks (VmHWM) of fresh processes that import and load, minus those that only import, median of three each. MAE ViT-B
with random weights, as facebookresearch/mae saves it and as a Hugging Face folder.

Run: ``python benchmarks/load_memory.py`` (two minutes, 1 GB of disk).
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from mto_analysis.masks import MaskRule
from mto_analysis.models import MAE, MAEConfig, ModelInfo

TARGET = 1.5

_HUGGING_FACE = (
    (r"^(cls_token|pos_embed|patch_embed)", r"vit.embeddings.\1"),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"^norm\.", "vit.layernorm."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(mask_token|decoder_)", r"decoder.\1"),
    (r"pos_embed$", "position_embeddings"),
    (r"decoder_position_embeddings$", "decoder_pos_embed"),
    (r"patch_embed\.proj", "patch_embeddings.projection"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_CHILD = """
import sys
from mto_analysis.checkpoints import load_checkpoint
{load}
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def write_files(folder: Path) -> dict[str, Path]:
    """The same weights twice."""
    torch.manual_seed(0)
    state = MAE(MAEConfig(), ModelInfo("mae", "decoder", 224, 16, MaskRule("random", 0.75, 16))).state_dict()
    torch.save({"model": state}, folder / "mae_vit_base.pth")
    hub = folder / "vit-mae-base"
    hub.mkdir()
    renamed: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in _HUGGING_FACE:
            new = re.sub(pattern, replacement, new)
        if ".attn.qkv." in new:
            for part, chunk in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[new.replace(".attn.qkv.", f".attention.attention.{part}.")] = chunk.clone()
        else:
            renamed[new] = value
    save_file(renamed, hub / "model.safetensors")
    config = {"num_attention_heads": 12, "decoder_num_attention_heads": 16, "layer_norm_eps": 1e-12, "mask_ratio": 0.75}
    (hub / "config.json").write_text(json.dumps(config))
    return {"facebookresearch/mae file": folder / "mae_vit_base.pth", "Hugging Face folder": hub}


def peak(load: str) -> float:
    """Peak memory in MB of a fresh process, median of three."""
    command = [sys.executable, "-c", _CHILD.format(load=load)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
    return statistics.median(int(run) / 1024 for run in runs)


def main() -> None:
    """Print one line per format."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder))
        imports = peak("")
        for name, path in files.items():
            weights = path / "model.safetensors" if path.is_dir() else path
            size = weights.stat().st_size / 2**20
            extra = peak(f"model = load_checkpoint({str(path)!r})") - imports
            verdict = "ok" if extra <= TARGET * size else "ABOVE TARGET"
            print(f"{name}: {size:.0f} MB, takes {extra:.0f} MB above imports, {extra / size:.2f} times ({verdict})")


if __name__ == "__main__":
    main()
