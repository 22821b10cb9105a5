"""Slow branches: a copy of the student that follows it."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def slow_copy(student: _Module) -> _Module:
    """A copy that gets no gradients; hooks on the student are not on it."""
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move each weight of the teacher towards the student's: ``momentum * teacher + (1 - momentum) * student``.

    Example:
        >>> teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = teacher.weight.data.fill_(1.0), student.weight.data.fill_(2.0)
        >>> follow(teacher, student, 0.75)
        >>> teacher.weight.item()
        1.25
    """
    slow, fast = ([parameter.detach() for parameter in module.parameters()] for module in (teacher, student))
    torch._foreach_lerp_(slow, fast, 1.0 - momentum)
