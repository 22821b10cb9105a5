"""Any torch model behind the interface of ours: its own forward runs, and taps read its tokens."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mto_analysis.errors import StackError
from mto_analysis.masks import MaskRule, check_mask, mask_keys
from mto_analysis.models.interface import (
    MaskedImageModel,
    ModelInfo,
    height_and_width,
)
from mto_analysis.runtime.pixels import IMAGENET_MEAN, IMAGENET_STD
from mto_analysis.taps.forward import Forward, NotEntered, Stack
from mto_analysis.taps.hooks import Attached
from mto_analysis.taps.search import find_stacks, hinted_grids, sizes_of, unwrap
from mto_analysis.taps.stacks import StackSpec, version_of
from mto_analysis.taps.tokens import LayerTokens

#: Calls a model on images with a mask ``batch num_patches``, or ``None`` for the model's own.
Call = Callable[[nn.Module, Tensor, Tensor | None], Any]


class _Kept(Forward):
    """The tokens of all layer depths of one forward."""

    def __init__(self, *seen: Any) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._as_seen: dict[int, tuple[Tensor, int | None]] = {}
        super().__init__(*seen)

    def take(self, depth: int, tokens: Tensor) -> None:
        """Keep the tokens of patches: a copy of them until a forward has shown that blocks change none in place."""
        patches = tokens[:, self.prefix :]
        self._as_seen[depth] = tokens, version_of(tokens)
        kept = patches.clone() if self.stack.changes_in_place or tokens.is_inference() else patches
        self.layers[depth] = kept, self.mask_for(patches.shape[1])[0]

    def verify(self) -> None:
        """Whether tokens that were kept are still those that were seen."""
        changed = [depth for depth, (tokens, version) in self._as_seen.items() if version_of(tokens) != version]
        self._as_seen.clear()
        if changed and not self.stack.changes_in_place:
            raise StackError(f"{self.stack.where}: tokens of layer depths {changed} were changed in place, not before")
        self.stack.changes_in_place = bool(changed)


class _Reader(Attached[_Kept]):
    """Reads every forward, in evaluation mode too."""

    def _records(self, module: nn.Module) -> bool:
        return True

    def read(self) -> dict[str, _Kept]:
        """The forwards since the last call, one per stack."""
        try:
            self._raise_failure()
            for stack in self._stacks:
                if len(stack.forwards) > 1:
                    raise StackError(
                        f"{stack.where}: it ran {len(stack.forwards)} times in one call of the model; "
                        "pass call=... that runs it once"
                    )
                for forward in stack.forwards:
                    forward.verify()
            return {stack.spec.name: stack.forwards[0] for stack in self._stacks if stack.forwards}
        finally:
            for stack in self._stacks:
                stack.drop()

    def named(self, stack: str) -> Stack[_Kept]:
        """A stack by its name."""
        return next(each for each in self._stacks if each.spec.name == stack)


@dataclass(frozen=True)
class _Held:
    """The tokens of one forward that were not asked for yet; without ``images`` where the model sampled its mask."""

    forwards: dict[str, _Kept]
    names: tuple[str, ...]
    mask: Tensor
    images: Tensor | None = None

    def is_of(self, images: Tensor, mask: Tensor, stack: str | None) -> bool:
        """Whether it is of these images and this mask, and still has the tokens of a stack."""
        same = self.mask is mask and (self.images is None or self.images is images)
        return same and not (stack in self.names and stack not in self.forwards)


@dataclass(frozen=True)
class LiveConfig:
    """What is known of a live model, for ``run.json``."""

    model: str
    stacks: str


class LiveModel(MaskedImageModel):
    """Any model with a learned mask token as one of ours: its forward runs, and its tokens are read by hooks.

    One forward gives the tokens of all layer depths and stacks; those of one batch are held at a time.

    Args:
        model: An instance, wrapped in DistributedDataParallel or torch.compile or not (then what is inside runs).
        info: How to feed it; where it is not given, images of any size are passed on as they are.
        stacks: Where masked tokens live; found by structure by default.
        call: Runs the model on images and a mask; by default by an argument of a known name.
        factory: Makes such a model with new weights, for controls that need it.
    """

    def __init__(
        self,
        model: nn.Module,
        info: ModelInfo | None = None,
        *,
        stacks: Sequence[StackSpec] | None = None,
        call: Call | None = None,
        factory: Callable[[], nn.Module] | None = None,
    ) -> None:
        inner = unwrap(model)
        rule = MaskRule("random", 0.6, 1)
        known = info is not None
        info = info or ModelInfo(type(inner).__name__, "inpainting", 1, 1, rule, layout="live model")
        super().__init__(LiveConfig(type(inner).__name__, ""), info)
        self.model = inner
        self._known_info = known
        self._specs = tuple(stacks) if stacks is not None else None
        self._call, self._factory = call, factory
        self._reader: _Reader | None = None
        self._held: _Held | None = None
        self._attach()

    # ---- the interface

    @property
    def stacks(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the stacks that masked tokens entered, or may enter where nothing ran yet."""
        return tuple(self._attach().followed)

    def stacks_for(self, images: Tensor, mask: Tensor) -> Sequence[str]:
        """The stacks that masked tokens enter in a forward with these images, which is then held."""
        return self._see(images, mask).names

    def depth(self, stack: str) -> int:
        """The last layer depth of a stack."""
        return self._attach().followed[stack].depth

    def stack_blocks(self, stack: str) -> Sequence[nn.Module]:
        """The blocks of a stack, none where it is given by taps."""
        return self._attach().followed[stack].blocks

    def layer_tokens(self, images: Tensor, mask: Tensor, stack: str | None = None) -> Iterator[LayerTokens]:
        """Patch tokens of a stack at every layer depth, all from one forward of the model."""
        self._see(images, mask, stack)
        return self._layer_tokens(images, mask, self._choose(stack))

    def _layer_tokens(self, images: Tensor, mask: Tensor, stack: str) -> Iterator[LayerTokens]:
        forwards = self._see(images, mask, stack).forwards
        if stack not in forwards:
            raise StackError(f"no masked token entered the stack {stack} in this forward")
        layers = forwards.pop(stack).layers
        missing = [depth for depth in range(self.depth(stack) + 1) if depth not in layers]
        if missing:
            raise StackError(f"layer depths {missing} of {stack} did not run; pass stacks=... with blocks that do")
        in_order = self.order_is_known(stack)
        for depth in sorted(layers):
            yield LayerTokens(depth, *layers.pop(depth), in_order)

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Not possible: how the model's output becomes pixels is not known."""
        raise ValueError(f"how {self.info.family} turns its output into pixels is not known, so nothing is predicted")

    _reconstruct = reconstruct

    def with_new_weights(self, seed: int) -> LiveModel:
        """The same architecture with weights as its factory starts them."""
        fresh = self._started(seed)
        if _mostly_equal(fresh, self._started(seed + 1)):
            raise ValueError(
                f"the factory of {self.info.family} gives the same weights for every seed, so they are not random; let "
                "it make the model as it is before training, and give the trained weights in a file (--weights)"
            )
        like = next(self.model.parameters())
        fresh = fresh.to(like.device, like.dtype).train(self.training)
        return LiveModel(fresh, self.info, stacks=self._specs, call=self._call, factory=self._factory)

    def _started(self, seed: int) -> nn.Module:
        if self._factory is None:
            raise ValueError(f"new weights of {self.info.family} need factory=..., which makes such a model")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self._factory()

    # ---- running it

    def own_mask(self, images: Tensor) -> Tensor:
        """Run the model with masks that it samples itself; the mask of its first stack, whose tokens are then held.

        Shapes:
            images: batch channels height width
            returns: batch num_patches
        """
        read = self._forward(images, None)
        first = next(iter(read.values()))
        mask = first.layers[0][1]
        self._held = _Held(read, tuple(read), mask)
        return mask

    def verify(self) -> None:
        """Find the stacks, and check on two images of noise that exactly the tokens asked for are masked."""
        info = self.info
        height, width = height_and_width(info.image_size)
        with torch.no_grad(), torch.random.fork_rng():
            images = torch.randn(2, info.channels, height, width)
            self.stacks_for(images, info.mask_rule.sample(mask_keys(["0", "1"]), info.mask_grid, info.patch_size))
        self._held = None

    @property
    def description(self) -> str:
        """What was found: stacks, prefix tokens, and how masks are known."""
        return self._attach().describe()

    def suffix_tokens(self, stack: str) -> int:
        """Tokens of a stack behind those of patches, as its description says."""
        return self._attach().followed[stack].suffix_tokens

    def order_is_known(self, stack: str) -> bool:
        """Whether the tokens of a stack are in the order of patches, so that maps of them can be drawn."""
        return self._attach().named(stack).in_order

    def position_embedding(self, stack: str) -> Tensor | None:
        """What is added to masked tokens for their place, where it is a table and a forward has shown which."""
        return self._attach().named(stack).position

    def close(self) -> None:
        """Remove all hooks from the model."""
        if self._reader is not None:
            self._reader.detach()
        self._reader = self._held = None

    def _attach(self) -> _Reader:
        # A copy of this model has a copy of the inner one, to which nothing is attached.
        if self._reader is None or not self._reader.is_on(self.model):
            specs = find_stacks(self.model) if self._specs is None else self._specs
            self._reader = _Reader(self.model, specs, _Kept)
        return self._reader

    def _see(self, images: Tensor, mask: Tensor, stack: str | None = None) -> _Held:
        """Run the model, unless a forward with these images and this mask is held, with the tokens of a stack."""
        check_mask(mask, self.info.num_patches if self._known_info else None)
        if len(mask) != len(images):
            raise ValueError(f"images and mask must have the same batch, got {len(images)} and {len(mask)}")
        if self._held is not None and self._held.is_of(images, mask, stack):
            return self._held
        read = self._forward(images, mask)
        for name, found in self._attach().last_masks.items():
            if (
                name in read
                and found.shape == mask.shape
                and self.order_is_known(name)
                and not torch.equal(found, mask)
            ):
                other = " but all others" if torch.equal(found, ~mask) else ""
                raise StackError(
                    f"{name}: the model does not mask the patches that it is asked to mask{other}, or its tokens are "
                    "in another order, which no position tells; pass call=..., or position=..."
                )
        self._held = _Held(read, tuple(read), mask, images)
        return self._held

    def _forward(self, images: Tensor, mask: Tensor | None) -> dict[str, _Kept]:
        if self.info.frames > 1 and images.ndim == 4:
            images = images[:, None].expand(-1, self.info.frames, -1, -1, -1)
        reader = self._attach()
        reader.requested = mask
        try:
            with torch.compiler.set_stance("force_eager"):  # hooks that come after compilation would not run
                if self._call is not None:
                    self._call(self.model, images, mask)
                else:
                    self._infer_and_call(images, mask)
        finally:
            reader.requested = None
        try:
            read = reader.read()
        except NotEntered as error:
            if self.model.training:
                raise
            hint = "it ran in eval mode: a model that masks only in training needs train_mode=True"
            raise StackError(f"{error}; {hint}") from error
        if not read:
            mode = (
                "" if self.model.training else " in eval mode; if it masks only in training mode pass train_mode=True"
            )
            raise StackError(
                f"{self.info.family}: no masked token was seen{mode}. Looked for: {reader.describe()}; pass stacks=... "
                "or call=..."
            )
        for name, forward in read.items():
            if len(forward.layers[0][0]) != len(images) or forward.leaves_images_out:
                if (rows := len(forward.layers[0][0])) > len(images):
                    raise StackError(
                        f"{name}: {len(images)} images are {rows} rows of tokens (windows, frames, several targets or "
                        "copies); pass call=... that makes one row of an image, or images that are a row each"
                    )
                raise StackError(
                    f"{name}: of {len(images)} images, {forward.num_images} have masked and visible patches"
                )
        return read

    def _infer_and_call(self, images: Tensor, mask: Tensor | None) -> None:
        if mask is None:
            if inspect.signature(self.model.forward).parameters.keys() >= _INDICES:
                raise ValueError(f"{type(self.model).__name__} samples no masks itself; pass mask=... or call=...")
            try:
                self.model(images)
            except TypeError as error:
                raise ValueError(
                    f"{type(self.model).__name__} cannot be called with images alone, so it samples no masks itself "
                    f"({error}); pass mask=... or call=lambda model, images, mask: ..."
                ) from error
            return
        failures = []
        for call in inferred_calls(self.model, self._grid_of(mask)):
            try:
                call(self.model, images, mask)
            except StackError:  # of an intervention, which no other way to call the model would change
                raise
            except (ValueError, RuntimeError, TypeError, IndexError, AssertionError) as error:
                failures.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                self._attach().forget()
            else:
                return
        raise ValueError(
            f"{type(self.model).__name__} cannot be called with images {list(images.shape)} and a mask "
            f"{list(mask.shape)}: {' / '.join(failures)}; pass call=lambda model, images, mask: ..."
        )

    def _grid_of(self, mask: Tensor) -> tuple[int, ...] | None:
        if self._known_info:
            return self.info.mask_grid
        side = math.isqrt(mask.shape[1])
        square = (side, side) if side * side == mask.shape[1] else None
        return next(hinted_grids(self.model), square)


