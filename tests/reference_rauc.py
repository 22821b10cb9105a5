"""Eq. 6 and its companions again, as slow plain loops written from the paper alone."""

import itertools


def at(curve, epoch):
    """Score on the line between the two logged epochs around ``epoch``."""
    points = sorted(zip(*curve, strict=True))
    for (e0, s0), (e1, s1) in itertools.pairwise(points):
        if e0 <= epoch <= e1:
            return s0 + (s1 - s0) * (epoch - e0) / (e1 - e0)
    raise LookupError(epoch)


def integral(curve, start, end, reference):
    corners = [start, *sorted(e for e in curve[0] if start < e < end), end]
    total = 0.0
    for left, right in itertools.pairwise(corners):
        total += (right - left) * ((at(curve, left) - reference) + (at(curve, right) - reference)) / 2
    return total


def rauc(baseline, target, start, end, reference=None):
    level = at(baseline, start) if reference is None else reference
    return integral(target, start, end, level) / integral(baseline, start, end, level)


def first_epoch_with(curve, score, end, steps=200_000):
    """First epoch on a fine grid at which the curve has the score."""
    first = min(curve[0])
    for step in range(steps + 1):
        epoch = first + (end - first) * step / steps
        if at(curve, epoch) >= score:
            return epoch
    return None


def fieller_by_search(numerators, denominators, t, low=-50.0, high=50.0, steps=400_000):
    """Ends of the set of ratios that a t test keeps, by trying them all."""
    n = len(numerators)
    kept = []
    for step in range(steps + 1):
        theta = low + (high - low) * step / steps
        rest = [y - theta * x for y, x in zip(numerators, denominators, strict=True)]
        mean = sum(rest) / n
        variance = sum((r - mean) ** 2 for r in rest) / (n - 1) / n
        if mean**2 <= t**2 * variance:
            kept.append(theta)
    return (min(kept), max(kept)) if kept else (None, None)
