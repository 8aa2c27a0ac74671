import math

import numpy as np
import pytest

from tameformer.report.loss import smoothed
from tameformer.report.read import Event, Run, Series, gather_probes
from tameformer.report.verdict import (
    best,
    clipping,
    collapsed_attention,
    judge,
    loss_course,
    metric_course,
    non_finite,
    over_fitting,
    run_state,
)
from tameformer.report.wording import direction, fitted, label, number, quantity

NAN, INF = math.nan, math.inf


def series(*values: float, every: int = 10) -> Series:
    return Series(np.arange(len(values)) * every, np.array(values, dtype=float))


def run(log: dict[str, Series], *kinds: str, probes: list[dict] | None = None) -> Run:
    last = max((int(s.steps[-1]) for s in log.values()), default=0)
    events = tuple(Event(last if kind in ("stop", "finish") else 0, kind, "", {"max_steps": 900}) for kind in kinds)
    return Run("name", log, gather_probes(probes or []), events, {}, "")


@pytest.mark.parametrize(
    ("values", "kinds", "state", "words"),
    [
        ((), (), "empty", "Nothing has been logged yet."),
        ((2.0, 1.0), ("start", "finish"), "finished", "Finished at step 10."),
        ((2.0, 1.0), ("start", "stop"), "stopped", "Stopped at step 10, before its end."),
        ((2.0, 1.0), ("start", "stop", "resume"), "unfinished", "The last record is of step 10 of 900."),
        ((2.0, 1.0), (), "unfinished", "The last record is of step 10."),
        ((2.0, NAN, NAN), ("start",), "diverged", "Diverged: the loss is not finite since step 10."),
        ((2.0, NAN, INF), ("start", "stop"), "diverged", "since step 10; it was stopped at step 20."),
        ((NAN, 2.0, INF), ("finish",), "diverged", "since step 20; it ran to its end at step 20."),
        ((NAN, NAN), (), "diverged", "since step 0."),
        ((2.0, NAN, 1.0), ("finish",), "finished", "Finished at step 20."),
    ],
)
def test_the_state_is_told_from_the_last_loss_and_the_last_event(values, kinds, state, words):
    log = {"train/loss": series(*values)} if values else {}
    told, sentence = run_state(run(log, *kinds))
    assert told == state
    assert sentence.endswith(words) or words in sentence


def test_non_finite_values_are_counted_over_all_series_and_the_first_is_named():
    found = non_finite({"train/loss": series(1, 1, NAN), "train/grad_norm": series(1, INF, -INF), "a": series(1)})
    assert found is not None
    assert (found.level, found.text) == ("bad", "3 logged values are not finite, first at step 10 (train/grad_norm).")
    assert non_finite({"train/loss": series(1, 2)}) is None


@pytest.mark.parametrize(
    ("values", "level", "words"),
    [
        ((2.0, 1.0, 0.5), "good", "fell from 2 to 0.5."),
        ((2.0, NAN, 0.5), "good", "fell from 2 to 0.5."),
        ((2.0, 0.5, 1.8), "bad", "fell from 2 to 0.5 by step 10, then rose to 1.8."),
        ((2.0, 0.5, 7.0), "bad", "rose from 2 to 7 (lowest 0.5, step 10)."),
        ((2.0, INF, 3.0), "bad", "rose from 2 to 3 (lowest 2, step 0)."),
    ],
)
def test_the_course_of_the_loss(values, level, words):
    found = loss_course(series(*values))
    assert found is not None
    assert found.level == level
    assert found.text.endswith(words)


def test_no_course_without_two_finite_losses():
    assert loss_course(None) is None
    assert loss_course(series(1.0, NAN)) is None


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("eval/accuracy", (0.5, 0.9, 0.8), "Evaluation accuracy: 80.00 % at step 20; best 90.00 % at step 10."),
        (
            "eval/accuracy_longer",
            (0.5, 0.25),
            "Evaluation accuracy, longer strings: 25.00 % at step 10; best 50.00 % at step 0.",
        ),
        ("eval/wer", (1.25, 0.2662), "Evaluation WER: 26.62 % at step 10, its best."),
        ("eval/loss", (0.5, 0.2, 0.3), "Evaluation loss: 0.3 at step 20; best 0.2 at step 10."),
        ("eval/loss", (0.5, 0.2), "Evaluation loss: 0.2 at step 10, its best."),
        ("eval/bleu", (NAN, 31.25, NAN), "Evaluation BLEU: 31.25 at step 10."),
        ("eval/gate", (1.0, 2.0), "Evaluation gate: 2 at step 10."),
    ],
)
def test_last_and_best_of_a_metric(key, values, words):
    found = metric_course(key, series(*values))
    assert found is not None
    assert found.text == words


