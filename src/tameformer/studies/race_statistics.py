"""What runs that differ in their seeds say: the best of n, how many failed, what early values are worth, what did it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc, ndtri
from scipy.stats import rankdata


@dataclass(frozen=True)
class Share:
    """A share of runs with its interval."""

    count: int
    n: int
    low: float
    high: float


def share(count: int, n: int, *, confidence: float = 0.95) -> Share:
    """`count` of `n` with Wilson's score interval, which stays within 0 and 1 and is not empty at either end.

    References:
        Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".

    Example:
        >>> found = share(0, 10)
        >>> f"{found.low:.3f} {found.high:.3f}"
        '0.000 0.278'
    """
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"expected 0 <= count <= n and n >= 1, got {count} of {n}")
    z = float(ndtri(0.5 + confidence / 2))
    middle = (count + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(count * (n - count) / n + z * z / 4)
    return Share(count, n, 0.0 if count == 0 else middle - half, 1.0 if count == n else middle + half)


def expected_max(values: Sequence[float], n: int) -> float:
    """The largest of n values drawn from these with replacement, on average: sum of v (F(v)^n - F(v-)^n).

    F is the empirical distribution. It is about drawing again from the runs at hand: for n near their number it leans to
    the low side of what fresh runs would give.

    References:
        Dodge et al. 2019, "Show Your Work", arXiv:1909.03004, equation 2.

    Example:
        >>> expected_max([0.0, 1.0], 2)  # 1 unless both draws are 0
        0.75
    """
    if not values or not all(map(math.isfinite, values)) or n < 1:
        raise ValueError(f"expected finite values and n >= 1, got {list(values)} and {n}")
    ordered = sorted(values)
    shares = [(place / len(ordered)) ** n for place in range(len(ordered) + 1)]
    return math.fsum(value * (shares[at + 1] - shares[at]) for at, value in enumerate(ordered))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's correlation of ranks, ties sharing theirs; None for fewer than three pairs, or where one side is constant.

    Example:
        >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
        0.5
    """
    if len(first) != len(second):
        raise ValueError(f"expected pairs, got {len(first)} and {len(second)} values")
    if len(first) < 3 or min(first) == max(first) or min(second) == max(second):
        return None
    return round(float(np.corrcoef(rankdata(first), rankdata(second))[0, 1]), 12)


@dataclass(frozen=True)
class Effect:
    """What one of the things that were varied did to the values."""

    name: str
    share: float
    """Of the sum of squares about the mean: what it explains beyond the others."""
    degrees: int
    p_value: float | None
    """Of a value of F as large when it does nothing; None where no degree of freedom is left to tell."""


def effects(values: Sequence[float], levels: Mapping[str, Sequence[object]]) -> list[Effect]:
    """How much of the spread each factor explains beyond the others, without interactions (sums of squares of type II).

    Args:
        values: One a run.
        levels: By factor, the level of each run; factors with one level are left out.

    Example:
        >>> found = effects([1.0, 1.0, 2.0, 2.0], {"weights": [0, 0, 1, 1], "order": [0, 1, 0, 1]})
        >>> [(one.name, round(one.share, 9)) for one in found]
        [('weights', 1.0), ('order', 0.0)]
    """
    y = np.asarray(values, dtype=np.float64)
    total = float(((y - y.mean()) ** 2).sum()) if len(y) else 0.0
    varied = {name: found for name, found in levels.items() if len(set(found)) > 1}
    if total == 0.0 or not varied:
        return []
    dummies = {
        name: np.array([[one == level for level in set(found)] for one in found]) for name, found in varied.items()
    }
    full, rank = _residual(y, list(dummies.values()))
    left = len(y) - rank
    out = []
    for name in varied:
        without, fewer = _residual(y, [columns for other, columns in dummies.items() if other != name])
        gained, degrees = max(0.0, without - full), rank - fewer
        known = left > 0 and degrees > 0 and full > 1e-12 * total
        p = float(fdtrc(degrees, left, gained / degrees / (full / left))) if known else None
        out.append(Effect(name, gained / total, degrees, p))
    return out


def _residual(y: np.ndarray, columns: Sequence[np.ndarray]) -> tuple[float, int]:
    """Sum of squares that a linear fit leaves, and the rank of the fit."""
    design = np.column_stack([np.ones(len(y)), *columns]).astype(np.float64)
    fit, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    return float(((y - design @ fit) ** 2).sum()), int(rank)
