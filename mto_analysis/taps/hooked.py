"""Hooks that keep no model alive, that its copies and pickles do not have, and that stay outside of compiled code."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def on_output(model: nn.Module, change: Callable[[nn.Module, Any], Any], leave: Callable[[], None]) -> RemovableHandle:
    """Change what a model returns: ``change`` gets the model and its output, and gives the new one.

    Where one of an earlier run is still there, which was interrupted, its ``leave`` is called, with a warning.
    """
    for earlier in [hook for hook in model._forward_hooks.values() if isinstance(hook, _OnOutput)]:
        warnings.warn("losses of an earlier run that was interrupted are no longer added", stacklevel=4)
        earlier.leave()
    return model.register_forward_hook(_OnOutput(model, change, leave))


class Hook:
    """A hook that keeps neither the handle nor the model alive, and that copies and pickles of a model do not have."""

    def __init__(
        self, attached: Any, module: nn.Module, tell: Callable[..., None], stack: int, *, always: bool
    ) -> None:
        self._handle, self._owner = weakref.ref(attached), weakref.ref(module)
        self._tell = tell  # gets the handle at each call, as it must not keep it
        self._stack = stack
        self.always = always  # also after an error of the module

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, called: nn.Module, *arguments: Any) -> None:
        """Tell the handle, unless a copy of the module was called, or the backward pass runs it again."""
        target = self._handle()
        if target is not None and self._owner() is called and not _recomputing():
            try:
                self._tell(target, called, *arguments)
            except Exception as error:  # nothing of ours may stop the user's forward
                target._failed(self._stack, error)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        """In a copy of the model the hook is empty."""
        return _empty_hook, ()


class _OnOutput:
    """Changes what its module returns, not what copies of it return."""

    def __init__(self, module: nn.Module, change: Callable[[nn.Module, Any], Any], leave: Callable[[], None]) -> None:
        self._owner, self._change, self.leave = weakref.ref(module), change, leave

    def __call__(self, called: nn.Module, args: Any, output: Any) -> Any:
        """The new output."""
        return self._change(called, output) if self._owner() is called else output

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        """In a copy of the model the hook is empty."""
        return _empty_hook, ()


class AroundCompiled:
    """Stands in for the compiled call of a module (``module.compile()``): hooks run before and after, uncompiled.

    Hooks registered on the module itself would be compiled with it, and break its graph.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._compiled = module, module._compiled_call_impl
        self._hooks: dict[str, list[Hook]] = {"pre": [], "post": []}
        module._compiled_call_impl = self

    @classmethod
    def of(cls, module: nn.Module) -> AroundCompiled:
        """That of a module, made where there is none."""
        found = module._compiled_call_impl
        return found if isinstance(found, cls) else cls(module)

    def register(self, when: str, hook: Hook) -> _Registered:
        """Add a hook; what is returned removes it."""
        self._hooks[when].append(hook)
        return _Registered(self, when, hook)

    def remove(self, when: str, hook: Hook) -> None:
        """Remove a hook, and with the last one all of this."""
        if hook in self._hooks[when]:
            self._hooks[when].remove(hook)
        if not any(self._hooks.values()) and self._module._compiled_call_impl is self:
            self._module._compiled_call_impl = self._compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled module between its hooks."""
        assert self._compiled is not None
        for hook in tuple(self._hooks["pre"]):
            hook(self._module, args, kwargs)
        ended = [hook for hook in self._hooks["post"] if hook.always]
        output = None
        try:
            output = self._compiled(*args, **kwargs)
            ended = self._hooks["post"]
        finally:
            for hook in tuple(ended):
                hook(self._module, args, kwargs, output)
        return output


class _Registered(NamedTuple):
    """A hook of a compiled module."""

    around: AroundCompiled
    when: str
    hook: Hook

    def remove(self) -> None:
        """Take it away."""
        self.around.remove(self.when, self.hook)


def _recomputing() -> bool:
    """Whether activation checkpointing is running a block again inside the backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def _empty_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*arguments: Any) -> None:
    pass