def test_directions_and_bests_ignore_non_finite_values():
    assert [direction(f"eval/{name}") for name in ("perplexity_per_byte", "wer", "accuracy", "f1", "matthews", "answer")] == [
        "lower", "lower", "higher", "higher", "higher", None]  # fmt: skip
    assert best("eval/loss", series(-INF, 3.0, NAN, 2.0)) == (30, 2.0)
    assert best("eval/accuracy", series(INF, 0.5)) == (10, 0.5)
    assert best("eval/loss", series(NAN)) is None


@pytest.mark.parametrize(
    ("train", "evaluation", "found"),
    [
        ((3, 2, 1, 0.5, 0.2), (2.0, 1.5, 1.0, 1.2, 1.4), True),
        ((3, 2, 1, 0.5, 0.2), (2.0, 1.5, 1.0, 1.2, 1.01), False),  # back within 2 % of the best
        ((3, 2, 1, 0.5, 0.2), (2.0, 1.5, 1.2, 1.0, 1.4), False),  # one rise is no trend
        ((3, 2, 1, 1.5, 2.0), (2.0, 1.5, 1.0, 1.2, 1.4), False),  # training loss rises too
        ((3, 2, 1, 0.5, 0.2), (2.0, 1.5, 1.0, NAN, 1.4), False),
    ],
)
def test_over_fitting(train, evaluation, found):
    finding = over_fitting(series(*train), series(*evaluation))
    assert (finding is not None) == found
    if finding is not None:
        assert finding.text.startswith("Over-fitting since about step 20: evaluation loss rose from 1 to 1.4 while")


@pytest.mark.parametrize(
    ("rates", "level", "words"),
    [
        ((0.0, 0.0), "good", "No gradient"),
        ((0.001, 0.0), "good", "on less than 1 % of steps."),
        ((0.5, NAN), "good", "on 50 % of steps."),
        ((1.0, 0.95), "note", "98 %"),
    ],
)
def test_the_clip_rate_is_a_mean_over_finite_records(rates, level, words):
    found = clipping(series(*rates))
    assert found is not None
    assert found.level == level
    assert words in found.text


def entropies(*rows: tuple[float, float], ceiling: float = 2.0) -> list[dict]:
    """One probe line a row, of heads 0 and 1 of layer `a`."""
    keys = ("diag/attention_entropy/a/0", "diag/attention_entropy/a/1")
    return [
        {"step": 10 * number, **dict(zip(keys, row, strict=True)), "diag/attention_entropy_max/a": ceiling}
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (((2, 2), (2, 0.1), (2, 0.1)), "in a, head 1 is below a tenth of its ceiling since step 10:"),
        (((2, 2), (0.1, 2), (0.1, 0.1)), "in a, heads 0 and 1 is below a tenth of its ceiling since steps 10 to 20:"),
        (((2, 0.1), (2, 2), (2, 0.1)), "head 1 is below a tenth of its ceiling since step 20:"),
        (((2, 2), (2, 0.1), (2, NAN)), "head 1 is below a tenth of its ceiling since step 10:"),
        (((2, 0.1), (2, 0.1), (2, 2)), None),  # recovered
        (((2, NAN), (2, NAN), (2, NAN)), None),
        (((2, 0.21), (2, 0.21), (2, 0.21)), None),
    ],
)
def test_collapsed_heads_are_named_with_the_step_it_began(rows, words):
    found = collapsed_attention(run({}, probes=entropies(*rows)))
    assert [words in finding.text for finding in found] == ([True] if words else [])


def test_heads_without_a_positive_ceiling_are_not_judged():
    lines = entropies((0.0, 0.0), ceiling=0.0)
    assert collapsed_attention(run({}, probes=lines)) == []
    without = [{key: value for key, value in line.items() if "max" not in key} for line in lines]
    assert collapsed_attention(run({}, probes=without)) == []


def test_a_collapse_says_how_long_before_the_loss_it_came():
    log = {"train/loss": series(2.0, 1.0, 1.0, NAN)}
    (found,) = collapsed_attention(run(log, probes=entropies((2, 2), (2, 0.1))))
    assert "since step 10, 20 steps before the loss broke: attention collapsed." in found.text
    assert found.level == "bad"


def test_sharp_heads_of_a_run_that_learns_are_no_trouble():
    (found,) = collapsed_attention(run({"train/loss": series(2.0, 1.0)}, probes=entropies((2, 2), (2, 0.1))))
    assert (found.level, "no harm while the loss goes on falling" in found.text) == ("good", True)


