"""Features of a frozen encoder: labelled images decoded once and kept, tokens pooled to one vector per image."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from PIL import Image
from timm.data import create_transform  # type: ignore[attr-defined]
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from mto_analysis.errors import DataError, NumericalError
from mto_analysis.images import Images, open_images
from mto_analysis.images.interface import spread_rows, unreadable
from mto_analysis.images.loading import Loader
from mto_analysis.models import MaskedImageModel, ModelInfo
from mto_analysis.models.interface import height_and_width
from mto_analysis.probe import undisturbed
from mto_analysis.runtime.processes import Processes
from mto_analysis.training.evaluation.protocols import Feature, Precision
from mto_analysis.training.methods.method import Pooling

#: Decoded images up to this size in all are kept in memory between two evaluations.
_MOST_KEPT = 4 * 2**30
_EPS = 1e-6  # of a fresh norm, as in every family's fine-tuning


class Features(NamedTuple):
    """One vector per image, with its class.

    Shapes:
        vectors: num_images dim
        labels: num_images (int64)
    """

    vectors: Tensor
    labels: Tensor


class LabelledImages:
    """Images with classes, resized and cropped as a model expects, as batches of bytes that are always the same.

    They are decoded at first use and kept while they fit (4 GiB), so that a second evaluation reads nothing.

    Args:
        source: As for :func:`mto_analysis.open_images`.
        limit: Use so many images, spread evenly over the names.
        batch_size: Images in a batch.
        num_workers: Processes that decode; results do not depend on it.
        value_range: As for :func:`mto_analysis.open_images`.
    """

    def __init__(
        self,
        source: str,
        *,
        limit: int | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        self.source = source
        self.images: Images = open_images(source, value_range=value_range)
        labels = self.images.labels
        if labels is None:
            why = f" ({self.images.unlabelled})" if self.images.unlabelled else ""
            raise DataError(
                f"{source} has no labels{why}; give a folder with one sub-folder per class, or a table with a column "
                "`label` of whole numbers or words"
            )
        self.rows = spread_rows(len(self.images.names), limit)
        self.labels = torch.tensor([int(labels[row]) for row in self.rows])
        self.class_names = tuple(self.images.class_names)
        self.batch_size, self._num_workers = batch_size, num_workers
        self._kept: dict[int, Tensor] = {}
        self._kept_for: tuple[object, ...] = ()

    @property
    def num_batches(self) -> int:
        """Batches in all; the last one may be smaller."""
        return -(-len(self.rows) // self.batch_size)

    def batches(
        self, info: ModelInfo, process: int = 0, processes: int = 1, *, crop_pct: float = 1.0
    ) -> Iterator[tuple[int, Tensor]]:
        """Every ``processes``-th batch from ``process`` on, with its number; cropped as :func:`eight_bits` does.

        Shapes:
            returns: number, batch channels image_size image_size (uint8)
        """
        key = (info.image_size, process, processes, crop_pct)
        if self._kept_for != key:
            self._kept, self._kept_for = {}, key
        numbers = range(process, self.num_batches, processes)
        if len(self._kept) == len(numbers):
            yield from ((number, self._kept[number]) for number in numbers)
            return
        size = self.batch_size
        keep = len(self.rows) * info.channels * math.prod(height_and_width(info.image_size)) <= _MOST_KEPT
        loader = Loader(
            _Bytes(self.images, self.rows, eight_bits(info, crop_pct)),
            batch_sampler=[list(range(n * size, min((n + 1) * size, len(self.rows)))) for n in numbers],
            num_workers=self._num_workers,
        )
        for number, images in zip(numbers, loader, strict=True):
            if keep:
                self._kept[number] = images
            yield number, images


def check_colours(info: ModelInfo) -> None:
    """Labelled images are read in colour."""
    if info.channels != 3:
        raise DataError(f"labelled images are read with 3 channels, and the model has {info.channels}: it has no score")


def eight_bits(info: ModelInfo, crop_pct: float) -> Callable[[Image.Image], Tensor]:
    """Test images as bytes: the shorter side resized (bicubic), then a centre crop; only the normalization is left.

    Args:
        info: Has the side of the crop.
        crop_pct: That side over the resized shorter one, rounded down to pixels; 1 for as much as possible.
    """
    check_colours(info)
    transform: Callable[[Image.Image], Tensor] = create_transform(
        info.image_size, is_training=False, interpolation="bicubic", crop_pct=crop_pct, normalize=False
    )
    return transform


class _Bytes(Dataset[Tensor]):
    def __init__(self, images: Images, rows: list[int], transform: Callable[[Image.Image], Tensor]) -> None:
        self._images, self._rows, self._transform = images, rows, transform

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> Tensor:
        row = self._rows[item]
        try:
            return self._transform(self._images.open(row))
        except Exception as error:
            raise unreadable(self._images.names[row], error) from None


def normalized(images: Tensor, info: ModelInfo) -> Tensor:
    """Bytes as the model expects them: 0..1, then centred and scaled per channel.

    Shapes:
        images: batch channels height width (uint8)
        returns: batch channels height width (float32)
    """
    mean = torch.tensor(info.mean, device=images.device).view(-1, 1, 1)
    std = torch.tensor(info.std, device=images.device).view(-1, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)


def attentive_mean(patches: Tensor) -> Tensor:
    r"""Mean of patch tokens weighted by attention, with the mean of all as the query.

    .. math:: \sum_i w_i x_i, \quad w = \mathrm{softmax}_i \left( n(\bar{x})^\top n(x_i) / \sqrt{D} \right),

    where n is layer normalization without weights. Nothing is learned, so that one pass gives it at every layer depth;
    it is SimPool without its projections.

    Shapes:
        patches: batch num_patches dim
        returns: batch dim

    Source:
        Psomas et al., "Keep It SimPool: Who Said Supervised Transformers Suffer from Attention Deficit?" (ICCV 2023).

    Example:
        >>> attentive_mean(torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])).round(decimals=3)
        tensor([[0.9710, 0.0290]])
    """
    dim = patches.shape[-1:]
    query = F.layer_norm(patches.mean(dim=1, keepdim=True), dim, eps=_EPS)
    logits: Tensor = query @ F.layer_norm(patches, dim, eps=_EPS).mT * dim[0] ** -0.5
    return (logits.softmax(dim=-1) @ patches)[:, 0]


def pooled(tokens: Tensor, prefix_tokens: int, pooling: Pooling) -> Tensor:
    """One vector per image.

    Shapes:
        tokens: batch num_tokens dim (prefix tokens first)
        returns: batch dim (``concat``: batch 2*dim, the class token first)

    Example:
        >>> pooled(torch.tensor([[[1.0], [2.0], [4.0]]]), 1, "patches")
        tensor([[3.]])
    """
    patches = tokens[:, prefix_tokens:]
    if pooling == "attentive":
        return attentive_mean(patches)
    if pooling == "patches":
        return patches.mean(dim=1)
    if not prefix_tokens:
        raise ValueError("the model has no class token; take the mean of its patches")
    if pooling == "class":
        return tokens[:, 0]
    return torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1)


def feature_vectors(model: MaskedImageModel, images: Tensor, *features: Feature) -> list[Tensor]:
    """Several features of each image, from one forward of the encoder.

    Shapes:
        images: batch channels height width (normalized)
        returns: batch dim (of ``concat`` 2*dim), for each feature
    """
    found: dict[Feature, Tensor] = {}
    last = max(feature.layer for feature in features)
    if not 0 <= last <= (depth := len(model.encoder_blocks())):
        raise ValueError(f"layer must lie between 0 and {depth}, the number of blocks, got {last}")
    for layer, tokens in enumerate(islice(model.encoder_tokens(images), last + 1)):
        here = [feature for feature in features if feature.layer == layer]
        normed = _normed(model, tokens, layer) if any(feature.norm == "encoder" for feature in here) else tokens
        for feature in here:
            chosen = normed if feature.norm == "encoder" else tokens
            vectors = pooled(chosen, model.encoder_prefix_tokens, feature.pooling)
            found[feature] = F.layer_norm(vectors, vectors.shape[1:], eps=_EPS) if feature.norm == "fresh" else vectors
    return [found[feature] for feature in features]


def _normed(model: MaskedImageModel, tokens: Tensor, layer: int) -> Tensor:
    """Tokens of a layer depth after the encoder's final norm, which fits the width of the last stage."""
    norm = model.final_norm()
    width = getattr(norm, "normalized_shape", tokens.shape[-1:])[-1]
    if width != tokens.shape[-1]:
        raise ValueError(
            f"the final norm has width {width} and the tokens of layer depth {layer} have {tokens.shape[-1]}: give "
            "another norm, fresh or off"
        )
    normed: Tensor = norm(tokens)
    return normed


