"""The layers whose residual branches we know, told by class or by the names of their parts; all parts must be known.

A family is a function from a layer's name in the model and the layer to its branches in order, or None where the layer is
no member of it. The stack's name and the number of uses are filled in by `branches`.
"""

from collections.abc import Callable

from torch import nn

from tameformer.patch.adapters.branch import Branch
from tameformer.patch.adapters.hugging_face import bart, bert, distilbert, gpt2, llama, t5, vit
from tameformer.patch.adapters.ours import ours
from tameformer.patch.adapters.torch_nn import torch_layers

Family = Callable[[str, nn.Module], list[Branch] | None]

FAMILIES: dict[str, Family] = {
    "tameformer.models": ours,
    "torch.nn.Transformer*Layer": torch_layers,
    "BERT, RoBERTa": bert,
    "DistilBERT": distilbert,
    "ViT, DeiT": vit,
    "Llama, Mistral, Qwen": llama,
    "GPT-2": gpt2,
    "T5": t5,
    "BART, Marian": bart,
}
"""What messages call a family, and its function."""
