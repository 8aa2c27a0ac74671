"""What a probe is: an observer that has something to read."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from tameformer.patch import Observer


class Probe(Observer):
    """An observer that has something to read."""

    unseen: Mapping[str, str] = {}
    """What it could not measure, and why, by name."""

    def take_norms(self, parameters: Sequence[nn.Parameter], norms: Tensor) -> None:
        """Told, before `on_gradients`, of the norms of gradients that clipping computed anyway; never owed."""

    def read(self) -> Mapping[str, Tensor]:
        """What the last observed step gave, on the device, by `diag/<quantity>/<layer>`; a vector has a value a head."""
        return {}

    def summary(self, values: Mapping[str, float]) -> Mapping[str, float]:
        """A few numbers for the run's log, from the values by `diag/<quantity>/<layer>[/<head>]`."""
        return {}
