"""Progress of a run in the terminal: a live line where there is one, a line now and then where there is not."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from tameformer.record import REPORT
from tameformer.training import Listener

SECONDS_BETWEEN_LINES = 10.0
_PLAIN: Any = {"highlight": False, "markup": False, "soft_wrap": True}  # as it is: paths and names may hold brackets
_SHOWN = (
    ("train/loss", "loss", ".4f"),
    ("train/lr", "lr", ".2e"),
    ("train/grad_norm", "grad norm", ".2f"),
    ("train/attention_entropy", "entropy", ".2f"),
    ("perf/samples_per_second", "samples/s", ",.0f"),
    ("perf/tokens_per_second", "tokens/s", ",.0f"),
)


class Progress(Listener):
    """Shows loss, rate, gradient norm before clipping, mean attention entropy in nats, throughput and time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._start_step = self._max_steps = 0
        self._started = self._last_line = time.monotonic()

    def on_train_begin(self, *, start_step: int, max_steps: int) -> None:
        self._start_step, self._max_steps = start_step, max_steps
        self._started = self._last_line = time.monotonic()
        if self.console.is_terminal:
            self._bar = Bar(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("left")
            )
            self._task = self._bar.add_task("train", total=max_steps, completed=start_step)
            self._live = Live(self._bar, console=self.console, refresh_per_second=4)
            self._live.start()

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        shown = "  ".join(f"{name} {values[key]:{form}}" for key, name, form in _SHOWN if key in values)
        if self._live is not None:
            self._bar.update(self._task, completed=step)
            self._live.update(Group(Text(shown), self._bar))
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            rate = (step - self._start_step) / (self._last_line - self._started)
            left = (self._max_steps - step) / rate if rate else math.inf
            self.console.print(f"step {step}/{self._max_steps}  {shown}  {_duration(left)} left", **_PLAIN)

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        measured = "  ".join(f"{key} {value:.4f}" for key, value in values.items() if key != "epoch")
        self.console.print(f"step {step}  epoch {values['epoch']:.4g}  {measured}", **_PLAIN)

    def on_event(self, step: int, kind: str, message: str, details: Mapping[str, Any]) -> None:
        self.console.print(f"step {step}  {message}", **_PLAIN)

    def on_train_end(self, step: int) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def conclude(self, folder: Path, metrics: Mapping[str, float], *, finished: bool) -> None:
        """Print the last value of every metric, and where the report is."""
        table = Table(title=Text(folder.name), title_justify="left")
        table.add_column("metric")
        table.add_column("last value", justify="right")
        for key, value in metrics.items():
            table.add_row(key, f"{value:,.5g}")
        self.console.print(table)
        if not finished:
            self.console.print(
                f"stopped after a save; continue with: --output_dir {folder} --resume auto", highlight=False
            )
        if (folder / REPORT).is_file():
            self.console.print(f"report: {folder / REPORT}", **_PLAIN)


def _duration(seconds: float) -> str:
    """A duration in hours, minutes and seconds.

    Example:
        >>> _duration(75), _duration(7260)
        ('1:15', '2:01:00')
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
