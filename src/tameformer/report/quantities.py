"""What each probed quantity means to a reader: one literal table; a probe that is not in it is drawn with defaults."""

from dataclasses import dataclass
from typing import Literal

Group = Literal["Attention", "Tokens and activations", "Weights", "Gradients and updates", "Other measurements"]
GROUPS: tuple[Group, ...] = (
    "Attention", "Tokens and activations", "Weights", "Gradients and updates", "Other measurements",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """How one probe is drawn and explained."""

    title: str
    """In a few words, without the unit."""
    unit: str = ""
    """Empty for pure numbers; `share` for 0 to 1, printed as per cent."""
    scale: Literal["linear", "log"] | None = None
    """Of the values' axis; None decides by their range."""
    worry: Literal["low", "high"] | None = None
    """The end at which trouble lies; None where neither end is bad by itself."""
    explanation: str = ""
    """One sentence for people."""
    group: Group = "Other measurements"
    ceiling: str | None = None
    """The probe that holds its largest possible value; the heat map then shows the share of it."""
    floor: str | None = None
    """The probe that holds a lower bound, drawn beside it."""
    quotient: bool = False
    """May be 0/0 while what it is measured on is still zero, as after a zero initialization: no trouble by itself."""

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit and self.unit != "share" else self.title


QUANTITIES: dict[str, Quantity] = {
    "attention_entropy": Quantity(
        title="Attention entropy", unit="nats", scale="linear", worry="low", group="Attention",
        ceiling="attention_entropy_max", floor="attention_entropy_bound",
        explanation="How evenly a head spreads its attention: at its ceiling, the logarithm of the number of visible "
        "keys, over all of them alike; near 0 each query looks at a single key.",
    ),
    "attention_entropy_min": Quantity(
        title="Attention entropy of the sharpest query", unit="nats", scale="linear", worry="low", group="Attention",
        explanation="The lowest entropy among the sampled queries of a head: near 0 when one of them looks at a single "
        "key, while the mean may still be high.",
    ),
    "attention_entropy_max": Quantity(
        title="Ceiling of the attention entropy", unit="nats", scale="linear", group="Attention",
        explanation="Mean logarithm of the number of keys that a query may look at.",
    ),
    "attention_entropy_bound": Quantity(
        title="Lower bound of the attention entropy", unit="nats", scale="linear", worry="low", group="Attention",
        explanation="What the size of the attention logits guarantees: no head can be sharper than its bound "
        "(Zhai et al. 2023); it falls exponentially as the logits grow.",
    ),
    "attention_logit_max": Quantity(
        title="Largest attention logit", worry="high", group="Attention",
        explanation="The largest score before the softmax; some tens are ordinary, and every run above 10,000 "
        "diverged in Wortsman et al. 2023.",
    ),
    "head_output": Quantity(
        title="Output of each head", unit="of its layer's", worry="low", group="Attention", quotient=True,
        explanation="Root mean square of what a head adds, relative to its layer's: a head near 0 is dead.",
    ),
    "branch_share": Quantity(
        title="Share of the residual branch", unit="share", scale="linear", group="Tokens and activations",
        quotient=True,
        explanation="How much of a block's output is the branch and not the stream it is added to: large shares make "
        "the output depend strongly on every layer (Liu et al. 2020).",
    ),
    "rank_residual": Quantity(
        title="Rank residual", scale="log", worry="low", group="Tokens and activations", quotient=True,
        explanation="Distance of the tokens from their common mean, relative to their size: 1 when they differ, "
        "0 when all tokens have become equal and attention has nothing to choose from (Dong et al. 2021).",
    ),
    "token_cosine": Quantity(
        title="Mean cosine between tokens", scale="linear", worry="high", group="Tokens and activations", quotient=True,
        explanation="How alike the tokens of a sequence are: 1 when all point the same way.",
    ),
    "activation_rms": Quantity(
        title="Activation size", unit="root mean square", worry="high", group="Tokens and activations",
        explanation="Root mean square of a block's output; steady growth by orders of magnitude precedes overflow.",
    ),
    "activation_absmax": Quantity(
        title="Largest activation", worry="high", group="Tokens and activations",
        explanation="Largest absolute value in a block's output; half precision ends at 65,504.",
    ),
    "activation_kurtosis": Quantity(
        title="Activation kurtosis", worry="high", group="Tokens and activations", quotient=True,
        explanation="How heavy the tails of a block's output are: 3 for a normal distribution, thousands where single "
        "channels tower above the rest, which hurts low-precision formats.",
    ),
    "dead_units": Quantity(
        title="Dead units", unit="share", scale="linear", worry="high", group="Tokens and activations",
        explanation="Share of a layer's hidden units that no token of the batch activates.",
    ),
    "log_partition": Quantity(
        title="Log-partition of the output", unit="nats", scale="linear", worry="high", group="Tokens and activations",
        explanation="Mean log-sum-exp of the output logits: far from 0 the logits drift together, which the loss "
        "cannot see and low precision cannot hold.",
    ),
    "spectral_norm": Quantity(
        title="Spectral norm", worry="high", group="Weights",
        explanation="The factor by which a weight matrix stretches its input at most.",
    ),
    "stable_rank": Quantity(
        title="Stable rank", worry="low", group="Weights", quotient=True,
        explanation="Squared Frobenius norm over squared spectral norm: near 1 the matrix acts along one direction.",
    ),
    "grad_norm": Quantity(
        title="Gradient norm by module", scale="log", worry="high", group="Gradients and updates",
        explanation="Size of the gradient of each module before clipping: a fall by orders of magnitude across the "
        "layers is a vanishing gradient, a jump comes before a bad step.",
    ),
    "grad_rms_over_epsilon": Quantity(
        title="Gradient size over Adam's epsilon", scale="log", worry="low", group="Gradients and updates",
        explanation="Near or below 1, epsilon and not the gradient decides the length of the update, and learning "
        "stalls (Wortsman et al. 2023).",
    ),
    "update_ratio": Quantity(
        title="Update to weight ratio", scale="log", worry="high", group="Gradients and updates", quotient=True,
        explanation="Norm of a step's update over the norm of the weights: about 0.001 is usual, above 0.1 the step "
        "rewrites what was learnt.",
    ),
}  # fmt: skip


def quantity_of(probe: str) -> Quantity:
    """The table's entry for a probe, or for one that it does not know a plain one named after it.

    Example:
        >>> quantity_of("stable_rank").title, quantity_of("my_own_norm").heading
        ('Stable rank', 'My own norm')
    """
    known = QUANTITIES.get(probe)
    return known if known is not None else Quantity(title=probe.replace("_", " ").capitalize())
