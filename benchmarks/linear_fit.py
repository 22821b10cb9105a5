"""What the linear classifier on cached features costs, beside 200 steps of L-BFGS in float32 on the same features.

Usage: ``python benchmarks/linear_fit.py``. 10,000 features of width 192, nearly singular; processor time of one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from mto_analysis.training.evaluation.linear import linear_scores

IMAGES, DIM, CLASSES, PENALTY, STEPS = 10_000, 192, 10, 1e-5, 200


def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Nearly singular ones, as a masked image model gives: variances over six decades; classes hang on all of them."""
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))
    latent = torch.randn(IMAGES, DIM, generator=generator)
    chances = (latent @ torch.randn(DIM, CLASSES, generator=generator) / 4).softmax(dim=1)
    vectors = (latent * torch.logspace(0, -3, DIM)) @ axes
    return F.batch_norm(vectors, None, None, training=True), torch.multinomial(chances, 1, generator=generator)[:, 0]


def steps_of_lbfgs(vectors: torch.Tensor, labels: torch.Tensor) -> None:
    """A fixed number of steps, as far as they go."""
    weight, bias = torch.zeros(CLASSES, DIM, requires_grad=True), torch.zeros(CLASSES, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=STEPS,
        history_size=20,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(vectors, weight, bias), labels) + PENALTY / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def main() -> None:
    """Print the median of five turns each, in processor seconds of one thread."""
    torch.set_num_threads(1)
    vectors, labels = features()
    fits: dict[str, Callable[[], object]] = {
        "to within 1e-8 of the minimum": lambda: linear_scores(vectors, labels, vectors[:1], CLASSES)[1:],
        f"{STEPS} steps of L-BFGS in float32": lambda: steps_of_lbfgs(vectors, labels),
    }
    for name, fit in fits.items():
        seconds = []
        for _ in range(5):
            start = time.process_time()
            fit()
            seconds.append(time.process_time() - start)
        print(f"{name}: {sorted(seconds)[2]:.2f} s")


if __name__ == "__main__":
    main()
