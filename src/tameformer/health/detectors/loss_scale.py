"""A loss scale that has run out: float16 gradients underflow (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2)."""

from collections.abc import Mapping
from typing import Any

from tameformer.health.detectors.detector import Detector, finite
from tameformer.health.detectors.episodes import Episodes
from tameformer.health.verdicts import Verdict, number


class LossScale(Detector):
    """`train/loss_scale`, as `torch.amp.GradScaler.get_scale` gives it, is below a limit; silent where nobody logs it.

    Args:
        below: The limit; below 1 gradients are made smaller than they are. Sixteen times that is in order again.

    Example:
        >>> print(LossScale().observe(10, {"train/loss_scale": 0.5}).text)
        The loss scale is down to 0.5 at step 10: gradients overflow at any scale, and small ones are lost.
    """

    name = "loss_scale"

    def __init__(self, below: float = 1.0) -> None:
        self.below = below
        self._episodes = Episodes()

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict as it falls below."""
        scale = finite(values, "train/loss_scale")
        if scale is None:
            return None
        beyond, in_order = scale < self.below, scale >= 16 * self.below
        if not self._episodes.hear(step, beyond=[""] * beyond, in_order=[""] * in_order):
            return None
        return Verdict(
            "bad", "loss_scale", (), scale,
            f"The loss scale is down to {number(scale)} at step {step}: gradients overflow at any scale, "
            f"and small ones are lost.",
            "Train in bfloat16 or float32, or keep attention and norms in float32; look for NaN in the data.", step,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return self._episodes.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._episodes.load(state)
