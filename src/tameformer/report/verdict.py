"""What a run's record says, in words: pure functions of what was logged, each finding with its step and its number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tameformer.limits import ALWAYS_CLIPPED, ENTROPY_COLLAPSED, OVER_FITTING_RISE
from tameformer.report.loss import Departure, departure, smoothed, stall
from tameformer.report.quantities import quantity_of
from tameformer.report.read import Event, Probe, Run, Series, share_of
from tameformer.report.trouble import COLLAPSE, first_trouble, onsets
from tameformer.report.warned import sentence, standing
from tameformer.report.wording import direction, label, listed, number, quantity

Level = Literal["good", "note", "bad"]
State = Literal["empty", "unfinished", "finished", "stopped", "diverged"]

MOST_LAYERS = 4  # with collapsed heads that are told one by one


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict and how worrying it is."""

    level: Level
    text: str


@dataclass(frozen=True)
class Verdict:
    """The state of the run, the line that sums it up, and the findings behind it."""

    state: State
    headline: str
    findings: tuple[Finding, ...]

    @property
    def level(self) -> Level:
        """The most worrying level: `bad` for a diverged run or any bad finding."""
        levels = {finding.level for finding in self.findings}
        if self.state == "diverged" or "bad" in levels:
            return "bad"
        return "good" if self.state == "finished" and "note" not in levels else "note"


def judge(run: Run) -> Verdict:
    """The verdict on a run, from its log, probes and events alone."""
    state, headline = run_state(run)
    trouble, warned = first_trouble(run), standing(run.events)
    findings = [
        Finding(trouble.level, trouble.text) if trouble is not None and trouble.probe != "train/loss" else None,
        unsaved(run.events),
        skipped(run.events),
        *map(warning, warned.values()),
        non_finite(run.log),
        non_finite_probes(run.probes),
        loss_course(run.log.get("train/loss"), diverged=state == "diverged"),
        *(metric_course(key, series) for key, series in run.log.items() if is_metric(key)),
        *(test_result(key, series) for key, series in run.log.items() if key.startswith("test/")),
        # What the detectors told is not told again in other words.
        over_fitting(run.log.get("train/loss"), run.log.get("eval/loss")) if "eval/loss" not in warned else None,
        clipping(run.log.get("train/clip_rate")) if "clip_rate" not in warned else None,
        *(collapsed_attention(run) if "attention_entropy" not in warned else ()),
    ]
    worst_first = {"bad": 0, "note": 1, "good": 2}
    told = sorted((finding for finding in findings if finding is not None), key=lambda it: worst_first[it.level])
    if state == "finished" and told and told[0].level == "bad":
        headline = f"{headline[:-1]}, with problems."
    return Verdict(state, headline, tuple(told))


def run_state(run: Run) -> tuple[State, str]:
    """Whether the run finished, was stopped, diverged or is still going, and the sentence that says so."""
    if not run.log:
        return "empty", "Nothing has been logged yet."
    last = run.last_step
    loss = run.log.get("train/loss")
    marks = [event for event in run.events if event.kind in ("start", "resume", "stop", "pause", "finish", "diverged")]
    ended = marks[-1].kind if marks and marks[-1].kind in ("stop", "pause", "finish", "diverged") else None
    if loss is not None and len(loss) and not np.isfinite(loss.values[-1]):
        tail = loss.finite.steps[-1] if len(loss.finite) else -1
        since = int(loss.steps[loss.steps > tail][0])
        ending = {"finish": "; it ran to its end at step {:,}", "stop": "; it was stopped at step {:,}"}
        return (
            "diverged",
            f"Diverged: the loss is not finite since step {since:,}{ending.get(ended or '', '').format(last)}.",
        )
    if ended == "diverged":
        return "diverged", f"Diverged at step {marks[-1].step:,}: {marks[-1].message}"
    if ended == "finish":
        return "finished", f"Finished at step {last:,}."
    if ended == "stop":
        return "stopped", f"Stopped at step {last:,}, before its end."
    if ended == "pause":
        return "stopped", f"Paused at step {last:,}, as asked for, before its end."
    return "unfinished", f"Not finished: still running, or killed. The last record is of step {last:,}{_planned(run)}."


def skipped(events: Sequence[Event]) -> Finding | None:
    """How many steps the guard refused, and when the last was; the events say why."""
    refused = [event for event in events if event.kind == "step_skipped"]
    if not refused:
        return None
    one = len(refused) == 1
    text = "The guard skipped one step" if one else f"The guard skipped {len(refused):,} steps"
    return Finding("good", f"{text}, {'' if one else 'the last '}at step {refused[-1].step:,}.")