def extract_features(
    model: MaskedImageModel,
    labelled: LabelledImages,
    *features: Feature,
    crop_pct: float = 1.0,
    precision: Precision = "fp32",
    processes: Processes | None = None,
) -> list[Features]:
    """Several features of all images from one pass, in the order of their names, float32, on the model's device.

    The model is left as it was found, nothing random is sampled, and no graph is kept. Batches are the same however
    many processes share the work, so the features are too.

    Args:
        model: Any model with an encoder that sees whole images.
        labelled: With classes.
        features: What to make of the tokens; all are held at once.
        crop_pct: As for :func:`eight_bits`.
        precision: Autocast precision of the encoder: ``fp32`` (without TF32) or ``bf16``.
        processes: Each takes its share of the batches, and all of them call this; by default this one alone.
    """
    like = next(model.parameters())
    here = processes or Processes()
    parts: dict[int, list[Tensor]] = {}
    half = torch.autocast(like.device.type, torch.bfloat16, enabled=precision == "bf16")
    with undisturbed(model), half:
        for number, images in labelled.batches(model.info, here.rank, here.count, crop_pct=crop_pct):
            batch = normalized(images.to(like.device, non_blocking=True), model.info).to(like.dtype)
            parts[number] = [vectors.float() for vectors in feature_vectors(model, batch, *features)]
    if here.count > 1:
        everywhere = here.exchange({number: [each.cpu() for each in part] for number, part in parts.items()})
        parts = {number: [each.to(like.device) for each in part] for one in everywhere for number, part in one.items()}
    labels = labelled.labels.to(like.device)
    columns = zip(*(parts[number] for number in range(labelled.num_batches)), strict=True)
    found = [Features(torch.cat(column), labels) for column in columns]
    for vectors, _ in found:
        if not bool(vectors.isfinite().all()):
            row = int((~vectors.isfinite().all(dim=1)).nonzero()[0])
            name = labelled.images.names[labelled.rows[row]]
            raise NumericalError(f"the features of image {name} are not finite; check the checkpoint")
    return found


