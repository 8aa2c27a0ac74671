"""The words that array shapes are written with, and names for the shapes that recur.

Axis words: `batch seq query key heads kv_heads head_dim dim hidden vocab layers`; `query` and `key` where the two
lengths may differ, else `seq`; `...` for any leading axes. A word with `#` may also be 1, which then broadcasts.
Layout is `batch heads seq head_dim` inside attention and `batch seq dim` outside.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

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
