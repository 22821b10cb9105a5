"""Tiny models with the structure, names, calls and mask forms of public pre-training code, written for the tests.

Each :class:`Case` builds a model, runs one training forward as that code's own script does, and says where its masked
tokens are, independently of what ``attach_mto`` finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

GRID, PATCH, BATCH, DIM = 4, 4, 3, 16
NUM = GRID * GRID


def make_images(seed=0, side=GRID * PATCH):
    return torch.randn(BATCH, 3, side, side, generator=torch.Generator().manual_seed(seed))


def draw_mask(seed=0, *, masked=(10, 10, 10), grid=GRID, unit=1):
    """Bool [batch, grid * grid]; ``masked`` counts units of each image."""
    generator = torch.Generator().manual_seed(seed + 100)
    units = (grid // unit) ** 2
    mask = torch.zeros(len(masked), units, dtype=torch.bool)
    for row, count in zip(mask, masked, strict=True):
        row[torch.randperm(units, generator=generator)[:count]] = True
    side = grid // unit
    return mask.view(-1, side, side).repeat_interleave(unit, 1).repeat_interleave(unit, 2).flatten(1)


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch=PATCH):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images, **ignored):
        return self.proj(images).flatten(2).mT


class Attention(nn.Module):
    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x, memory=None, bias=None):
        keys, values = self.kv(x if memory is None else memory).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), keys, values))
        weights = q @ k.mT / q.shape[-1] ** 0.5
        weights = (weights if bias is None else weights + bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block; the second argument is a relative position bias."""

    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(dim), nn.LayerNorm(dim), Attention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, rel_pos_bias=None):
        x = x + self.attn(self.norm1(x), bias=rel_pos_bias)
        return x + self.mlp(self.norm2(x))


class CrossBlock(Block):
    """Block that also looks at encoder features."""

    def __init__(self, dim, memory_dim):
        super().__init__(dim)
        self.norm3, self.cross, self.bring = nn.LayerNorm(dim), Attention(dim), nn.Linear(memory_dim, dim)

    def forward(self, x, fea):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm3(x), self.bring(fea))
        return x + self.mlp(self.norm2(x))


def blocks(dim, count, kind=Block, *more):
    return nn.ModuleList(kind(dim, *more) for _ in range(count))


def table(tokens, dim, *, learned=True):
    return nn.Parameter(torch.randn(1, tokens, dim), requires_grad=learned)


def patches_of(images, patch=PATCH):
    return nn.functional.unfold(images, patch, stride=patch).mT


class MaskedAutoencoderViT(nn.Module):
    """As facebookresearch/mae: drawn inside, patches leave in shuffled order and return to their places."""

    def __init__(self, dim=DIM, decoder_dim=12):
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = table(NUM + 1, dim, learned=False)
        self.blocks, self.norm = blocks(dim, 2), nn.LayerNorm(dim)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim))
        self.decoder_pos_embed = table(NUM + 1, decoder_dim, learned=False)
        self.decoder_blocks, self.decoder_norm = blocks(decoder_dim, 3), nn.LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, PATCH * PATCH * 3)

    def random_masking(self, x, mask_ratio):
        keep = int(x.shape[1] * (1 - mask_ratio))
        shuffle = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        kept = x.gather(1, shuffle[:, :keep, None].expand(-1, -1, x.shape[-1]))
        return kept, (restore >= keep).float(), restore

    def forward_encoder(self, images, mask_ratio):
        x, mask, restore = self.random_masking(self.patch_embed(images) + self.pos_embed[:, 1:], mask_ratio)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, restore

    def forward_decoder(self, x, restore):
        x = self.decoder_embed(x)
        fill = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        whole = torch.cat([x[:, 1:], fill], dim=1).gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], whole], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward_loss(self, images, pred, mask):
        return ((pred - patches_of(images)).square().mean(-1) * mask).sum() / mask.sum()

    def forward(self, images, mask_ratio=0.75):
        latent, mask, restore = self.forward_encoder(images, mask_ratio)
        pred = self.forward_decoder(latent, restore)
        return self.forward_loss(images, pred, mask), pred, mask


class VisionTransformerForSimMIM(nn.Module):
    def __init__(self, dim=DIM, depth=3):
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = None
        self.rel_pos_bias = nn.Parameter(torch.randn(2, NUM + 1, NUM + 1))
        self.blocks, self.norm = blocks(dim, depth), nn.LayerNorm(dim)

    def forward(self, images, mask):
        x = self.patch_embed(images)
        w = mask.flatten(1).unsqueeze(-1).type_as(self.mask_token)
        x = x * (1 - w) + self.mask_token * w
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, rel_pos_bias=self.rel_pos_bias)
        return self.norm(x)[:, 1:].mT.unflatten(2, (GRID, GRID))


