"""The recipes' key `data.curriculum`: short texts first (Platanios et al. 2019, arXiv:1903.09848)."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from tameformer.data import LengthCurriculum, Plan
from tameformer.data.curriculum import BatchSize, Lengths, linear, square_root
from tameformer.errors import ConfigError
from tameformer.recipes.assemble import num_steps
from tameformer.recipes.config import RecipeConfig

COMPETENCE = {"square_root": square_root, "linear": linear}


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """A warm-up from short to long training samples, which counts as the first of the `num_train_epochs`."""

    warmup_steps: int | None = None
    """Optimizer steps until samples of every length are drawn; null draws them from the first step on."""
    competence: Literal["square_root", "linear"] = "square_root"
    """How the share of the samples that are drawn, the shortest ones, grows."""
    start: float = 0.01
    """That share in the first step."""

    def __post_init__(self) -> None:
        if self.warmup_steps is not None and self.warmup_steps < 1:
            raise ValueError(
                f"data.curriculum.warmup_steps must be at least 1, got {self.warmup_steps}; null for no curriculum"
            )
        if not 0 < self.start <= 1:
            raise ValueError(
                f"data.curriculum.start must lie in (0, 1], got {self.start}; it is a share of the samples"
            )


def with_curriculum(
    plan: Plan,
    curriculum: CurriculumConfig,
    lengths: Lengths,
    batch_size: int | BatchSize,
    *,
    config: RecipeConfig,
    min_batch_size: int = 1,
) -> Plan:
    """The plan with the warm-up before it, where one is asked for.

    Args:
        plan: What comes after the warm-up.
        curriculum: The warm-up.
        lengths: Tokens of each sample, or of each of its sides.
        batch_size: Samples of a step of the warm-up, or a function that says how many, see `LengthCurriculum`.
        config: The run's.
        min_batch_size: Fewest samples of a step.

    Raises:
        ConfigError: The warm-up is longer than the run.
    """
    if curriculum.warmup_steps is None:
        return plan
    found = LengthCurriculum(
        plan,
        lengths,
        warmup_steps=curriculum.warmup_steps,
        batch_size=batch_size,
        min_batch_size=min_batch_size,
        competence=partial(COMPETENCE[curriculum.competence], start=curriculum.start),
        seed=config.order_seed,
    )
    if curriculum.warmup_steps > num_steps(config, found):
        raise ConfigError(
            f"data.curriculum.warmup_steps is {curriculum.warmup_steps}, but the run has {num_steps(config, found)} steps: "
            "take fewer, or a longer run"
        )
    return found
