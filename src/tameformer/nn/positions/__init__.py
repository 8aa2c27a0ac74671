"""Where a token stands: vectors added to the embeddings, or turns of queries and keys."""

from tameformer.nn.positions.learned import LearnedPositions
from tameformer.nn.positions.rotary import RotaryPositions, rotary_angles, rotate
from tameformer.nn.positions.sinusoidal import SinusoidalPositions, sinusoidal_table

__all__ = ["LearnedPositions", "RotaryPositions", "SinusoidalPositions", "rotary_angles", "rotate", "sinusoidal_table"]
