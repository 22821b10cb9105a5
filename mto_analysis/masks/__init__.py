"""What a mask is, how masks are sampled, and mask files."""

from mto_analysis.masks.rules import (
    MaskKey,
    MaskRule,
    block_mask,
    blockwise_mask,
    check_mask,
    load_masks,
    mask_from_noise,
    mask_keys,
    masks_to_bytes,
    random_mask,
    save_masks,
    topped_up_mask,
)

__all__ = [
    "MaskKey",
    "MaskRule",
    "block_mask",
    "blockwise_mask",
    "check_mask",
    "load_masks",
    "mask_from_noise",
    "mask_keys",
    "masks_to_bytes",
    "random_mask",
    "save_masks",
    "topped_up_mask",
]
