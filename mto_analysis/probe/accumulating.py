"""What a measure is in one pass over images: numbers of each image at each layer depth, and numbers of all images."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mto_analysis.affinity import TokenSplit
from mto_analysis.models import LayerTokens, MaskedImageModel
from mto_analysis.runtime.randomness import name_keys

#: Kinds of tokens, in the order of :func:`kind_means`.
KINDS = ("masked", "visible")

#: Images are divided into so many groups by name: for cross-validation, and for intervals by leaving one group out.
NUM_GROUPS = 5


class Row(NamedTuple):
    """One number of the tidy table of measures.

    Attributes:
        stack: Which stack.
        layer_depth: Which layer depth; of attention, that of the block's output.
        measure: Its name.
        value: NaN where it is undefined.
        ci_low: Of the 95 % interval; NaN where there is none.
        ci_high: The same.
        num_images: That it is of.
        head: Attention head, counted from 1; ``None`` for what is of all heads.
        other_model: The second of two models that are compared; empty for the same one.
        other_stack: The second of two stacks; empty for the same one.
        other_layer_depth: The second of two layer depths that are compared, else ``None``.
    """

    stack: str
    layer_depth: int
    measure: str
    value: float
    ci_low: float = math.nan
    ci_high: float = math.nan
    num_images: int = 0
    head: int | None = None
    other_model: str = ""
    other_stack: str = ""
    other_layer_depth: int | None = None


def kind_means(tokens: Tensor, split: TokenSplit) -> Tensor:
    """Mean masked and mean visible token of each image: its embeddings, where a measure compares images.

    Shapes:
        tokens: batch num_patches dim
        returns: batch 2 dim (in the order of ``KINDS``)
    """

    def means(x: Tensor, num_masked: int) -> Tensor:
        return torch.stack([x[:, :num_masked].mean(dim=1), x[:, num_masked:].mean(dim=1)], dim=1)

    return split.map(tokens, means)


@dataclass
class Setup:
    """What measures are told of a pass.

    Args:
        model: That is measured.
        grid: Rows and columns of patches (frames first for video), or ``None`` where they are unknown.
        masks_per_image: Masks per image.
        strict: A measure that the model does not allow is an error; else it is left out.
        compared: Keep what comparing the model with another one takes.
    """

    model: MaskedImageModel
    grid: tuple[int, ...] | None = None
    masks_per_image: int = 1
    strict: bool = False
    compared: bool = False
    _last: tuple[Callable[[], Tensor | None], Tensor | None] = field(default=(lambda: None, None), repr=False)
    _views: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict, repr=False)

    def release(self) -> None:
        """Let go of the model after the pass: what was measured may be kept longer."""
        del self.model
        self._views.clear()

    def grid_of(self, stack: str, num_patches: int) -> tuple[int, ...] | str:
        """The grid of a layer depth, coarser than the input's in hierarchical models, or why it is not known."""
        if not self.model.order_is_known(stack):
            return "the order of its tokens is not known"
        if self.grid is None:
            return "its grid of patches is not known; pass grid=(rows, columns)"
        factor = round((math.prod(self.grid) / num_patches) ** (1 / len(self.grid)))
        grid = tuple(side // max(factor, 1) for side in self.grid)
        if math.prod(grid) != num_patches:
            return f"its {num_patches} tokens are no grid like {' x '.join(map(str, self.grid))}"
        return grid

    def views(self, stack: str, layer: LayerTokens, split: TokenSplit) -> Tensor | None:
        """:func:`kind_means` under all masks of a batch, once the last one is measured, until then ``None``.

        Computed once for all measures that ask.

        Shapes:
            returns: batch masks_per_image 2 dim
        """
        tokens, views = self._last
        if tokens() is not layer.tokens:
            seen = self._views.setdefault((stack, layer.depth), [])
            seen.append(kind_means(layer.tokens, split))
            views = None
            if len(seen) == self.masks_per_image:
                views = torch.stack(seen, dim=1)
                seen.clear()
            self._last = weakref.ref(layer.tokens), views
        return views


class TokenMeasure:
    """A measure in one pass: called at every layer depth, with numbers per image to return or sums to keep.

    Sums that processes share are put together by :meth:`kept` and :meth:`put_together`.

    Args:
        setup: What is known of the pass.

    Raises:
        ValueError: Under ``strict``, if the model does not allow it; says why.
    """

    #: Names of the numbers per image that it may return.
    columns: tuple[str, ...] = ()

    #: A number that is not finite is left out instead of ending the pass.
    tolerant = False

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        #: Why it was not measured, by stack; ``""`` stands for all.
        self.left_out: dict[str, str] = {}

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Numbers of each image at this layer depth: name -> ``batch``."""
        return {}

    def watching(self) -> AbstractContextManager[object]:
        """Entered before the pass and left after it."""
        return nullcontext()

    def rows(self) -> list[Row]:
        """What was measured of all images together, after the pass."""
        return []

    def rows_with(self, other: Any, other_model: str) -> list[Row]:
        """What compares this model with another one, which the same measure has seen on the same images."""
        return []

    def kept(self) -> Any:
        """What this process has accumulated, with tensors on the CPU."""
        return None

    def put_together(self, parts: Sequence[Any]) -> None:
        """Take what all processes have accumulated, in the order of images, instead of the own part."""

    def refuse(self, reason: str, stack: str = "") -> Mapping[str, Tensor]:
        """Take note that a stack (all by default) does not allow the measure; an error under ``strict``."""
        if self.setup.strict:
            raise ValueError(f"{type(self).__name__.lower()} cannot be measured: {stack or 'the model'}: {reason}")
        self.left_out.setdefault(stack, reason)
        return {}


class Sums(dict[Any, Any]):
    """Tensors or numbers that are added up by key, in a pass and over processes."""

    def add(self, key: Any, value: Any) -> None:
        """Add to what a key has."""
        self[key] = self[key] + value if key in self else value

    def kept(self) -> dict[Any, Any]:
        """On the CPU."""
        return {key: each.cpu() if isinstance(each, Tensor) else each for key, each in self.items()}

    def take(self, parts: Iterable[Mapping[Any, Any]]) -> None:
        """The sums of several processes instead of the own ones."""
        self.clear()
        for part in parts:
            for key, each in part.items():
                self.add(key, each)


def groups_of(names: Sequence[str]) -> Tensor:
    """The group of each image, 0 to ``NUM_GROUPS - 1``: by its name alone, so the same for any batches and processes.

    Shapes:
        returns: batch
    """
    return torch.from_numpy((name_keys(names) % NUM_GROUPS).astype("int64"))


def wide(tensor: Tensor) -> Tensor:
    """In float64; on the CPU where a device has no such numbers."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


class EmbeddingRows:
    """Embeddings by group of images, in memory that stops growing.

    Above ``2 * NUM_GROUPS * dim`` rows those of a group are replaced by a triangular matrix of ``dim`` rows with the
    same second moments, from their QR decomposition.

    Example:
        >>> rows = EmbeddingRows()
        >>> rows.add(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> rows.without(None).shape, rows.without(1).shape
        (torch.Size([3, 3]), torch.Size([1, 3]))
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._held = 0

    def add(self, rows: Tensor, groups: Tensor) -> None:
        """Take embeddings ``some dim`` of images with their groups ``some``."""
        self._parts.append((rows.detach().clone(), groups.cpu()))
        self._held += len(rows)
        if self._held > 2 * NUM_GROUPS * rows.shape[1]:
            self._compress()

    def _compress(self) -> None:
        rows, groups = self.all()
        self._parts = []
        for group in sorted(set(groups.tolist())):
            part = rows[(groups == group).to(rows.device)]
            small = torch.linalg.qr(part, mode="r").R if len(part) > rows.shape[1] else part
            self._parts.append((small, torch.full((len(small),), group)))
        self._held = sum(len(part) for part, _ in self._parts)

    def all(self) -> tuple[Tensor, Tensor]:
        """Rows and their groups."""
        rows, groups = zip(*self._parts, strict=True)
        return torch.cat(rows), torch.cat(groups)

    def without(self, group: int | None) -> Tensor:
        """Rows of all groups but one, in float64."""
        rows, groups = self.all()
        return wide(rows if group is None else rows[(groups != group).to(rows.device)])

    def kept(self) -> list[tuple[Tensor, Tensor]]:
        """All parts on the CPU."""
        return [(rows.cpu(), groups) for rows, groups in self._parts]

    def take(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add what another process kept."""
        for rows, groups in parts:
            self.add(rows, groups)
