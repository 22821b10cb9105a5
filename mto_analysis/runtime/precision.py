"""How float32 matrices are multiplied: in full precision, and on a CPU by the faster of torch's two libraries.

torch gives them to MKL, which does not reach what AMD processors can do. How much the other library, oneDNN, gains
depends on the processor: it halved the time of a forward on one AMD processor and saved 0 to 10 % on another. It is
taken only where ``torch.backends.mkldnn.matmul.fp32_precision`` allows operands to be rounded to bf16. Processors that
have no fast instruction for this (of x86 all but those with AMX) compute in float32 then, too. Whether this one does is
tried with products that nothing shorter than float32 holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

#: Number formats by the words of options and tables.
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_MATMUL: Any = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
_FULL_PRECISION = ("none", "ieee")
_NOTHING = contextlib.nullcontext()

# Batch, rows, columns and inner size of the products tried: small ones, and those of a ViT.
_TRIED = ((1, 16, 16, 64), (8, 76, 120, 64), (8, 120, 384, 76), (1, 256, 768, 768))
# Float32 holds the sum of so many whole numbers below so much, added in any order.
_ADDENDS, _BELOW = 64, 2**18


def fast_float32(device_type: str = "cpu") -> contextlib.AbstractContextManager[None]:
    """Inside, products of float32 tensors on a CPU are made by oneDNN, if it is as exact on this processor.

    Sums are made in another order than MKL's, so results differ by the rounding of float32. A precision that the user
    chose (``torch.set_float32_matmul_precision``) is left as it is. The setting is the process's, not the thread's.

    Args:
        device_type: Where the tensors are, as for ``torch.autocast``; for anything but a CPU nothing is done.

    Example:
        >>> with fast_float32():
        ...     torch.ones(2, 3) @ torch.ones(3, 2)
        tensor([[3., 3.],
                [3., 3.]])
    """
    # While code is compiled nothing is done: the setting is for products that are made now.
    if device_type != "cpu" or _MATMUL is None or torch.compiler.is_compiling():
        return _NOTHING
    rounding = _CpuPrecision("bf16")
    return rounding if rounding.before in _FULL_PRECISION and _keeps_float32() else _NOTHING


@contextlib.contextmanager
def full_float32(device_type: str = "cpu") -> Iterator[None]:
    """Inside, products of float32 tensors are made in full precision, whatever the user chose.

    No TF32 on CUDA; on a CPU no bf16, and :func:`fast_float32`.
    """
    cuda: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before: list[tuple[Any, str, Any]] = []
    for owner in (cuda, cudnn):
        try:
            before.append((owner, "allow_tf32", owner.allow_tf32))
        except RuntimeError:  # the user chose by the newer words, to which the older flag has no answer
            words = [cuda] if owner is cuda else [cudnn.conv, cudnn.rnn]
            before += [(word, "fp32_precision", word.fp32_precision) for word in words]
        owner.allow_tf32 = False
    on_cpu: contextlib.AbstractContextManager[None] = _NOTHING
    if _MATMUL is not None and device_type == "cpu":
        on_cpu = _CpuPrecision("bf16" if _keeps_float32() else "ieee")
    try:
        with on_cpu:
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class _CpuPrecision(contextlib.AbstractContextManager[None]):
    """Inside, oneDNN may round operands of float32 products so far; after it as far as before."""

    __slots__ = ("_word", "before")

    def __init__(self, word: str) -> None:
        self._word, self.before = word, _MATMUL.fp32_precision

    def __enter__(self) -> None:
        """Set it."""
        _MATMUL.fp32_precision = self._word

    def __exit__(self, *_: object) -> None:
        """Leave all as it was."""
        _MATMUL.fp32_precision = self.before


@cache
def _keeps_float32() -> bool:
    """Whether oneDNN, allowed to round operands to bf16, does not."""
    enabled = torch.backends.mkldnn.enabled
    try:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
        with _CpuPrecision("bf16"), torch.autocast("cpu", enabled=False), torch.inference_mode():
            return all(_counts_exactly(*shape) for shape in _TRIED)
    finally:
        torch.backends.mkldnn.enabled = enabled


def _counts_exactly(batch: int, rows: int, columns: int, inner: int) -> bool:
    """Whether sums of great whole numbers come out right, on either side of a product."""
    ones = (torch.arange(inner, device="cpu") < _ADDENDS).float().expand(batch, max(rows, columns), inner)
    numbers = (torch.arange(ones.numel(), device="cpu") * 7919 % _BELOW).float().view_as(ones)
    sums = (numbers * ones).sum(dim=-1, keepdim=True)
    left, right = numbers[:, :rows] @ ones[:, :columns].mT, ones[:, :rows] @ numbers[:, :columns].mT
    return bool((left == sums[:, :rows]).all() and (right == sums[:, :columns].mT).all())
