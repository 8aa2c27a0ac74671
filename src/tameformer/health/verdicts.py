"""What single measurements mean, in words: what, where, how sure, what to try.

Thresholds come from the papers named beside them, or were chosen here and say so. They are marks to look at, not proofs:
a verdict of one batch says "look", and the course over a run says whether it mattered.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tameformer.limits import LOGITS_DIVERGED, RANK_COLLAPSED

Level = Literal["bad", "note"]
Place = tuple[str, int | None]
"""A layer, and a head of it."""


@dataclass(frozen=True)
class Verdict:
    """One finding, with all the places it was made at."""

    level: Level
    """`bad` where the literature or arithmetic says that training is in danger, `note` where it is worth a look."""
    quantity: str
    places: tuple[tuple[str, tuple[int, ...]], ...]
    """Layers, each with the heads concerned, where the quantity has heads; in the order of the model."""
    value: float
    """The most worrying value."""
    text: str
    """What was found and where, in one sentence."""
    advice: str
    """What to try."""
    since: int | None = None
    """The step it began with, where it was found over several."""
    confidence: Literal["certain", "likely"] = "likely"
    """`certain` where arithmetic says so, such as NaN; `likely` where a threshold does."""

    def __str__(self) -> str:
        return f"{self.text} {self.advice}"

    @property
    def details(self) -> dict[str, Any]:
        """All but the words, for an event of the run folder."""
        return {
            "level": self.level, "quantity": self.quantity, "places": [[layer, list(heads)] for layer, heads in self.places],
            "value": self.value, "since": self.since, "confidence": self.confidence,
        }  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """When a value is worth a word."""

    quantity: str
    bad: Callable[[float], bool]
    note: Callable[[float], bool]
    found: str
    """What to say, with {where} and {value}."""
    advice: str
    source: str
    """Where the thresholds come from."""
    worst: Callable[[Iterable[float]], float] = max
    """Which of several values is the most worrying."""


def _never(value: float) -> bool:
    return False


_LOGITS = "Try QK-norm or sigmaReparam, or half the learning rate."
RULES: tuple[Rule, ...] = (
    Rule(
        "attention_logit_max",
        lambda value: value > LOGITS_DIVERGED,
        lambda value: value > 100,
        "Attention logits reach {value} in {where}.",
        _LOGITS,
        "1e4: every run beyond diverged (Wortsman et al. 2023, arXiv:2309.14322); 100: clipped there in Kimi K2",
    ),
    Rule(
        "attention_entropy_share",
        _never,
        lambda value: value < 0.05,
        "Attention rests on few keys in {where}: the entropy is down to {value} of that of uniform attention.",
        "Ordinary in single heads of a trained model; if it fell together with a rising loss, it is entropy collapse. "
        + _LOGITS,
        "chosen here: the collapsed heads of the learning-rate experiment fell below a twentieth, healthy ones seldom",
        worst=min,
    ),
    Rule(
        "head_output",
        _never,
        lambda value: value < 1e-2,
        "The output hardly depends on the position in {where}: it varies by {value} of what the layer does.",
        "A dead head: it costs time and adds a constant; fewer heads may do as well.",
        "chosen here: a hundredth of the layer",
        worst=min,
    ),
    Rule(
        "rank_residual",
        lambda value: value < RANK_COLLAPSED,
        lambda value: value < 0.1,
        "All tokens are nearly the same vector after {where}: their distance from rank one is {value}.",
        "Rank collapse: check that residual connections are there, shorten the stack, or use Pre-norm or Admin.",
        "chosen here, after the depths at which Dong et al. 2021 (arXiv:2103.03404) see collapse",
        worst=min,
    ),
    Rule(
        "branch_share",
        _never,
        lambda value: value < 1e-3 or value > 0.99,
        "A branch makes up {value} of its residual sum in {where}.",
        "Near 0 the layer does nothing, near 1 it overwrites what came before: look at its initial scale "
        "(Admin, LayerScale, depth-scaled initialization).",
        "chosen here",
        worst=min,
    ),
    Rule(
        "activation_absmax",
        lambda value: value > 3e4,
        lambda value: value > 1e3,
        "Activations reach {value} after {where}.",
        "float16 ends at 65,504: train in bfloat16, lower the rate, or put a norm on the branch (Peri-norm).",
        "half of the largest float16; 1e3: the massive activations of Sun et al. 2024 (arXiv:2402.17762) start about there",
    ),
    Rule(
        "dead_units",
        lambda value: value > 0.9,
        lambda value: value > 0.5,
        "A share of {value} of the hidden units was silent for every token looked at in {where}.",
        "Check the learning rate and the input scale; a larger batch tells whether they are silent for good.",
        "chosen here",
    ),
    Rule(
        "stable_rank",
        _never,
        lambda value: value < 1.5,
        "A weight has nearly rank one (stable rank {value}) in {where}.",
        "A direction has taken over; sigmaReparam bounds its growth.",
        "chosen here: 1 is exactly rank one",
        worst=min,
    ),
    Rule(
        "grad_rms_over_epsilon",
        lambda value: value < 0.1,
        lambda value: value < 1,
        "Gradients are only {value} times Adam's epsilon in {where}: their updates vanish.",
        "Lower epsilon (1e-12 or 1e-15).",
        "Wortsman et al. 2023, arXiv:2309.14322, section 3.4",
        worst=min,
    ),
    Rule(
        "grad_norm",
        lambda value: value == 0,
        _never,
        "No gradient reaches {where}.",
        "Frozen, unused, or cut off from the loss: look at requires_grad and at the forward pass.",
        "exact zero",
        worst=min,
    ),
    Rule(
        "update_ratio",
        lambda value: value > 0.3,
        lambda value: value > 0.03,
        "One step changes the weights by {value} of their size in {where}.",
        "Lower the learning rate or warm up longer; 0.001 is usual.",
        "chosen here, thirty and three hundred times the usual 1e-3",
    ),
    Rule(
        "log_partition",
        lambda value: abs(value) > 100,
        lambda value: abs(value) > 30,
        "The logarithm of the softmax's denominator is {value} in {where}.",
        "The logits have drifted: add a z-loss, or weight decay on the output layer.",
        "chosen here; PaLM (arXiv:2204.02311) keeps it near 0 by a z-loss",
    ),
)


def judge(values: Mapping[str, float]) -> list[Verdict]:
    """Verdicts on measurements by `diag/<quantity>/<layer>[/<head>]`, the most worrying first.

    A value that is NaN or infinite is a finding of its own and goes into no other rule.

    Example:
        >>> [verdict.text for verdict in judge({"diag/attention_logit_max/layers.3/7": 2e4})]
        ['Attention logits reach 20,000 in layers.3 (head 7).']
    """
    by_quantity: dict[str, dict[Place, float]] = {}
    for key, value in values.items():
        quantity, place = parse(key)
        by_quantity.setdefault(quantity, {})[place] = value
    verdicts = []
    for quantity, of_places in by_quantity.items():
        broken = {place: value for place, value in of_places.items() if not math.isfinite(value)}
        if broken:
            verdicts.append(_non_finite(quantity, broken))
        finite = {place: value for place, value in of_places.items() if math.isfinite(value)}
        verdicts += [found for rule in RULES if rule.quantity == quantity for found in _apply(rule, finite)]
    order = {"bad": 0, "note": 1}
    return sorted(verdicts, key=lambda verdict: (math.isfinite(verdict.value), order[verdict.level]))


def parse(key: str) -> tuple[str, Place]:
    """Quantity and place of a measurement's key.

    Example:
        >>> parse("diag/attention_entropy/layers.3/7"), parse("diag/log_partition/output")
        (('attention_entropy', ('layers.3', 7)), ('log_partition', ('output', None)))
    """
    _, quantity, place = key.split("/", 2)
    return quantity, place_of(place)


def place_of(text: str) -> Place:
    """The place that is written `<layer>[/<head>]`.

    Example:
        >>> place_of("layers.3/7"), place_of("output")
        (('layers.3', 7), ('output', None))
    """
    layer, _, head = text.rpartition("/")
    return (layer, int(head)) if head.isdigit() and "/" in text else (text, None)


def concern(quantity: str, value: float) -> int:
    """3 for a value that is not finite, 2 for a bad one, 1 for one worth a look, 0 otherwise."""
    if not math.isfinite(value):
        return 3
    rules = [rule for rule in RULES if rule.quantity == quantity]
    return 2 if any(rule.bad(value) for rule in rules) else 1 if any(rule.note(value) for rule in rules) else 0


def _apply(rule: Rule, values: Mapping[Place, float]) -> list[Verdict]:
    found: list[Verdict] = []
    bad = {place: value for place, value in values.items() if rule.bad(value)}
    note = {place: value for place, value in values.items() if rule.note(value) and place not in bad}
    levels: tuple[tuple[Level, dict[Place, float]], ...] = (("bad", bad), ("note", note))
    for level, hits in levels:
        if hits:
            value = rule.worst(hits.values())
            places = by_layer(hits)
            text = rule.found.format(where=where(places), value=number(value))
            found.append(Verdict(level, rule.quantity, places, value, text, rule.advice))
    return found


def _non_finite(quantity: str, values: Mapping[Place, float]) -> Verdict:
    places = by_layer(values)
    text = f"The {quantity.replace('_', ' ')} is not a finite number in {where(places)}."
    advice = "Look for the first layer that gives one, and at the data of this batch."
    return Verdict("bad", quantity, places, next(iter(values.values())), text, advice)


def by_layer(places: Iterable[Place]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Layers, each with its heads, in the order in which they come.

    Example:
        >>> by_layer([("a", 1), ("b", None), ("a", 0)])
        (('a', (0, 1)), ('b', ()))
    """
    heads: dict[str, list[int]] = {}
    for layer, head in places:
        heads.setdefault(layer, []).extend([] if head is None else [head])
    return tuple((layer, tuple(sorted(of_layer))) for layer, of_layer in heads.items())


def where(places: Sequence[tuple[str, tuple[int, ...]]], *, most: int = 3) -> str:
    """Layers and heads in words, `most` of them by name.

    Example:
        >>> where([("layers.4", (3, 7)), ("layers.5", (0,))]), where([("a", ()), ("b", ()), ("c", ())], most=1)
        ('layers.4 (heads 3 and 7) and layers.5 (head 0)', 'a and 2 more layers')
    """
    named = [f"{layer or 'the model'}{_heads(heads)}" for layer, heads in places[:most]]
    rest = len(places) - len(named)
    return _listed([*named, f"{rest} more layer{'s' * (rest > 1)}"] if rest else named)


def _heads(heads: Sequence[int]) -> str:
    if not heads:
        return ""
    shown = [str(head) for head in heads[:8]] + ([f"{len(heads) - 8} more"] if len(heads) > 8 else [])
    return f" (head{'s' * (len(heads) > 1)} {_listed(shown)})"


def _listed(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def number(value: float) -> str:
    """Three significant digits, thousands separated.

    Example:
        >>> number(0.012345), number(20000.0)
        ('0.0123', '20,000')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
