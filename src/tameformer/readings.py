"""Measurements on their way from the device to the host: one vector, one copy, waited for only when it is asked for."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tameformer.tensors import pins


class Readings:
    """The values of a step, by `diag/<probe>/<layer>[/<head>]`.

    On an accelerator the copy runs beside the next step's work: ask one step later and nothing waits.

    Args:
        tensors: By key; a scalar keeps its key, a vector gets `/<head>` behind it. All on one device.

    Example:
        >>> Readings({"diag/rank/layer": torch.tensor(0.5), "diag/entropy/layer": torch.tensor([1.0, 2.0])}).values()
        {'diag/rank/layer': 0.5, 'diag/entropy/layer/0': 1.0, 'diag/entropy/layer/1': 2.0}
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._keys = [
            name
            for key, tensor in tensors.items()
            for name in ([key] if tensor.dim() == 0 else (f"{key}/{head}" for head in range(len(tensor))))
        ]
        self._event: torch.Event | None = None
        if not tensors:
            self._host = torch.empty(0)
            return
        vector = torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])
        if vector.device.type == "cpu":
            self._host = vector
            return
        self._host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=pins(vector.device))
        self._host.copy_(vector, non_blocking=True)
        self._event = torch.Event(vector.device)
        self._event.record()

    def are_here(self) -> bool:
        """Whether `values` would not wait: the device is done with what was asked of it before."""
        return self._event is None or self._event.query()

    def values(self) -> dict[str, float]:
        """The numbers; waits for the copy if it is still running."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return dict(zip(self._keys, self._host.tolist(), strict=True))
