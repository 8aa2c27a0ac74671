"""Each detector on measurements made for it, and all of them together under interruption."""

import json
import math
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tameformer.health.detectors import (
    ClipRate,
    DataWait,
    Detectors,
    DetectorsConfig,
    EntropyCollapse,
    LogitGrowth,
    LossScale,
    NotFinite,
    OverFitting,
    RankCollapse,
    Stalled,
    UpdateNormRise,
    VanishingGradient,
    prior_loss,
)

NAN = math.nan
HEADS = [f"layers.{layer}/{head}" for layer in range(2) for head in range(2)]


def told(detector, lines):
    """Steps and sentences of the verdicts on lines of values, ten steps apart."""
    found = [(10 * number, detector.observe(10 * number, values)) for number, values in enumerate(lines, start=1)]
    return [(step, verdict) for step, verdict in found if verdict is not None]


def steps(found):
    return [step for step, _ in found]


def entropies(*values, loss=None):
    line = {f"diag/attention_entropy/{head}": value for head, value in zip(HEADS, values, strict=True)}
    line |= {"diag/attention_entropy_max/layers.0": 4.0, "diag/attention_entropy_max/layers.1": 4.0}
    return line if loss is None else {**line, "train/loss": loss}


def test_one_sharp_head_is_no_collapse_while_the_loss_falls():
    lines = [entropies(3.0, 3.0, 3.0, 0.01, loss=3.0 - 0.05 * number) for number in range(40)]
    assert told(EntropyCollapse(), lines) == []


def test_a_head_is_blamed_when_the_loss_rises_after_it():
    before = [entropies(3.0, 3.0, 3.0, 3.0, loss=3.0 - 0.1 * number) for number in range(20)]
    sharp = [entropies(3.0, 3.0, 3.0, 0.01, loss=1.1) for _ in range(5)]
    gone = [entropies(3.0, 3.0, 3.0, 0.01, loss=2.5) for _ in range(10)]
    ((_, verdict),) = told(EntropyCollapse(), [*before, *sharp, *gone])
    assert verdict.places == (("layers.1", (1,)),)
    assert verdict.since == 210
    assert "50 steps before the loss rose" in verdict.text


def test_a_collapse_of_all_heads_is_told_at_once_and_again_after_a_recovery():
    well, ill = entropies(3.0, 3.0, 3.0, 3.0), entropies(0.2, 0.1, 0.3, 0.2)
    assert steps(told(EntropyCollapse(), [well, ill, ill, well, well, ill])) == [20, 60]
    flicker = [entropies(*(4 * share for share in shares)) for shares in [(0.09,) * 4, (0.15,) * 4] * 5]
    assert steps(told(EntropyCollapse(), flicker)) == [10]


def test_logits_are_told_as_they_spread_and_when_they_reach_where_runs_diverge():
    sizes = [(8, 8, 8, 8), (2e3, 8, 8, 8), (2e3, 8, 8, 8), (2e3, 2e3, 8, 8), (2e3, 2e3, 2e3, 8), (2e4, 2e3, 2e3, 8)]
    lines = [{f"diag/attention_logit_max/{head}": v for head, v in zip(HEADS, row, strict=True)} for row in sizes]
    found = told(LogitGrowth(), lines)
    assert steps(found) == [20, 40, 60]
    assert [verdict.level for _, verdict in found] == ["note", "note", "bad"]
    assert found[0][1].text.startswith("Attention logits have grown from 8 to 2,000 in layers.0 (head 0) since step 20")


def test_rank_and_gradients_must_be_low_twice_in_a_row():
    for detector, quantity, low, between, high in (
        (RankCollapse(), "rank_residual", 0.005, 0.015, 0.5),
        (VanishingGradient(), "grad_rms_over_epsilon", 0.5, 1.5, 30.0),
    ):
        values = [low, high, low, between, low, low, between, low, high, low, low]
        assert steps(told(detector, [{f"diag/{quantity}/a": value} for value in values])) == [60, 110]
    assert told(VanishingGradient(), [{"diag/grad_rms_over_epsilon/a": 0.0}] * 5) == []


