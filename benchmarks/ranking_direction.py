"""What each loss alone does to H at every layer depth in a short real run; nothing is claimed beyond what is printed.

Each run starts from a bundled checkpoint (trained on CIFAR-10 with the original code) or from random weights, and
trains the model's own loss, plus one loss of masked token optimization, on the first 192 bundled images. H is
measured on the other 64 with fixed masks, in eval mode. The same masks and order of images in every run.

Run: ``python benchmarks/ranking_direction.py`` (about three minutes on one idle core).
"""

from __future__ import annotations

import argparse

import torch

from mto_analysis.checkpoints import load_checkpoint
from mto_analysis.demo import DEMO_CHECKPOINTS, demo_batches
from mto_analysis.masks import mask_keys
from mto_analysis.models import MaskedImageModel
from mto_analysis.models.targets import reconstruction_loss
from mto_analysis.mto import MTOConfig, attach_mto, mto_loss

NONE = {"sparsity_weight": 0.0, "embedding_weight": 0.0, "ranking_weight": 0.0}


def runs(weight: float) -> dict[str, MTOConfig | None]:
    """Settings by name; weights are the same for all terms, L_spa is the mean over rows."""
    return {
        "own loss": None,
        "+ L_r, descending": MTOConfig(**NONE | {"ranking_weight": weight}),
        "+ L_r, as printed": MTOConfig(**NONE | {"ranking_weight": weight}, ranking_direction="as_printed"),
        "+ L_spa": MTOConfig(**NONE | {"sparsity_weight": weight}),
        "+ L_spa, without self": MTOConfig(**NONE | {"sparsity_weight": weight}, include_self=False),
        "+ L_e": MTOConfig(**NONE | {"embedding_weight": weight}),
    }


class Images:
    """The bundled images: the first 192 to train on, the last 64 to measure."""

    def __init__(self, model: MaskedImageModel) -> None:
        batches = list(demo_batches(model.info))
        self.train = torch.cat([batch.images for batch in batches[:3]])
        self.test, self.test_mask = batches[3].images, self.masks(model, list(batches[3].names))

    @staticmethod
    def masks(model: MaskedImageModel, names: list[str], epoch: int = 0) -> torch.Tensor:
        """Masks of named images in an epoch."""
        return model.info.mask_rule.sample(mask_keys(names, epoch=epoch), model.info.grid, model.info.patch_size)


def own_loss(model: MaskedImageModel, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    info = model.info
    target, criterion = info.target or "pixels", info.criterion or "l2"
    return reconstruction_loss(
        model(images, mask), images, mask, info.patch_size, target=target, criterion=criterion
    ).mean()


@torch.no_grad()
def measure(model: MaskedImageModel, images: Images) -> tuple[list[float], float, float]:
    """H at every layer depth, L_spa as a mean over rows, and the model's own loss."""
    layers = [each.tokens for each in model.eval().layer_tokens(images.test, images.test_mask)]
    terms = mto_loss(layers, images.test_mask)
    loss = own_loss(model, images.test, images.test_mask).item()
    return terms.heterogeneity.mean(dim=1).tolist(), terms.sparsity.item(), loss


def train(model: MaskedImageModel, images: Images, config: MTOConfig | None, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate, weight_decay=0.05)
    mto = None if config is None else attach_mto(model, config, check_every=0)
    order = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randperm(len(images.train), generator=order)[:32]
        mask = images.masks(model, [str(int(k)) for k in chosen], epoch=step)
        loss = own_loss(model, images.train[chosen], mask)
        if mto is not None:
            loss = loss + mto.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if mto is not None:
        mto.detach()


def fresh(name: str, random: bool) -> MaskedImageModel:
    """A bundled model, or one of the same architecture with random weights."""
    model = load_checkpoint(DEMO_CHECKPOINTS[name])
    if random:
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                torch.nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
            elif isinstance(module, torch.nn.LayerNorm):
                module.reset_parameters()
        for token in (model.mask_token, model.cls_token):
            torch.nn.init.normal_(token, std=0.02)
    return model


def line(label: str, found: tuple[list[float], float, float]) -> str:
    h, sparsity, loss = found
    return f"{label:<24}" + "".join(f"{value:7.3f}" for value in h) + f"   L_spa {sparsity:6.3f}   own {loss:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["MAE", "SimMIM"], choices=("MAE", "SimMIM"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--weight", type=float, default=0.1)
    parser.add_argument("--random", action="store_true", help="start from random weights")
    options = parser.parse_args()
    start = "random weights" if options.random else "the bundled checkpoint"
    print(f"from {start}; {options.steps} steps of 32 images, rate {options.rate}, weight {options.weight}")
    for name in options.models:
        print(
            f"\n{name:<24}" + "".join(f"{'H_' + str(k):>7}" for k in range(len(measure_start(name, options.random)[0])))
        )
        print(line("before", measure_start(name, options.random)), flush=True)
        for label, config in runs(options.weight).items():
            model = fresh(name, options.random)
            images = Images(model)
            train(model, images, config, options.steps, options.rate)
            print(line(label, measure(model, images)), flush=True)


def measure_start(name: str, random: bool) -> tuple[list[float], float, float]:
    model = fresh(name, random)
    return measure(model, Images(model))


if __name__ == "__main__":
    main()
