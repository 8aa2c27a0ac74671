import json
import math

import numpy as np
import pytest

from run_folders import write_run
from tameformer.errors import RecordError
from tameformer.report.read import clean, gather_probes, gather_series, parse_probe_key, read_run


def test_series_are_sorted_by_step_and_the_last_telling_of_a_step_counts():
    lines = [{"step": 20, "a": 2.0}, {"step": 10, "a": 1, "b": math.nan}, {"step": 20, "a": 3.0}]
    found = gather_series(lines)
    assert found["a"].steps.tolist() == [10, 20]
    assert found["a"].values.tolist() == [1.0, 3.0]
    assert found["b"].non_finite_steps.tolist() == [10]
    assert len(found["b"].finite) == 0


def test_what_is_no_number_or_has_no_step_is_passed_over():
    lines = [{"a": 1.0}, {"step": "x", "a": 1.0}, {"step": math.nan, "a": 1.0}]
    assert gather_series([*lines, {"step": 1, "a": "no", "b": True, "c": 10**400}]) == {}


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("diag/entropy/a.b/3", ("entropy", "a.b", 3)),
        ("diag/norm/a.b", ("norm", "a.b", None)),
        ("diag/norm/0", ("norm", "0", None)),
        ("diag/norm/a/b/c", ("norm", "a/b/c", None)),
        ("train/loss", None),
        ("diag/norm", None),
    ],
)
def test_probe_keys(key, place):
    assert parse_probe_key(key) == place


def test_probe_rows_keep_the_layers_order_and_sort_the_heads():
    keys = ["diag/p/b/10", "diag/p/b/9", "diag/p/a/0"]
    probe = gather_probes([{"step": 5, **dict.fromkeys(keys, 1.0)}, {"step": 6, keys[0]: math.nan}])["p"]
    assert probe.rows == (("b", 9), ("b", 10), ("a", 0))
    np.testing.assert_array_equal(probe.values, [[1, math.nan], [1, math.nan], [1, math.nan]])
    assert probe.measured.tolist() == [[True, False], [True, True], [True, False]]


def test_a_ceiling_holds_until_the_next_one_and_is_unknown_before_the_first(tmp_path):
    folder = write_run(tmp_path / "run", steps=0)
    key, bound = "diag/entropy/a/0", "diag/entropy_max/a"
    lines = [{"step": step, key: 1.0} for step in range(4)]
    lines[1][bound], lines[3][bound] = 2.0, 3.0
    (folder / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    np.testing.assert_array_equal(run.ceiling(run.probes["entropy"]), [[math.nan, 2, 2, 3]])
    assert [probe.name for probe in run.drawn_probes()] == ["entropy"]


def test_damaged_parts_become_remarks_and_a_torn_last_line_is_no_damage(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "env.json").write_text("")
    (folder / "events.jsonl").write_text('{"step": 1, "ki{"step": 2}\n')
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 999, "train/lo')
    run = read_run(folder)
    assert run.last_step == 400
    assert [remark.split(" ")[0] for remark in run.remarks] == ["events.jsonl", "env.json"]


def test_a_damaged_log_is_refused_with_its_line(tmp_path):
    folder = write_run(tmp_path / "run", steps=0)
    (folder / "log.jsonl").write_text('{"step": 0}\nnonsense\n')
    with pytest.raises(RecordError, match=r"log.jsonl, line 2 is not a JSON object"):
        read_run(folder)
    (folder / "log.jsonl").write_text("3\n")
    with pytest.raises(RecordError, match=r"not a JSON object; remove that line"):
        read_run(folder)


def test_characters_that_no_page_can_hold_are_replaced():
    assert clean("a\x00b\ud800c\td") == "a\ufffdb\ufffdc\td"
