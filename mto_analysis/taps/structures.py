"""Where masked tokens live in other people's models: recognised by structure, never by import or class name.

For each stack of blocks it is enough to know the row that a masked token has at the first block's input (mask token
plus position): tokens equal to it, bit for bit, are the masked ones. So one rule finds the mask in every code base,
whatever form the caller's own mask has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["StackSpec", "find_stacks", "unwrap"]


@dataclass(frozen=True)
class StackSpec:
    """A stack of blocks through which masked and visible tokens pass together.

    Give ``masked_row`` or ``mask``.

    Args:
        name: For logs: ``encoder``, ``decoder``, ``pixel_decoder`` ...
        blocks: In the order they run; each takes tokens ``batch num_tokens dim`` as its first positional argument and
            returns them, or a tuple that starts with them. The number of tokens may shrink by 4 between blocks (Swin).
        mask_token: The learned vector, for its gradient's norm.
        prefix_tokens: Class and register tokens in front of the patch tokens.
        masked_row: What a masked token is at the first block's input, ``num_patches dim`` or anything that broadcasts;
            or several such, where a model may round it.
        mask: The mask of the running forward, ``batch num_patches`` in the order of the tokens, True = masked.
    """

    name: str
    blocks: Sequence[nn.Module]
    mask_token: nn.Parameter | None = None
    prefix_tokens: int = 1
    masked_row: Callable[[], Tensor | Sequence[Tensor]] | None = None
    mask: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.blocks or self.prefix_tokens < 0:
            raise ValueError(f"stack {self.name} needs blocks, and prefix_tokens of at least 0")
        if (self.masked_row is None) == (self.mask is None):
            raise ValueError(f"stack {self.name} needs either masked_row or mask")

    def find_mask(self, tokens: Tensor) -> Tensor:
        """The mask of the running forward from the patch tokens at the first block's input.

        Shapes:
            tokens: batch num_patches dim
            returns: batch num_patches
        """
        if self.mask is not None:
            return self.mask().to(tokens.device).flatten(1).bool()
        rows = () if self.masked_row is None else self.masked_row()
        candidates = [rows] if isinstance(rows, Tensor) else list(rows)
        found = tokens.new_zeros(tokens.shape[:2], dtype=torch.bool)
        for row in candidates:
            if tokens.is_cuda:  # to ask is to wait for the device
                found = torch.where(found.any(), found, _equal(tokens, row))
            elif len(candidates) == 1 or bool(_equal(tokens[..., :16], row[..., :16]).any()):
                found = _equal(tokens, row)
                if found.any():
                    break
        return found


def _equal(tokens: Tensor, row: Tensor) -> Tensor:
    tokens, row = tokens.detach(), row.detach().to(tokens.dtype)
    if tokens.is_cuda:  # a third of the memory to pass over
        return torch.eq(tokens, row).all(dim=-1)
    return torch.sub(tokens, row).abs_().amax(dim=-1) == 0  # on a CPU four times as fast


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, FullyShardedDataParallel and torch.compile.

    Raises:
        ValueError: For nn.DataParallel, whose replicas no hook can follow, and for FullyShardedDataParallel that joins
            the mask token with other parameters.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError("nn.DataParallel copies the model in every step; use DistributedDataParallel")
        if getattr(model, "_use_orig_params", True) is False:
            raise ValueError(
                "FullyShardedDataParallel with use_orig_params=False joins the mask token with other parameters; "
                "pass use_orig_params=True, or use fully_shard"
            )
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_stacks(model: nn.Module) -> list[StackSpec]:
    """The stacks of a model of a known structure.

    Raises:
        ValueError: If no structure fits; says how to give the stacks.
    """
    for rule in _RULES:
        if stacks := rule(model):
            return stacks
    # The user's class holds a decoder or a backbone of a known structure. An MAE's backbone has a mask token too, which
    # is never used: decoders first.
    for rule in (_lightly_decoder, _lightly_backbone):
        for module in model.modules():
            if stacks := rule(module):
                return stacks
    raise ValueError(
        f"{type(model).__name__} has no known structure with masked tokens; "
        "give attach_mto(..., stacks=[StackSpec(name, blocks, masked_row=..., prefix_tokens=...)])"
    )


def _at(model: nn.Module, *paths: str) -> object | None:
    """The first attribute path that exists and is not None."""
    for path in paths:
        found: object | None = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    return None


def _parameter(model: nn.Module, path: str) -> nn.Parameter | None:
    found = _at(model, path)
    return found if isinstance(found, nn.Parameter) else None


def _blocks(found: object | None) -> list[nn.Module]:
    return list(found) if isinstance(found, (nn.ModuleList, nn.Sequential)) else []


def _blocks_of_stages(found: object | None) -> list[nn.Module]:
    return [block for stage in _blocks(found) for block in _blocks(getattr(stage, "blocks", None))]


def _stack(
    name: str, blocks: list[nn.Module], owner: nn.Module, token: str, position: str | None, prefix: int = 1
) -> Iterator[StackSpec]:
    """One stack, if its parts are there."""
    parameter = _parameter(owner, token)
    if not blocks or parameter is None:
        return

    def masked_row() -> Tensor | Sequence[Tensor]:
        now, found = _parameter(owner, token), None if position is None else _at(owner, position)
        row = (parameter if now is None else now).reshape(1, 1, -1)
        added = found[:, prefix:] if isinstance(found, Tensor) else torch.zeros_like(row)
        device = row.device.type
        if not torch.is_autocast_enabled(device):
            return row + added
        # Some models bring the mask token to the dtype of the patches that it joins, some the position too.
        half = torch.get_autocast_dtype(device)
        return row + added, row.to(half) + added, row.to(half) + added.to(half)

    yield StackSpec(name, blocks, parameter, prefix, masked_row)


def _bootmae(model: nn.Module) -> list[StackSpec]:
    """LightDXY/BootMAE, and ours: two decoders; visible rows carry no decoder position, masked rows do."""
    if ours := _blocks(_at(model, "pixel_blocks")):
        feature = _blocks(_at(model, "feature_blocks"))
        return [
            *_stack("pixel_decoder", ours, model, "pixel_mask_token", "pixel_pos_embed"),
            *_stack("feature_decoder", feature, model, "feature_mask_token", "pos_embed"),
        ]
    if _at(model, "decode_blocks_1") is None or _at(model, "de_pos_embed") is None:
        return []
    return [
        *_stack("pixel_decoder", _blocks(_at(model, "decode_blocks")), model, "mask_token", "de_pos_embed"),
        *_stack("feature_decoder", _blocks(_at(model, "decode_blocks_1")), model, "mask_token_1", "pos_embed"),
    ]


def _mae(model: nn.Module) -> list[StackSpec]:
    """facebookresearch/mae, and ours."""
    if _at(model, "decoder_embed") is None or _at(model, "decoder_pos_embed") is None:
        return []
    return [*_stack("decoder", _blocks(_at(model, "decoder_blocks")), model, "mask_token", "decoder_pos_embed")]


def _hf_vitmae(model: nn.Module) -> list[StackSpec]:
    """Hugging Face ``ViTMAEForPreTraining``."""
    decoder = _at(model, "decoder")
    if _at(model, "vit.embeddings") is None or not isinstance(decoder, nn.Module):
        return []
    blocks = _blocks(_at(decoder, "decoder_layers", "layers"))
    return [*_stack("decoder", blocks, decoder, "mask_token", "decoder_pos_embed")]


def _simmim(model: nn.Module) -> list[StackSpec]:
    """microsoft/SimMIM, ViT and Swin."""
    encoder = _at(model, "encoder")
    if not isinstance(encoder, nn.Module) or _at(model, "decoder") is None:
        return []
    if blocks := _blocks(_at(encoder, "blocks")):
        return [*_stack("encoder", blocks, encoder, "mask_token", "pos_embed")]
    blocks = _blocks_of_stages(_at(encoder, "layers"))
    return [*_stack("encoder", blocks, encoder, "mask_token", "absolute_pos_embed", prefix=0)]


def _hf_inpainting(model: nn.Module) -> list[StackSpec]:
    """Hugging Face BEiT, ViT, Swin and SwinV2 for masked image modelling."""
    for base in ("beit", "vit", "swin", "swinv2", "data2vec_vision"):
        inner = _at(model, base)
        if isinstance(inner, nn.Module) and _parameter(inner, "embeddings.mask_token") is not None:
            token, position = "embeddings.mask_token", "embeddings.position_embeddings"
            if blocks := _blocks_of_stages(_at(inner, "encoder.layers")):
                return [*_stack("encoder", blocks, inner, token, position, prefix=0)]
            return [*_stack("encoder", _blocks(_at(inner, "layers", "encoder.layer")), inner, token, position)]
    return []


def _beit(model: nn.Module) -> list[StackSpec]:
    """TencentARC/ConMIM, the original BEiT, and our inpainting-style ViTs and Swin."""
    if stages := [block for stage in _blocks(_at(model, "stages")) for block in _blocks(stage)]:
        return [*_stack("encoder", stages, model, "mask_token", "pos_embed", prefix=0)]
    if _at(model, "cls_token") is None or _at(model, "patch_embed") is None:
        return []
    return [*_stack("encoder", _blocks(_at(model, "blocks")), model, "mask_token", "pos_embed")]


def _lightly_decoder(module: nn.Module) -> list[StackSpec]:
    """Lightly's MAE decoders, current and older."""
    prefix = getattr(module, "num_prefix_tokens", 1)
    if not callable(getattr(module, "decode", None)) or not isinstance(prefix, int):
        return []
    if older := _blocks(_at(module, "decoder_blocks")):
        return [*_stack("decoder", older, module, "mask_token", "decoder_pos_embed", prefix)]
    if _at(module, "pos_embed") is None:
        return []
    return [*_stack("decoder", _blocks(_at(module, "blocks")), module, "mask_token", "pos_embed", prefix)]


def _lightly_backbone(module: nn.Module) -> list[StackSpec]:
    """Lightly's SimMIM backbone, on a ViT of torchvision or of timm."""
    if not callable(getattr(module, "preprocess", None)):
        return []
    if blocks := _blocks(_at(module, "vit.encoder.layers")):
        return [*_stack("encoder", blocks, module, "mask_token", "vit.encoder.pos_embedding")]
    return [*_stack("encoder", _blocks(_at(module, "vit.blocks")), module, "mask_token", "vit.pos_embed")]


# One class name serves several code bases, and MAE also has `blocks` and `mask_token`: the order matters.
_RULES: tuple[Callable[[nn.Module], list[StackSpec]], ...] = (
    _bootmae,
    _mae,
    _hf_vitmae,
    _simmim,
    _hf_inpainting,
    _beit,
)