def inferred_calls(model: nn.Module, grid: tuple[int, ...] | None) -> list[Call]:
    """Ways to call a model with a mask, by the names of its arguments.

    ``bool_masked_pos`` and ``mask`` get the mask, ``batch num_patches`` or on the grid; ``noise`` (ViTMAE) gets noise
    that sorts visible patches to the front, ``context_mask`` and ``target_mask`` (V-JEPA 2) get numbers of patches.
    """
    names = inspect.signature(model.forward).parameters

    def keyword(name: str, form: Callable[[Tensor], Tensor]) -> Call:
        return lambda model, images, mask: model(images, **{name: None if mask is None else form(mask)})

    def on_grid(mask: Tensor) -> Tensor:
        assert grid is not None
        return mask.reshape(len(mask), *grid)

    def noise(mask: Tensor) -> Tensor:
        return mask.float() + torch.linspace(0, 0.5, mask.shape[1], device=mask.device)

    for name in ("bool_masked_pos", "mask", "masks"):
        if name in names:
            flat, square = keyword(name, lambda mask: mask), keyword(name, on_grid)
            long = keyword(name, lambda mask: on_grid(mask).long())
            return [flat] if grid is None else [flat, square, long]
    if "noise" in names:
        return [keyword("noise", noise)]
    if names.keys() >= _INDICES:
        return [_call_with_indices]
    raise ValueError(
        f"{type(model).__name__}.forward({', '.join(names)}) has no argument bool_masked_pos, mask or noise to pass a "
        "mask by; pass call=lambda model, images, mask: ..., or mask=None for the model's own masks"
    )


