"""Linear CKA: how alike the embeddings of images are at two layer depths, of one model or of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mto_analysis.affinity import TokenSplit
from mto_analysis.models import LayerTokens
from mto_analysis.probe.accumulating import KINDS, Row, Setup, TokenMeasure, wide
from mto_analysis.runtime.statistics import jackknife_interval

#: Fewer images have no unbiased HSIC.
_FEWEST_IMAGES = 4

# Embeddings whose differences are below this share of their size are the same up to rounding.
_LEAST_SPREAD = 1e-10


def unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    r"""Unbiased estimate of the Hilbert-Schmidt independence criterion, of each pair of two lists of kernels.

    .. math:: \frac{1}{n (n - 3)} \Bigl(\mathrm{tr}(\tilde K \tilde L)
        + \frac{1^\top \tilde K 1 \; 1^\top \tilde L 1}{(n - 1)(n - 2)}
        - \frac{2}{n - 2} 1^\top \tilde K \tilde L 1\Bigr)

    A tilde means that the diagonal is zero.

    Shapes:
        first: ... num_first num_images num_images
        second: ... num_second num_images num_images
        returns: ... num_first num_second (any number)

    Source:
        Song et al. (JMLR 2012); as in Nguyen, Raghu and Kornblith (ICLR 2021, arXiv:2010.15327), Eq. (3).
    """
    number = first.shape[-1]
    if number < _FEWEST_IMAGES:
        raise ValueError(f"an unbiased HSIC needs {_FEWEST_IMAGES} images at least, got {number}")
    others = ~torch.eye(number, dtype=torch.bool, device=first.device)
    first, second = first * others, second * others
    rows_first, rows_second = first.sum(dim=-1), second.sum(dim=-1)
    together = first.flatten(-2) @ second.flatten(-2).mT
    apart = rows_first.sum(dim=-1)[..., :, None] * rows_second.sum(dim=-1)[..., None, :]
    crossed = rows_first @ rows_second.mT
    return (together + apart / ((number - 1) * (number - 2)) - 2 * crossed / (number - 2)) / (number * (number - 3))


def linear_cka(batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    r"""Linear centred kernel alignment of two representations of the same images, in its mini-batch form.

    .. math:: \frac{\sum_b \mathrm{HSIC}(K_b, L_b)}
        {\sqrt{\sum_b \mathrm{HSIC}(K_b, K_b) \sum_b \mathrm{HSIC}(L_b, L_b)}}, \quad
        K_b = X_b X_b^\top, \; L_b = Y_b Y_b^\top

    1 for equal representations, also after a rotation or scaling of one of them. HSIC is :func:`unbiased_hsic`, so the
    value does not depend on the size of batches in expectation; of unrelated representations it scatters around 0.
    Batches of different sizes are weighted by their images.

    Shapes:
        batches: num_images dim, and num_images other_dim, of each batch
        returns: scalar (at most about 1; NaN where a representation is the same for all images)

    Source:
        Kornblith et al. (ICML 2019, arXiv:1905.00414); mini-batches: Nguyen, Raghu and Kornblith (ICLR 2021).

    Example:
        >>> x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
        >>> round(linear_cka([(x, 2 * x.flip(1))]).item(), 6)
        1.0
    """
    sums = sum(
        len(x) * torch.stack([unbiased_hsic(*pair) for pair in ((k, m), (k, k), (m, m))])
        for x, y in batches
        for k, m in [(_kernels(x), _kernels(y))]
    )
    assert isinstance(sums, Tensor)
    return _aligned(*sums).squeeze()


def _kernels(embeddings: Tensor) -> Tensor:
    """``1 num_images num_images``, in float64."""
    x = wide(embeddings)
    return (x @ x.mT)[None]


def _aligned(across: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return across / (first.clamp_min(0) * second.clamp_min(0)).sqrt()


class CKA(TokenMeasure):
    """:func:`linear_cka` of the images' mean masked and mean visible tokens, between layer depths, and between models.

    An image's masks are averaged. Intervals leave out one batch at a time.

    Memory: of a batch of images ``32 * depths**2`` bytes (170 bytes per image of ViT-B in batches of 32); to compare
    models ``16 * depths * batch_size`` bytes per image more (7 kB).
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._now: list[Tensor] = []
        #: By stack and batch: names of the images and :func:`unbiased_hsic` of all pairs, ``2 depths depths``.
        self._sums: dict[str, list[tuple[tuple[str, ...], Tensor]]] = {}
        #: By stack and batch: the kernels themselves, ``2 depths num_images num_images``.
        self._kernels: dict[str, list[Tensor]] = {}

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Make the kernels of a batch, once all its masks were seen, and compare all pairs at the last layer depth."""
        views = self.setup.views(stack, layer, split)
        if views is None:
            return {}
        if len(names) < _FEWEST_IMAGES:
            return {} if stack in self._sums else self.refuse(f"a batch needs {_FEWEST_IMAGES} images at least", stack)
        if layer.depth == 0:
            self._now = []
        x = wide(views.mean(dim=1).transpose(0, 1))
        self._now.append(x @ x.mT)
        if layer.depth == self.setup.model.depth(stack):
            kernels = _spread_out(torch.stack(self._now, dim=1))
            self._sums.setdefault(stack, []).append((tuple(names), unbiased_hsic(kernels, kernels).cpu()))
            if self.setup.compared:
                self._kernels.setdefault(stack, []).append(kernels.cpu())
            self._now = []
        return {}

    def rows(self) -> list[Row]:
        """Each layer depth with each, by stack and kind of tokens."""
        found = []
        for stack, batches in self._sums.items():
            sums = [_with_own(hsic, hsic, hsic) for _, hsic in batches]
            found += _rows(stack, stack, "", [names for names, _ in batches], sums)
        return found

    def rows_with(self, other: CKA, other_model: str) -> list[Row]:
        """Each layer depth of this model with each of the other one."""
        found = []
        for stack, kernels in self._kernels.items():
            for other_stack, other_kernels in other._kernels.items():
                mine, others = self._sums[stack], other._sums[other_stack]
                if [names for names, _ in mine] != [names for names, _ in others]:
                    raise ValueError("two models are compared on the same images in the same batches")
                sums = [
                    _with_own(unbiased_hsic(k, m), own, its)
                    for k, m, (_, own), (_, its) in zip(kernels, other_kernels, mine, others, strict=True)
                ]
                found += _rows(stack, other_stack, other_model, [names for names, _ in mine], sums)
        return found

    def kept(self) -> Any:
        """Sums and kernels of this process's batches."""
        return self._sums, self._kernels

    def put_together(self, parts: Sequence[Any]) -> None:
        """Those of all batches."""
        self._sums, self._kernels = {}, {}
        for sums, kernels in parts:
            for stack, batches in sums.items():
                self._sums.setdefault(stack, []).extend(batches)
            for stack, each in kernels.items():
                self._kernels.setdefault(stack, []).extend(each)


