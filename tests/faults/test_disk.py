"""Disks that fill up, fail and forget: never loaded, always named, the older checkpoint taken, the run goes on."""

import os
import resource
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tameformer.errors import RecordError
from tameformer.recipes import launch
from tameformer.record import RunReader, RunWriter
from tameformer.report.read import read_run
from tameformer.report.verdict import judge
from tameformer.training import CheckpointFolder, Listener, Snapshot
from tameformer.training.checkpoint import MANIFEST, model_tensors

pytestmark = pytest.mark.usefixtures("unreported")
SMALL = {
    "max_steps": 8,
    "data.batch_size": 24,
    "model.dim": 16,
    "model.num_layers": 1,
    "loop.eval_steps": 8,
    "checkpoint.every": 2,
    "precision": "fp32",
}


def run(folder, resume="never", listeners=(), inject="", **overrides):
    overrides = {**SMALL, **overrides, "output_dir": str(folder)}
    return launch.train("vit-digits", overrides=overrides, resume=resume, listeners=listeners, inject=inject)


@contextmanager
def files_no_larger_than(size: int):
    """The kernel refuses to make any file larger: a write fails in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def snapshot(seed=0):
    torch.manual_seed(seed)
    return Snapshot(model_tensors(nn.Linear(40, 40)), {}, state={"step": 1})


@pytest.mark.parametrize("size", [0, 100, 3000, 6000])
def test_a_write_that_fails_in_its_middle_leaves_nothing_but_the_older_checkpoint(tmp_path, size):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, snapshot())
    with files_no_larger_than(size), pytest.raises(OSError, match=r"checkpoint of step 2 was not written: .*large"):
        folder.save(2, snapshot(1))
    assert [path.name for path in folder.folder.iterdir()] == ["step-000001"]
    assert folder.newest_verified() == (folder.path(1), [])
    folder.save(2, snapshot(1))  # with space again
    assert folder.newest_verified() == (folder.path(2), [])


@pytest.mark.skipif(
    os.geteuid() == 0, reason="nothing is read-only to root; run as root, the next test has the same errors"
)
def test_a_folder_that_became_read_only(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, snapshot())
    folder.folder.chmod(0o555)
    try:
        with pytest.raises(OSError, match=r"checkpoint of step 2 was not written: .*Permission denied"):
            folder.save(2, snapshot())
        assert folder.newest_verified() == (folder.path(1), [])
    finally:
        folder.folder.chmod(0o755)


def test_a_run_without_a_place_for_checkpoints_goes_on_and_says_so(tmp_path):
    tmp_path.joinpath("checkpoints").write_text("a file stands where the folder shall be")
    assert run(tmp_path).finished
    told = [event["message"] for event in RunReader(tmp_path).events() if event["kind"] == "checkpoint_failed"]
    assert len(told) == 4
    assert all("checkpoints" in message and message.endswith("the run goes on") for message in told)


def test_what_is_in_no_file_at_the_end_is_told_where_people_look(tmp_path):
    """The last checkpoint is tried twice; after that, words are all there is, and a resume repeats the steps."""
    (place := tmp_path / "checkpoints").write_text("a file stands where the folder shall be")
    run(tmp_path)
    events = RunReader(tmp_path).events()
    assert [event["step"] for event in events if event["kind"] == "checkpoint_retry"] == [8]
    assert "its last checkpoint could not be written" in events[-1]["message"]
    verdict = judge(read_run(tmp_path))
    assert verdict.headline.endswith("with problems.")
    assert "step 8 could not be written: all that was learned is in no file" in verdict.findings[0].text
    place.unlink()
    assert run(tmp_path, resume="auto").finished
    assert CheckpointFolder(tmp_path).steps()[-1] == 8
    assert not any("in no file" in finding.text for finding in judge(read_run(tmp_path)).findings)


def test_an_error_that_passes_costs_no_last_checkpoint(tmp_path):
    assert run(tmp_path, inject="eio@save", **{"checkpoint.every": None}).finished
    assert CheckpointFolder(tmp_path).steps() == [8]
    assert [event["kind"] for event in RunReader(tmp_path).events()][-3:] == [
        "checkpoint_retry",
        "checkpoint",
        "finish",
    ]


class Fill(Listener):
    """Fills the disk after the second checkpoint, and frees it after another has failed."""

    def __init__(self):
        self.full = None

    def on_save(self, step):
        if step == 4:
            self.full = files_no_larger_than(100)
            self.full.__enter__()

    def on_event(self, step, kind, message, details):
        if kind == "checkpoint_failed":
            self.full.__exit__(None, None, None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_run_on_a_disk_that_is_full_for_a_while_loses_no_line(tmp_path, caplog):
    """Nothing at all can be written meanwhile: the lines wait in memory, and the run ends as the clean one."""
    run(tmp_path / "clean", **{"loop.logging_steps": 1})
    assert run(tmp_path / "full", listeners=[Fill()], **{"loop.logging_steps": 1}).finished
    folder = CheckpointFolder(tmp_path / "full")
    assert folder.steps() == [4, 8]
    failed = [event for event in RunReader(tmp_path / "full").events() if event["kind"] == "checkpoint_failed"]
    assert [event["step"] for event in failed] == [6]
    assert "log.jsonl cannot be written" in caplog.text
    logs = [
        [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in RunReader(path).log()]
        for path in (tmp_path / "full", tmp_path / "clean")
    ]
    assert logs[0] == logs[1]
    one, other = (
        (path.path(8) / "model.safetensors").read_bytes() for path in (folder, CheckpointFolder(tmp_path / "clean"))
    )
    assert one == other


def test_lines_that_cannot_be_written_at_the_end_are_an_error(tmp_path):
    writer = RunWriter(tmp_path)
    writer.log(1, {"train/loss": 1.0})
    size = (tmp_path / "log.jsonl").stat().st_size
    with files_no_larger_than(size + 5):
        writer.log(2, {"train/loss": 2.0})  # its first five bytes are there
        assert [line["step"] for line in RunReader(tmp_path).log()] == [1]
        with pytest.raises(RecordError, match=r"cannot write .*log\.jsonl: .*large; free some space"):
            writer.close()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "a flipped byte": (flip, "optimizer.safetensors", "step-000008 is damaged: optimizer.safetensors differs"),
    "a truncated shard": (truncate, "model.safetensors", "step-000008 is damaged: model.safetensors differs"),
    "a deleted manifest": (
        os.remove,
        MANIFEST,
        "step-000008 is not a whole checkpoint: its manifest.json cannot be read",
    ),
    "a deleted shard": (
        os.remove,
        "model.safetensors",
        "step-000008 is not a whole checkpoint: model.safetensors is missing",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_never_loaded_always_named_and_the_older_one_taken(finished, tmp_path, what):
    """The run makes the last checkpoint again, with the same bits."""
    damage, file, message = DAMAGES[what]
    damaged = CheckpointFolder(finished).path(8)
    expected = (damaged / "model.safetensors").read_bytes()
    damage(damaged / file)
    assert run(finished, resume="auto").finished
    events = RunReader(finished).events()
    begun = max(index for index, event in enumerate(events) if event["kind"] == "resume")
    assert events[begun]["message"] == "continues from step-000006"
    assert events[begun + 1]["kind"] == "checkpoint_skipped"
    assert events[begun + 1]["message"].startswith(message)
    assert (damaged / "model.safetensors").read_bytes() == expected
