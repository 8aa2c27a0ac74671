import math

import numpy as np
import pytest

from tameformer.report.loss import departure, stall
from tameformer.report.read import Run, Series, gather_probes
from tameformer.report.trouble import COLLAPSE, SIGNS, first_trouble, onsets
from tameformer.report.verdict import judge

NAN, INF = math.nan, math.inf
STEPS = np.arange(100) * 10


def course(name: str, seed: int = 0) -> Series:
    """Losses over 1,000 steps with 5 % of noise: what they do is their name."""
    time = np.arange(100)
    falling = 0.1 + 2.2 * np.exp(-time / 15)
    values = {
        "learns": falling,
        "rises": np.where(time >= 60, np.minimum(falling + 0.4 * (time - 59), 2.3), falling),
        "breaks": np.where(time >= 60, NAN, falling),
        "rises, then breaks": np.where(time >= 70, NAN, np.where(time >= 60, falling + 0.4 * (time - 59), falling)),
        "spikes": np.where((time >= 60) & (time < 63), 3.0, falling),
        "comes back": np.where((time >= 40) & (time < 70), 1.5, falling),
        "misses one": np.where(time == 60, NAN, falling),
        "is stuck": np.full(100, 2.3),
        "is flat": np.where(time < 40, falling, 0.25),
    }[name]
    noise = np.random.default_rng(seed).standard_normal(100)
    return Series(STEPS, values * np.exp((0.005 if name == "is stuck" else 0.05) * noise))


def run(loss: str | None, **probes: dict[str, np.ndarray | float]) -> Run:
    """A run of that loss, and probes by name as values over the steps by `layer` or `layer/head`."""
    lines: list[dict] = [{"step": int(step)} for step in STEPS]
    for name, places in probes.items():
        for place, values in places.items():
            for line, value in zip(lines, np.broadcast_to(values, 100).tolist(), strict=True):
                line[f"diag/{name}/{place}"] = value
    log = {} if loss is None else {"train/loss": course(loss)}
    return Run("name", log, gather_probes(lines), (), {}, "")


def from_step(step: int, then: float, before: float) -> np.ndarray:
    return np.where(step <= STEPS, then, before)


def entropies(**heads: np.ndarray | float) -> dict:
    """Heads `h0`, `h1`, ... of layer `a`, with a ceiling of 2."""
    places = {f"a/{name[1:]}": values for name, values in heads.items()}
    return {"attention_entropy": places, "attention_entropy_max": {"a": 2.0}}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "how", "first", "last"),
    [
        ("learns", None, 0, 0),
        ("spikes", None, 0, 0),
        ("is flat", None, 0, 0),
        ("is stuck", None, 0, 0),
        ("rises", "rose", 560, 610),
        ("breaks", "broke", 600, 600),
        ("rises, then breaks", "rose", 560, 610),
        ("misses one", "broke", 600, 600),
        ("comes back", "rose and came back", 360, 410),
    ],
)
def test_where_the_loss_leaves_its_course(name, how, first, last, seed):
    gone = departure(course(name, seed))
    assert (gone.how if gone is not None else None) == how
    if gone is not None:
        assert first <= gone.step <= last
        assert (gone.back is not None) == (how == "rose and came back")
        assert gone.back is None or 690 <= gone.back <= 740


def test_only_a_loss_that_hardly_fell_is_stalled():
    assert [name for name in ("learns", "rises", "is flat", "is stuck") if stall(course(name)) is not None] == [
        "is stuck"
    ]
    assert stall(Series(STEPS[:11], np.full(11, 2.3))) is None  # too few records to tell


def test_the_edges_of_a_course():
    assert departure(Series(STEPS[:0], np.zeros(0))) is None
    assert departure(Series(STEPS[:5], np.array([1.0, 2.0, 3.0, 4.0, 5.0]))) is None  # too few to tell from noise
    never = departure(Series(STEPS[:3], np.full(3, NAN)))
    assert never is not None
    assert (never.step, never.how) == (0, "broke")


