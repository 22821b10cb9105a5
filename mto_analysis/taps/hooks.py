"""Hooks that follow stacks of blocks through the forwards of somebody else's model, and only there."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from mto_analysis.errors import StackError
from mto_analysis.taps.forward import Forward, NotEntered, Stack
from mto_analysis.taps.hooked import AroundCompiled, Hook
from mto_analysis.taps.layout import REQUESTED
from mto_analysis.taps.search import holders_of
from mto_analysis.taps.stacks import Found, NoTokens, StackSpec, find_tokens

_Any = TypeVar("_Any", bound=Forward)

_WHOLE = "pass taps=[(module, 'input' or 'output'), ...] at the points where the tokens are whole"


class Attached(Generic[_Any]):
    """Hooks on a model that tell what its stacks do in a training forward, and only there.

    Nothing that is raised in a hook reaches the user's forward: it is kept for the next call of ours.
    """

    def __init__(self, model: nn.Module, specs: Sequence[StackSpec], forward: Callable[..., _Any], **more: Any) -> None:
        if len({spec.name for spec in specs}) < len(specs):
            raise ValueError(f"stacks must have different names, got {', '.join(spec.name for spec in specs)}")
        self.step = 0
        self._model = weakref.ref(model)
        self.requested: Tensor | None = None  # a mask that the caller asks the model for
        self._stacks: list[Stack[_Any]] = [Stack(model, spec, forward, **more) for spec in specs]
        self._given_up: set[int] = set()  # candidates for stacks that another one turned out to be
        self._failures: dict[int, StackError] = {}  # by stack; -1 for what concerns none
        self._warned_of_size = False
        # What the model-level hook saw; None outside the model's own call (Lightning calls training_step instead).
        self._recording: bool | None = None
        self._arguments: dict[int, dict[str, Tensor]] = {}  # of the running calls, by the module's id
        self._handles: list[Any] = []
        self._between: dict[int, dict[int, Any]] = {}  # verify inputs of blocks, by stack and depth
        self._on(model, "pre", lambda handle, *seen: handle._model_starts(*seen), with_kwargs=True, prepend=True)
        for module in holders_of(model, [each for spec in specs for each in (*spec.mask_tokens, spec.points[0][0])]):
            self._on(module, "pre", lambda handle, *seen: handle._call_starts(*seen), with_kwargs=True)
            self._on(module, "post", lambda handle, *seen: handle._call_ends(*seen), always_call=True)
        self._on(model, "post", lambda handle, *seen: handle._model_ends(*seen), with_kwargs=True, always_call=True)
        self._stack_handles = {at: self._follow(at, stack) for at, stack in enumerate(self._stacks)}

    def _on(self, module: nn.Module, when: str, tell: Callable[..., None], stack: int = -1, **options: Any) -> Any:
        hook = Hook(self, module, tell, stack, always=options.get("always_call", False))
        if module._compiled_call_impl is not None:
            handle: Any = AroundCompiled.of(module).register(when, hook)
        elif when == "pre":
            handle = module.register_forward_pre_hook(hook, **options)
        else:
            handle = module.register_forward_hook(hook, **options)
        self._handles.append(handle)
        return handle

    def _follow(self, at: int, stack: Stack[_Any]) -> list[Any]:
        """Hooks on the points of one stack; a module that occurs several times has one hook for all of them."""
        handles = []
        depths: dict[tuple[nn.Module, str], list[int]] = {}
        for depth, point in enumerate(stack.spec.points):
            depths.setdefault(point, []).append(depth)
        for (module, where), several in depths.items():
            # Before a module ran its hook gets the arguments; afterwards these and the output.
            if where == "input":
                tell = lambda handle, called, *given, of=tuple(several): handle._seen(at, of, called, given)  # noqa: E731
                handles.append(self._on(module, "pre", tell, at, with_kwargs=True))
            else:
                tell = lambda handle, called, *seen, of=tuple(several): handle._seen(at, of, called, seen[-1])  # noqa: E731
                handles.append(self._on(module, "post", tell, at, with_kwargs=True))
        handles += self._follow_between(at, stack)
        return handles

    def _follow_between(self, at: int, stack: Stack[_Any]) -> list[Any]:
        """Hooks that verify that each block's input is what the block before it gave."""
        found = self._between[at] = {}
        for depth, block in enumerate(stack.spec.blocks[1:], start=1):
            tell = lambda handle, *seen, of=depth: handle._goes_on(at, of, *seen)  # noqa: E731
            found[depth] = self._on(block, "pre", tell, at, with_kwargs=True)
        return list(found.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of the model (an EMA) has nothing attached."""
        return self

    def detach(self) -> None:
        """Remove every hook; the model is as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for stack in self._stacks:
            stack.drop()

    @property
    def skipped(self) -> int:
        """Forwards whose number of tokens does not fit the positions of a stack, so that nothing was measured."""
        known = [stack.skipped for stack in self._stacks if stack.layout is not None]
        return sum(known) if known else max((stack.skipped for stack in self._stacks), default=0)

    @property
    def last_masks(self) -> dict[str, Tensor]:
        """The mask of the last forward with masked tokens, by stack: ``batch num_patches``, True = masked."""
        return {stack.spec.name: stack.last_mask for stack in self._stacks if stack.last_mask is not None}

    @property
    def followed(self) -> dict[str, StackSpec]:
        """Stacks by name: those that masked tokens entered, or all candidates while none did."""
        known = {stack.spec.name: stack.spec for stack in self._stacks if stack.layout is not None}
        return known or {stack.spec.name: stack.spec for stack in self._stacks}

    @property
    def failed(self) -> bool:
        """Whether something went wrong in a forward, which the next call of ours raises."""
        self._settle_candidates()
        return bool(self._failures)

    def is_on(self, model: nn.Module) -> bool:
        """Whether this is attached to a model itself, not to one that it is a copy of."""
        return self._model() is model

    def describe(self) -> str:
        """What was found: for each stack its mask token, blocks, prefix tokens, patches, and how its mask is known."""
        lines = []
        for stack in (stack for at, stack in enumerate(self._stacks) if self._follows(at)):
            first = f"{stack.first_path} ({stack.spec.points[0][1]})"
            line = f"{stack.spec.name}: {stack.token_path} enters {first}, to {stack.last_path} "
            line += f"(layer depths 0 to {stack.spec.depth}); "
            if (layout := stack.layout) is None:
                line += "no masked token seen yet"
            else:
                told = "tokens" if layout.argument is None else f"tokens and argument {layout.argument!r}"
                told += " (True means visible)" if layout.inverted else ""
                line += f"{layout.prefix} prefix tokens, {layout.num_patches} patches; mask known by {told}"
            lines.append(line)
        return "\n".join(lines)

    def forget(self) -> None:
        """Forget the forwards so far, and what went wrong in them."""
        self._failures.clear()
        for stack in self._stacks:
            stack.drop()

    def _due(self) -> bool:
        return True

    def _follows(self, at: int) -> bool:
        """Whether a stack is still watched, or was given up for another candidate."""
        return at not in self._given_up

    def _key_prefix(self, stack: Stack[_Any]) -> str:
        """What keys of a stack's numbers start with: its name where several stacks are watched."""
        return f"{stack.spec.name}/" if len(self._stacks) - len(self._given_up) > 1 else ""

    def _settle_candidates(self) -> None:
        """Keep of the candidates for one mask token those that saw masked tokens, as soon as one did."""
        seen = {id(token) for stack in self._stacks if stack.layout is not None for token in stack.spec.mask_tokens}
        seen_blocks = {id(stack.spec.points[0][0]) for stack in self._stacks if stack.layout is not None}
        if not seen:
            return
        for at, stack in enumerate(self._stacks):
            tokens = {id(token) for token in stack.spec.mask_tokens}
            if stack.layout is None and (tokens & seen or id(stack.spec.points[0][0]) in seen_blocks):
                self._failures.pop(at, None)
                self._given_up.add(at)
                for handle in self._stack_handles.pop(at, ()):
                    handle.remove()

    def _raise_failure(self) -> None:
        """Raise what went wrong in a hook since the last call."""
        self._settle_candidates()
        # Of several candidates, one that masked tokens did enter says more.
        failures = sorted(self._failures.values(), key=lambda each: isinstance(each, NotEntered))
        self._failures.clear()
        for failure in failures:
            for stack in self._stacks:
                stack.drop()
            raise failure
        for stack in self._stacks:
            while stack.doubts:
                warnings.warn(stack.doubts.pop(), stacklevel=4)
        if self.skipped and not self._warned_of_size:
            self._warned_of_size = True
            warnings.warn(
                f"{self.skipped} forwards have a number of tokens that does not fit the positions of masked tokens, "
                "so nothing is measured in them (local crops, or interpolated positions)",
                stacklevel=4,
            )

    def _model_starts(self, module: nn.Module, *_: Any) -> None:
        self._recording = module.training and torch.is_grad_enabled()
        self._arguments.clear()
        for stack in self._stacks:
            stack.running = None

    def _model_ends(self, *_: Any) -> None:
        self._recording = None

    def _call_starts(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        named = dict(zip(_parameters(type(module)), args, strict=False)) | dict(kwargs)
        self._arguments[id(module)] = {
            name: tensor for name, value in named.items() if (tensor := _first_of(value)) is not None
        }

    def _call_ends(self, module: nn.Module, *_: Any) -> None:
        self._arguments.pop(id(module), None)

    def _records(self, module: nn.Module) -> bool:
        # Gradients are off inside a block that is checkpointed (reentrant), so the model's own call is asked first.
        return module.training and torch.is_grad_enabled() if self._recording is None else self._recording

    def _seen(self, at: int, depths: tuple[int, ...], module: nn.Module, values: Any) -> None:
        """Tokens at a point: at layer depth 0 they begin a forward of the stack."""
        stack = self._stacks[at]
        done = stack.running.depths if stack.running is not None else set()
        if depths == (0,) and 0 < len(done) <= stack.spec.depth and stack.repeats:
            return  # one block that runs several times in a forward
        depth = depths[0] if len(depths) == 1 else next((each for each in depths if each not in done), depths[0])
        if depth == 0:
            self._begin(at, module, values)
        if (running := stack.running) is None:
            return
        before = running.last
        found = find_tokens(values, None if before is None else before.tokens)
        if before is not None and found.tokens.shape != before.tokens.shape:
            self._refuse_fewer(stack, depth, before, found)
        running.depths.add(depth)
        running.take(depth, stack.batch_first(found.flat))
        if depth == 1 and len(stack.spec.blocks) == 1 and _new(found.others, running.carried):
            raise StackError(f"{stack.where}: its block gives several tensors of tokens; {_WHOLE}")
        if depth == 0:
            running.carried = found.others
        running.last = found.kept()
        if depth == stack.spec.depth:
            running.last, stack.last_output = None, weakref.ref(found.tokens)

    def _begin(self, at: int, module: nn.Module, values: Any) -> None:
        """Tokens of layer depth 0: which of them are masked, if this forward is one to measure."""
        stack = self._stacks[at]
        stack.running = None
        if not (self._records(module) and self._due()):
            return
        arguments = {name: value for each in self._arguments.values() for name, value in each.items()}
        if self.requested is not None:
            arguments[REQUESTED] = self.requested
        found = find_tokens(values)
        self._refuse_continued(at, found.tokens)
        stack.orient(found.flat, arguments)
        stack.start(stack.batch_first(found.flat), found.grid, arguments)
        if stack.running is not None:
            if isinstance(self._failures.get(at), NotEntered):
                del self._failures[at]  # the stack ran before without masked tokens
            self._refuse_other_tokens(at, found.tokens)

    def _refuse_fewer(self, stack: Stack[_Any], depth: int, before: Found, found: Found) -> None:
        """Whether tokens became fewer in a way that need not be the merging of cells of a grid."""
        if found.grid is not None or found.tokens.shape[-1] != before.tokens.shape[-1]:
            return
        count, earlier = (stack.batch_first(each.flat).shape[1] for each in (found, before))
        if count < earlier:
            raise StackError(
                f"{stack.where}: of {earlier} tokens there are {count} at layer depth {depth}, and nothing tells "
                "whether they were merged or left out; pass taps=[...] at points with one number of tokens"
            )

    def _refuse_other_tokens(self, at: int, tokens: Tensor) -> None:
        """Whether two mask tokens are among the same tokens, so that each stack takes those of the other as visible."""
        stack = self._stacks[at]
        for other in self._stacks:
            if other is not stack and other.last_input is not None and other.last_input() is tokens:
                raise StackError(
                    f"{stack.where}: tokens of {other.token_path} are masked there too; give both as one stack: "
                    "stacks=[StackSpec(name, blocks, mask_token=[..., ...], position=...)]"
                )
        stack.last_input = weakref.ref(tokens)

    def _refuse_continued(self, at: int, tokens: Tensor) -> None:
        """Whether what enters a candidate is what another one of the same mask token gave: both are one stack."""
        entered = self._stacks[at]
        for other, stack in enumerate(self._stacks):
            output = stack.last_output() if stack.last_output is not None else None
            same = {id(token) for token in stack.spec.mask_tokens} & {id(each) for each in entered.spec.mask_tokens}
            if output is not None and same and other != at and _is_same_memory(output, tokens):
                several = f"[*{stack.first_path.rpartition('.')[0]}, *{entered.first_path.rpartition('.')[0]}]"
                found = StackError(
                    f"{stack.where}: the tokens go on from {stack.last_path} into {entered.first_path}; give both "
                    f"lists as one stack: stacks=[StackSpec(name, {several}, mask_token=..., position=...)]"
                )
                self._failures.setdefault(other, found)

    def _goes_on(self, at: int, depth: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Verify that a block takes what the block before it gave, until it is seen to be the same memory."""
        stack = self._stacks[at]
        running, handles = stack.running, self._between[at]
        if running is None or running.last is None or depth not in running.depths:
            return
        given, taken = running.last, find_tokens((args, kwargs), running.last.tokens)
        if any(each is other for each in taken.others for other in _new(given.others, running.carried)):
            raise StackError(f"{stack.where}: block {depth} takes tokens in several tensors; {_WHOLE}")
        running.carried = taken.others
        count, before = (each.flat.shape[1] for each in (taken, given))
        merged = count < before and taken.tokens.shape != given.tokens.shape
        same = _is_same_memory(given.tokens, taken.tokens) and not given.changed
        if same or merged:
            handles.pop(depth).remove()
        elif given.changed or given.tokens.shape != taken.tokens.shape or not torch.equal(given.tokens, taken.tokens):
            raise StackError(
                f"{stack.where}: the input of block {depth} {list(taken.tokens.shape)} is not the output of the block "
                f"before it: something is added outside of the blocks; {_WHOLE}"
            )

    def _failed(self, at: int, error: Exception) -> None:
        """Something went wrong in a hook: kept for the next call of ours."""
        if isinstance(error, NoTokens):
            error = StackError(f"{self._stacks[at].where}: {error}")
        if not isinstance(error, StackError):
            error = StackError(f"a forward could not be followed: {type(error).__name__}: {error}").with_traceback(
                error.__traceback__
            )
        self._failures.setdefault(at, error)
        if at >= 0:
            self._stacks[at].running = None


def _first_of(value: Any) -> Tensor | None:
    """An argument that may be a mask or images, or the first of a list of such, one per view."""
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, Tensor) and value.ndim > 1 else None


_NAMES: dict[type, tuple[str, ...]] = {}


def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the parameters of a class's forward."""
    if kind not in _NAMES:
        _NAMES[kind] = tuple(inspect.signature(kind.forward).parameters)[1:]
    return _NAMES[kind]


def _new(tensors: Sequence[Tensor], known: Sequence[Tensor]) -> list[Tensor]:
    return [each for each in tensors if not any(each is one for one in known)]


def _is_same_memory(tokens: Tensor, others: Tensor) -> bool:
    """Whether two tensors are one, or views of the same values (reentrant checkpointing detaches tokens)."""
    same = tokens.shape == others.shape and tokens.stride() == others.stride() and tokens.dtype == others.dtype
    return tokens is others or (same and tokens.data_ptr() == others.data_ptr())
