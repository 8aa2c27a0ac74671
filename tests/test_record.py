import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tameformer.errors import RecordError
from tameformer.record import (
    EVENTS,
    LOG,
    RunReader,
    RunWriter,
    cut_back,
    decode_number,
    encode_number,
    write_atomically,
)


@given(st.floats())
def test_numbers_round_trip(value):
    decoded = decode_number(json.loads(json.dumps(encode_number(value), allow_nan=False)))
    assert decoded == value or (math.isnan(decoded) and math.isnan(value))


def test_non_finite_values_stay_what_they_are(tmp_path):
    writer = RunWriter(tmp_path)
    writer.log(1, {"train/loss": math.nan, "train/grad_norm": math.inf})
    writer.close()
    assert (tmp_path / LOG).read_text() == '{"step": 1, "train/loss": "NaN", "train/grad_norm": "Infinity"}\n'
    (line,) = RunReader(tmp_path).log()
    assert math.isnan(line["train/loss"])
    assert line["train/grad_norm"] == math.inf


def test_a_resume_cuts_log_and_probes_back_and_keeps_events(tmp_path):
    writer = RunWriter(tmp_path)
    for step in (10, 20, 30):
        writer.log(step, {"train/loss": 1.0 / step})
        writer.probe(step, {"diag/x/y": 0.5})
        writer.event(step, "checkpoint", f"at {step}")
    writer.close()
    with open(tmp_path / LOG, "a") as file:
        file.write('{"step": 40, "train/lo')  # the machine lost power here
    with open(tmp_path / EVENTS, "a") as file:
        file.write('{"step": 40, "ki')
    RunWriter(tmp_path, resume_step=20).close()
    reader = RunReader(tmp_path)
    assert [line["step"] for line in reader.log()] == [10, 20]
    assert [line["step"] for line in reader.probes()] == [10, 20]
    assert [line["step"] for line in reader.events()] == [10, 20, 30]


def test_a_fresh_run_starts_fresh_files(tmp_path):
    first = RunWriter(tmp_path)
    first.log(1, {"train/loss": 1.0})
    first.close()
    RunWriter(tmp_path).close()
    assert RunReader(tmp_path).log() == []


def test_a_torn_last_line_is_passed_over_and_a_broken_one_is_named(tmp_path):
    (tmp_path / LOG).write_text('{"step": 1}\n{"step": 2')
    assert RunReader(tmp_path).log() == [{"step": 1}]
    (tmp_path / LOG).write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(RecordError, match="line 2 is not a JSON object"):
        RunReader(tmp_path).log()
    assert cut_back(tmp_path / LOG, 5) == 1
    assert [line["step"] for line in RunReader(tmp_path).log()] == [1, 3]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"holds no run: expected a file log.jsonl"):
        RunReader(tmp_path)


def test_atomic_write_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "LATEST"
    write_atomically(path, "one")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "two \ud800")
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["LATEST"]