@pytest.mark.parametrize(
    ("line", "step", "turned"),
    [
        ([1, 1, 0.05, 0.05, 0.05], 20, True),
        ([1, 0.05, 0.15, 0.05, 0.05], 10, True),  # flickers around the limit: one sign
        ([1, 0.05, 0.25, 0.05, 0.05], 30, True),  # was over in between
        ([0.05, 0.05, 0.05, 0.05, 0.05], 0, False),
        ([1, 0.05, NAN, INF, 0.05], 10, True),
        ([1, 1, 1, 1, 0.05], None, None),  # after `until`
        ([1, 0.05, 0.05, 0.5, 0.05], None, None),  # over at `until`
        ([1, 0.1, 0.1, 0.1, 0.1], None, None),  # at the limit, not beyond it
        ([NAN, NAN, NAN, NAN, 0.05], None, None),
    ],
)
def test_a_sign_begins_where_it_last_set_in_for_good(line, step, turned):
    found = onsets(np.array([line], dtype=float), np.arange(5) * 10, COLLAPSE, until=30)
    assert [(onset.step, onset.turned) for onset in found] == ([] if step is None else [(step, turned)])


@pytest.mark.parametrize(
    ("loss", "words"), [("rises", "before the loss rose"), ("breaks", "100 steps before the loss")]
)
def test_the_head_that_collapsed_before_the_loss_went_is_named(loss, words):
    heads = entropies(h0=1.9, h1=from_step(500, 0.1, 1.9), h2=from_step(540, 0.1, 1.9), h3=from_step(800, 0.1, 1.9))
    found = first_trouble(run(loss, **heads))
    assert found is not None
    assert (found.step, found.probe, found.layer, found.head, found.level) == (500, "attention_entropy", "a", 1, "bad")
    assert found.text.startswith("First sign of trouble at step 500: head 1 of a has attention entropy below a tenth")
    assert words in found.text
    assert "The same holds in 1 more head before the loss" in found.text
    assert "Measured every 10 steps." in found.text
    (told,) = [it for it in judge(run(loss, **heads)).findings if it.text == found.text]
    assert told.level == "bad"


@pytest.mark.parametrize("loss", ["learns", "is flat", "spikes", None])
def test_sharp_heads_large_activations_and_dead_heads_of_a_run_that_learns_are_no_trouble(loss):
    ordinary = {
        **entropies(h0=from_step(500, 0.01, 1.9)),
        "activation_absmax": {"a": from_step(500, 5000.0, 1.0)},
        "head_output": {"a/0": from_step(500, 1e-4, 0.5)},
        "dead_units": {"a": from_step(500, 0.99, 0.1)},
        "attention_logit_max": {"a/0": from_step(500, 2000.0, 10.0)},
    }
    assert first_trouble(run(loss, **ordinary)) is None


def test_a_head_that_was_sharp_long_before_is_not_blamed():
    found = first_trouble(run("rises", **entropies(h0=from_step(100, 0.1, 1.9), h1=1.9)))
    assert found is not None
    assert (found.probe, found.layer, found.head) == ("train/loss", "", None)
    assert "no probe showed a sign before" in found.text


def test_a_head_that_fell_goes_before_one_that_was_always_sharp():
    short = entropies(h0=0.1, h1=from_step(50, 0.1, 1.9))
    loss = Series(STEPS, np.where(STEPS >= 120, NAN, 2.0))
    found = first_trouble(Run("name", {"train/loss": loss}, run(None, **short).probes, (), {}, ""))
    assert found is not None
    assert (found.head, found.step) == (1, 50)


