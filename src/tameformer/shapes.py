"""The words that array shapes are written with, and names for the shapes that recur.

Axis words: `batch seq query key heads kv_heads head_dim dim hidden vocab layers`; `query` and `key` where the two
lengths may differ, else `seq`; `...` for any leading axes. A word with `#` may also be 1, which then broadcasts.
Layout is `batch heads seq head_dim` inside attention and `batch seq dim` outside.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING or find_spec("jaxtyping") is not None:
    from jaxtyping import Bool, Float, Int, Int64, Integer
else:  # only the tests check shapes: a machine that has torch and no jaxtyping runs the same code

    class _Unchecked:
        def __class_getitem__(cls, array_and_shape: tuple[Any, str]) -> Any:
            return array_and_shape[0]

    Bool = Float = Int = Int64 = Integer = _Unchecked

__all__ = ["Bool", "Float", "Images", "Int", "Int64", "Integer", "Mask", "Real", "Stream", "Tokens"]

Stream = Float[Tensor, "batch seq dim"]
"""The residual stream."""

Tokens = Int[Tensor, "batch seq"]
"""Token numbers."""

Real = Bool[Tensor, "batch seq"]
"""True at real tokens, False at padding."""

Mask = Bool[Tensor, "#batch #heads #query #key"]
"""True where a query may attend to a key."""

Images = Float[Tensor, "batch channels height width"]
"""Images, channels first."""
