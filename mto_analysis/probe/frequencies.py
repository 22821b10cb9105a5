"""How much of the visible tokens varies slowly over the image, and how much from patch to patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mto_analysis.affinity import TokenSplit
from mto_analysis.models import LayerTokens
from mto_analysis.probe.accumulating import TokenMeasure


def frequency_amplitudes(tokens: Tensor, mask: Tensor, grid: Sequence[int]) -> Tensor:
    r"""Amplitude of low and of high spatial frequencies of visible tokens, and the logarithm of their ratio.

    .. math:: a(\omega) = \frac{1}{C \sqrt{N_V}} \sum_c \Bigl| \sum_{i \in V} (x_{ic} - \bar x_c) e^{-2 \pi \mathrm{i}
        \langle \omega, r_i \rangle} \Bigr|

    The mean of :math:`a` over the frequencies whose largest component is at most half of the highest one (Nyquist's),
    without zero, and over all others. Masked places count as the visible tokens' mean :math:`\bar x`, so that they add
    nothing; uncorrelated tokens then have the same amplitude under any mask, and a log ratio of about 0. Negative: the
    layer is a low-pass filter.

    Shapes:
        tokens: batch num_patches dim (row-major on the grid)
        mask: batch num_patches
        returns: batch 3 (low and high, from 0; log(high / low), any number)

    Args:
        tokens: Embeddings at one layer depth, without prefix tokens.
        mask: True where masked.
        grid: Rows and columns of patches, frames first for video.

    Source:
        After the Fourier analysis of Park et al., "What Do Self-Supervised Vision Transformers Learn?" (ICLR 2023),
        section 3, where all tokens are visible and the reference is the frequency zero.

    Example:
        >>> board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2).reshape(1, 16, 1)
        >>> low, high, _ = frequency_amplitudes(board, torch.zeros(1, 16, dtype=torch.bool), (4, 4)).unbind(-1)
        >>> low.item(), high.item() > 0
        (0.0, True)
    """
    visible = ~mask[..., None]
    x = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    number = visible.sum(dim=1, keepdim=True)
    mean = (x * visible).sum(dim=1, keepdim=True) / number
    on_grid = ((x - mean) * visible / number.sqrt()).mT.reshape(len(x), -1, *grid)
    amplitude = torch.fft.fftn(on_grid, dim=tuple(range(2, on_grid.ndim))).abs().mean(dim=1).flatten(1)
    axes = [torch.fft.fftfreq(side, device=x.device).abs() for side in grid]
    largest = torch.stack(torch.meshgrid(*axes, indexing="ij")).amax(dim=0).flatten()
    low = amplitude[:, (largest > 0) & (largest <= 0.25)].mean(dim=1)
    high = amplitude[:, largest > 0.25].mean(dim=1)
    tiny = torch.finfo(x.dtype).tiny
    return torch.stack([low, high, (high + tiny).log() - (low + tiny).log()], dim=-1)


class Frequency(TokenMeasure):
    """:func:`frequency_amplitudes` of each image."""

    tolerant = True
    columns = ("frequency_low", "frequency_high", "frequency_log_ratio")

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Of each image."""
        grid = self.setup.grid_of(stack, layer.mask.shape[1])
        if isinstance(grid, str) or min(grid) < 4:
            words = grid if isinstance(grid, str) else f"a grid of {' x '.join(map(str, grid))} has no low frequencies"
            nothing = self.refuse(words, stack)
            missing = torch.full((len(names),), torch.nan, device=layer.tokens.device)
            return dict.fromkeys(self.columns, missing) if layer.depth else nothing  # a grid may shrink with depth
        values = frequency_amplitudes(layer.tokens, layer.mask, grid)
        return dict(zip(self.columns, values.unbind(dim=-1), strict=True))
