"""Learning-rate schedules: functions of the step whose value, between 0 and 1, multiplies each group's peak rate.

Steps are counted from 0: the update number `step` uses `schedule(step)`. A warm-up of w steps rises linearly and reaches 1
at step w, so that no update has rate 0 (step 0 uses 1/(w+1)). All take plain numbers and return a float; hand
them to `torch.optim.lr_scheduler.LambdaLR`, or multiply by hand.

References:
    Vaswani et al. 2017, arXiv:1706.03762, eq. 3 (inverse square root); Loshchilov and Hutter 2017, arXiv:1608.03983
    (cosine); Smith and Topin 2017, arXiv:1708.07120 (one-cycle); Hu et al. 2024, arXiv:2404.06395
    (warmup-stable-decay); Geiping and Goldstein 2022, arXiv:2212.14034 (long warm-up triangle).
"""

import math


def warmup(step: int, *, warmup_steps: int) -> float:
    """Linear rise to 1 at `warmup_steps`, then 1.

    Example:
        >>> [warmup(step, warmup_steps=4) for step in (0, 3, 4, 9)]
        [0.2, 0.8, 1.0, 1.0]
    """
    return min(1.0, (step + 1) / (warmup_steps + 1))


def constant(step: int, *, total_steps: int, warmup_steps: int = 0) -> float:
    """Warm-up, then 1.

    Example:
        >>> constant(50, total_steps=100, warmup_steps=10)
        1.0
    """
    return warmup(step, warmup_steps=warmup_steps)


def linear(step: int, *, total_steps: int, warmup_steps: int = 0, final_ratio: float = 0.0) -> float:
    """Warm-up, then a straight line to `final_ratio` at `total_steps`.

    Example:
        >>> linear(50, total_steps=100), linear(100, total_steps=100, final_ratio=0.5)
        (0.5, 0.5)
    """
    done = _decayed(step, warmup_steps, total_steps)
    return warmup(step, warmup_steps=warmup_steps) * (1 - (1 - final_ratio) * done)


def cosine(step: int, *, total_steps: int, warmup_steps: int = 0, final_ratio: float = 0.0) -> float:
    """Warm-up, then half a cosine to `final_ratio` at `total_steps`.

    Example:
        >>> round(cosine(50, total_steps=100), 3), cosine(100, total_steps=100, final_ratio=0.1)
        (0.5, 0.1)
    """
    done = _decayed(step, warmup_steps, total_steps)
    falling = 0.5 * (1 + math.cos(math.pi * done))
    return warmup(step, warmup_steps=warmup_steps) * (final_ratio + (1 - final_ratio) * falling)


def one_cycle(
    step: int, *, total_steps: int, warmup_steps: int = 0, start_ratio: float = 0.04, final_ratio: float = 0.0
) -> float:
    """Half a cosine up from `start_ratio`, reached at `warmup_steps`, then half a cosine down to `final_ratio`.

    Example:
        >>> one_cycle(0, total_steps=100, warmup_steps=30), one_cycle(30, total_steps=100, warmup_steps=30)
        (0.04, 1.0)
    """
    if step < warmup_steps:
        rising = 0.5 * (1 - math.cos(math.pi * step / warmup_steps))
        return start_ratio + (1 - start_ratio) * rising
    falling = 0.5 * (1 + math.cos(math.pi * _decayed(step, warmup_steps, total_steps)))
    return final_ratio + (1 - final_ratio) * falling


def inverse_sqrt(step: int, *, total_steps: int, warmup_steps: int = 0) -> float:
    """Warm-up, then the square root of w / step: the schedule of "Attention is all you need", scaled to reach 1.

    The rate of the paper (Noam), dim^-0.5 min(s^-0.5, s w^-1.5), is this with a peak rate of (dim w)^-0.5.

    Example:
        >>> inverse_sqrt(400, total_steps=1000, warmup_steps=100)
        0.5
    """
    start = max(1, warmup_steps)
    return warmup(step, warmup_steps=warmup_steps) if step < start else math.sqrt(start / step)


def warmup_stable_decay(
    step: int, *, total_steps: int, warmup_steps: int = 0, decay_ratio: float = 0.2, final_ratio: float = 0.0
) -> float:
    """Warm-up, a plateau at 1, and over the last `decay_ratio` of all steps a straight line to `final_ratio`.

    Example:
        >>> [round(warmup_stable_decay(step, total_steps=100), 3) for step in (50, 80, 90, 100)]
        [1.0, 1.0, 0.5, 0.0]
    """
    start = max(warmup_steps, total_steps - round(decay_ratio * total_steps))
    return warmup(step, warmup_steps=warmup_steps) * (1 - (1 - final_ratio) * _decayed(step, start, total_steps))


def triangle(step: int, *, total_steps: int, warmup_steps: int = 0, final_ratio: float = 0.0) -> float:
    """A straight line up for half of all steps (or `warmup_steps`, if given), then a straight line down to `final_ratio`.

    Example:
        >>> [round(triangle(step, total_steps=100), 2) for step in (0, 50, 75, 100)]
        [0.02, 1.0, 0.5, 0.0]
    """
    peak = warmup_steps or total_steps // 2
    return linear(step, total_steps=total_steps, warmup_steps=peak, final_ratio=final_ratio)


def _decayed(step: int, start: int, end: int) -> float:
    """The share of the way from `start` to `end` that is done, in [0, 1]."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))
