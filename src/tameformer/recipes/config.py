"""What all recipes are configured with; each task adds its `data` and `model` sections."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from tameformer.health import DetectorsConfig, GuardConfig
from tameformer.optim import OptimConfig
from tameformer.probes import PROBES, Watch
from tameformer.recipes.stabilize import Settings, methods_of
from tameformer.training.checkpoint import CheckpointConfig
from tameformer.training.run import LoopConfig


@dataclass(frozen=True, kw_only=True)
class ProbesConfig:
    """What is measured inside the model, and how often: steps from one measurement to the next, null for never."""

    attention_entropy: int | Literal["logged"] | None = "logged"
    """Entropy, largest logit and entropy bound of each attention head; "logged" is at each line of the log."""
    head_output: int | None = 50
    """Output of each head relative to its layer's: a dead head is near 0."""
    branch_share: int | None = 50
    """Share of each residual branch in its sum."""
    dead_units: int | None = 50
    """Share of hidden units that stay silent."""
    activations: int | None = 50
    """RMS, largest value and kurtosis of each layer's output."""
    rank_residual: int | None = 50
    """Distance of the tokens from being one vector, and their mean cosine."""
    spectral_norm: int | None = 50
    """Largest singular value and stable rank of each weight."""
    grad_norm: int | None = 50
    """Norm of the gradient of each module."""
    grad_rms_over_epsilon: int | None = 50
    """Size of the gradient of each module relative to Adam's epsilon."""
    update_ratio: int | None = 50
    """Size of an update relative to the weight it changes."""
    log_partition: int | None = 50
    """Logarithm of the output softmax's denominator: how far the logits have drifted."""

    def __post_init__(self) -> None:
        for name, every in asdict(self).items():
            if isinstance(every, int) and every < 1:
                raise ValueError(f"probes.{name} must be at least 1 step, or null for never, got {every}")

    def watch(self, model: nn.Module, optimizers: Sequence[Optimizer], *, logging_steps: int, last_step: int) -> Watch:
        """The probes on a model; all of them measure the last step of the run."""
        cadences = {**asdict(self)}
        if self.attention_entropy == "logged":
            cadences["attention_entropy"] = logging_steps
        chosen = {name: every for name, every in cadences.items() if every is not None}
        probes = [(PROBES[name](model, optimizers), every) for name, every in chosen.items()]
        return Watch(model, probes, optimizers=optimizers, last_step=last_step)


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
    deterministic: bool = False
    """Same seed, same bits on a GPU, too, with slower kernels where torch has them and an error where not; a processor needs
    nothing."""
    fsdp: bool = False
    """Share weights, gradients and the optimizer's state out over the processes that `torchrun` starts (FSDP2), where
    otherwise each has all of them (DDP)."""
    overfit_batches: int | None = None
    """Train on this many batches only, over and over: a model that cannot learn them by heart has a bug."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Logging and evaluation."""
    stabilize: tuple[str | dict[str, Any], ...] = ()
    """Methods that `tame methods` lists, applied in this order before training: names, or {name: {setting: value}}."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What happens to steps that must not be taken."""
    detectors: DetectorsConfig = field(default_factory=DetectorsConfig)
    """What is warned of."""
    probes: ProbesConfig = field(default_factory=ProbesConfig)
    """Measurements inside the model."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""

    def __post_init__(self) -> None:
        methods_of(self.stabilize)
        for name in ("max_steps", "num_train_epochs", "gradient_accumulation_steps", "overfit_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.max_steps is None and self.num_train_epochs is None:
            raise ValueError("the run has no length: give max_steps or num_train_epochs")

    @property
    def methods(self) -> list[tuple[str, Settings]]:
        """The methods of `stabilize` with their settings."""
        return methods_of(self.stabilize)

    @property
    def order_seed(self) -> int:
        """The seed of the data."""
        return self.seed if self.data_seed is None else self.data_seed