# Of V-JEPA 2, which takes numbers of patches; without them, all are visible and masked at once.
_INDICES = {"context_mask", "target_mask"}


def _call_with_indices(model: nn.Module, videos: Tensor, mask: Tensor | None) -> None:
    """Call V-JEPA 2 with the numbers of visible and masked patches, which must be all patches."""
    assert mask is not None
    counts = set(mask.sum(dim=1).tolist())
    if len(counts) > 1:
        raise ValueError(
            f"context_mask and target_mask need equally many masked patches, got {min(counts)} to {max(counts)}"
        )
    visible, masked = (each.nonzero()[:, 1].view(len(mask), -1) for each in (~mask, mask))
    output = model(videos, context_mask=[visible], target_mask=[masked])
    encoded = getattr(output, "last_hidden_state", None)
    if isinstance(encoded, Tensor) and encoded.shape[1] != mask.shape[1]:
        raise ValueError(f"the mask has {mask.shape[1]} patches, the videos have {encoded.shape[1]}; pass grid=...")


def _mostly_equal(one: nn.Module, two: nn.Module) -> bool:
    """Whether most trained weights are equal, not counting those that start as one number (biases, norms, tokens)."""
    random = equal = 0
    frozen = not any(each.requires_grad for each in one.parameters())
    for mine, other in zip(one.parameters(), two.parameters(), strict=True):
        if (frozen or mine.requires_grad) and mine.numel() and bool((mine != mine.flatten()[0]).any()):
            random += mine.numel()
            equal += mine.numel() * torch.equal(mine, other)
    return 2 * equal > random