def updates(sizes, rate=lambda step: 1e-3):
    return [{"diag/update_ratio/a": size * rate(step), "diag/update_ratio/b": rate(step), "train/lr": rate(step)}
            for step, size in enumerate(sizes, start=1)]  # fmt: skip


def test_updates_that_grow_beyond_their_rate_are_told():
    found = told(UpdateNormRise(), updates([1.0, 1.1, 0.9, 1.0, 1.05, 4.0, 1.0, 1.0, 4.0]))
    assert steps(found) == [60, 90]
    assert found[0][1].places == (("a", ()),)
    assert found[0][1].value == pytest.approx(math.sqrt(17 / (1 + 1)), rel=0.1)


def test_a_warm_up_is_no_rise_and_what_stays_is_the_usual_size():
    assert told(UpdateNormRise(), updates([1.0] * 30, rate=lambda step: 1e-4 * step)) == []
    assert steps(told(UpdateNormRise(), updates([1.0] * 8 + [4.0] * 20))) == [90]
    rounding = [{"diag/update_ratio/a": 1e-8 * (1 + step % 7), "train/lr": 1e-12} for step in range(30)]
    assert told(UpdateNormRise(), rounding) == []


@pytest.mark.parametrize(("losses", "when"), [
    ([2.3] * 30, [100]),
    ([2.3 - 0.05 * number for number in range(30)], []),
    ([2.3] * 5 + [1.0] * 20 + [2.4] * 30, [340]),  # what was learned is lost
    ([2.3] * 15 + [1.0] * 20 + [2.4] * 30, [100, 440]),
])  # fmt: skip
def test_a_loss_no_better_than_the_frequencies_is_a_stall(losses, when):
    found = told(Stalled(math.log(10), after=100), [{"train/loss": loss} for loss in losses])
    assert steps(found) == when


def test_without_a_trivial_loss_nothing_stalls_and_the_prior_is_the_entropy():
    assert told(Stalled(None, after=0), [{"train/loss": 9.0}] * 30) == []
    assert prior_loss([1, 1, 2]) == pytest.approx(1.5 * math.log(2))
    assert prior_loss([9, 0], label_smoothing=0.2) == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))


def course(evaluations, seed=0, noise=0.0):
    draw = random.Random(seed)
    for number, value in enumerate(evaluations):
        yield {"train/loss": 3.0 * math.exp(-0.1 * number) + 0.01 * draw.random()}
        yield {"eval/loss": value + noise * draw.gauss(0, 1)}


def test_over_fitting_is_a_rise_beyond_the_noise():
    fall = [3.0 * math.exp(-0.3 * number) + 0.5 for number in range(15)]
    rising = told(OverFitting(), course(fall + [0.5 + 0.1 * number for number in range(15)], noise=0.01))
    assert len(rising) == 1
    assert "over-fitting" in rising[0][1].text
    for seed in range(30):
        assert told(OverFitting(), course(fall + [0.53] * 60, seed, noise=0.05)) == []
    flat = [{"train/loss": 1.0}, {"eval/loss": 1.0}, {"eval/loss": 1.0}, {"eval/loss": 1.0}] + [{"eval/loss": 3.0}] * 5
    assert told(OverFitting(), flat) == []  # the training loss does not fall


def test_clipping_loss_scale_and_data_wait():
    assert steps(told(ClipRate(), [{"train/clip_rate": rate} for rate in [0.9] + [1.0] * 40])) == [310]
    assert told(ClipRate(), [{"train/clip_rate": rate} for rate in [1.0] * 20 + [0.3] * 40]) == []
    assert steps(told(ClipRate(), [{"train/clip_rate": rate} for rate in [1.0] * 40 + [0.3] + [1.0] * 40])) == [
        310,
        720,
    ]
    scales = [65536.0 / 2**number for number in range(20)] + [0.5, 32.0, 0.25]
    assert steps(told(LossScale(), [{"train/loss_scale": scale} for scale in scales])) == [180, 230]
    waits = [0.9, 0.9, 0.9, 0.9, 0.0] * 3 + [0.9] * 15 + [0.0] + [0.9] * 15
    assert steps(told(DataWait(), [{"perf/data_wait": wait} for wait in waits])) == [260, 420]


