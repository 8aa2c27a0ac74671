"""Probes on a model, each with its own cadence."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.patch import Observation
from tameformer.probes.probe import Probe


class Watch:
    """Lets probes observe the steps they are due at.

    Args:
        model: The model; compiled and distributed ones are looked into.
        probes: Each with the number of steps from one measurement to the next.
        optimizers: Those that update the model; without them nothing is measured of gradients and updates.
        last_step: A step at which all are due, such as the last of the run.
        sequences: How many sequences of a batch the attention probes see; None is all.
        counts: Which forward passes count; by default those that gradients are needed for, so no evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Sequence[tuple[Probe, int]],
        *,
        optimizers: Sequence[Optimizer] = (),
        last_step: int | None = None,
        sequences: int | None = 1,
        counts: Callable[[], bool] = torch.is_grad_enabled,
    ) -> None:
        self.probes, self.last_step = tuple(probes), last_step
        self.observation = Observation(
            model, [probe for probe, _ in probes], optimizers=optimizers, sequences=sequences, counts=counts
        )
        self._due: list[Probe] = []

    def due(self, step: int) -> bool:
        """Whether some probe measures the step that `step` steps precede and include."""
        return any(self._is_due(every, step) for _, every in self.probes)

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Let the probes that are due observe the step that runs inside."""
        self._due = [probe for probe, every in self.probes if self._is_due(every, step)]
        with self.observation.watching(self._due):
            yield

    def tell_norms(self, parameters: Sequence[nn.Parameter], norms: Tensor) -> None:
        """Hand on the norms of gradients that clipping computed anyway, so that no probe reads those gradients again.

        Args:
            parameters: Those that have a gradient.
            norms: L2 norm of the gradient of each, as the optimizer gets it, (parameters,).
        """
        for probe in self._due:
            probe.take_norms(parameters, norms)

    def read(self) -> dict[str, Tensor]:
        """What the last observed step gave; nothing when no forward pass counted."""
        if not self.observation.seen_a_pass:
            return {}
        return {key: value for probe in self._due for key, value in probe.read().items()}

    def summary(self, values: Mapping[str, float]) -> dict[str, float]:
        """What the probes say in a few numbers, by the keys of the run's log."""
        return {key: value for probe, _ in self.probes for key, value in probe.summary(values).items()}

    def unseen(self) -> list[str]:
        """What no probe could see, by name, with the reason where there is one."""
        if not self.observation.seen_a_pass:
            kind = type(self.observation.model).__name__
            return [f"anything: no forward pass of {kind} was seen; give the module that the training calls"]
        reasons = [f"{name}: {why}" for probe, _ in self.probes for name, why in probe.unseen.items()]
        silent = [f"{name}: no call of attention was seen" for name in self.observation.unseen()]
        return silent + list(dict.fromkeys(reasons))  # probes of the same weight may say the same

    def _is_due(self, every: int, step: int) -> bool:
        return step % every == 0 or step == self.last_step
