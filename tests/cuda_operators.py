"""Operators that code starts on a CUDA device, and those that wait for it, without such a device: on fake tensors."""

from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of operators that return something new these start nothing.
_NOTHING = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"}
_NOTHING |= {
    "aten::detach",
    "aten::_unsafe_view",
    "aten::sym_size",
    "aten::is_pinned",
    "aten::_reshape_alias",
    "prim::device",
}


class Operators(TorchDispatchMode):
    """Lists operators, and those that copy between devices and so wait for all that a device has to do."""

    def __init__(self):
        super().__init__()
        self.started, self.waiting = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = _devices((args, kwargs))
        result = func(*args, **kwargs)
        name = func._schema.name
        is_view = any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
        if not is_view and name not in _NOTHING:
            devices = before | _devices(result)
            copies = name in ("aten::_to_copy", "aten::copy_")
            waits_not = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
            if copies and len(devices) > 1 and not waits_not:
                self.waiting.append(name)
            if "cuda" in devices:
                self.started.append(name)
        return result


def _devices(values):
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


@contextmanager
def fake_cuda():
    """Inside, tensors are on CUDA by default and have no values: to ask for one is an error."""
    with FakeTensorMode() as mode, torch.device("cuda"):
        yield mode
