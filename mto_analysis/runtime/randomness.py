"""Keyed random numbers by the thousand: functions of (seed, epoch, name, purpose) alone, in whole-number arithmetic.

Masks have their own keys (:class:`~mto_analysis.masks.MaskKey`); these serve order and augmentation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)


def name_keys(names: Iterable[str]) -> Keys:
    """One 64-bit key per name.

    Example:
        >>> name_keys(["cat.jpg"])
        array([17319441901738941214], dtype=uint64)
    """
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


def _mix(values: Keys) -> Keys:
    """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hashed(keys: Keys, seed: int, epoch: int, purpose: str) -> Keys:
    return _mix(keys ^ name_keys([f"{seed}\x1f{epoch}\x1f{purpose}"]))


def keyed_uniform(keys: Keys, count: int, *, seed: int, epoch: int, purpose: str) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), ``count`` per key; a row does not depend on the rows beside it.

    Shapes:
        keys: batch (from :func:`name_keys`)
        returns: batch count

    Example:
        >>> keyed_uniform(name_keys(["a", "b"]), 2, seed=0, epoch=0, purpose="crop").round(3)
        array([[0.391, 0.754],
               [0.54 , 0.77 ]])
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * _STEP
    bits = _mix(_hashed(keys, seed, epoch, purpose)[:, None] + steps)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_permutation(keys: Keys, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The rows of ``keys`` in a random order of the epoch's own."""
    return np.argsort(_hashed(keys, seed, epoch, "order"), kind="stable").astype(np.int64)
