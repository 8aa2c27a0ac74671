"""Score functions: how well a key answers a query. One a file, all called as `score(query, key)` -> logits.

A function or a module of anyone's with the same two arguments will do. One that is a dot product in disguise says so with
`as_dot_product`, and attention with it then runs in torch's fused kernels.
"""

from tameformer.nn.attention.scores.additive import AdditiveScore
from tameformer.nn.attention.scores.concat import concat_score
from tameformer.nn.attention.scores.dot import DotProducts, DotScore, dot, scaled_dot
from tameformer.nn.attention.scores.gaussian import GaussianScore
from tameformer.nn.attention.scores.general import GeneralScore

__all__ = [
    "AdditiveScore",
    "DotProducts",
    "DotScore",
    "GaussianScore",
    "GeneralScore",
    "concat_score",
    "dot",
    "scaled_dot",
]
