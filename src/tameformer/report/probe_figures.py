"""The figures of one probe: lines for a few rows, a map of layers over steps, and a panel a layer where it has heads."""

from tameformer.report.curves import Line, Mark, line_chart
from tameformer.report.drawing import PALETTE, Chart
from tameformer.report.heat_map import by_layer, heat_map
from tameformer.report.quantities import Quantity, quantity_of
from tameformer.report.read import Probe, Run, share_of
from tameformer.report.small_multiples import BESIDE, LINES, PANELS, small_multiples
from tameformer.report.trouble import Trouble
from tameformer.report.wording import place_names

FEW = 6  # rows up to which each has a line in one chart, beside a map of half the width


def probe_figures(run: Run, probe: Probe, trouble: Trouble | None = None) -> list[Chart]:
    """All figures of a probe, the trouble's step marked in each; nothing that was measured is left out of all of them.

    The map of a probe with heads shows the mean over the finite heads of each layer, the panels its heads; where these
    cannot all be shown, a map with a row for each head follows.
    """
    quantity = quantity_of(probe.name)
    with_heads = any(head is not None for _, head in probe.rows)
    marks = [] if trouble is None else [trouble.step]
    figures = [] if with_heads or len(probe.rows) > FEW else [_lines(run, probe, quantity, marks)]
    ceiling = run.companion(probe, quantity.ceiling) if quantity.ceiling is not None else run.ceiling(probe)
    scaled = probe if ceiling is None else share_of(probe, ceiling)
    share = ceiling is not None or quantity.unit == "share"
    heading = f"{quantity.title}, share of its ceiling" if ceiling is not None else quantity.heading
    if len(probe.layers) > 1 or not figures:
        figures.append(_layers(run, scaled, quantity, heading, share=share, with_heads=with_heads, marks=marks))
    if not with_heads:
        return figures
    figures.append(
        small_multiples(
            f"{quantity.heading}, by head", probe, quantity, last_step=run.last_step, ceiling=ceiling,
            floor=run.companion(probe, quantity.floor or f"{probe.name}_bound"), marks=marks,
        )
    )  # fmt: skip
    heads = max(sum(name == layer for name, _ in probe.rows) for layer in probe.layers)
    if len(probe.layers) > PANELS or heads > LINES:
        figures.append(
            heat_map(
                f"{heading}, every head", scaled, last_step=run.last_step, share=share, scale=quantity.scale,
                keep="lowest" if quantity.worry == "low" else "largest", marks=marks,
            )
        )  # fmt: skip
    return figures


def _layers(
    run: Run, probe: Probe, quantity: Quantity, heading: str, *, share: bool, with_heads: bool, marks: list[int]
) -> Chart:
    layers, some = by_layer(probe)
    told = [quantity.explanation, _worry(quantity)] if with_heads or len(probe.rows) > FEW else []
    return heat_map(
        f"{heading}, {'mean over heads' if with_heads else 'by layer'}", layers, last_step=run.last_step, share=share,
        scale=quantity.scale, some=some, keep="lowest" if quantity.worry == "low" else "largest", marks=marks,
        wide=len(layers.rows) > (BESIDE if with_heads else FEW), caption=" ".join(filter(None, told)),
    )  # fmt: skip


def _lines(run: Run, probe: Probe, quantity: Quantity, marks: list[int]) -> Chart:
    labels = place_names(probe.layers)
    lines = [Line(labels[row], probe.series(row), PALETTE[row % len(PALETTE)]) for row in range(len(probe.rows))]
    log = None if quantity.scale is None else quantity.scale == "log"
    return line_chart(
        quantity.heading, lines, last_step=run.last_step, log=log, percent=quantity.unit == "share",
        marks=[Mark(step) for step in marks], caption=" ".join(filter(None, (quantity.explanation, _worry(quantity)))),
    )  # fmt: skip


def _worry(quantity: Quantity) -> str:
    return f"Worrying where it is {quantity.worry}." if quantity.worry is not None else ""
