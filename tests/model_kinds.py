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


class SelfDistillation(nn.Module):
    """A teacher in front of the student, or after it; frozen or not."""

    def __init__(self, order=("teacher", "student"), *, frozen=True):
        super().__init__()
        for name in order:
            setattr(self, name, Backbone())
        if frozen:
            self.teacher.requires_grad_(False).eval()

    def forward(self, x, mask):
        with torch.no_grad():
            target = self.teacher(x)
        return (self.student(x, mask) - target).square().mean()


class VisibleArgument(Inpainting):
    """Its argument is True for visible patches."""

    def forward(self, x, visible):
        return super().forward(x, ~visible)


class Rounds(Backbone):
    """Brings the mask token, or the position too, to the dtype of the patches, as several current ViTs do."""

    def __init__(self, *, everything=False):
        super().__init__()
        self.embed, self.everything = nn.Linear(DIM, DIM), everything

    def forward(self, x, mask=None):
        x = self.embed(x)
        x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.vit.before.expand(len(x), -1, -1).to(x.dtype), x], 1)
        return self.vit.blocks(x + (self.vit.pos_embed.to(x.dtype) if self.everything else self.vit.pos_embed))


class Residual(nn.Module):
    """Pairs of branches whose residuals are added outside of modules."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)]) for _ in range(2))
        self.hole, self.norm = nn.Parameter(torch.randn(DIM)), nn.LayerNorm(DIM)

    def forward(self, x, mask):
        x = torch.where(mask[..., None], self.hole, x)
        self.whole = [x]
        for first, second in self.layers:
            x = first(x) + x
            x = second(x) + x
            self.whole.append(x)
        return self.norm(x)


class AddsBetween(Inpainting):
    """Adds its position before each block again, or in place after it, or in place what starts as zero."""

    def __init__(self, way="before"):
        super().__init__()
        self.way, self.scale = way, nn.Parameter(torch.tensor(0.0 if way == "zero" else 1.0))

    def run(self, x):
        for each in self.blocks:
            if self.way == "before":
                x = each(x + self.positions())
            elif self.way == "in place":
                x = each(x)
                x += self.positions()
            else:
                x = each(x) + self.scale * self.positions()
        return x


class Shared(Inpainting):
    """Its blocks run over the patches first, then over these with masked tokens."""

    def forward(self, x, mask):
        return self.run(self.tokens(self.run(self.embed(x)), mask))


class Behind(Inpainting):
    """Class tokens behind the patches, or padding."""

    def tokens(self, x, mask):
        x = torch.where(mask[..., None], self.mask_token, self.embed(x)) + self.positions()
        return torch.cat([x, self.cls_token.expand(len(x), -1, -1)], 1)


class BlockOf(nn.Module):
    """A block that gives more than its tokens, or changes its input in place."""

    def __init__(self, way):
        super().__init__()
        self.way, self.block, self.mlp = way, block(), nn.Linear(DIM, DIM)

    def forward(self, x, more=None):
        if self.way == "in place":
            return x.add_(self.mlp(x.clone()))
        if self.way == "changes its input":
            return self.mlp(x.clone()) + x.mul_(0.5)
        if self.way == "attention first":
            return torch.ones(len(x), NUM, NUM), self.block(x)
        if self.way == "branch too":
            return self.block(x), self.mlp(x)
        if self.way == "carries positions":
            return self.block(x + more), more
        assert self.way == "residual apart"
        more = x if more is None else x + more
        return self.mlp(more), more


class Gives(Inpainting):
    """Blocks as above, with what they hand on to each other; ``whole`` are the tokens as they come."""

    def __init__(self, way, count=3):
        super().__init__()
        self.way, self.blocks = way, nn.ModuleList(BlockOf(way) for _ in range(count))

    def run(self, x):
        more = torch.randn(x.shape) if self.way == "carries positions" else None
        self.whole = [x.clone()]
        for each in self.blocks:
            if self.way == "attention first":
                _, x = each(x)
            elif self.way in ("residual apart", "carries positions"):
                x, more = each(x, more)
            else:
                x = each(x)
                x = x[0] if isinstance(x, tuple) else x
            self.whole.append(x.clone())
        return x


class Chunk(nn.ModuleList):
    """A part of the blocks, filled up with nn.Identity so that names count all blocks."""

    def forward(self, x):
        for each in self:
            x = each(x)
        return x


class EachView(nn.Module):
    """A block that takes one tensor, or a list of views."""

    def __init__(self):
        super().__init__()
        self.block, self.norm = block(), nn.LayerNorm(DIM)

    def forward(self, x):
        return [self.block(each) for each in x] if isinstance(x, list) else self.block(x)


class Chunks(Inpainting):
    """Blocks in chunks, and a list of views whose first one is masked, as DINOv2 trains."""

    def __init__(self, **more):
        super().__init__(cls=1, registers=4, **more)
        self.parts = [EachView() for _ in range(4)]
        self.blocks = nn.ModuleList([Chunk(self.parts[:2]), Chunk([nn.Identity(), nn.Identity(), *self.parts[2:]])])

    def forward(self, x, masks):
        return self.run([self.tokens(*pair) for pair in zip(x, masks, strict=True)])


class TwoLists(Inpainting):
    """Two lists of blocks that run one after the other."""

    def __init__(self):
        super().__init__()
        self.more = blocks(2)

    def run(self, x):
        for each in (*self.blocks, *self.more):
            x = each(x)
        return x


class TwoTokens(Inpainting):
    """A mask token for each half of the patches, as of two modalities."""

    def __init__(self):
        super().__init__()
        self.other_mask_token = nn.Parameter(torch.randn(1, 1, DIM))

    def tokens(self, x, mask):
        half = torch.arange(NUM)[:, None] < NUM // 2
        token = torch.where(half, self.mask_token, self.other_mask_token[0])
        return torch.where(mask[..., None], token, self.embed(x)) + self.positions()


class FromPixels(Inpainting):
    """Gets images and samples its own mask; with what is then done to its tokens before, among or after its blocks."""

    def __init__(self, change, mask, **more):
        super().__init__(**more)
        self.change, self.mask = change, mask
        self.embed = nn.Conv2d(3, DIM, 8, 8)

    def forward(self, images):
        x = torch.where(self.mask[..., None], self.mask_token, self.embed(images).flatten(2).mT) + self.positions()
        x = self.change(x)
        for each in self.blocks:
            x = each(x)
        return x


class LeavesOut(nn.Module):
    """A block that gives the first tokens only."""

    def __init__(self):
        super().__init__()
        self.block = block()

    def forward(self, x):
        return self.block(x)[:, :4]


class Joins(nn.Module):
    """A block that makes one token, twice as wide, of four in a row."""

    def __init__(self):
        super().__init__()
        self.join = nn.Linear(4 * DIM, 2 * DIM)

    def forward(self, x):
        return self.join(x.reshape(len(x), -1, 4 * DIM))


class InTurn(nn.Module):
    """A student that runs once for each view, the masks of all views in a list."""

    def __init__(self):
        super().__init__()
        self.student = Inpainting()

    def forward(self, views, masks):
        return [self.student(*each) for each in zip(views, masks, strict=True)]


class Predictor(nn.Module):
    """Sees some of the patches, and masked tokens of others, in the order of their positions or masked ones last."""

    def __init__(self, num_tokens=1, *, ordered=False):
        super().__init__()
        self.ordered, self.which = ordered, num_tokens - 1
        self.embed, self.blocks = nn.Linear(DIM, DIM), blocks()
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.randn(1, 1, DIM)) for _ in range(num_tokens))
        self.pos_embed = nn.Parameter(torch.randn(1, NUM, DIM), requires_grad=False)

    def forward(self, x, context, target):
        position = self.pos_embed.expand(len(x), -1, -1)
        x = pick(self.embed(x) + position, context)
        x = torch.cat([x, self.mask_tokens[self.which] + pick(position, target)], 1)
        self.true_mask = torch.arange(x.shape[1]).expand(len(x), -1) >= context.shape[1]
        if self.ordered:
            order = torch.cat([context, target], 1).argsort(1)
            x, self.true_mask = pick(x, order), self.true_mask.gather(1, order)
        for each in self.blocks:
            x = each(x)
        return x


def pick(tokens, index):
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


class GridBlock(nn.Module):
    """Takes ``batch height width dim`` by keyword only, and returns a tuple."""

    def __init__(self, dim=DIM):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, *, hidden_states, flag=None):
        return hidden_states + self.mlp(self.norm(hidden_states)), flag


class Grid(nn.Module):
    """Tokens on a grid that is no square; merges 2 x 2 of them after the first block."""

    def __init__(self, *, merges=True):
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(DIM))
        self.layers, self.merges = nn.ModuleList(GridBlock() for _ in range(2)), merges

    def forward(self, x, mask):
        x = torch.where(mask[..., None], self.mask_token, x)
        x, _ = self.layers[0](hidden_states=x)
        if self.merges:
            x = nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return self.layers[1](hidden_states=x)[0]
