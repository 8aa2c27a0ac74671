"""How far the output logits have drifted together: ln Z, which the cross-entropy leaves free up to a constant.

It can drift far below or above zero late in training, where bf16 logits lose their digits; the z-loss of Chowdhery et al.
2022 ("PaLM", arXiv:2204.02311, section 5) holds it near 0. See Wortsman et al. 2023, arXiv:2309.14322, section 3.2.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tameformer.probes.dead_units import spread_rows
from tameformer.probes.probe import Probe
from tameformer.shapes import Float


def find_logits(output: Any) -> Tensor | None:
    """Logits in what a model returned: `.logits` or `["logits"]`, the tensor itself, or the only candidate in a tuple.

    A candidate has floats, at least two axes, and at least two classes along the last. None where there is no such thing, or
    where a tuple has two.

    Example:
        >>> find_logits({"loss": torch.tensor(1.0), "logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    candidates: list[Any]
    if isinstance(output, Mapping):
        candidates = [output.get("logits")]
    elif isinstance(output, (tuple, list)) and not hasattr(output, "logits"):
        candidates = list(output)
    else:
        candidates = [getattr(output, "logits", output)]
    found: list[Tensor] = [candidate for candidate in candidates if _may_be_logits(candidate)]
    return found[0] if len(found) == 1 else None


class LogPartition(Probe):
    """Mean ln Z of the output logits, `diag/log_partition/output`, in nats.

    A look at 64 tokens costs about 0.1 ms a thousand classes. A plain tensor as wide as the residual stream is taken for the
    stream, not for logits. Where no logits are found, `unseen` says so.

    Args:
        tokens: How many tokens of the batch are looked at, evenly spread, padding included; None is all.
        logits: Finds the logits in what the model returned, for models that `find_logits` does not understand; what it gives
            is believed.
    """

    def __init__(self, *, tokens: int | None = 64, logits: Callable[[Any], Tensor | None] | None = None) -> None:
        self.tokens, self.logits = tokens, logits
        self.unseen: Mapping[str, str] = {}
        self._width: int | None = None
        self._values: dict[str, Tensor] = {}

    def on_begin(self) -> None:
        """Forget the last step."""
        self._values.clear()
        self.unseen, self._width = {}, None

    def on_block(self, block: str, input: Tensor, output: Tensor) -> None:
        """Keep the width of the residual stream."""
        self._width = output.shape[-1]

    def on_output(self, output: Any) -> None:
        """Measure the logits."""
        logits = find_logits(output) if self.logits is None else self.logits(output)
        if logits is None:
            self.unseen = {"log_partition": f"no logits were found in the model's output, {type(output).__name__}"}
        elif self.logits is None and isinstance(output, (Tensor, tuple, list)) and logits.shape[-1] == self._width:
            self.unseen = {"log_partition": f"the model's output is as wide as its stream, {self._width}: no logits"}
        else:
            self._values["diag/log_partition/output"] = log_partition(spread_rows(logits.detach(), self.tokens))

    def read(self) -> Mapping[str, Tensor]:
        """The value of the last observed step, on the device."""
        return dict(self._values)


def log_partition(logits: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, ""]:
    """Mean over tokens of ln Σ exp(logits), in nats, in float32; ln(vocab) for logits of zero. Not finite where a logit is NaN.

    Example:
        >>> log_partition(torch.zeros(5, 8)).exp()
        tensor(8.)
    """
    return torch.logsumexp(logits.float(), -1).mean()


def _may_be_logits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2 and value.shape[-1] >= 2
