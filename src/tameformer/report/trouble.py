"""The first sign of trouble in a run's record: which probe, layer and head, at which step, how long before the loss went.

Most signs are ordinary in a run that learns: a language model has heads that look at the token before and nowhere else,
and activations that grow a thousandfold. They count only where the loss went soon after, or never learnt. A value
that is not finite, and logits at which every known run diverged, count by themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tameformer.limits import (
    ENTROPY_COLLAPSED,
    ENTROPY_RECOVERED,
    LOGITS_DIVERGED,
    LOGITS_LARGE,
    LOGITS_ORDINARY,
    RANK_COLLAPSED,
    RANK_RECOVERED,
    RECENT_SHARE,
    RECENT_STEPS,
)
from tameformer.report.loss import Departure, departure, stall
from tameformer.report.quantities import quantity_of
from tameformer.report.read import Probe, Run, share_of
from tameformer.report.wording import listed, place_names

_SHARPENING = "half the peak learning rate, a longer warm-up, QK-norm or sigmaReparam"


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A limit that a probe crosses, and what that says."""

    probe: str
    side: Literal["below", "above"]
    enter: float
    """The sign begins where a value is beyond this ..."""
    leave: float
    """... and is over where one is back beyond this, so that a value that flickers around the limit is one sign."""
    of: Literal["value", "ceiling", "start"] = "value"
    """What the limits are relative to: nothing, the largest possible value, the first measured one."""
    needs: Literal["loss", "loss soon after", "nothing"] = "loss soon after"
    """What must follow for it to be trouble."""
    words: str
    """Follows the name of the place."""
    remedy: str
    source: str
    """Where the limits come from."""


