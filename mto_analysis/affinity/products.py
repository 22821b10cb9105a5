"""Dot products of tokens in float32 or better, also where the tokens are in half precision.

A product of two bfloat16 or float16 numbers is exact in float32. So half-precision tokens are multiplied as they are
where a library sums such products in float32, as torch does on CUDA (since torch 2.8, without a derivative and without
a kernel for CPUs): a seventh of the time of float32, and half the memory. Elsewhere tokens are raised to float32 first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mto_analysis.runtime.memory import write_to

_HALF = (torch.bfloat16, torch.float16)
_SUMS_IN_FLOAT32 = hasattr(torch.ops.aten.bmm, "dtype_out") and torch.version.hip is None


def product_dtype(tokens: Tensor) -> torch.dtype:
    """The dtype in which tokens are multiplied: at least float32, or their own where half precision does as well."""
    if tokens.dtype in _HALF and tokens.is_cuda and _SUMS_IN_FLOAT32:
        return tokens.dtype
    return torch.promote_types(tokens.dtype, torch.float32)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """A batch of matrix products into given memory of at least float32, under autocast too; without a derivative.

    Shapes:
        left: batch rows inner (of :func:`product_dtype`)
        right: batch inner columns (the same dtype)
        out: batch rows columns
    """
    if left.dtype in _HALF:
        return write_to(out, torch.bmm, left, right, out_dtype=out.dtype)
    if torch.compiler.is_compiling():  # without `out` the product would be in half precision under autocast
        return out.baddbmm_(left, right, beta=0)
    return torch.bmm(left, right, out=out)


def summands(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Float32 numbers as a sum of bfloat16 ones, the smaller first; for another dtype they themselves.

    Their own rounding would not cancel where rows add to 0, as gradients of a softmax do.
    """
    if dtype not in _HALF:
        return (numbers,)
    high = numbers.to(dtype)
    return torch.sub(numbers, high, out=torch.empty_like(high)), high


def multiply_sum(left: Iterable[Tensor], right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """A batch of products of a sum with ``right``, into given memory; without a derivative.

    Shapes:
        left: batch rows inner (of :func:`summands`, in the dtype of ``right``)
        right: batch inner columns
        out: batch rows columns (the same dtype; what it holds stays in the sum with ``add``)
    """
    for part in left:
        if add:
            out.baddbmm_(part, right)
        else:
            torch.bmm(part, right, out=out)
        add = True


def dot_products(rows: Tensor, columns: Tensor) -> Tensor:
    """Dot products of two kinds of tokens of each image, in at least float32.

    Half precision has no derivative here; raise tokens before where one is wanted.

    Shapes:
        rows: batch num_rows dim
        columns: batch num_columns dim
        returns: batch num_rows num_columns

    Example:
        >>> dot_products(torch.ones(1, 2, 3), torch.ones(1, 1, 3))
        tensor([[[3.],
                 [3.]]])
    """
    if rows.dtype not in _HALF:
        return rows @ columns.mT
    return multiply(rows, columns.mT, rows.new_empty(len(rows), rows.shape[1], columns.shape[1], dtype=torch.float32))
