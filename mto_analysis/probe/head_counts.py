"""Head counts that a file does not state: compared by the model's own loss on a few images.

No shape depends on them, so a wrong count loads, and gives wrong tokens. On trained models the right ones had the
lowest loss in all that was tried; of an untrained model, or one that predicts no pixels, nothing can be said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from mto_analysis.errors import HeadCountError
from mto_analysis.models import MaskedImageModel
from mto_analysis.models.adapting import with_config
from mto_analysis.probe.engine import undisturbed
from mto_analysis.probe.own_loss import predicts_pixels, relative_losses, without_pixels

#: Images that decide between two counts.
COMPARED_IMAGES = 64
# Images that the search looks at: for a count to choose, one that was given, and one of a published width, of which
# another is unlikely.
_CHOSEN, _GIVEN, _PUBLISHED = 32, 16, 4

#: Widths of a head that are compared.
_HEAD_SIZES = (8, 128)

#: The configuration's width that a head count divides; encoder first.
_WIDTHS = {"num_heads": "dim", "decoder_num_heads": "decoder_dim"}

# A lower loss counts where it is lower by half a percent, and by two standard errors of the images' differences. A
# model that is hardly better than the mean has learned too little for its loss to tell.
_TRAINED = 0.9
_LEAST_GAIN = 0.005
_ERRORS = 2.0
_CHUNK = 16

Counts = Mapping[str, int]


@dataclass(frozen=True)
class HeadCounts:
    """What a comparison found.

    Args:
        taken: Counts to take, of those that were to be chosen.
        note: Why, in words.
        warning: That another count beats one that was given or assumed.
    """

    taken: Counts = field(default_factory=dict)
    note: str = ""
    warning: str = ""


def compare_heads(
    model: MaskedImageModel,
    batch: tuple[Tensor, Tensor] | None,
    asked: Mapping[str, object],
    *,
    encoder_only: bool = False,
) -> HeadCounts:
    """Choose the head counts asked for as ``auto``, and compare the others with what beats them.

    Args:
        model: With some counts.
        batch: Normalized images and their masks, or ``None`` where none can be read.
        asked: The counts that the file does not state, as the user gave them.
        encoder_only: The decoder is of no use but for the loss: its count is neither asked for nor doubted.
    """
    auto = [option for option, count in asked.items() if count == "auto"]
    compared = [option for option in asked if len(head_candidates(model, option)) > 1]
    reasons = {
        "no image can be read": batch is None,
        f"a {model.info.family} model {without_pixels(model)}": not predicts_pixels(model),
        "its stages have head counts of their own": not set(auto) <= set(compared),
    }
    reason = next((words for words, true in reasons.items() if true), None)
    if auto and reason:
        raise HeadCountError(f"head counts cannot be compared, as {reason}; give {_flags(auto)}", auto[0])
    if batch is None or reason or not compared:
        return HeadCounts()
    found = HeadCounts()
    if auto:
        found = _choose(model, batch, auto, auto[:1] if encoder_only else auto)
        model = with_config(model, replace(model.config, **found.taken))
    given = any(count is not None for count in asked.values())
    few = slice(_CHOSEN if auto else _GIVEN if given else _PUBLISHED)
    own = {option: getattr(model.config, option) for option in compared}
    best, _ = lowest_loss(model, batch[0][few], batch[1][few], compared)
    if encoder_only:
        own = {**best, "num_heads": own["num_heads"]}
    better = {option: count for option, count in best.items() if count != own[option] and option not in auto}
    if not better:
        return found
    clear, low, high = clearly_lower(model, *batch, best, own)
    warning = (
        f"own loss is lower with {_in_words(better)}: {low:.3g} of predicting the mean, {high:.3g} with "
        f"{_in_words(own)} ({len(batch[1])} images); give {_flags(better)}"
    )
    return replace(found, warning=warning if clear else "")


def _choose(
    model: MaskedImageModel, batch: tuple[Tensor, Tensor], options: Sequence[str], wanted: Sequence[str]
) -> HeadCounts:
    """The counts with a clearly lower loss than all others, of which not all need be wanted."""
    best, second = lowest_loss(model, batch[0][:_CHOSEN], batch[1][:_CHOSEN], options, wanted)
    clear, low, high = clearly_lower(model, *batch, best, second)
    words = (
        f"{_in_words(best)}, own loss {low:.3g} of predicting the mean, then {_in_words(second)}, {high:.3g} "
        f"({len(batch[1])} images)"
    )
    if not clear:
        raise HeadCountError(f"no head count is clearly best: {words}; give {_flags(wanted)}", options[0])
    return HeadCounts(best, f"compared head counts: {words}")


def head_candidates(model: MaskedImageModel, option: str) -> list[int]:
    """The model's own head count, and the others that divide the width into heads of 8 to 128 channels."""
    own, width = getattr(model.config, option, None), getattr(model.config, _WIDTHS[option], None)
    if not isinstance(own, int) or not isinstance(width, int):
        return []
    low, high = _HEAD_SIZES
    fitting = [count for count in range(1, width + 1) if width % count == 0 and low <= width // count <= high]
    return [own, *(count for count in fitting if count != own)]


def lowest_loss(
    model: MaskedImageModel,
    images: Tensor,
    mask: Tensor,
    options: Sequence[str],
    wanted: Sequence[str] | None = None,
) -> tuple[Counts, Counts]:
    """Search for the lowest loss: the encoder's count, then the decoder's, until neither changes any more.

    Shapes:
        images: batch channels height width
        mask: batch num_patches

    Args:
        model: Any model that predicts pixels.
        images: Normalized for it.
        mask: True where masked.
        options: Counts to search for, of ``num_heads`` and ``decoder_num_heads``.
        wanted: Those of them that matter; by default all.

    Returns:
        The counts with the lowest loss, and the best of those that differ in one that matters.
    """
    candidates = {option: head_candidates(model, option) for option in _WIDTHS if option in options}
    known: dict[tuple[tuple[str, int], ...], float] = {}

    def loss(counts: Counts) -> float:
        key = tuple(counts.items())
        if key not in known:
            known[key] = next(_losses(model, images, mask, [counts])).mean().item()
        return known[key]

    best: Counts = {option: counts[0] for option, counts in candidates.items()}
    before: Counts | None = None
    while best != before:
        before = best
        for option in best:
            best = min(({**best, option: count} for count in candidates[option]), key=loss)
    others = [
        {**best, option: count} for option in wanted or best for count in candidates[option] if count != best[option]
    ]
    return best, min(others, key=loss)


def clearly_lower(
    model: MaskedImageModel, images: Tensor, mask: Tensor, low: Counts, high: Counts
) -> tuple[bool, float, float]:
    """Whether the loss is clearly lower with some head counts than with others, and both losses.

    Losses are relative to that of predicting the mean. Lower is clear where the model is better than the mean by a
    tenth, and the differences of the images are half a percent and two standard errors.

    Shapes:
        images: batch channels height width
        mask: batch num_patches
    """
    lower, higher = _losses(model, images, mask, [low, high])
    difference = higher - lower
    gain = difference.mean()
    error = difference.std() / len(difference) ** 0.5 if len(difference) > 1 else torch.inf
    clear = lower.mean() < _TRAINED and gain >= _LEAST_GAIN * lower.mean() and gain >= _ERRORS * error
    return bool(clear), lower.mean().item(), higher.mean().item()


def _losses(model: MaskedImageModel, images: Tensor, mask: Tensor, several: Sequence[Counts]) -> Iterator[Tensor]:
    """The relative loss of each image with each head counts; infinite where they do not fit the shapes."""
    for counts in several:
        try:
            changed = with_config(model, replace(model.config, **counts))
        except (RuntimeError, ValueError):
            yield torch.full((len(images),), torch.inf)
            continue
        with undisturbed(changed):
            parts = zip(torch.split(images, _CHUNK), torch.split(mask, _CHUNK), strict=True)
            yield torch.tensor(list(chain.from_iterable(relative_losses(changed, *part).tolist() for part in parts)))


def _in_words(counts: Counts) -> str:
    return " and ".join(f"{option} {count}" for option, count in counts.items())


def _flags(counts: Iterable[str] | Counts) -> str:
    """The options of the command line that give them, with their numbers where they are known."""
    numbers = counts if isinstance(counts, Mapping) else {}
    return " ".join(f"--{option.replace('_', '-')} {numbers.get(option, '')}".rstrip() for option in counts)
