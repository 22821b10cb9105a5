"""Runs the Triton kernels of the losses in Triton's interpreter beside the plain path, in a process of its own.

The interpreter must be chosen before Triton is imported. Prints one JSON object: the differences of each case.
"""

import json
import os
import sys
from contextlib import nullcontext

os.environ["TRITON_INTERPRET"] = "1"

import torch
from training_models import CASES

from mto_analysis.training import MTOConfig, StackSpec, attach_mto, mto_loss
from mto_analysis.training.entropies import SortedMask, masked_visible_entropy, visible_rows_entropy
from mto_analysis.training.fused import FusedEntropies, FusedTerms, plain_path


def masks(name):
    generator = torch.Generator().manual_seed(1)
    if name == "equal":
        return torch.rand(2, 16, generator=generator).argsort(dim=1) < 11
    if name == "many":  # several tiles of rows, of columns and of patches
        return torch.rand(1, 215, generator=generator).argsort(dim=1) < 140
    if name == "extreme":  # one visible, one masked
        return torch.arange(19) < torch.tensor([[1], [18], [7]])
    return torch.rand(3, 81, generator=generator) < torch.tensor([[0.2], [0.9], [0.5]])


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def entropies(mask, dim, dtype, prefix, include_self, scale=1.0):
    """Differences of values and gradient, each by its norm, and the gradient of prefix tokens."""
    generator = torch.Generator().manual_seed(2)
    wide = (scale * torch.randn(len(mask), prefix + mask.shape[1], dim + 3, generator=generator)).to(dtype)
    exact, here = wide[..., :dim].double().requires_grad_(), wide[..., :dim].requires_grad_()  # not contiguous
    results = []
    for x in (exact, here):
        split = SortedMask.of(mask, prefix)
        values = [masked_visible_entropy(x, split)]
        if include_self is not None:
            values += visible_rows_entropy(x, split, include_self=include_self)
        if x is here and type(values[0].grad_fn).__name__ != FusedEntropies.__name__ + "Backward":
            raise RuntimeError("the kernels were not used")
        weights = torch.arange(1.0, len(mask) + 1).double()
        sum((k + 1) * (value.double() * weights).sum() for k, value in enumerate(values)).backward()
        results.append((torch.stack(values).detach(), x.grad))
    (value, gradient), (value_here, gradient_here) = results
    if gradient_here.dtype != dtype or value_here.dtype != torch.float32:
        raise RuntimeError("the kernels changed a dtype")
    return {
        "values": relative(value_here, value),
        "gradient": relative(gradient_here, gradient),
        "prefix": gradient_here[:, :prefix].abs().sum().item(),
    }


def all_losses(config, combine, dtype=torch.float32):
    """Differences of the terms, and of the gradients of all layers, where ``combine`` makes one number of the terms."""
    generator = torch.Generator().manual_seed(4)
    mask = masks("extreme")
    tokens = 0.5 * torch.randn(3, len(mask), mask.shape[1], 12, generator=generator, dtype=torch.float64)
    results = []
    for kind in (torch.float64, dtype):
        layers = [each.to(kind).requires_grad_() for each in tokens]
        terms = mto_loss(layers, mask, config, step=2)
        used = type(terms.loss.grad_fn).__name__ == FusedTerms.__name__ + "Backward"
        combine(terms).backward()
        results.append(
            (
                torch.stack(terms[:4]).detach(),
                torch.stack([torch.zeros_like(each) if each.grad is None else each.grad for each in layers]),
            )
        )
    (terms, gradient), (terms_here, gradient_here) = results
    worst = max(relative(here, exact) for here, exact in zip(terms_here, terms, strict=True))
    return {"values": worst, "gradient": relative(gradient_here, gradient), "used": float(used)}


def found_masks(count, learned_position):
    """Whether masks are found as on the plain path, with rows in another dtype and an image of another kind."""
    generator = torch.Generator().manual_seed(5)
    mask = masks("ragged")
    tokens = torch.randn(3, 82, 150, generator=generator).half()[:, 1:]
    row = torch.randn(1, 81 if learned_position else 1, 150, generator=generator)
    tokens = torch.where(mask[..., None], row.half(), tokens)
    tokens[0, 3, 149] += 1  # almost a masked token
    rows = [row + 1, row, row + 2][-count:] if count > 1 else row
    spec = StackSpec("encoder", [torch.nn.Identity()], masked_row=lambda: rows)
    candidates = spec.find_masks(tokens)
    here = next((each for each in candidates if each.any()), candidates[0])
    with plain_path():
        exact = spec.find_mask(tokens)
    return {"same": float(torch.equal(here, exact)), "masked": int(exact.sum()), "candidates": len(candidates)}


def attached(name):
    """Differences of the attached loss and of all gradients of a model that was written by others."""
    results = []
    for way in (nullcontext, plain_path):
        torch.manual_seed(0)
        case = CASES[name]
        model = case.build().train()
        mto = attach_mto(model, MTOConfig.paper(), check_every=1)
        with way():
            own, _ = case.run(model, 1)
            loss = mto.loss()
            (own + loss).backward()
        gradients = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
        results.append((loss.detach(), torch.cat(gradients).double()))
    (loss, gradient), (loss_plain, gradient_plain) = results
    return {"values": relative(loss, loss_plain), "gradient": relative(gradient, gradient_plain)}


def main():
    found = {}
    half, single = torch.float16, torch.float32  # the interpreter has no products of bfloat16
    cases = [
        ("equal", 40, 2, [(single, None), (single, True), (half, False)]),
        ("ragged", 70, 2, [(single, False), (half, True)]),
        ("many", 20, 0, [(single, False), (half, None)]),
        ("extreme", 5, 2, [(single, True), (single, False), (half, True)]),
    ]
    for name, dim, prefix, kinds in cases:
        for dtype, include_self in kinds:
            key = f"{name} {str(dtype).removeprefix('torch.')} {include_self}"
            found[key] = entropies(masks(name), dim, dtype, prefix, include_self, 0.6)
    found["sorted"] = {}
    for name in ("equal", "ragged", "many", "extreme"):
        mask = masks(name)
        here = SortedMask.of(mask, 1)
        with plain_path():
            exact = SortedMask.of(mask, 1)
        same = torch.equal(here.order, exact.order) and torch.equal(here.num_masked, exact.num_masked)
        found["sorted"][name] = float(same)
    configs = {
        "default": MTOConfig(warmup_steps=5),
        "paper": MTOConfig.paper(),
        "as printed": MTOConfig(ranking_direction="as_printed", include_self=False, sparsity_reduction="sum"),
        "ranking": MTOConfig(sparsity_weight=0, embedding_weight=0),
        "no ranking": MTOConfig(ranking_weight=0),
        "some layers": MTOConfig(layers=(0, 2)),
    }
    for name, config in configs.items():
        found[f"losses {name}"] = all_losses(config, lambda terms: 3 * terms.loss)
        if name == "paper":
            found["losses apart"] = all_losses(config, lambda terms: terms.loss + 2 * terms.ranking - terms.embedding)
            found["losses beside H"] = all_losses(config, lambda terms: terms.sparsity + terms.heterogeneity.sum())
    for name in ("mae", "simmim swin", "conmim", "bootmae"):
        found[f"attached {name}"] = attached(name)
    for count in (1, 2, 3):
        for learned_position in (False, True):
            found[f"masks {count} {learned_position}"] = found_masks(count, learned_position)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