def _spread_out(kernels: Tensor) -> Tensor:
    """Kernels in which embeddings that are alike up to rounding are exactly so: their alignment is then undefined."""
    size = kernels.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    centred = kernels - kernels.mean(dim=-1, keepdim=True) - kernels.mean(dim=-2, keepdim=True)
    spread = (centred + kernels.mean(dim=(-2, -1), keepdim=True)).diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    return kernels * (spread > _LEAST_SPREAD * size)[..., None, None]


def _with_own(across: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """HSIC of pairs and of each one with itself: ``3 2 depths other_depths``."""
    own, its = (each.diagonal(dim1=-2, dim2=-1) for each in (first, second))
    return torch.stack([across, own[..., :, None].expand_as(across), its[..., None, :].expand_as(across)])


def _rows(
    stack: str, other_stack: str, other_model: str, names: Sequence[tuple[str, ...]], sums: Sequence[Tensor]
) -> list[Row]:
    counts = {batch: len(each) for batch, each in enumerate(names)}
    weighted = torch.stack([count * each for count, each in zip(counts.values(), sums, strict=True)])
    total = weighted.sum(dim=0)
    values = _aligned(*total)
    without = _aligned(*(total - weighted).unbind(dim=1)) if len(counts) > 1 else values[None][:0]
    found = []
    for kind, name in enumerate(KINDS):
        for depth in range(values.shape[1]):
            for other in range(values.shape[2]):
                if not other_model and other <= depth:
                    continue  # symmetric
                place = (kind, depth, other)
                value = values[place].item()
                left_out = dict(enumerate(without[(slice(None), *place)].tolist()))
                interval = jackknife_interval(value, left_out, counts)
                found.append(
                    Row(
                        stack,
                        depth,
                        f"cka_{name}",
                        value,
                        *interval,
                        num_images=sum(counts.values()),
                        other_model=other_model,
                        other_stack="" if other_stack == stack else other_stack,
                        other_layer_depth=other,
                    )
                )
    return found