class WindowBlock(Block):
    """Attention in windows of 2 x 2 tokens, shifted or not."""

    def __init__(self, dim, side, shift):
        super().__init__(dim)
        self.side, self.shift = side, shift

    def forward(self, x):
        batch, _, dim = x.shape
        size = min(2, self.side)
        y = self.norm1(x).view(batch, self.side, self.side, dim).roll((-self.shift, -self.shift), (1, 2))
        y = y.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
        shape = y.shape
        y = self.attn(y.reshape(-1, size * size, dim)).view(shape).transpose(2, 3)
        y = y.reshape(batch, self.side, self.side, dim).roll((self.shift, self.shift), (1, 2))
        x = x + y.flatten(1, 2)
        return x + self.mlp(self.norm2(x))


class Merging(nn.Module):
    def __init__(self, dim, side):
        super().__init__()
        self.side, self.reduction = side, nn.Linear(4 * dim, 2 * dim)

    def forward(self, x):
        cells = x.view(len(x), self.side // 2, 2, self.side // 2, 2, -1).transpose(2, 3)
        return self.reduction(cells.flatten(3).flatten(1, 2))


class Stage(nn.Module):
    def __init__(self, dim, side, *, last, use_checkpoint):
        super().__init__()
        self.blocks = nn.ModuleList(WindowBlock(dim, side, shift) for shift in (0, 1 if side > 2 else 0))
        self.downsample = None if last else Merging(dim, side)
        self.use_checkpoint = use_checkpoint

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.use_checkpoint is None else checkpoint(block, x, use_reentrant=self.use_checkpoint)
        return x if self.downsample is None else self.downsample(x)


class SwinTransformerForSimMIM(nn.Module):
    """``use_checkpoint`` is None, or whether to checkpoint blocks in the reentrant form."""

    def __init__(self, use_checkpoint=None, *, grid=8, dim=8):
        super().__init__()
        self.patch_embed = PatchEmbed(dim, patch=2)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim))
        self.layers = nn.ModuleList(
            Stage(dim * 2**s, grid // 2**s, last=s == 2, use_checkpoint=use_checkpoint) for s in range(3)
        )
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, images, mask):
        x = self.patch_embed(images)
        w = mask.flatten(1).unsqueeze(-1).type_as(self.mask_token)
        x = x * (1 - w) + self.mask_token * w
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mT.unflatten(2, (2, 2))


class SimMIM(nn.Module):
    """As microsoft/SimMIM: the loader's mask is int [batch, grid, grid]."""

    def __init__(self, encoder, encoder_stride, dim):
        super().__init__()
        self.encoder, self.encoder_stride = encoder, encoder_stride
        self.decoder = nn.Sequential(nn.Conv2d(dim, encoder_stride**2 * 3, 1), nn.PixelShuffle(encoder_stride))

    def forward(self, x, mask):
        rebuilt = self.decoder(self.encoder(x, mask))
        unit = x.shape[-1] // mask.shape[-1]
        pixels = mask.repeat_interleave(unit, 1).repeat_interleave(unit, 2).unsqueeze(1)
        return ((rebuilt - x).abs() * pixels).sum() / pixels.sum() / 3