COLLAPSE = Sign(
    probe="attention_entropy", side="below", enter=ENTROPY_COLLAPSED, leave=ENTROPY_RECOVERED, of="ceiling",
    words="has attention entropy below a tenth of its ceiling",
    remedy=_SHARPENING, source="chosen here; collapse is described in Zhai et al. 2023, arXiv:2303.06296",
)  # fmt: skip
SIGNS: tuple[Sign, ...] = (
    Sign(
        probe="attention_logit_max", side="above", enter=LOGITS_DIVERGED, leave=LOGITS_DIVERGED, needs="nothing",
        words="has attention logits above 10,000, at which every run of Wortsman et al. 2023 diverged",
        remedy=_SHARPENING, source="Wortsman et al. 2023, arXiv:2309.14322",
    ),
    Sign(
        probe="attention_logit_max", side="above", enter=LOGITS_LARGE, leave=LOGITS_ORDINARY, needs="loss",
        words="has attention logits above 1,000",
        remedy=_SHARPENING, source="chosen here: a tenth of the limit of Wortsman et al. 2023",
    ),
    COLLAPSE,
    Sign(
        probe="rank_residual", side="below", enter=RANK_COLLAPSED, leave=RANK_RECOVERED, needs="loss",
        words="has made all tokens nearly equal (rank residual below 0.01)",
        remedy="residual branches scaled down with depth, Pre-LN, or a lower rate",
        source="chosen here: half of what 12 Post-LN layers leave at initialization; Dong et al. 2021, arXiv:2103.03404",
    ),
    Sign(
        probe="activation_rms", side="above", enter=100.0, leave=50.0, of="start",
        words="has activations a hundred times as large as at the start",
        remedy="a lower rate, gradient clipping, or weight decay", source="chosen here",
    ),
    Sign(
        probe="activation_absmax", side="above", enter=100.0, leave=50.0, of="start",
        words="has a largest activation a hundred times that of the start",
        remedy="a lower rate, gradient clipping, or weight decay",
        source="chosen here; ordinary in large models that learn: Sun et al. 2024, arXiv:2402.17762",
    ),
    Sign(
        probe="dead_units", side="above", enter=0.9, leave=0.8,
        words="has more than nine tenths of its units dead",
        remedy="a lower rate or a smooth activation such as GELU", source="chosen here",
    ),
    Sign(
        probe="head_output", side="below", enter=0.01, leave=0.02,
        words="adds less than a hundredth of its layer's output: dead",
        remedy="a lower rate or a longer warm-up", source="chosen here",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Trouble:
    """What first went wrong."""

    step: int
    probe: str
    """The probe that saw it, or the logged key, such as `train/loss`, where no probe did."""
    layer: str
    """Empty for a logged key."""
    head: int | None
    text: str
    """In a few sentences: step, place, what, how long before the loss went, what to try."""
    label: str
    """In a few words, for a mark on a chart."""
    loss: Departure | None = None
    """Where the loss went, if it did."""

    @property
    def level(self) -> Literal["note", "bad"]:
        """`note` where the loss recovered, or only stopped falling."""
        return "note" if self.loss is not None and self.loss.how in ("rose and came back", "stalled") else "bad"


@dataclass(frozen=True)
class Onset:
    """Where a sign began: its step, the row of its probe, and whether the value had been in order before."""

    step: int
    row: int
    turned: bool


def first_trouble(run: Run) -> Trouble | None:
    """The earliest sign that the record holds before the loss went, or by itself; None for a run in order.

    Without such a sign a loss that went is itself the trouble; one that merely stopped falling is not.
    """
    loss = run.log.get("train/loss")
    gone = departure(loss) if loss is not None else None
    found = [trouble for trouble in (_not_finite(run, gone), _first_sign(run, gone)) if trouble is not None]
    if found:
        return min(found, key=lambda it: it.step)
    if gone is not None:
        return _loss_itself(run, gone)
    stalled = stall(loss) if loss is not None else None
    return _first_sign(run, stalled) if stalled is not None else None


def onsets(values: np.ndarray, steps: np.ndarray, sign: Sign, *, until: float = np.inf) -> list[Onset]:
    """For each row in which the sign holds at its last value up to `until`, where that stretch began.

    Args:
        values: What the limits apply to, shape (rows, steps); NaN where there is nothing to judge.
        steps: Shape (steps,).
        sign: The limits.
        until: Later steps are not looked at.
    """
    found = []
    upwards = 1.0 if sign.side == "above" else -1.0
    for row, line in enumerate(values[:, steps <= until]):
        known = np.flatnonzero(np.isfinite(line))
        path = upwards * line[known]
        inside, healthy = path > upwards * sign.enter, np.flatnonzero(path <= upwards * sign.leave)
        after = int(healthy[-1]) + 1 if len(healthy) else 0
        begun = np.flatnonzero(inside[after:])
        if len(begun):
            at = after + int(begun[0])
            found.append(Onset(int(steps[known[at]]), row, turned=bool((~inside[:at]).any())))
    return found


def _first_sign(run: Run, gone: Departure | None) -> Trouble | None:
    """The earliest onset of any sign; one that set in during the run before one that was there from the start."""
    ranked = []
    for order, sign in enumerate(SIGNS):
        probe = run.probes.get(sign.probe)
        values = _judged(run, probe, sign) if probe is not None else None
        if probe is None or values is None or (gone is None and sign.needs != "nothing"):
            continue
        begun = onsets(values, probe.steps, sign, until=np.inf if gone is None else gone.step)
        if sign.needs == "loss soon after":
            begun = [onset for onset in begun if onset.step >= _recent(gone)]
        if begun:
            first = _first(begun)
            ranked.append(((not first.turned, first.step, order), sign, probe, begun))
    if not ranked:
        return None
    _, sign, probe, begun = min(ranked, key=lambda it: it[0])
    return _told(probe, begun, sign.words, sign.remedy, gone)


def _judged(run: Run, probe: Probe, sign: Sign) -> np.ndarray | None:
    """What the limits of a sign apply to, shape (rows, steps); None when it cannot be told."""
    if sign.of == "value":
        return probe.values
    if sign.of == "ceiling":
        ceiling = run.ceiling(probe)
        return None if ceiling is None else share_of(probe, ceiling).values
    starts = [probe.series(row).finite.values[:1] for row in range(len(probe.rows))]
    first = np.array([start[0] if len(start) and start[0] > 0 else np.nan for start in starts])
    return probe.values / first[:, None]


def _not_finite(run: Run, gone: Departure | None) -> Trouble | None:
    """The first value of a probe that is not finite: soon before the loss went, or ever since, or in any other run."""
    end, ranked = np.inf if gone is None else gone.step, []
    for order, probe in enumerate(run.probes.values()):
        broken = probe.measured & ~np.isfinite(probe.values)
        if quantity_of(probe.name).quotient:  # 0/0 until there is something to divide: counts after a finite value only
            broken &= np.maximum.accumulate(np.isfinite(probe.values), axis=1)
        if not broken[:, probe.steps <= end].any():
            continue
        flags = np.where(probe.measured, broken.astype(float), np.nan)
        begun = onsets(flags, probe.steps, _EVER_SINCE, until=end)
        begun += [
            Onset(int(probe.steps[column]), row, turned=True)
            for row in np.flatnonzero(broken.any(axis=1)).tolist()
            for column in np.flatnonzero(broken[row])[:1].tolist()
            if _recent(gone) <= probe.steps[column] <= end and row not in {onset.row for onset in begun}
        ]
        if begun:
            ranked.append((min(onset.step for onset in begun), order, probe, begun))
    if not ranked:
        return None
    _, _, probe, begun = min(ranked, key=lambda it: it[:2])
    title = quantity_of(probe.name).title
    return _told(probe, begun, f"has a value that is not finite ({title[:1].lower()}{title[1:]})", _FINITE, gone)


def _first(begun: Sequence[Onset]) -> Onset:
    """The earliest that set in during the run, or else the earliest."""
    return min(begun, key=lambda onset: (not onset.turned, onset.step))


def _recent(gone: Departure | None) -> float:
    """The first step at which an ordinary sign may begin to be blamed for the loss."""
    return -np.inf if gone is None else gone.step - max(RECENT_SHARE * gone.step, RECENT_STEPS)


def _loss_itself(run: Run, gone: Departure) -> Trouble:
    seen = "no probe showed a sign before" if run.probes else "no probe was watching"
    norm = run.log.get("train/grad_norm")
    norms = norm.non_finite_steps.tolist() if norm is not None else []
    norms = [step for step in norms if _recent(gone) <= step < gone.step]
    if norms:
        text = f"First trouble at step {norms[0]:,}: the gradient norm is not finite{_before(norms[0], gone)}; {seen}."
        return Trouble(norms[0], "train/grad_norm", "", None, f"{text} Try {_FINITE}.", "gradient not finite", gone)
    text = f"First trouble at step {gone.step:,}: {gone.words}; {seen}. Try half the peak learning rate."
    return Trouble(gone.step, "train/loss", "", None, text, gone.words, gone)


def _told(probe: Probe, begun: Sequence[Onset], words: str, remedy: str, gone: Departure | None) -> Trouble:
    """The trouble in words: the heads of one layer that were first, and how many rows followed before the loss."""
    first = _first(begun)
    layer, head = probe.rows[first.row]
    same = [onset for onset in begun if probe.rows[onset.row][0] == layer and onset.step == first.step]
    heads = [str(name) for onset in same if (name := probe.rows[onset.row][1]) is not None]
    place = layer if not heads else f"head{'s' * (len(heads) > 1)} {listed(heads)} of {layer}"
    if len(heads) > 1:
        words = words.replace("has ", "have ", 1).replace("adds ", "add ", 1)
    what = f"{place} {words}"
    since = f"First sign of trouble at step {first.step:,}" if first.turned else (
        f"A sign of trouble since the first measurement, at step {first.step:,}")  # fmt: skip
    sentences = [f"{since}: {what}{_before(first.step, gone)}."]
    if others := len(begun) - len(same):
        kind = "head" if heads else "layer"
        before = f" before {gone.words}" if gone is not None else ""
        sentences.append(f"The same holds in {others:,} more {kind}{'s' * (others > 1)}{before}.")
    gaps = np.diff(probe.steps)
    if len(gaps) and np.median(gaps) > 1:
        sentences.append(f"Measured every {int(np.median(gaps)):,} steps.")
    short = place_names(probe.layers)[probe.layers.index(layer)]
    label = f"{_LABELS.get(probe.name, quantity_of(probe.name).title.lower())}, {short}"
    label += f", head{'s' * (len(heads) > 1)} {listed(heads, limit=3)}" if heads else ""
    return Trouble(first.step, probe.name, layer, head, " ".join([*sentences, f"Try {remedy}."]), label, gone)


def _before(step: int, gone: Departure | None) -> str:
    """How long before the loss went, as the end of a sentence."""
    if gone is None:
        return ""
    back = f", until step {gone.back:,}" if gone.back is not None else ""
    lead = gone.step - step
    if lead <= 0:
        return f", at the step at which {gone.words}"
    return f", {lead:,} step{'s' * (lead != 1)} before {gone.words} (step {gone.step:,}{back})"


_FINITE = "attention and norms in float32, a lower rate, or a look at the batch of that step"
_LABELS = {
    "attention_entropy": "entropy collapse",
    "attention_logit_max": "large logits",
    "rank_residual": "rank collapse",
}
_EVER_SINCE = Sign(
    probe="", side="above", enter=0.5, leave=0.5, needs="nothing", words="", remedy="", source="0 and 1 are the values"
)
