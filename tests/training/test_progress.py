import json

import pytest

from tameformer.errors import CheckpointError
from tameformer.training.progress import Progress
from tameformer.training.run import epochs
from tameformer.training.selection import Selection


def somewhere() -> Progress:
    progress = Progress(Selection("eval/loss"), step=7, skipped=2, passed_over=3, anchors=[3, 6], parts=2)
    progress.selection.update(6, {"eval/loss": 1.5})
    progress.interval.add(2.0, 0.5, 32.0, clip={"clipped": 1.0, "limit": 0.7})
    progress.metrics = {"train/loss": 2.0, "perf/step_seconds": 0.1}
    return progress


def test_what_is_saved_is_where_the_run_stands_but_for_speed():
    saved = json.loads(json.dumps(somewhere().state()))
    loaded = Progress(Selection(None))
    loaded.load(saved, max_steps=10)
    expected = somewhere()
    del expected.metrics["perf/step_seconds"]
    assert loaded == expected
    assert loaded.position == 10


def test_a_finished_run_goes_on_when_it_is_made_longer():
    progress, state = Progress(Selection(None)), {**somewhere().state(), "status": "finished"}
    progress.load(state, max_steps=7)
    assert progress.status == "finished"
    progress.load(state, max_steps=8)
    assert progress.status == "running"
    progress.load({**state, "status": "early_stopped"}, max_steps=8)
    assert progress.status == "early_stopped"


def test_a_checkpoint_beyond_the_end_is_refused():
    with pytest.raises(CheckpointError, match="is of step 7, beyond the run's end at step 6; raise max_steps"):
        Progress(Selection(None)).load(somewhere().state(), max_steps=6)


def test_going_back_does_not_forget_that_memory_ran_out():
    progress, state = Progress(Selection(None), parts=8), somewhere().state()
    progress.load(state, max_steps=10)
    assert progress.parts == 8
    del state["parts"]  # of a run begun before it was kept
    progress.load(state, max_steps=10)
    assert progress.parts == 8


class Growing:
    """Epochs of 1, 2, 3, ... steps."""

    def locate(self, step: int) -> tuple[int, int]:
        epoch = 0
        while step > epoch:
            step -= epoch + 1
            epoch += 1
        return epoch, step

    def steps_in_epoch(self, epoch: int) -> int:
        return epoch + 1


def test_epochs_count_shares_of_each():
    assert [epochs(Growing(), position) for position in range(7)] == [0, 1, 1.5, 2, 2 + 1 / 3, 2 + 2 / 3, 3]
