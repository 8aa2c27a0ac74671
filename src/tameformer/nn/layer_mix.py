"""One layer of vectors from all layers of a model.

Kondratyuk and Straka 2019, "75 Languages, 1 Model", UDify, arXiv:1904.02099, section 3.3; after Peters et al. 2018, "ELMo",
arXiv:1802.05365.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tameformer.shapes import Float, Stream


class LayerMix(nn.Module):
    """scale · sum of softmax(logits)_i · layer_i: each task learns which layers it reads.

    Works on anything that returns the outputs of its layers, such as Hugging Face models called with
    `output_hidden_states=True`. It starts as the mean of the layers.

    Args:
        num_layers: how many are mixed, the embeddings included where they are handed in.
        layer_dropout: probability of leaving a layer out while training, one draw for all of a batch, so that the weight
            does not settle on one; the others share its weight, and where all would go, none does.

    Example:
        >>> mix = LayerMix(3).eval()
        >>> mix([torch.zeros(1, 2, 4), torch.ones(1, 2, 4), torch.full((1, 2, 4), 5.0)])[0, 0]
        tensor([2., 2., 2., 2.], grad_fn=<SelectBackward0>)
    """

    def __init__(self, num_layers: int, *, layer_dropout: float = 0.1):
        super().__init__()
        if num_layers < 1 or not 0 <= layer_dropout < 1:
            raise ValueError(f"expected layers to mix and 0 <= layer_dropout < 1, got {num_layers} and {layer_dropout}")
        self.logits = nn.Parameter(torch.zeros(num_layers))
        self.scale = nn.Parameter(torch.ones(1))
        self.layer_dropout = layer_dropout

    def weights(self) -> Float[Tensor, " layers"]:
        """Each layer's share, without dropout."""
        return self.logits.softmax(0)

    def forward(self, hidden_states: Sequence[Stream]) -> Stream:
        """The mixed layers.

        Raises:
            ValueError: another number of layers than it was built for.
        """
        if len(hidden_states) != len(self.logits):
            raise ValueError(
                f"expected the outputs of {len(self.logits)} layers, got {len(hidden_states)}; Hugging Face models hand out "
                "one more than they have layers, the embeddings first"
            )
        logits = self.logits
        if self.training and self.layer_dropout:
            left_out = torch.rand(len(logits), device=logits.device) < self.layer_dropout
            logits = logits.masked_fill(left_out & ~left_out.all(), -torch.inf)
        weights = (logits.softmax(0) * self.scale).to(hidden_states[0].dtype)
        return torch.einsum("l...,l->...", torch.stack(tuple(hidden_states)), weights)