def unsaved(events: Sequence[Event]) -> Finding | None:
    """What is in no checkpoint because the last one could not be written; a run goes on without, and may end so."""
    marks = [event for event in events if event.kind in ("checkpoint", "checkpoint_failed")]
    if not marks or marks[-1].kind == "checkpoint":
        return None
    saved = [event.step for event in marks if event.kind == "checkpoint"]
    lost = f"what was learned since step {saved[-1]:,}" if saved else "all that was learned"
    text = f"The checkpoint of step {marks[-1].step:,} could not be written: {lost} is in no file."
    return Finding("bad", f"{text} Make room, then --resume auto repeats those steps.")


def warning(verdicts: Sequence[Event]) -> Finding:
    """What a detector told during the run."""
    is_bad, text = sentence(verdicts)
    return Finding("bad" if is_bad else "note", text)


def non_finite(log: dict[str, Series]) -> Finding | None:
    """How many logged values are NaN or infinite, in which series, first at which step."""
    hit = {key: series.non_finite_steps for key, series in log.items() if len(series.non_finite_steps)}
    if not hit:
        return None
    first = min(int(steps[0]) for steps in hit.values())
    keys = [key for key, steps in hit.items() if steps[0] == first]
    count = sum(len(steps) for steps in hit.values())
    values = "value is" if count == 1 else "values are"
    return Finding("bad", f"{count:,} logged {values} not finite, first at step {first:,} ({listed(keys)}).")


def non_finite_probes(probes: dict[str, Probe]) -> Finding | None:
    """How many probed values are NaN or infinite, and where the first was; quotients may be, see `Quantity.quotient`."""
    found = []
    for name, probe in probes.items():
        broken = probe.measured & ~np.isfinite(probe.values)
        if broken.any() and not quantity_of(name).quotient:
            column = int(np.flatnonzero(broken.any(axis=0))[0])
            layer, head = probe.rows[int(np.flatnonzero(broken[:, column])[0])]
            where = layer if head is None else f"{layer}, head {head}"
            found.append((int(probe.steps[column]), f"{quantity_of(name).title.lower()} in {where}", int(broken.sum())))
    if not found:
        return None
    step, where, _ = min(found, key=lambda it: it[0])
    count = sum(it[2] for it in found)
    return Finding(
        "note", f"{count:,} probed value{'s are' if count > 1 else ' is'} not finite, first at step {step:,} ({where})."
    )


def loss_course(loss: Series | None, *, diverged: bool = False) -> Finding | None:
    """How far the training loss fell, on its smoothed finite values; bad when it ends well above where it was."""
    if loss is None or len(loss.finite) < 2:
        return None
    smooth = smoothed(loss.finite)
    start, end, lowest = loss.finite.values[0], smooth.values[-1], smooth.values.min()
    at = int(smooth.steps[int(smooth.values.argmin())])
    if end - lowest > 0.25 * max(abs(start - lowest), 1e-12) and end > lowest:
        if end > start:
            return Finding(
                "bad",
                f"Training loss rose from {number(start)} to {number(end)} (lowest {number(lowest)}, step {at:,}).",
            )
        return Finding(
            "bad",
            f"Training loss fell from {number(start)} to {number(lowest)} by step {at:,}, then rose to {number(end)}.",
        )
    until = " before it diverged" if diverged else ""
    return Finding("note" if diverged else "good", f"Training loss fell from {number(start)} to {number(end)}{until}.")


def is_metric(key: str) -> bool:
    """Whether the key is an evaluation metric."""
    return key.startswith("eval/")


def best(key: str, series: Series) -> tuple[int, float] | None:
    """Step and value of the best finite point; None without one, or when the direction is not known."""
    finite, way = series.finite, direction(key)
    if way is None or not len(finite):
        return None
    at = int(finite.values.argmin() if way == "lower" else finite.values.argmax())
    return int(finite.steps[at]), float(finite.values[at])


def metric_course(key: str, series: Series) -> Finding | None:
    """The last and the best value of an evaluation metric."""
    if not len(series.finite):
        return None
    last, top = series.finite, best(key, series)
    text = f"{label(key)}: {quantity(key, last.values[-1])} at step {int(last.steps[-1]):,}"
    if top is None or len(last) == 1:
        return Finding("good", f"{text}.")
    if top[1] == last.values[-1]:
        return Finding("good", f"{text}, its best.")
    return Finding("good", f"{text}; best {quantity(key, top[1])} at step {top[0]:,}.")