def test_a_loss_that_stopped_falling_is_not_said_to_go_on_falling():
    log = {"train/loss": series(4.0, *[3.0] * 60)}
    (found,) = collapsed_attention(run(log, probes=entropies((2, 2), (2, 0.1))))
    assert (found.level, "goes on falling" in found.text) == ("note", False)


def test_steps_that_were_skipped_are_counted():
    log = {"train/loss": series(2.0, 1.0)}
    told = [
        " ".join(finding.text for finding in judge(run(log, *["step_skipped"] * n, "finish")).findings)
        for n in (0, 1, 3)
    ]
    assert "skipped" not in told[0]
    assert "The guard skipped one step, at step 0." in told[1]
    assert "The guard skipped 3 steps, the last at step 0." in told[2]


def test_the_verdict_tells_the_worst_first_and_grades_the_run():
    good = judge(run({"train/loss": series(2.0, 1.0)}, "finish"))
    assert (good.level, good.headline) == ("good", "Finished at step 10.")
    bad = judge(run({"train/clip_rate": series(1.0), "train/loss": series(2.0, NAN, 1.0)}, "finish"))
    assert (bad.level, bad.headline) == ("bad", "Finished at step 20, with problems.")
    assert [finding.level for finding in bad.findings] == ["bad", "note", "good"]
    assert judge(run({"train/loss": series(2.0, 1.0)}, "stop")).level == "note"


def test_long_names_stay_different_from_each_other():
    sides = [f"{side}.stack.layers.{layer}.cross_attention" for side in ("encoder", "decoder") for layer in (3, 12)]
    for limit in (24, 30):
        told = fitted(sides, limit)
        assert len(set(told)) == 4
        assert max(map(len, told)) <= limit
    assert fitted(["a.layers.0", "b"], 24) == ["a.layers.0", "b"]  # as they are where there is room
    assert fitted(["layers.0.xxxxxxxx", "blocks.0.xxxxxxxx"], 16) == ["layers.0\u2026xxxxxxx", "blocks.0\u2026xxxxxxx"]


def test_smoothing_keeps_a_straight_line_away_from_its_ends_and_a_constant_everywhere():
    line = smoothed(series(*np.arange(300.0))).values
    np.testing.assert_allclose(line[20:-20], np.arange(20.0, 280.0), rtol=1e-12)
    np.testing.assert_allclose(smoothed(series(*np.full(50, 0.3))).values, 0.3, rtol=1e-12)
    assert smoothed(series(1, 5, 2)).values.tolist() == [1, 5, 2]


def test_smoothing_is_a_triangular_mean():
    values = np.random.default_rng(0).normal(size=90)
    weights = np.array([1, 2, 3, 4, 3, 2, 1]) / 16  # half-width 3: a thirtieth of the points
    slow = [sum(w * values[i + k - 3] for k, w in enumerate(weights)) for i in range(3, 87)]
    np.testing.assert_allclose(smoothed(series(*values)).values[3:-3], slow, rtol=1e-12)


def test_numbers_are_short_and_say_when_they_are_none():
    assert [number(x) for x in (0.0, 1e-5, 999.96, 12345.6, 2e12, -INF, NAN)] == [
        "0", "1e-05", "1000", "12,346", "2e+12", "\u2212\u221e", "NaN",
    ]  # fmt: skip
    assert quantity("eval/accuracy", 0.97345) == "97.34 %"
    assert quantity("eval/bleu", 0.5) == "0.5"
    assert [quantity("test/cer", value) for value in (0.058, 1.1, 27.5)] == ["5.80 %", "110.00 %", "27.5"]
    assert [label(f"eval/{name}") for name in ("cer", "bleu_lowercased")] == [
        "Evaluation CER",
        "Evaluation BLEU lowercased",
    ]


def test_probed_values_that_are_not_finite_are_told_with_where_the_first_was():
    log = {"train/loss": series(2.0, 1.5, 1.0)}
    heads = {"diag/attention_entropy/b/0": (1.0, 1.0, 1.0), "diag/attention_entropy/b/1": (1.0, NAN, NAN)}
    values = {**heads, "diag/activation_rms/a": (1.0, 1.0, INF)}
    lines = [{"step": 10 * at, **{key: some[at] for key, some in values.items()}} for at in range(3)]
    told = [finding.text for finding in judge(run(log, probes=lines)).findings]
    assert "3 probed values are not finite, first at step 10 (attention entropy in b, head 1)." in told
    told = [finding.text for finding in judge(run(log, probes=lines[:1])).findings]
    assert not any("not finite" in one for one in told)
