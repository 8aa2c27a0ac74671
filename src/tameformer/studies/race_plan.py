"""How many runs a budget starts, how far, and how many go on to the end.

Dodge et al. 2020, "Fine-Tuning Pretrained Language Models: Weight Initializations, Data Orders, and Early Stopping",
arXiv:2002.06305, section 5: start many, stop early, continue some.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from tameformer.errors import ConfigError
from tameformer.studies.grid import Cell, Grid

SHARE = 0.3


@dataclass(frozen=True)
class Plan:
    """A race of t starts to a share f of the run, of which p go on."""

    starts: int
    share: float
    continued: int

    @property
    def cost(self) -> float:
        """In whole runs: t f + p (1 - f).

        Example:
            >>> Plan(41, 0.3, 11).cost
            20.0
        """
        return float(_cost(self.starts, _exact(self.share), self.continued))


def solve(
    budget: float,
    *,
    share: float = SHARE,
    starts: int | None = None,
    continued: int | None = None,
    multiple: int = 1,
) -> Plan:
    """The plan that uses a budget best: many starts, and about half the budget's runs continued.

    With neither number given it takes the number continued near half the budget that leaves the least over, and as many
    starts as that affords, at least twice as many as are continued. The paper found shares of 0.2 to 0.3 and p near half
    the budget best on three of its four tasks.

    Args:
        budget: Whole runs that may be paid for.
        share: Of each run before all are judged, f.
        starts: t, if it is settled.
        continued: p, if it is settled.
        multiple: Starts come in groups of so many, one of each variant.

    Raises:
        ConfigError: A budget that affords no race of this form.

    Example:
        >>> solve(20)
        Plan(starts=41, share=0.3, continued=11)
    """
    if not 0 < share < 1:
        raise ConfigError(f"the share of a run before it is judged must lie between 0 and 1, got {share}")
    for name, value in (("budget", budget), ("starts", starts), ("continued", continued)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} must be positive, got {value}")
    if starts is not None and starts % multiple:
        raise ConfigError(f"starts must be a multiple of the {multiple} variants, got {starts}")
    paid, part = _exact(budget), _exact(share)
    if continued is not None:
        wanted = [continued]
    elif starts is not None:
        wanted = [min(starts, floor((paid - starts * part) / (1 - part)))]
    else:
        reach = max(Fraction(1), paid / 10)
        wanted = list(range(max(1, ceil(paid / 2 - reach)), floor(paid / 2 + reach) + 1))
    free = starts is None and continued is None
    plans = []
    for some in wanted:
        many = floor((paid - some * (1 - part)) / part / multiple) * multiple if starts is None else starts
        enough = max(2, 2 * some) if free else some
        if some >= 1 and many >= enough and _cost(many, part, some) <= paid:
            plans.append((paid - _cost(many, part, some), abs(some - paid / 2), Plan(many, share, some)))
    if not plans:
        least = Plan(max(multiple, 2) if starts is None else starts, share, continued or 1)
        raise ConfigError(
            f"a budget of {budget:g} runs affords no such race: {least.starts} starts to {share:g} of the run and "
            f"{least.continued} to its end cost {least.cost:g}; give a larger budget, or fewer or shorter starts"
        )
    return min(plans, key=lambda found: found[:2])[2]


def _exact(number: float) -> Fraction:
    return Fraction(str(number))  # 0.3 as it is written, not as binary has it


def _cost(starts: int, share: Fraction, continued: int) -> Fraction:
    return starts * share + continued * (1 - share)


def pairs(count: int) -> list[tuple[int, int]]:
    """That many pairs of numbers from a square that grows: a longer list begins with the shorter one.

    A pair is the seed of the weights and that of the order of the data. With each of either in several pairs, what the
    weights do can be told from what the order does.

    Example:
        >>> pairs(6)
        [(0, 0), (1, 1), (1, 0), (0, 1), (2, 2), (2, 0)]
    """
    found: list[tuple[int, int]] = []
    side = 0
    while len(found) < count:
        found.append((side, side))
        for other in range(side):
            found += [(side, other), (other, side)]
        side += 1
    return found[:count]


@dataclass(frozen=True)
class Race:
    """Everything that says which runs start, when they are judged, and how many go on."""

    grid: Grid
    """Seeds of weights are its seeds; the last factor is the order of the data."""
    plan: Plan
    budget: float
    metric: str
    mode: str
    """Whether the best value is the smallest (min) or the largest (max)."""
    failed: float | None
    """A run that is no better than this has failed; None takes what each had before training."""
    run_all: bool
    """Whether all go on, which shows what stopping would have missed."""

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All runs, pair of seeds by pair of seeds, each with all variants."""
        numbers = {(str(cell.seed), cell.choices[-1].label): [] for cell in self.grid.cells}
        for cell in self.grid.cells:
            numbers[str(cell.seed), cell.choices[-1].label].append(cell)
        variants = len(self.grid.cells) // len(numbers)
        return tuple(
            cell for weights, order in pairs(self.plan.starts // variants) for cell in numbers[str(weights), str(order)]
        )
