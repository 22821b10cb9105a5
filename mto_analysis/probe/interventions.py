"""What masked tokens cause: attention to or from them is cut, or they are replaced, in the model's own forward.

Each effect is a difference on the same image, beside a control: the same done to equally many random visible tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from mto_analysis.errors import DataError, NumericalError, StackError
from mto_analysis.masks import mask_keys
from mto_analysis.models.targets import reconstruction_loss
from mto_analysis.probe.engine import mean_and_interval, undisturbed
from mto_analysis.probe.knn import knn_scores
from mto_analysis.probe.request import LoadedModel, Request, masked_batch
from mto_analysis.taps.interventions import BlockChange, BlockCut, intervene

#: What is done to the target tokens where they enter a block, and what that is called in figures.
INTERVENTIONS = {
    "cut_visible_to_masked": "cut visible to masked (Q3)",
    "cut_masked_to_visible": "cut masked to visible (Q2)",
    "cut_masked_to_masked": "cut masked to masked (Q1)",
    "cut_all_to_masked": "cut all others to masked",
    "zero": "replace by zero",
    "mean": "replace by their mean",
    "other_image": "replace by another image's",
    "freeze": "freeze at depth 0",
}

#: Which tokens are the target: all masked ones, or equally many masked and visible ones, and these two compared.
CONDITIONS = {
    "masked": "all masked tokens",
    "some_masked": "some masked tokens",
    "some_visible": "as many visible tokens (control)",
    "difference": "some masked minus as many visible",
}

#: Numbers of an image, and their names in figures.
MEASURES = {
    "loss": "reconstruction loss",
    "cosine": "cosine of visible tokens with the intact forward's",
    "accuracy": "kNN accuracy from visible tokens (%)",
}


class Group(NamedTuple):
    """Target tokens of an intervention, and the visible tokens that are looked at.

    Shapes:
        target: batch num_patches
        other: batch num_patches (visible, and never a target)
    """

    target: Tensor
    other: Tensor


def token_groups(mask: Tensor, names: Sequence[str], *, seed: int = 0) -> dict[str, Group]:
    """The targets of ``masked``, ``some_masked`` and ``some_visible``.

    The last two have the same number of targets, half of the visible tokens or all masked ones if these are fewer, and
    the same visible tokens left to look at, so that an intervention concerns equally many pairs.

    Shapes:
        mask: batch num_patches

    Args:
        mask: True = masked.
        names: Of the images, on which the random choice depends.
        seed: Of the same.

    Example:
        >>> groups = token_groups(torch.tensor([[True, True, True, False, False]]), ["a"])
        >>> {name: int(group.target.sum()) for name, group in groups.items()}
        {'masked': 3, 'some_masked': 1, 'some_visible': 1}
    """
    chosen = {True: torch.zeros_like(mask), False: torch.zeros_like(mask)}
    for row, (key, masked) in enumerate(zip(mask_keys(names, seed=seed), mask.tolist(), strict=True)):
        count = min(sum(masked), (len(masked) - sum(masked)) // 2)
        if count < 1:
            raise DataError(f"image {key.image} has one visible token, too few for a control; leave controls out")
        generator = key._replace(image=f"control {key.image}").generator()
        for kind, into in chosen.items():
            places = [place for place, each in enumerate(masked) if each is kind]
            generator.shuffle(places)
            into[row, places[:count]] = True
    rest = ~mask & ~chosen[False]
    return {
        "masked": Group(mask, ~mask),
        "some_masked": Group(chosen[True], rest),
        "some_visible": Group(chosen[False], rest),
    }


def cut_pairs(intervention: str, group: Group, prefix_tokens: int = 0) -> Tensor:
    """The pairs of query and key whose attention a ``cut_...`` leaves out.

    Quadrants of the affinity map by (query, key), as in Fig. 2: first masked-masked, second masked-visible, third
    visible-masked; pairs of a token with itself belong to the first. Prefix tokens (class, registers) are of neither
    kind, so what masked tokens give to them reaches visible tokens in the next block; ``cut_all_to_masked`` takes their
    attention too: all that are no target then get what they would get without the targets.

    Shapes:
        returns: batch num_tokens num_tokens (prefix tokens first)

    Args:
        intervention: One of the ``cut_...`` of :data:`INTERVENTIONS`.
        group: Targets, and the visible tokens in the place of all visible ones.
        prefix_tokens: In front of the patches.

    Example:
        >>> group = Group(torch.tensor([[True, False]]), torch.tensor([[False, True]]))
        >>> cut_pairs("cut_visible_to_masked", group)
        tensor([[[False, False],
                 [ True, False]]])
    """
    target, other = (F.pad(each, (prefix_tokens, 0)) for each in group)
    queries, keys = {
        "cut_visible_to_masked": (other, target),
        "cut_masked_to_visible": (target, other),
        "cut_masked_to_masked": (target, target),
        "cut_all_to_masked": (~target, target),
    }[intervention]
    return queries[:, :, None] & keys[:, None, :]


def with_targets(tokens: Tensor, target: Tensor, values: Tensor) -> Tensor:
    """Tokens with others in the place of the targets; prefix tokens, in front, stay.

    Shapes:
        tokens: batch num_tokens dim
        target: batch num_patches (num_patches <= num_tokens)
        values: broadcasts to tokens
        returns: batch num_tokens dim
    """
    chosen = F.pad(target, (tokens.shape[1] - target.shape[1], 0))
    return torch.where(chosen[..., None], values.to(tokens.dtype), tokens)


def _target_mean(tokens: Tensor, target: Tensor) -> Tensor:
    weight = F.pad(target, (tokens.shape[1] - target.shape[1], 0)).to(tokens.dtype)[:, None]
    return weight @ tokens / weight.sum(dim=-1, keepdim=True)


@dataclass
class InterventionStudy:
    """Effects per model, stack, depth, intervention, condition and measure, and what they are made of."""

    table: pd.DataFrame
    per_image: pd.DataFrame
    models: list[dict[str, Any]] = field(default_factory=list)

    def shown(self) -> pd.DataFrame:
        """The effect of each condition side by side, without intervals: for a terminal."""
        keys = [*_KEYS, "measure"]
        wide = self.table.pivot_table("effect", keys, "condition", sort=False).reset_index()
        return wide[[*keys, *(name for name in CONDITIONS if name in wide)]].rename_axis(columns=None)


class _Stack:
    """A stack of a model on one batch: its intact forward, and forwards with an intervention."""

    def __init__(self, loaded: LoadedModel, stack: str, images: Tensor, mask: Tensor) -> None:
        self.loaded, self.model, self.stack = loaded, loaded.model, stack
        self.where = f"{stack} of {loaded.label}"
        self.blocks = self.model.stack_blocks(stack)
        self.images, self._asked = images, mask
        if not self.blocks:
            raise StackError(f"{self.where}: its blocks are not known, so nothing can be done to their tokens")
        self._transposed = False
        self.mask, self.inputs = self.record(images)
        self.prefix = self.inputs[0].shape[1] - self.mask.shape[1]

    def record(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The mask in the order of tokens, and what enters each block, verified to be the tokens of a layer depth."""
        inputs: list[Tensor] = []

        def keep(number: int, tokens: Tensor) -> Tensor:
            inputs.append(tokens)
            return tokens

        with self._intervening(keep, None) as seen:
            layers = list(self.model.layer_tokens(images, self._asked.clone(), self.stack))
        mask = layers[0].mask
        if not self._transposed and inputs and inputs[0].shape[1] == len(mask) != len(inputs[0]):
            self._transposed = True  # batch_first=False; verified below
            return self.record(images)
        if any(layer.mask.shape != mask.shape for layer in layers):
            raise StackError(
                f"{self.where}: its token grid changes with layer depth, where interventions are not possible"
            )
        if seen.ran != list(range(1, len(layers))) or seen.output is None:
            raise StackError(f"{self.where}: blocks {seen.ran} ran for layer depths 0 to {len(layers) - 1}")
        for layer, tokens in zip(layers, (*inputs, seen.output), strict=True):
            prefix = tokens.shape[1] - mask.shape[1]
            if prefix < 0 or len(tokens) != len(mask) or not torch.equal(tokens[:, prefix:], layer.tokens):
                last = layer.depth == len(self.blocks)
                raise StackError(
                    f"{self.where}: what {'leaves' if last else 'enters'} block {layer.depth + (not last)} "
                    f"{list(tokens.shape)} is not the tokens of layer depth {layer.depth} {list(layer.tokens.shape)} "
                    "with prefix tokens in front, so these cannot be intervened on"
                )
        return mask, inputs

    def run(self, change: BlockChange | None = None, cut: BlockCut | None = None) -> tuple[Tensor, Tensor | None]:
        """Patch tokens of the last layer depth, and the loss of each image where these tokens lead to one."""
        info, own = self.model.info, self.loaded.own_loss
        if own is not None:
            with self._intervening(change, cut) as seen:
                prediction = self.model.reconstruct(self.images, self._asked)
            if seen.output is not None:
                assert info.criterion is not None
                losses = reconstruction_loss(
                    prediction.float(),
                    self.images.float(),
                    self._asked,
                    info.patch_size,
                    target=own.target,
                    criterion=info.criterion,
                )
                return seen.output[:, self.prefix :], losses
        with self._intervening(change, cut) as seen:  # without a loss, or in a stack that pixels are not made from
            for _ in self.model.layer_tokens(self.images, self._asked.clone(), self.stack):
                pass
        assert seen.output is not None
        return seen.output[:, self.prefix :], None

    def _intervening(self, change: BlockChange | None, cut: BlockCut | None) -> Any:
        return intervene(self.blocks, change=change, cut=cut, where=self.where, transposed=self._transposed)

    def changed(
        self, intervention: str, group: Group, depth: int, donors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The same with an intervention in the blocks that take the tokens of layer depth ``depth`` and later ones."""
        if intervention.startswith("cut_"):
            pairs = cut_pairs(intervention, group, self.prefix)
            return self.run(cut=lambda number, tokens: pairs if number > depth else None)
        return self.run(change=partial(self._replace, intervention, group.target, depth, donors))

    def _replace(
        self, intervention: str, target: Tensor, depth: int, donors: Sequence[Tensor], number: int, tokens: Tensor
    ) -> Tensor:
        if number <= depth:
            return tokens
        if intervention == "zero":
            values = tokens.new_zeros(())
        elif intervention == "mean":
            values = _target_mean(tokens, target)
        else:
            values = self.inputs[0] if intervention == "freeze" else donors[number - 1]
        return with_targets(tokens, target, values)


def intervene_on_checkpoints(
    request: Request,
    *,
    interventions: Sequence[str] = tuple(INTERVENTIONS),
    from_depths: Sequence[int] = (0,),
    controls: bool = True,
    neighbours: int = 20,
) -> InterventionStudy:
    """Run each checkpoint with and without interventions on its masked tokens, on the same images and masks.

    An intervention from layer depth d on acts in blocks d + 1 and later, on what enters them; prefix tokens are never
    targets. Accuracy is that of kNN on the mean of the visible tokens at the last layer depth, where images have
    labels: each image is classified by the other images, under the same intervention. Memory grows with the number of
    images by these means alone, 4 bytes x width for each image, intervention, condition and depth.

    Args:
        request: What to measure; a batch's forwards are those of one mask per image.
        interventions: Of :data:`INTERVENTIONS`.
        from_depths: Layer depths from which on they act.
        controls: Also for as many masked as visible tokens, and for these visible tokens instead.
        neighbours: Of kNN.

    Raises:
        ValueError: If an intervention is unknown, or a depth is not one that a block takes.
        StackError: If a model's tokens or its attention cannot be reached, with the name of the block.
        DataError: If no image can be read, or too few for what is asked.
        NumericalError: If a loss or a token is not finite.

    Example:
        >>> from mto_analysis.images import open_images
        >>> from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
        >>> from mto_analysis.probe.request import Settings
        >>> request = Request([DEMO_CHECKPOINTS["MAE"]], open_images(DEMO_IMAGES), Settings(limit=4))
        >>> study = intervene_on_checkpoints(request, interventions=["zero"], controls=False)
        >>> study.table["measure"].tolist()
        ['loss', 'cosine', 'accuracy']
    """
    unknown = [each for each in interventions if each not in INTERVENTIONS]
    if unknown or not interventions:
        raise ValueError(f"interventions are {', '.join(INTERVENTIONS)}, got {', '.join(unknown) or 'none'}")
    parts, models = [], []
    for loaded in request.models():
        with undisturbed(loaded.model):
            parts.append(_Study(request, loaded, interventions, from_depths, controls).run(neighbours))
        models.append(request.measured(loaded))
    per_image = pd.concat(parts, ignore_index=True)
    return InterventionStudy(effects(per_image), per_image, models)


class _Study:
    """One model over all images."""

    def __init__(
        self,
        request: Request,
        loaded: LoadedModel,
        interventions: Sequence[str],
        from_depths: Sequence[int],
        controls: bool,
    ) -> None:
        self._request, self._loaded, self._interventions = request, loaded, interventions
        self._depths, self._controls = from_depths, controls
        self._names: dict[str, list[str]] = {}  # of the images, by stack
        self._values: dict[tuple[str, int, str, str], dict[str, list[Tensor]]] = {}
        self._previous: Tensor | None = None  # the image before this batch

    def run(self, neighbours: int) -> pd.DataFrame:
        """A row per stack, depth, intervention, condition, measure and image."""
        request, settings, model = self._request, self._request.settings, self._loaded.model
        rows = settings.rows(request.images)
        batches = request.batches(model, rows, num_workers=settings.num_workers)
        for batch in request.listener.progress(batches, -(-len(rows) // settings.batch_size), self._loaded.label):
            images, mask = masked_batch(model, batch, self._loaded.masks)
            for name in tuple(model.stacks_for(images, mask)):
                stack = _Stack(self._loaded, name, images, mask)
                self._names.setdefault(name, []).extend(batch.names)
                self._batch(stack, batch.names)
            self._previous = images[-1:]
        if not self._values:
            raise DataError("there is no image to measure")
        return pd.concat([*self._frames(neighbours)], ignore_index=True)

    def _batch(self, stack: _Stack, names: Sequence[str]) -> None:
        if wrong := [depth for depth in self._depths if not 0 <= depth < len(stack.blocks)]:
            raise ValueError(
                f"{stack.where} has {len(stack.blocks)} blocks, which take the tokens of layer depths 0 to "
                f"{len(stack.blocks) - 1}: an intervention cannot begin at {wrong[0]}"
            )
        groups = {"masked": Group(stack.mask, ~stack.mask)}
        if self._controls:
            groups = token_groups(stack.mask, names, seed=self._request.settings.seed)
        intact, intact_losses = stack.run()
        donors = self._donors(stack) if "other_image" in self._interventions else ()
        for condition, group in groups.items():
            before = {"means": _mean_over(intact, group.other), "cosine": torch.ones(len(names))}
            if intact_losses is not None:
                before["loss"] = intact_losses
            self._keep((stack.stack, -1, "intact", condition), before)
            for depth in self._depths:
                for intervention in self._interventions:
                    tokens, losses = stack.changed(intervention, group, depth, donors)
                    cosine = F.cosine_similarity(tokens.float(), intact.float(), dim=-1).unsqueeze(-1)
                    found = {
                        "num_target": group.target.sum(dim=1),
                        "num_visible": group.other.sum(dim=1),
                        "means": _mean_over(tokens, group.other),
                        "cosine": _mean_over(cosine, group.other)[:, 0],
                    }
                    if losses is not None:
                        found["loss"] = losses
                    for measure, values in found.items():
                        if not bool(values.isfinite().all()):
                            raise NumericalError(f"{measure} is not finite in {stack.where} under {intervention}")
                    self._keep((stack.stack, depth, intervention, condition), found)

    def _donors(self, stack: _Stack) -> Sequence[Tensor]:
        """What enters each block for the image before each one, under the mask of this one."""
        before = self._last_image(stack.images) if self._previous is None else self._previous
        mask, inputs = stack.record(torch.cat([before, stack.images[:-1]]))
        if not torch.equal(mask, stack.mask):
            raise StackError(f"{stack.where}: the order of tokens differs between images; leave other_image out")
        return inputs

    def _last_image(self, images: Tensor) -> Tensor:
        """The last image of all, whose tokens the first one gets."""
        rows = self._request.settings.rows(self._request.images)
        for row in reversed(rows[1:]):
            for batch in self._request.batches(self._loaded.model, [row], batch_size=1):
                return batch.images.to(images.device, images.dtype)
        raise DataError("other_image takes tokens of another image, and there is only one; leave it out")

    def _keep(self, key: tuple[str, int, str, str], found: Mapping[str, Tensor]) -> None:
        kept = self._values.setdefault(key, {})
        for name, values in found.items():
            kept.setdefault(name, []).append(values.cpu())

    def _frames(self, neighbours: int) -> Iterator[pd.DataFrame]:
        values = {key: {name: torch.cat(each) for name, each in kept.items()} for key, kept in self._values.items()}
        labels = {stack: self._labels(names) for stack, names in self._names.items()}
        for (stack, *_), kept in values.items():
            if (classes := labels[stack]) is not None:
                kept["accuracy"] = _accuracies(kept["means"], classes, neighbours)
        for (stack, depth, intervention, condition), kept in values.items():
            intact = values[stack, -1, "intact", condition]
            for measure in MEASURES if intervention != "intact" else ():
                if measure in kept:
                    columns = {
                        "model": self._loaded.label,
                        "stack": stack,
                        "from_depth": depth,
                        "intervention": intervention,
                        "condition": condition,
                        "measure": measure,
                        "image": self._names[stack],
                        "num_target": kept["num_target"].numpy(),
                        "num_visible": kept["num_visible"].numpy(),
                        "intact": intact[measure].double().numpy(),
                        "effect": (kept[measure].double() - intact[measure].double()).numpy(),
                    }
                    yield pd.DataFrame(columns)

    def _labels(self, names: Sequence[str]) -> Tensor | None:
        """Classes of images; ``None`` where there are none, or one image alone."""
        images = self._request.images
        if images.labels is None:
            self._request.listener.note(f"{self._loaded.label}: images have no labels, so there is no accuracy")
        if images.labels is None or len(names) < 2:
            return None
        by_name = dict(zip(images.names, images.labels, strict=True))
        return torch.tensor([int(by_name[name]) for name in names])


def _mean_over(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen tokens of each image, in at least float32: ``batch dim``."""
    weight = chosen.to(torch.promote_types(tokens.dtype, torch.float32))[:, None]
    return (weight @ tokens.to(weight.dtype) / weight.sum(dim=-1, keepdim=True))[:, 0]


def _accuracies(vectors: Tensor, labels: Tensor, neighbours: int) -> Tensor:
    """100 for each image whose class the others' votes give, else 0."""
    scores = knn_scores(vectors, labels, vectors, int(labels.max()) + 1, neighbours=neighbours, leave_one_out=True)
    return 100.0 * (scores.argmax(dim=1) == labels)


_KEYS = ("model", "stack", "from_depth", "intervention")


def effects(per_image: pd.DataFrame) -> pd.DataFrame:
    """Mean effect and its 95 % interval over images: Student's t of the differences within images.

    Where there are controls, ``difference`` is the effect of some masked tokens minus that of as many visible ones,
    image by image.

    Columns: ``model stack from_depth intervention condition measure num_target num_visible intact effect ci_low ci_high
    num_images``; cosine and loss as they are, accuracy in percent.
    """
    keys = [*_KEYS, "condition", "measure"]
    sides = [
        per_image[per_image["condition"] == condition].set_index([*_KEYS, "measure", "image"])
        for condition in ("some_masked", "some_visible")
    ]
    frames = [per_image]
    if len(sides[0]):
        both = sides[0].assign(condition="difference", effect=sides[0]["effect"] - sides[1]["effect"])
        frames.append(both.reset_index())
    values = pd.concat(frames, ignore_index=True)
    table = mean_and_interval(values, keys, ["effect"])
    others = values.groupby(keys, sort=False)[["num_target", "intact"]].mean().reset_index()
    table = table.merge(others, on=keys).rename(columns={"effect_ci_low": "ci_low", "effect_ci_high": "ci_high"})
    known = {"intervention": INTERVENTIONS, "condition": CONDITIONS, "measure": MEASURES}
    ranks = {key: {each: at for at, each in enumerate(known.get(key, table[key].unique()))} for key in keys}
    table = table.sort_values(keys, kind="stable", key=lambda column: column.map(ranks[str(column.name)]))
    columns = [*keys, "num_target", "num_visible", "intact", "effect", "ci_low", "ci_high", "num_images"]
    return table[columns].reset_index(drop=True)


def intervention_sentences(table: pd.DataFrame) -> list[str]:
    """Plain sentences: whether visible tokens gain where they do not attend to masked ones, and against the control.

    Args:
        table: Of :func:`effects`.
    """
    sentences = []
    chosen = table[table["intervention"] == "cut_visible_to_masked"]
    for (model, stack, depth), rows in chosen.groupby(["model", "stack", "from_depth"], sort=False):
        by_name = {(row["measure"], row["condition"]): row for row in rows.to_dict("records")}
        parts = []
        for measure, condition in product(("accuracy", "loss"), ("masked", "difference")):
            if (row := by_name.get((measure, condition))) is not None:
                better = (row["effect"] > 0) == (measure == "accuracy")
                shown = row["ci_low"] > 0 or row["ci_high"] < 0
                verdict = ("better" if better else "worse") if shown else "no effect shown"
                words = MEASURES[measure] if condition == "masked" else "against the control"
                interval = f"{row['effect']:+.3g} ({row['ci_low']:+.3g} to {row['ci_high']:+.3g})"
                parts.append(f"{words} {interval}, {verdict}")
        text = f"{model}, {stack}: without attention from visible to masked tokens from layer depth {depth} on: "
        sentences.append(f"{text}{'; '.join(parts)}.")
    return sentences
