"""What to get instead of a file that cannot be measured."""

from __future__ import annotations

from collections.abc import Iterable

from mto_analysis.checkpoints.reading import RawCheckpoint

__all__ = ["BEIT", "MAE_FULL", "NO_MIXMIM", "SIMMIM_SWIN", "SIMMIM_VIT", "what_instead"]

MAE_FULL = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_{}_full.pth"
_SIZES = {768: "base", 1024: "large", 1280: "huge"}
SIMMIM_VIT = "simmim_pretrain__vit_base__img224__800ep.pth, linked in the README of microsoft/SimMIM"
SIMMIM_SWIN = "simmim_pretrain__swin_base__img192_window6__800ep.pth, linked in the README of microsoft/SimMIM"
NO_MIXMIM = "its encoder mixes two images, so no file of this model can be measured; for a Swin get " + SIMMIM_SWIN
BEIT = "the Hugging Face folder microsoft/beit-base-patch16-224-pt22k"

_KNOWN = (
    "blocks.0.", "layers.0.", "encoder.", "vit.", "backbone.", "patch_embed.", "beit.", "data2vec_vision.", "swin.",
    "swinv2.",
)  # fmt: skip


def what_instead(raw: RawCheckpoint) -> str:
    """Why a file without masked tokens cannot be measured, and which one can."""
    names = raw.tensors

    def starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if not starts(*_KNOWN):
        return f"is not a masked image model; its tensors are {_some(names)}"
    embedding = next((names[name] for name in names if name.endswith("patch_embed.proj.weight")), None)
    size = _SIZES.get(len(embedding) if embedding is not None and embedding.ndim else 0, "base")
    full = MAE_FULL.format(size)
    fine_tuned = starts("head.", "fc_norm.", "classifier.", "model.head.")
    if fine_tuned and "fc_norm.weight" in names and "blocks.0.attn.relative_position_bias_table" in names:
        return (
            "is a fine-tuned classifier of BEiT's kind without mask token (so are ConMIM's public files); get a "
            f"pre-training file instead, for BEiT {BEIT}"
        )
    if starts("beit."):
        return f"has no mask token; get {BEIT}"
    if starts("data2vec_vision."):
        return "has no mask token; get the pre-training file of facebookresearch/data2vec_vision (checkpoint-799.pth)"
    if starts("swin.", "swinv2.", "layers.0.blocks.0."):
        return f"is a Swin without mask token; get {SIMMIM_SWIN}"
    if starts("backbone."):
        return (
            "holds a backbone only: no mask token, so there is nothing to measure; get the pre-training file of the "
            f"same model that has backbone and neck, or for MAE {full}"
        )
    if fine_tuned:
        return (
            "is a fine-tuned classifier without mask token; get the pre-training file of the same model instead, "
            f"for MAE {full}"
        )
    if starts("encoder."):
        return f"is an encoder without mask token and decoder; get {SIMMIM_VIT}"
    return (
        "holds an encoder only: no mask token, no decoder, so there is nothing to measure; for MAE get "
        f"{full} or the Hugging Face folder facebook/vit-mae-{size}"
    )


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
