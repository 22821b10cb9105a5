"""Small models that stand for kinds of other people's code, with what is unusual about each as an option."""

from __future__ import annotations

import torch
from torch import nn

NUM, DIM = 16, 12


def block(dim=DIM, *, batch_first=True):
    return nn.TransformerEncoderLayer(dim, 2, 2 * dim, 0.0, batch_first=batch_first)


def blocks(count=2, dim=DIM, **more):
    return nn.ModuleList(block(dim, **more) for _ in range(count))


def random_mask(batch=2, masked=(12,), seed=0, num=NUM):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch, num, dtype=torch.bool)
    for row, index in enumerate(range(batch)):
        mask[row, torch.randperm(num, generator=generator)[: masked[index % len(masked)]]] = True
    return mask


def features(batch=2, seed=0, num=NUM, dim=DIM):
    return torch.randn(batch, num, dim, generator=torch.Generator().manual_seed(seed + 50))


class DecoderNames(nn.Module):
    """MAE's names; masked tokens at their places, after the visible ones, or in any order; a class token or none.

    Its class token is no parameter, so that nothing but the mask in the call tells how many patches there are.
    """

    def __init__(self, order="places", cls=1):
        super().__init__()
        self.order, self.cls = order, cls
        self.decoder_embed, self.decoder_blocks = nn.Linear(DIM, DIM), blocks()
        self.mask_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, NUM + cls, DIM), requires_grad=False)

    def tokens(self, seen, mask):
        x = self.decoder_embed(seen)
        position = self.decoder_pos_embed[:, self.cls :].expand(len(x), -1, -1)
        x = torch.where(mask[..., None], self.mask_token.expand_as(x), x) + position
        order = torch.arange(NUM).expand(len(x), -1)
        if self.order == "visible first":
            order = mask.int().argsort(dim=1, stable=True)
        elif self.order == "shuffled":
            order = torch.rand(mask.shape).argsort(dim=1)
        self.true_mask = mask.gather(1, order)
        x = x.gather(1, order[..., None].expand(-1, -1, DIM))
        return torch.cat([torch.randn(len(x), self.cls, DIM), x], 1)

    def forward(self, seen, mask):
        x = self.tokens(seen, mask)
        for each in self.decoder_blocks:
            x = each(x)
        return x


class Vit(nn.Module):
    def __init__(self, registers=0, *, says=True):
        super().__init__()
        if says:
            self.num_prefix_tokens = 1 + registers
        self.blocks = nn.Sequential(*blocks())
        self.pos_embed = nn.Parameter(torch.randn(1, NUM + 1 + registers, DIM))
        self.before = nn.Parameter(torch.randn(1, 1 + registers, DIM))


class Backbone(nn.Module):
    """A masked ViT around another ViT; positions are interpolated for views of another size."""

    def __init__(self, registers=0, *, says=True):
        super().__init__()
        self.vit = Vit(registers, says=says)
        self.mask_token = nn.Parameter(torch.randn(1, 1, DIM))

    def preprocess(self, x, mask=None):
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token, x)
        x = torch.cat([self.vit.before.expand(len(x), -1, -1), x], 1)
        position = self.vit.pos_embed
        if x.shape[1] != position.shape[1]:
            others = nn.functional.interpolate(position[:, 1:].mT, x.shape[1] - 1).mT
            position = torch.cat([position[:, :1], others], 1)
        return x + position

    def forward(self, x, mask=None):
        return self.vit.blocks(self.preprocess(x, mask))


class Inpainting(nn.Module):
    """A plain encoder that fills masked patches; options are what public code does in other ways."""

    def __init__(self, *, cls=0, registers=0, position="learned", token=None, batch_first=True, name="mask_token"):
        super().__init__()
        if cls:
            self.cls_token = nn.Parameter(torch.randn(1, cls, DIM))
        if registers:
            self.register_tokens = nn.Parameter(torch.randn(1, registers, DIM))
        setattr(self, name, nn.Parameter(torch.randn(DIM) if token is None else token))
        self.name, self.batch_first = name, batch_first
        self.embed, self.blocks = nn.Linear(DIM, DIM), blocks(3, batch_first=batch_first)
        if position == "learned":
            self.pos_embed = nn.Parameter(torch.randn(1, NUM, DIM))
        elif position == "zero":
            self.pos_embed = nn.Parameter(torch.zeros(1, NUM, DIM))
        elif position == "grid":
            self.pos_embed = nn.Parameter(torch.randn(1, DIM, 4, 4))
        elif position == "embedding":
            self.position_embedding = nn.Embedding(NUM, DIM)

    def positions(self):
        if hasattr(self, "position_embedding"):
            return self.position_embedding(torch.arange(NUM))
        if not hasattr(self, "pos_embed"):
            return 0
        return self.pos_embed if self.pos_embed.ndim == 3 else self.pos_embed.flatten(2).mT

    def tokens(self, x, mask):
        x = torch.where(mask[..., None], getattr(self, self.name).to(x.dtype), self.embed(x)) + self.positions()
        before = [getattr(self, name) for name in ("cls_token", "register_tokens") if hasattr(self, name)]
        return torch.cat([*(each.expand(len(x), -1, -1) for each in before), x], 1)

    def forward(self, x, mask):
        return self.run(self.tokens(x, mask))

    def run(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        for each in self.blocks:
            x = each(x)
        return x if self.batch_first else x.transpose(0, 1)
