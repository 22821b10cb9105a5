"""Runs the Triton kernels of the losses in Triton's interpreter, beside the plain path in float64; a process of its own.

The interpreter must be chosen before Triton is imported. Prints one JSON object: for each case the greatest differences.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from mto_analysis.training import MTOConfig, mto_loss
from mto_analysis.training.entropies import SortedMask, masked_visible_entropy, visible_rows_entropy
from mto_analysis.training.fused import FusedEntropies, plain_path


def masks(name):
    generator = torch.Generator().manual_seed(1)
    if name == "equal":
        return torch.rand(2, 16, generator=generator).argsort(dim=1) < 11
    if name == "many":  # several tiles of rows, of columns and of patches
        return torch.rand(2, 235, generator=generator).argsort(dim=1) < 150
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


def main():
    found = {}
    for name in ("equal", "ragged", "many", "extreme"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for include_self in (None, True, False):
                dim = {"equal": 64, "ragged": 70, "many": 40, "extreme": 5}[name]
                key = f"{name} {str(dtype).removeprefix('torch.')} {include_self}"
                scale = {"many": 0.4}.get(name, 0.6)
                found[key] = entropies(masks(name), dim, dtype, 0 if name == "many" else 2, include_self, scale)
    found["sorted"] = {}
    for name in ("equal", "ragged", "many", "extreme"):
        mask = masks(name)
        here = SortedMask.of(mask, 1)
        with plain_path():
            exact = SortedMask.of(mask, 1)
        same = torch.equal(here.order, exact.order) and torch.equal(here.num_masked, exact.num_masked)
        found["sorted"][name] = float(same)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
