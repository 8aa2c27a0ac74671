"""Listeners that write: the run's own log, and TensorBoard beside it."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tameformer.record import TENSORBOARD, RunWriter
from tameformer.training.events import Listener

logger = logging.getLogger(__name__)


class RecordListener(Listener):
    """Writes `log.jsonl`, `probes.jsonl` and `events.jsonl`."""

    def __init__(self, writer: RunWriter) -> None:
        self.writer = writer

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        self.writer.log(step, values)

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        self.writer.log(step, values)

    def on_probe(self, step: int, values: Mapping[str, float]) -> None:
        self.writer.probe(step, values)

    def on_save(self, step: int) -> None:
        self.writer.event(step, "checkpoint", f"checkpoint of step {step} saved")

    def on_event(self, step: int, kind: str, message: str, details: Mapping[str, Any]) -> None:
        self.writer.event(step, kind, message, **details)

    def on_rollback(self, step: int) -> None:
        self.writer.cut_back(step)

    def on_train_end(self, step: int) -> None:
        self.writer.close()


class TensorBoardListener(Listener):
    """Writes event files for TensorBoard; on a resume, the steps after the checkpoint are purged there, too."""

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported late: it costs as much as the first steps

        self._has_failed = False
        self._open = partial(SummaryWriter, str(folder / TENSORBOARD))
        self._writer = self._open(purge_step=None if resume_step is None else resume_step + 1)

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        with self._may_fail():
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        self.on_log(step, values)

    def on_event(self, step: int, kind: str, message: str, details: Mapping[str, Any]) -> None:
        with self._may_fail():
            self._writer.add_text(f"event/{kind}", message, step)

    def on_rollback(self, step: int) -> None:
        with self._may_fail():
            self._writer.close()
        with self._may_fail():
            self._writer = self._open(purge_step=step + 1)

    def on_train_end(self, step: int) -> None:
        with self._may_fail():
            self._writer.close()

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        """A second copy of what `log.jsonl` has: a full disk is said once, and no reason to end a run."""
        try:
            yield
        except OSError as error:
            if not self._has_failed:
                logger.warning(
                    "TensorBoard's files cannot be written, log.jsonl has all that is missing there: %s", error
                )
            self._has_failed = True