def test_result(key: str, series: Series) -> Finding | None:
    """The final value of a test metric."""
    return Finding("good", f"{label(key)}: {quantity(key, series.finite.values[-1])}.") if len(series.finite) else None


def over_fitting(train: Series | None, evaluation: Series | None) -> Finding | None:
    """Evaluation loss that rose at least twice and 2 % above its best while the training loss went on falling."""
    if train is None or evaluation is None or len(evaluation.finite) < 3 or len(train.finite) < 2:
        return None
    points, smooth = evaluation.finite, smoothed(train.finite)
    at = int(points.values.argmin())
    lowest, last, since = points.values[at], points.values[-1], int(points.steps[at])
    then = float(np.interp(since, smooth.steps, smooth.values))
    if len(points) - 1 - at < 2 or last - lowest <= OVER_FITTING_RISE * abs(lowest) or smooth.values[-1] >= then:
        return None
    return Finding(
        "note",
        f"Over-fitting since about step {since:,}: evaluation loss rose from {number(lowest)} to {number(last)} "
        f"while training loss fell from {number(then)} to {number(smooth.values[-1])}.",
    )


def clipping(rate: Series | None) -> Finding | None:
    """The share of logged steps whose gradient was clipped."""
    if rate is None or not len(rate.finite):
        return None
    mean = float(rate.finite.values.mean())
    share = "less than 1" if 0 < mean < 0.01 else f"{100 * mean:.0f}"
    text = f"The gradient was clipped on {share} % of steps"
    if mean > ALWAYS_CLIPPED:
        return Finding("note", f"{text}: the clipping threshold sets the update length; raise it, or lower the rate.")
    return Finding("good", f"{text}.") if mean > 0 else Finding("good", "No gradient was clipped.")


def collapsed_attention(run: Run) -> list[Finding]:
    """A finding for each layer with heads whose entropy is below a tenth of its ceiling, up to the last measurement.

    In a run whose loss went, that is the trouble to look at. In one that learns, a few sharp heads are ordinary: a
    character model has heads that look at the character before and nowhere else.
    Non-finite entropies say nothing about collapse and are passed over; heads without a known ceiling are not judged.
    """
    probe = run.probes.get("attention_entropy")
    ceilings = run.ceiling(probe) if probe is not None else None
    if probe is None or ceilings is None:
        return []
    loss = run.log.get("train/loss")
    gone = (departure(loss) or stall(loss)) if loss is not None else None
    shares = share_of(probe, ceilings).values
    heads: dict[str, list[tuple[int | None, int]]] = {}
    for onset in onsets(shares, probe.steps, COLLAPSE):
        layer, head = probe.rows[onset.row]
        still = shares[onset.row][np.isfinite(shares[onset.row])][-1] < ENTROPY_COLLAPSED
        if still and (gone is None or onset.step <= gone.step):  # what came after the loss went is no cause
            heads.setdefault(layer, []).append((head, onset.step))
    level: Level = "good" if gone is None else "note" if gone.back is not None or gone.how == "stalled" else "bad"
    first = sorted(heads, key=lambda layer: min(since for _, since in heads[layer]))
    findings = [Finding(level, _collapse(layer, heads[layer], gone)) for layer in first[:MOST_LAYERS]]
    if left := first[MOST_LAYERS:]:
        layers = "another layer" if len(left) == 1 else f"{len(left):,} more layers"
        count = sum(len(heads[layer]) for layer in left)
        findings.append(Finding(level, f"The same holds for {count:,} head{'s' * (count > 1)} in {layers}."))
    return findings


def _planned(run: Run) -> str:
    """Of how many steps, when the start or resume event says it."""
    for event in reversed(run.events):
        total = event.details.get("max_steps")
        if event.kind in ("start", "resume") and isinstance(total, int) and not isinstance(total, bool):
            return f" of {total:,}"
    return ""


def _collapse(layer: str, found: list[tuple[int | None, int]], gone: Departure | None) -> str:
    first, last = min(since for _, since in found), max(since for _, since in found)
    names = [str(head) for head, _ in found if head is not None]
    heads = f" head{'s' * (len(names) > 1)} {listed(names)}" if names else ""
    since = f"since step {first:,}" if first == last else f"since steps {first:,} to {last:,}"
    before = f", {gone.step - first:,} steps before {gone.words}" if gone is not None and gone.step > first else ""
    where = f"{layer},{heads}" if heads else layer
    meaning = "attention collapsed" if gone is not None else "sharp heads, no harm while the loss goes on falling"
    return f"Attention entropy in {where} is below a tenth of its ceiling {since}{before}: {meaning}."
