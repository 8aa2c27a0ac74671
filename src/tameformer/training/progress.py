"""Where a run stands, in plain numbers: with the tensors of a checkpoint, all that a resume needs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tameformer.errors import CheckpointError
from tameformer.training.interval import Interval
from tameformer.training.selection import Selection

Status = Literal["running", "finished", "early_stopped"]


@dataclass
class Progress:
    """What a run counts and remembers from step to step."""

    selection: Selection
    """The best evaluation so far."""
    step: int = 0
    """Steps completed."""
    skipped: int = 0
    """Of these steps, those that were not taken: the schedule stands still for them, the data do not."""
    passed_over: int = 0
    """Batches of the plan that were given up by going back: the data go on where they were."""
    anchors: list[int] = field(default_factory=list)
    """Checkpoints that the schedule made and that are kept."""
    parts: int = 1
    """Pieces that each micro-batch is cut into: twice as many whenever memory has run out."""
    status: Status = "running"
    """Whether steps are left to take."""
    interval: Interval = field(default_factory=Interval)
    """The steps since the last line of the log."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last value of every metric."""

    @property
    def position(self) -> int:
        """Steps of the plan of the data that were used or passed over."""
        return self.step + self.passed_over

    def state(self) -> dict[str, Any]:
        """All of it as plain values, but for how fast this machine was."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "passed_over": self.passed_over,
            "anchors": self.anchors,
            "parts": self.parts,
            "status": self.status,
            "interval": self.interval.state(),
            "selection": asdict(self.selection),
            "metrics": {key: value for key, value in self.metrics.items() if not key.startswith("perf/")},
        }

    def load(self, state: Mapping[str, Any], *, max_steps: int) -> None:
        """Continue from `state`, in a run of `max_steps`.

        Raises:
            CheckpointError: The run ends before that.
        """
        self.step, self.status = state["step"], state["status"]
        if self.status == "finished" and self.step < max_steps:
            self.status = "running"  # the run was made longer
        if self.step > max_steps:
            raise CheckpointError(
                f"the checkpoint is of step {self.step}, beyond the run's end at step {max_steps}; raise max_steps"
            )
        self.skipped, self.passed_over = state["skipped"], state["passed_over"]
        self.anchors = list(state["anchors"])
        # What memory cannot hold is not forgotten by going back; checkpoints of runs begun before this was kept say nothing.
        self.parts = max(self.parts, state.get("parts", 1))
        self.selection = Selection(**state["selection"])
        self.metrics = dict(state["metrics"])
        self.interval = Interval.of(state["interval"])
