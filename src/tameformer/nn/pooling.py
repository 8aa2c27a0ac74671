"""From the outputs at all tokens to the logits of one example: one class a way, all built and called alike.

`Pooling(dim)` and `forward(x, head, real)`: `head` turns vectors of width `dim` into class logits, and each way decides
whether it pools before or after it. `extra_tokens` says how many tokens `extend` puts in front of the sequence.
`real` is True at real tokens; None says that all are.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from tameformer.shapes import Bool, Float, Real, Stream

Head = Callable[[Tensor], Tensor]
Logits = Float[Tensor, "batch classes"]


def _columns(real: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq 1"]:
    return real[:, :, None]


class Pooling(nn.Module):
    """What all ways share; alone it does not pool."""

    extra_tokens: ClassVar[int] = 0

    def __init__(self, dim: int):
        super().__init__()

    def extend(self, x: Stream) -> Float[Tensor, "batch extended dim"]:
        """What goes through the layers instead of `x`; here `x` itself."""
        return x

    def forward(self, x: Stream, head: Head, real: Real | None = None) -> Logits:
        """Logits of the classes."""
        raise NotImplementedError


class ClassTokenPooling(Pooling):
    """A learned token in front of the sequence, whose output is classified (Devlin et al. 2018, arXiv:1810.04805)."""

    extra_tokens: ClassVar[int] = 1

    def __init__(self, dim: int):
        super().__init__(dim)
        self.token = nn.Parameter(torch.zeros(dim))

    def extend(self, x: Stream) -> Float[Tensor, "batch extended dim"]:
        """`x` with the class token in front."""
        return torch.cat([self.token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)

    def forward(self, x: Stream, head: Head, real: Real | None = None) -> Logits:
        """head(first output)."""
        return head(x[:, 0])


class MeanPooling(Pooling):
    """head(mean of the outputs)."""

    def forward(self, x: Stream, head: Head, real: Real | None = None) -> Logits:
        """The logits; the mean is over real tokens."""
        if real is None:
            return head(x.mean(1))
        return head((x * _columns(real)).sum(1) / real.sum(1, keepdim=True))


class MaxPooling(Pooling):
    """head(largest value of each feature)."""

    def forward(self, x: Stream, head: Head, real: Real | None = None) -> Logits:
        """The logits; the maximum is over real tokens."""
        return head((x if real is None else x.masked_fill(~_columns(real), -torch.inf)).amax(1))


class AttentionPooling(Pooling):
    """head(mean of the outputs weighted by the softmax of a learned score) (Hassani et al. 2021, arXiv:2104.05704).

    The score starts at 0 for every token, so that pooling starts as the mean.
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        self.score = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Stream, head: Head, real: Real | None = None) -> Logits:
        """The logits; padding has weight 0."""
        logits = (x @ self.score.to(x.dtype))[:, None, None]  # one head, one query: probes know attention by its axes
        weights = (logits if real is None else logits.masked_fill(~real[:, None, None], -torch.inf)).softmax(-1)
        return head((weights[:, 0] @ x)[:, 0])


class SoftmaxPooling(Pooling):
    """Every output votes: log of the mean over tokens of softmax(head(output)), so all outputs are used and trained.

    The results are log-probabilities, which cross-entropy takes as logits unchanged.
    """

    def forward(self, x: Stream, head: Head, real: Real | None = None) -> Logits:
        """Log-probabilities of the classes; the mean is over real tokens and runs in float32 or wider."""
        votes = head(x)
        votes = votes.to(torch.promote_types(votes.dtype, torch.float32)).log_softmax(-1)  # bf16 has 3 digits
        if real is None:
            return votes.logsumexp(1) - torch.log(votes.new_tensor(votes.shape[1]))
        votes = votes.masked_fill(~_columns(real), -torch.inf)
        return votes.logsumexp(1) - real.sum(1, keepdim=True).to(votes.dtype).log()