@pytest.mark.parametrize(
    ("probe", "before", "beyond", "within"),
    [
        ("attention_logit_max", 10.0, 1100.0, 900.0),
        ("rank_residual", 0.5, 0.009, 0.011),
        ("activation_rms", 0.02, 2.1, 1.9),
        ("activation_absmax", 3.0, 310.0, 290.0),
        ("dead_units", 0.1, 0.95, 0.85),
        ("head_output", 0.3, 0.009, 0.011),
    ],
)
def test_every_sign_counts_beyond_its_limit_and_not_within(probe, before, beyond, within):
    place = "a/0" if probe in ("attention_logit_max", "head_output") else "a"
    seen = [first_trouble(run("breaks", **{probe: {place: from_step(550, then, before)}})) for then in (beyond, within)]
    assert [(it.step, it.probe) for it in seen if it is not None] == [(550, probe), (600, "train/loss")]


def test_logits_at_which_every_known_run_diverged_are_trouble_by_themselves():
    found = first_trouble(run("learns", attention_logit_max={"a/3": from_step(700, 20_000.0, 10.0)}))
    assert found is not None
    assert (found.step, found.head, found.loss) == (700, 3, None)
    assert "Wortsman et al. 2023" in found.text


def test_a_probe_that_is_not_finite_is_trouble_though_the_loss_goes_on():
    values = np.where(STEPS == 300, NAN, 1.0)
    found = first_trouble(run("learns", activation_rms={"b": 1.0, "c": values}))
    assert found is not None
    assert (found.step, found.probe, found.layer) == (300, "activation_rms", "c")
    assert "not finite" in found.text


def test_a_quotient_of_zeros_is_trouble_only_after_a_finite_value():
    start = np.where(STEPS < 50, INF, 1e-3)
    assert first_trouble(run("learns", update_ratio={"gate": start})) is None
    found = first_trouble(run("learns", update_ratio={"gate": np.where(STEPS == 500, NAN, start)}))
    assert found is not None
    assert found.step == 500


def test_a_value_not_finite_long_before_the_loss_went_is_told_but_not_blamed():
    early = run("rises", activation_rms={"b": np.where(STEPS == 20, NAN, 1.0)})
    found = first_trouble(early)
    assert found is not None
    assert found.probe == "train/loss"
    assert any("1 probed value is not finite, first at step 20" in finding.text for finding in judge(early).findings)
    ever_since = first_trouble(run("rises", activation_rms={"b": from_step(20, NAN, 1.0)}))
    assert ever_since is not None
    assert (ever_since.step, ever_since.probe) == (20, "activation_rms")


def test_a_run_that_never_learnt_is_explained_by_its_signs_or_not_at_all():
    found = first_trouble(run("is stuck", rank_residual={"a": from_step(30, 1e-3, 0.5)}))
    assert found is not None
    assert (found.step, found.level) == (30, "note")
    assert "before the loss stopped falling" in found.text
    assert first_trouble(run("is stuck", rank_residual={"a": 0.5})) is None


def test_a_loss_that_came_back_is_a_note():
    found = first_trouble(run("comes back", **entropies(h0=from_step(350, 0.1, 1.9))))
    assert found is not None
    assert (found.step, found.level) == (350, "note")
    assert "until step 7" in found.text


def test_without_probes_the_gradient_or_the_loss_itself_is_where_it_began():
    loss = course("breaks")
    alone = first_trouble(Run("name", {"train/loss": loss}, {}, (), {}, ""))
    assert alone is not None
    assert (alone.step, alone.probe) == (600, "train/loss")
    assert "no probe was watching" in alone.text
    norm = Series(STEPS, np.where(STEPS == 580, INF, 1.0))
    found = first_trouble(Run("name", {"train/loss": loss, "train/grad_norm": norm}, {}, (), {}, ""))
    assert found is not None
    assert (found.step, found.probe) == (580, "train/grad_norm")
    assert first_trouble(Run("name", {"train/loss": course("learns"), "train/grad_norm": norm}, {}, (), {}, "")) is None
    assert first_trouble(Run("name", {}, {}, (), {}, "")) is None


def test_every_sign_says_where_its_limits_come_from_and_leaves_them_on_the_healthy_side():
    for sign in SIGNS:
        assert sign.source.startswith(("chosen here", "Wortsman"))
        assert sign.leave <= sign.enter if sign.side == "above" else sign.leave >= sign.enter
