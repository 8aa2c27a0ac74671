"""A Gaussian kernel as score: attention is then kernel regression (Nadaraya 1964; Watson 1964).

Tsai et al. 2019, "Transformer Dissection", arXiv:1908.11775, section 3, read softmax attention so.
"""

from dataclasses import dataclass

from torch import Tensor

from tameformer.nn.attention.scores.dot import DotProducts
from tameformer.shapes import Float


@dataclass(frozen=True)
class GaussianScore:
    """-|query - key|² / (2 bandwidth²): the softmax weighs each value by a Gaussian around the query.

    The squared distance is query · key less half of both squared norms, and the softmax does not see that of the query. So
    where keys have one norm this is the dot product with scale 1 / bandwidth², and elsewhere that with a bias for each key:
    it costs what dot products cost, fused kernels included. In bfloat16 the difference of large numbers has few digits;
    center what is far from 0.

    Example:
        >>> import torch
        >>> from tameformer.nn.attention import attend
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> attend(x, x, x, score=GaussianScore(bandwidth=0.1)).round(decimals=4).squeeze(1)
        tensor([0., 1., 2.])
    """

    bandwidth: float = 1.0
    """Standard deviation of the kernel, in the units of queries and keys."""

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"expected a bandwidth above 0, got {self.bandwidth}")

    def __call__(
        self, query: Float[Tensor, "*batch query dim"], key: Float[Tensor, "*batch key dim"]
    ) -> Float[Tensor, "*batch query key"]:
        """The logits, all of them in memory."""
        products = query @ key.transpose(-2, -1) - query.square().sum(-1, keepdim=True) / 2
        return (products - key.square().sum(-1).unsqueeze(-2) / 2) / self.bandwidth**2

    def as_dot_product(
        self, query: Float[Tensor, "*batch query dim"], key: Float[Tensor, "*batch key dim"]
    ) -> DotProducts:
        """Queries and keys with a bias for each key."""
        scale = self.bandwidth**-2
        return DotProducts(query, key, scale, -key.square().sum(-1).unsqueeze(-2) * (scale / 2))
