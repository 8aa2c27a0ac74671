"""Reading rows of a table of positions."""

from torch import Tensor

from tameformer.shapes import Float, Tokens


def table_rows(
    table: Float[Tensor, "max_length width"], length: int, positions: Tokens | None, start: int
) -> Float[Tensor, "... {length} width"]:
    """Rows of `positions`, or the `length` rows from `start` on as a view.

    Raises:
        ValueError: the table ends before `start + length`.
    """
    if positions is not None:
        return table[positions]
    if start + length > table.shape[0]:
        raise ValueError(
            f"expected at most {table.shape[0]} positions, got {start + length}; "
            "shorten the sequence or build the model with a larger max_length"
        )
    return table[start : start + length]
