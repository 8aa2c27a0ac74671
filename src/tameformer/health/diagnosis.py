"""The result of `tame.diagnose`: measurements, verdicts and what could not be seen, as text, JSON and HTML."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from io import StringIO
from typing import Any

from tameformer.health.verdicts import Verdict, concern, judge, parse
from tameformer.record import encode_number

GROUPS: dict[str, tuple[str, ...]] = {
    "Attention heads": (
        "attention_entropy",
        "attention_entropy_share",
        "attention_entropy_min",
        "attention_entropy_bound",
        "attention_logit_max",
        "head_output",
    ),
    "Residual branches": ("branch_share",),
    "Hidden units": ("dead_units",),
    "Layers": (
        "activation_rms",
        "activation_absmax",
        "activation_kurtosis",
        "rank_residual",
        "token_cosine",
    ),
    "Weights": ("spectral_norm", "stable_rank"),
    "Gradients and updates": ("grad_norm", "grad_rms_over_epsilon", "update_ratio"),
    "The whole model": ("log_partition", "amplification_random", "amplification_gradient"),
}
"""Which quantities stand in one table: those that are measured of the same things."""


@dataclass(frozen=True)
class Row:
    """One layer, or one head of it."""

    layer: str
    head: int | None
    values: Mapping[str, float]
    concern: int
    """3 for a value that is not finite, 2 for a bad one, 1 for one worth a look, 0 otherwise."""


@dataclass(frozen=True)
class Diagnosis:
    """What one batch showed about a model."""

    values: Mapping[str, float]
    """Every measurement, by `diag/<quantity>/<layer>[/<head>]`."""
    unseen: tuple[str, ...] = ()
    """What could not be measured, and why."""

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """The findings, the most worrying first."""
        return judge(self.values)

    @cached_property
    def tables(self) -> dict[str, list[Row]]:
        """The rows of each group of `GROUPS`, the most worrying first, otherwise in the order of the model."""
        cells: dict[str, dict[tuple[str, int | None], dict[str, float]]] = {title: {} for title in GROUPS}
        titles = {quantity: title for title, quantities in GROUPS.items() for quantity in quantities}
        for key, value in self.values.items():
            quantity, place = parse(key)
            if quantity in titles:
                cells[titles[quantity]].setdefault(place, {})[quantity] = value
        return {title: _rows(of_title) for title, of_title in cells.items() if of_title}

    def to_text(self, *, rows: int = 8, width: int = 120) -> str:
        """Verdicts and tables for a terminal; tables are cut to `rows` and say so."""
        from rich.console import Console  # imported late: this module is loaded with the package

        with StringIO() as buffer:
            self.print(Console(file=buffer, width=width), rows=rows)
            return buffer.getvalue()

    def print(self, console: Any, *, rows: int = 8) -> None:
        """Print verdicts and tables on a rich console."""
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        styles = {"bad": "bold red", "note": "yellow"}
        if not self.verdicts:
            console.print(Text("Nothing worrying was found.", style="green"))
        for verdict in self.verdicts:
            console.print(Text(f"{verdict.level:4}  {verdict.text}", style=styles[verdict.level]))
            console.print(Padding(Text(verdict.advice), (0, 0, 0, 6)))
        for title, of_title in self.tables.items():
            columns = [quantity for quantity in GROUPS[title] if any(quantity in row.values for row in of_title)]
            table = Table(title=Text(title), title_justify="left", title_style="bold")
            longest = max(len(row.layer) for row in of_title)
            table.add_column("layer", overflow="fold", min_width=min(longest, console.width // 3))
            if any(row.head is not None for row in of_title):
                table.add_column("head", justify="right")
            for column in columns:
                table.add_column(column.replace("attention_", "").replace("_", "\n"), justify="right")
            for row in of_title[:rows]:
                head = [] if len(table.columns) == len(columns) + 1 else ["" if row.head is None else str(row.head)]
                cells = [_cell(row.values.get(column)) for column in columns]
                table.add_row(Text(row.layer), *head, *cells, style="red" if row.concern > 1 else "")
            console.print(table)
            if len(of_title) > rows:
                console.print(f"{len(of_title) - rows} more rows; all are in the JSON and HTML forms.")
        for text in self.unseen:
            console.print(Text(f"not measured: {text}", style="dim"))

    def to_json(self) -> str:
        """Verdicts, all values and what was not measured; NaN and infinities as strings."""
        verdicts = [{**asdict(verdict), "value": encode_number(verdict.value)} for verdict in self.verdicts]
        values = {key: encode_number(value) for key, value in self.values.items()}
        whole = {"verdicts": verdicts, "values": values, "unseen": list(self.unseen)}
        return json.dumps(whole, indent=1, allow_nan=False, ensure_ascii=False)

    def to_html(self, *, title: str = "Diagnosis") -> str:
        """One self-contained page, everything escaped."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        pages = Environment(
            loader=PackageLoader("tameformer", "health"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        return pages.get_template("diagnosis.html").render(
            title=title, diagnosis=self, groups=GROUPS, cell=_cell, concern=concern
        )

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        return self.to_html()


def _rows(cells: Mapping[tuple[str, int | None], Mapping[str, float]]) -> list[Row]:
    rows = [
        Row(layer, head, values, max(concern(quantity, value) for quantity, value in values.items()))
        for (layer, head), values in cells.items()
    ]
    return sorted(rows, key=lambda row: -row.concern)


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(encode_number(value))
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:#.3g}"


def merged(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """All measurements in one mapping, and the share that each head's entropy has of its ceiling."""
    values = {key: value for part in parts for key, value in part.items()}
    ceiling = "diag/attention_entropy_max/"
    for key, value in list(values.items()):
        if key.startswith("diag/attention_entropy/"):
            layer, _, head = key.removeprefix("diag/attention_entropy/").rpartition("/")
            most = values.get(f"{ceiling}{layer}", math.nan)
            if most > 0:
                values[f"diag/attention_entropy_share/{layer}/{head}"] = value / most
    return {
        key: value for key, value in values.items() if not key.startswith((ceiling, "diag/attention_entropy_error/"))
    }