def test_what_stops_being_finite_is_told_once_and_a_quotient_may_begin_as_0_over_0():
    lines = [
        {"diag/head_output/a": NAN, "diag/head_output/b": 1.0},  # a branch that starts at zero
        {"diag/head_output/a": NAN, "diag/head_output/b": 1.0},
        {"diag/head_output/a": 1.0, "diag/head_output/b": 1.0},
        {"diag/head_output/a": NAN, "diag/head_output/b": 1.0},
        {"diag/head_output/a": NAN, "diag/head_output/b": NAN},
        {"eval/loss": 1.0},
        {"eval/loss": math.inf},
    ]
    found = told(NotFinite(), lines)
    assert steps(found) == [40, 70]
    assert found[0][1].places == (("a", ()),)
    assert found[0][1].confidence == "certain"


VALUES = st.one_of(st.floats(0.0, 5.0), st.sampled_from([NAN, math.inf, -math.inf, 0.0, 1e4, 3e4]))
KEYS = [
    "train/loss", "eval/loss", "train/clip_rate", "train/loss_scale", "train/lr",
    *(f"diag/{quantity}/{head}" for quantity in ("attention_entropy", "attention_logit_max") for head in HEADS),
    "diag/attention_entropy_max/layers.0", "diag/attention_entropy_max/layers.1",
    "diag/rank_residual/a", "diag/rank_residual/b", "diag/grad_rms_over_epsilon/a", "diag/update_ratio/a",
]  # fmt: skip
LINES = st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1), min_size=1, max_size=40)


def all_of_them():
    return DetectorsConfig().build(trivial_loss=2.3, stalled_after=50)


@settings(max_examples=60)
@given(lines=LINES, repeats=st.integers(1, 6), cut=st.integers(0, 300))
@example(lines=[{"diag/update_ratio/a": 1.0, "train/lr": 5e-324}], repeats=2, cut=1)
def test_an_interruption_changes_no_verdict(lines, repeats, cut):
    lines = lines * repeats
    straight, interrupted = all_of_them(), all_of_them()
    for step, values in enumerate(lines, start=1):
        if step == 1 + cut % len(lines):
            fresh = all_of_them()
            fresh.load(json.loads(json.dumps(interrupted.state(), allow_nan=False)))
            interrupted = fresh
        assert interrupted.observe(step, values) == straight.observe(step, values)
        assert interrupted.state() == straight.state()


@given(lines=LINES, bad=st.sampled_from([NAN, math.inf, -math.inf]))
def test_what_is_not_finite_enters_no_statistic(lines, bad):
    clean, disturbed = all_of_them(), all_of_them()
    of_not_finite = "not_finite"
    for step, values in enumerate(lines, start=1):
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        clean.observe(step, finite)
        disturbed.observe(step, finite)
        disturbed.observe(step, {"train/loss": bad, "eval/loss": bad, "train/clip_rate": bad, "train/lr": bad})
        states = [{name: state for name, state in each.state().items() if name != of_not_finite}
                  for each in (clean, disturbed)]  # fmt: skip
        assert states[0] == states[1]


def test_detectors_are_chosen_by_their_limits():
    assert "clip_rate" not in DetectorsConfig(clip_rate=None).build().state()
    assert len(Detectors().state()) == 11
    with pytest.raises(ValueError, match=r"detectors\.clip_rate is a share and must be at most 1, got 2"):
        DetectorsConfig(clip_rate=2.0)
    with pytest.raises(ValueError, match=r"detectors\.logit_growth must be positive, got -1"):
        DetectorsConfig(logit_growth=-1.0)
    with pytest.raises(ValueError, match="must have different names, got clip_rate, clip_rate"):
        Detectors([ClipRate(), ClipRate()])
