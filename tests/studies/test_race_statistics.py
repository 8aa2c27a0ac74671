"""The arithmetic of a race, against brute force, tables and other libraries."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tameformer.errors import ConfigError
from tameformer.studies.race_plan import Plan, pairs, solve
from tameformer.studies.race_statistics import effects, expected_max, rank_correlation, share


def test_the_worked_example_of_the_paper():
    assert Plan(41, 0.3, 11).cost == 20.0
    assert solve(20) == Plan(41, 0.3, 11)


@given(st.integers(3, 400).map(lambda n: n / 4), st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5]), st.integers(1, 3))
def test_a_plan_keeps_to_the_budget_and_nobody_else_could_start(budget, part, variants):
    try:
        plan = solve(budget, share=part, multiple=variants)
    except ConfigError:
        # Even the smallest race of this form is too dear: twice as many starts as the fewest that may go on.
        fewest = max(1, math.ceil(budget / 2 - max(1, budget / 10)))
        starts = math.ceil(max(2, 2 * fewest) / variants) * variants
        assert Plan(starts, part, fewest).cost > budget - 1e-9
        return
    assert plan.cost <= budget
    assert plan.starts % variants == 0
    assert plan.starts >= 2 * plan.continued
    assert Plan(plan.starts + variants, part, plan.continued).cost > budget
    reach = max(1, budget / 10)
    others = range(max(1, math.ceil(budget / 2 - reach)), math.floor(budget / 2 + reach) + 1)
    left = [
        budget - Plan(starts, part, some).cost
        for some in others
        for starts in [math.floor((budget - some * (1 - part)) / part / variants + 1e-9) * variants]
        if starts >= max(2, 2 * some)
    ]
    assert budget - plan.cost == pytest.approx(min(left), abs=1e-9)


def test_numbers_that_are_settled_stay():
    assert solve(20, starts=30) == Plan(30, 0.3, 15)
    assert solve(20, continued=4, share=0.25) == Plan(68, 0.25, 4)
    assert solve(20, starts=8, continued=2) == Plan(8, 0.3, 2)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"budget": 1},
            "a budget of 1 runs affords no such race: 2 starts to 0.3 of the run and 1 to its end cost 1.3",
        ),
        ({"budget": 20, "starts": 100}, "100 starts to 0.3 of the run"),
        ({"budget": 5, "starts": 3, "continued": 4}, "affords no such race"),
        ({"budget": 20, "share": 1.0}, "must lie between 0 and 1, got 1.0"),
        ({"budget": -1}, "budget must be positive, got -1"),
        ({"budget": 20, "starts": 5, "multiple": 2}, "starts must be a multiple of the 2 variants, got 5"),
    ],
)
def test_what_cannot_be_paid_for_is_refused(told, message):
    with pytest.raises(ConfigError, match=message):
        solve(**told)


def test_pairs_grow_and_fill_squares():
    assert pairs(41) == pairs(60)[:41]
    for side in (1, 2, 5):
        assert set(pairs(side * side)) == set(itertools.product(range(side), repeat=2))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(1, 4))
def test_the_expected_maximum_is_the_mean_over_all_draws(values, n):
    draws = [max(draw) for draw in itertools.product(values, repeat=n)]
    assert expected_max([float(value) for value in values], n) == pytest.approx(sum(draws) / len(draws))


@pytest.mark.parametrize(("count", "n"), [(0, 7), (3, 7), (7, 7), (1, 41), (20, 41)])
def test_the_interval_of_a_share_is_wilsons(count, n):
    theirs = stats.binomtest(count, n).proportion_ci(method="wilson")
    ours = share(count, n)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_ranks_with_ties_are_scipys():
    first, second = [1.0, 2.0, 2.0, 5.0, 4.0], [0.1, 0.4, 0.3, 0.3, 0.9]
    assert rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None


def test_in_a_whole_square_the_effects_are_those_of_the_textbook():
    table = np.random.default_rng(0).normal(size=(4, 5))
    rows, columns = np.indices(table.shape)
    found = effects(table.ravel().tolist(), {"row": rows.ravel().tolist(), "column": columns.ravel().tolist()})
    total = ((table - table.mean()) ** 2).sum()
    of_rows = 5 * ((table.mean(1) - table.mean()) ** 2).sum()
    of_columns = 4 * ((table.mean(0) - table.mean()) ** 2).sum()
    assert [one.share for one in found] == pytest.approx([of_rows / total, of_columns / total])
    assert [one.degrees for one in found] == [3, 4]
    rest = (total - of_rows - of_columns) / 12
    assert [one.p_value for one in found] == pytest.approx(
        [stats.f.sf(of_rows / 3 / rest, 3, 12), stats.f.sf(of_columns / 4 / rest, 4, 12)]
    )


def test_an_effect_is_found_in_the_pairs_of_a_race_and_none_where_there_is_none():
    seeds = pairs(13)
    noise = np.random.default_rng(1).normal(size=13)
    found = effects(
        [10.0 * weights + 0.01 * one for (weights, _), one in zip(seeds, noise, strict=True)],
        {"weights": [one for one, _ in seeds], "order": [one for _, one in seeds]},
    )
    assert found[0].p_value < 1e-6
    assert found[1].p_value > 0.01
    assert effects([1.0, 1.0], {"weights": [0, 1]}) == []