def check_classes(train: LabelledImages, test: LabelledImages) -> int:
    """The number of classes, the same in both."""
    if train.class_names and test.class_names and train.class_names != test.class_names:
        odd = sorted(set(train.class_names) ^ set(test.class_names))
        which = f"; only one of them has {', '.join(odd[:3])}" if odd else ""
        raise DataError(
            f"{train.source} has {len(train.class_names)} classes and {test.source} has {len(test.class_names)}{which}:"
            " training and test images must have the same classes"
        )
    if bool(train.class_names) != bool(test.class_names):
        named, plain = (train, test) if train.class_names else (test, train)
        numbered = [name.isdecimal() for name in named.class_names]
        if all(numbered) and list(named.class_names) != [str(number) for number in range(len(numbered))]:
            raise DataError(
                f"{named.source} has folders or names {', '.join(named.class_names[:3])} ..., sorted as text, and "
                f"{plain.source} has numbers: give names, or numbers, in both"
            )
        warnings.warn(
            f"{plain.source} has numbers of classes and no names: 0 is taken for {named.class_names[0]!r} of "
            f"{named.source}, and so on in its order",
            stacklevel=2,
        )
    unseen = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if unseen:
        raise DataError(f"{test.source} has images of class {unseen[0]}, and {train.source} has none")
    count = len(train.class_names) or int(train.labels.max()) + 1
    if count < 2:
        raise DataError(f"{train.source} has images of one class only; nothing can be told apart")
    return count
