"""The results of a comparison as rows of text: for the terminal and for the page alike."""

import math
from collections.abc import Callable, Sequence

from tameformer.report.read import clean
from tameformer.report.tables import Table
from tameformer.report.wording import direction, is_share, label, number, quantity
from tameformer.studies.cells import State
from tameformer.studies.results import Difference, Results, Row, Variant
from tameformer.studies.statistics import Interval

DASH = "\u2013"


def result_table(results: Results, metrics: Sequence[str], *, heading: Callable[[str], str] = label) -> Table:
    """A row each combination of values; how many diverged or failed only where any did."""
    states: list[State] = [state for state in ("diverged", "failed") if any(row.count(state) for row in results.rows)]
    factors = [clean(factor.name) for factor in results.grid.factors]
    rows = tuple(
        (
            *(clean(choice.label) for choice in row.choices),
            *(with_interval(key, row.metric(key)) for key in metrics),
            f"{row.count('finished')} of {len(row.results)}",
            *(str(row.count(state) or "") for state in states),
        )
        for row in results.rows
    )
    note = "The mean is that of the runs that finished; those that diverged are counted beside it." if states else ""
    columns = (*factors, *map(heading, metrics), "finished", *states)
    return Table("Mean over seeds, with 95 % interval", columns, rows, note=note)


def rate_table(results: Results, *, heading: Callable[[str], str] = label) -> Table:
    """A row each variant: what the learning rate does to it; no rows unless the rate is varied."""
    columns = ("variant", "sensitivity", "seeds", "best rate", f"{heading(results.loss)} there",
               "usable rates", "highest / first's", "width / first's")  # fmt: skip
    rows = tuple(_rate_row(results, variant) for variant in results.variants) if results.grid.rates else ()
    note = (
        f"Sensitivity: mean over the rates of min(loss, start) - best (Wortsman et al. 2023); start is the "
        f"{results.initial_source}, and a run that diverged counts as the start. Usable: the widest unbroken stretch of rates "
        f"whose mean loss misses at most {100 * results.tolerance:g} % of start - best."
    )
    return Table("Learning rate", columns, rows, note=note)


def _rate_row(results: Results, variant: Variant) -> tuple[str, ...]:
    first, sensitivity = results.variants[0], variant.sensitivity
    ratio, width = variant.highest_to(first), variant.width_to(first)
    best = variant.best
    return (
        clean(variant.name),
        with_interval(results.loss, sensitivity),
        str(0 if sensitivity is None else sensitivity.n),
        DASH if best is None else number(variant.rates[best]),
        DASH if best is None else with_interval(results.loss, variant.rows[best].metric(results.loss)),
        usable_words(variant),
        DASH if ratio is None else f"{number(ratio)}\u00d7",
        DASH if width is None else f"{number(width)}\u00d7",
    )


def usable_words(variant: Variant) -> str:
    """The usable rates; where the highest of the grid is one, there may be higher ones."""
    if variant.usable is None:
        return "none"
    low, high = variant.usable
    span = number(low) if low == high else f"{number(low)} to {number(high)}"
    return span + (" or higher" if high == variant.rates[-1] else " only" if low == high else "")


def difference_table(results: Results) -> Table:
    """A row each variant but the first, at each rate."""
    rows = tuple(
        (
            clean(difference.variant),
            where(difference),
            with_interval(results.metric, difference.difference, signed=True),
            str(0 if difference.difference is None else difference.difference.n),
            reading(results.metric, difference.difference),
        )
        for difference in results.differences
    )
    first = clean(results.variants[0].name)
    return Table(
        f"{label(results.metric)}: difference to {first}, seed by seed",
        ("variant", "at rate" if results.grid.rates else "", "difference", "seeds", "in words"),
        rows,
        note="Over the seeds for which both runs finished. Each interval stands alone: of twenty, one misses the truth.",
    )


def where(difference: Difference) -> str:
    """The rate of a difference, in words."""
    if difference.at_best_rates:
        return "each at its best"
    return "" if difference.rate is None else clean(difference.rate.label)


def reading(key: str, found: Interval | None) -> str:
    """What a difference says.

    Example:
        >>> reading("eval/loss", Interval(-0.5, 0.1, 3)), reading("eval/accuracy", Interval(0.1, 0.2, 3))
        ('better', 'no clear difference')
    """
    if found is None:
        return "no pair finished"
    if found.half_width is None:
        return "one seed only"
    if found.low <= 0 <= found.high:
        return "no clear difference"
    better = direction(key)
    if better is None:
        return "lower" if found.high < 0 else "higher"
    return "better" if (found.high < 0) == (better == "lower") else "worse"


def trouble_table(results: Results) -> Table:
    """A row each run that did not finish."""
    rows = tuple(
        (clean(result.cell.name), result.state, f"{result.reading.step:,}", clean(brief(result.reading.message)))
        for result in results.cells
        if result.state != "finished"
    )
    return Table("Runs that did not finish", ("run", "state", "step", "message"), rows, folded=len(rows) > 24)


def brief(message: str) -> str:
    """What happened, without what to do about it.

    Example:
        >>> brief("step 37: the loss is nan; the last checkpoint before it is untouched. Resume from it")
        'step 37: the loss is nan'
    """
    return message.partition("; the last checkpoint")[0]


def with_interval(key: str, found: Interval | None, *, signed: bool = False) -> str:
    """A mean and its half-width as people write them.

    Example:
        >>> with_interval("eval/loss", Interval(0.51234, 0.0123, 3)), with_interval("eval/accuracy", Interval(0.97, None, 1))
        ('0.512 \u00b1 0.012', '97.00 %')
    """
    if found is None:
        return DASH
    plus = "+" if signed and found.mean > 0 else ""
    share, suffix = (100.0, " %") if is_share(key, found.mean) else (1.0, "")
    if found.half_width is None or not 0 < found.half_width < float("inf"):
        return f"{plus}{quantity(key, found.mean)}".replace("-", "\u2212", 1)
    # Two digits of the half-width, and at least three of the mean, unless that would make more than four of the half-width.
    width = _exponent(share * found.half_width)
    places = max(0, 1 - width, min(2 - _exponent(share * found.mean), 3 - width))
    half = f"{share * found.half_width:.{places}f}"
    return f"{plus}{share * found.mean:.{places}f} \u00b1 {half}{suffix}".replace("-", "\u2212", 1)


def _exponent(value: float) -> int:
    return int(f"{value:.1e}".partition("e")[2]) if math.isfinite(value) else 0


def named(results: Results, row: Row) -> str:
    """The values of a row as one phrase: `peak_lr 0.01, stabilize none`."""
    pairs = zip(results.grid.factors, row.choices, strict=True)
    return clean(", ".join(f"{factor.name} {choice.label}" for factor, choice in pairs))