class BootMAE(nn.Module):
    """As LightDXY/BootMAE: two decoders that attend to encoder features; the mask is a permutation."""

    def __init__(self, dim=DIM, decoder_dim=12):
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = table(NUM + 1, dim, learned=False)
        self.de_pos_embed = table(NUM + 1, decoder_dim, learned=False)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim))
        self.mask_token_1 = nn.Parameter(torch.randn(1, 1, dim))
        self.blocks, self.norm = blocks(dim, 3), nn.LayerNorm(dim)
        self.down = nn.Linear(dim, decoder_dim)
        self.decode_blocks = blocks(decoder_dim, 2, CrossBlock, dim)
        self.decode_blocks_1 = blocks(dim, 2, CrossBlock, dim)
        self.to_pixels, self.to_features = nn.Linear(decoder_dim, PATCH * PATCH * 3), nn.Linear(dim, dim)

    def get_feature(self, images, mask_len, idx_shuffle):
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def fill(self, x, token, position, idx_shuffle):
        """Visible tokens in their places, without position; masked ones with it."""
        masked = token.expand(len(x), NUM + 1 - x.shape[1], -1)
        places = idx_shuffle[:, x.shape[1] - 1 :, None].expand(-1, -1, x.shape[-1])
        masked = masked + position[:, 1:].expand(len(x), -1, -1).gather(1, places)
        order = idx_shuffle.argsort(dim=1)[..., None].expand(-1, -1, x.shape[-1])
        return torch.cat([x[:, :1], torch.cat([x[:, 1:], masked], dim=1).gather(1, order)], dim=1)

    def forward(self, images, mask_len, idx_shuffle):
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x = x.gather(1, idx_shuffle[:, : NUM - mask_len, None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        fea = self.norm(x)
        y = self.fill(fea, self.mask_token_1, self.pos_embed, idx_shuffle)
        for block in self.decode_blocks_1:  # features first: the order of the stacks must not matter
            y = block(y, fea)
        x = self.fill(self.down(fea), self.mask_token, self.de_pos_embed, idx_shuffle)
        for block in self.decode_blocks:
            x = block(x, fea)
        return self.to_pixels(x)[:, 1:], self.to_features(y)[:, 1:]


class ConMIM(nn.Module):
    """As TencentARC/ConMIM's student and teacher: a bool mask by keyword, projected tokens come back."""

    def __init__(self, dim=DIM):
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = None
        self.rel_pos_bias = nn.Parameter(torch.randn(2, NUM + 1, NUM + 1))
        self.blocks, self.norm = blocks(dim, 3), nn.LayerNorm(dim)
        self.projectors = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 8))

    def forward(self, x, bool_masked_pos, return_all_tokens=False, use_mlp_projectors=False, **flags):
        x = self.patch_embed(x, bool_masked_pos=bool_masked_pos)
        w = bool_masked_pos.unsqueeze(-1).type_as(self.mask_token)
        x = x * (1 - w) + self.mask_token * w
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, rel_pos_bias=self.rel_pos_bias)
        x = self.norm(x)[:, 1:]
        return self.projectors(x) if use_mlp_projectors else x


def as_permutation(mask):
    """Visible patches first, masked ones last, each kind in a shuffled order."""
    return (mask.float() + torch.rand(mask.shape) / 2).argsort(dim=1)


@dataclass(frozen=True)
class Case:
    """A public code base in small: how to build it, how its script calls it, where its masked tokens are."""

    build: Callable[[], nn.Module]
    #: From model and seed to the model's own loss and the true mask, bool [batch, patches].
    run: Callable[[nn.Module, int], tuple[torch.Tensor, torch.Tensor]]
    #: Blocks of each stack.
    stacks: Callable[[nn.Module], list[list[nn.Module]]]
    prefix: int = 1


def run_mae(model, seed):
    torch.manual_seed(seed)
    loss, _, mask = model(make_images(seed), mask_ratio=0.75)
    return loss, mask.bool()


def run_simmim(model, seed):
    mask = draw_mask(seed)
    return model(make_images(seed), mask.view(BATCH, GRID, GRID).long()), mask


def run_swin(model, seed):
    mask = draw_mask(seed, masked=(2, 2, 2), grid=8, unit=4)
    return model(make_images(seed), mask.view(BATCH, 8, 8).long()), mask


def run_bootmae(model, seed):
    torch.manual_seed(seed)
    mask, images = draw_mask(seed, masked=(12, 12, 12)), make_images(seed)
    pixels, features = model(images, 12, as_permutation(mask))
    loss = (pixels - patches_of(images))[mask].square().mean()
    return loss + features[mask].square().mean(), mask


def run_conmim(model, seed):
    mask = draw_mask(seed, masked=(10, 7, 12))  # block masks differ in number
    out = model(
        make_images(seed),
        bool_masked_pos=mask,
        return_all_tokens=True,
        only_return_before_head=True,
        use_mlp_projectors=True,
    )
    return (out[mask] - 1).square().mean(), mask


def _swin(use_checkpoint):
    return lambda: SimMIM(SwinTransformerForSimMIM(use_checkpoint), 8, 32)


def _stages(model):
    return [[block for stage in model.encoder.layers for block in stage.blocks]]


CASES = {
    "mae": Case(MaskedAutoencoderViT, run_mae, lambda m: [list(m.decoder_blocks)]),
    "simmim vit": Case(
        lambda: SimMIM(VisionTransformerForSimMIM(), PATCH, DIM), run_simmim, lambda m: [list(m.encoder.blocks)]
    ),
    "simmim swin": Case(_swin(None), run_swin, _stages, prefix=0),
    "simmim swin, reentrant": Case(_swin(True), run_swin, _stages, prefix=0),
    "simmim swin, non-reentrant": Case(_swin(False), run_swin, _stages, prefix=0),
    "bootmae": Case(BootMAE, run_bootmae, lambda m: [list(m.decode_blocks), list(m.decode_blocks_1)]),
    "conmim": Case(ConMIM, run_conmim, lambda m: [list(m.blocks)]),
}