def inferred_info(model: nn.Module) -> ModelInfo:
    """How to feed a live model: its own ``info``, or what its configuration or patch embedding says."""
    if isinstance(said := getattr(model, "info", None), ModelInfo):
        return said
    places = [getattr(model, "config", None), *(getattr(part, "patch_embed", None) for part in model.modules())]
    for place in places:
        said = sizes_of(place)
        if said is None or said.patch[0] != said.patch[1]:
            continue
        side = said.patch[0]
        channels = getattr(place, "num_channels", None) or getattr(place, "in_chans", None) or 3
        assumed = ["masks are random patches, as the model does not say"]
        if said.frames > 1:
            assumed.append(
                f"an image is a video of {said.frames} frames that are all alike, with one mask for all (tubes)"
            )
        return ModelInfo(
            type(model).__name__,
            "inpainting",
            said.image,
            side,
            MaskRule("random", 0.6, side),
            IMAGENET_MEAN if channels == 3 else (0.5,) * channels,
            IMAGENET_STD if channels == 3 else (0.5,) * channels,
            layout="live model",
            mask_rule_source="assumed",
            channels=channels,
            statistics_source="assumed",
            assumptions=tuple(assumed),
            frames=said.frames,
            tubelet=said.tubelet,
        )
    raise ValueError(
        f"{type(model).__name__} says neither the size of its images nor that of its patches; give it an attribute "
        "info = mto_analysis.ModelInfo(family, style, image_size, patch_size, mask_rule, ...)"
    )
