"""What all recipes are configured with; each task adds its `data` and `model` sections."""

from dataclasses import dataclass, field
from typing import Literal

from tameformer.optim import OptimConfig
from tameformer.training.checkpoint import CheckpointConfig
from tameformer.training.run import LoopConfig


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """A training run."""

    output_dir: str | None = None
    """The run folder; null takes runs/NAME, or runs/NAME-2 and so on when that one holds a run."""
    seed: int = 0
    """Seeds the weights and dropout."""
    data_seed: int | None = None
    """Seeds the order of samples and augmentation; null is the seed."""
    max_steps: int | None = None
    """Optimizer steps; null trains for `num_train_epochs`."""
    num_train_epochs: int | None = None
    """Passes over the training data; `max_steps` wins when both are given."""
    gradient_accumulation_steps: int = 1
    """Parts that each process cuts its share of a batch into, to save memory; the result is the same."""
    precision: Literal["auto", "fp32", "bf16", "bf16_fp32_attention"] = "auto"
    """Type of matrix products; `auto` times the first batch, and the run's config.yaml says what it chose."""
    overfit_batches: int | None = None
    """Train on this many batches only, over and over: a model that cannot learn them by heart has a bug."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Logging and evaluation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "num_train_epochs", "gradient_accumulation_steps", "overfit_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.max_steps is None and self.num_train_epochs is None:
            raise ValueError("the run has no length: give max_steps or num_train_epochs")

    @property
    def order_seed(self) -> int:
        """The seed of the data."""
        return self.seed if self.data_seed is None else self.data_seed
