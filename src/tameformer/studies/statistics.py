"""Numbers over seeds and over learning rates: pure functions of a few floats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    half_width: float | None
    """None for one value alone, which says nothing about the next one."""
    n: int

    @property
    def low(self) -> float:
        """The lower end; the mean itself where there is no interval."""
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        """The upper end; the mean itself where there is no interval."""
        return self.mean + (self.half_width or 0.0)


def interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval | None:
    """Mean and Student's t interval, mean +- t_(n-1) s / sqrt(n); None without values.

    It assumes that the values of seeds scatter about normally. A non-finite value makes the mean NaN: leave diverged runs
    out and say how many they were, or count them as what they lost.

    Example:
        >>> found = interval([1.0, 2.0, 3.0])  # 4.303 / sqrt(3)
        >>> print(f"{found.mean} +- {found.half_width:.4f}, n = {found.n}")
        2.0 +- 2.4841, n = 3
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n if all(map(math.isfinite, values)) else math.nan
    if n == 1:
        return Interval(mean, None, 1)
    # In exact arithmetic: equal values have no spread at all, whatever rounding does to their mean.
    deviation = stdev(values) if math.isfinite(mean) else math.nan
    return Interval(mean, float(stdtrit(n - 1, 0.5 + confidence / 2)) * deviation / math.sqrt(n), n)


def clipped(losses: Sequence[float], initial: float) -> list[float]:
    """Losses no worse than the one before training: min(loss, initial), and the initial one for NaN and infinity.

    Example:
        >>> clipped([1.0, 9.0, math.nan], initial=2.5)
        [1.0, 2.5, 2.5]
    """
    if not math.isfinite(initial):
        raise ValueError(f"the loss before training must be finite, got {initial}; evaluate the untrained model")
    return [min(loss, initial) if math.isfinite(loss) else initial for loss in losses]


def learning_rate_sensitivity(losses: Sequence[float], initial: float) -> float:
    """How much is lost on average when the learning rate is not the best of the grid, in units of the loss.

    S = mean over the rates of min(loss, initial) - best, with the best loss of the grid; a run that diverged counts as
    one that learned nothing. It speaks of runs that end badly, not of spikes that heal. A model that learns nothing at any
    rate has 0, so read it beside the best loss; and shift the grid with the optimum when a method changes what the rate means.

    Args:
        losses: Final evaluation loss of each rate of the grid.
        initial: Loss before training.

    References:
        Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training instabilities",
        arXiv:2309.14322, section 2.2.

    Example:
        >>> learning_rate_sensitivity([1.0, 1.5, math.nan], initial=2.5)  # (0 + 0.5 + 1.5) / 3
        0.6666666666666666
    """
    if not losses:
        raise ValueError("learning-rate sensitivity needs the loss of at least one rate, got none")
    counted = clipped(losses, initial)
    return math.fsum(loss - min(counted) for loss in counted) / len(counted)


def usable_range(
    rates: Sequence[float], losses: Sequence[float], initial: float, *, tolerance: float = 0.1
) -> tuple[float, float] | None:
    """Lowest and highest rate of the widest unbroken stretch of the grid whose losses come near the best one.

    Near is best + tolerance * (initial - best): all but that share of what training can gain. Of stretches that are equally
    wide, by their ratio, the one with the lower loss counts. None when no rate ends below the loss before training.

    Args:
        rates: The grid, ascending.
        losses: Final loss of each rate; above `initial` or non-finite counts as `initial`.
        initial: Loss before training.
        tolerance: Share of the gain that may be missed, from 0 to below 1.

    Example:
        >>> usable_range([1e-3, 3e-3, 1e-2, 3e-2], [1.1, 1.0, 1.2, math.nan], initial=2.5)  # up to 1.15
        (0.001, 0.003)
    """
    if len(rates) != len(losses) or list(rates) != sorted(set(rates)):
        raise ValueError(f"expected ascending rates and a loss for each, got {list(rates)} and {len(losses)} losses")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is a share of the gain in [0, 1), got {tolerance}")
    counted = clipped(losses, initial)
    best = min(counted, default=initial)
    if best >= initial:
        return None
    stretches: list[list[int]] = [[]]
    for index, loss in enumerate(counted):
        if loss <= best + tolerance * (initial - best):
            stretches[-1].append(index)
        elif stretches[-1]:
            stretches.append([])

    def width(stretch: list[int]) -> tuple[float, float]:
        return rates[stretch[-1]] / rates[stretch[0]], -min(counted[index] for index in stretch)

    widest = max(filter(None, stretches), key=width)
    return rates[widest[0]], rates[widest[-1]]
