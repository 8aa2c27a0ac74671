"""The measurements of a run in TensorBoard, Weights & Biases, MLflow or Trackio, by name."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from tameformer.errors import missing_extra

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Names of trackers: of their packages, and of the extras that install them."""


class ScalarTracker:
    """Sends numbers to one tracker; it starts with the first line, so only in the process that writes.

    Args:
        tracker: A tracker of `accelerate.tracking`, not started yet.
    """

    def __init__(self, tracker: Any) -> None:
        self._tracker, self._is_open = tracker, False

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Send the measurements of a step; non-finite ones go as they are."""
        if not self._is_open:
            from accelerate import PartialState

            PartialState()  # accelerate's trackers ask it whether this is the main process
            self._tracker.start()
            self._is_open = True
        self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left and end the tracker's run; does nothing where none is open."""
        if self._is_open:
            self._is_open = False
            self._tracker.finish()

    def __enter__(self) -> "ScalarTracker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def tracker(name: str, project: str = "tameformer", /, **options: Any) -> ScalarTracker:
    """What `Monitor(trackers=[...])` calls to send each line of the log to a tracker.

    Args:
        name: `tensorboard`, `wandb`, `mlflow` or `trackio`.
        project: The project, or experiment, that the run belongs to; for TensorBoard a folder's name.
        options: For TensorBoard `logging_dir`, the folder above, "runs" by default, and options of `SummaryWriter`; for the
            others those of `wandb.init`, `trackio.init` and of `accelerate.tracking.MLflowTracker`.

    Raises:
        ValueError: There is no such tracker.
        ImportError: Its package is not installed.

    Example:
        >>> tracker("wandb-offline")
        Traceback (most recent call last):
        ValueError: a tracker is one of tensorboard, wandb, mlflow, trackio, got 'wandb-offline'
    """
    if name not in TRACKERS:
        raise ValueError(f"a tracker is one of {', '.join(TRACKERS)}, got {name!r}")
    if find_spec(name) is None:
        raise missing_extra(name, name)
    from accelerate import tracking

    if name == "tensorboard":
        options.setdefault("logging_dir", "runs")
    return ScalarTracker(tracking.LOGGER_TYPE_TO_CLASS[name](project, **options))
