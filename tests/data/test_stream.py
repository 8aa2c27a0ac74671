import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tameformer.data import SequentialBatches, ShuffledBatches, single_pass, stream, uniforms
from tameformer.errors import DataError


class Numbers:
    """Sample i is i and its own random numbers."""

    def __init__(self, size=50, fail_at=None, error=DataError):
        self.size, self.fail_at, self.error = size, fail_at, error

    def __len__(self):
        return self.size

    def fetch(self, keys):
        if self.fail_at in keys.indices:
            raise self.error(f"sample {self.fail_at} is broken")
        noise = torch.from_numpy(uniforms(keys, 3, "noise"))
        return {"index": torch.from_numpy(keys.indices), "noise": noise, "pid": os.getpid(), "num_items": len(keys)}


def joined(step):
    return {name: torch.cat([part[name] for part in step]) for name in ("index", "noise")}


def assert_same_steps(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for name in ("index", "noise"):
            assert torch.equal(joined(one)[name], joined(other)[name])


@pytest.fixture
def plan():
    return ShuffledBatches(50, 12, 3)


@pytest.fixture
def reference(plan):
    return [[Numbers().fetch(plan.batch(step))] for step in range(10)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 4, 5])
def test_batches_do_not_depend_on_workers_or_accumulation(plan, reference, workers, accumulation):
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    steps = list(stream(Numbers(), plan, start=0, stop=10, accumulation=accumulation, num_workers=workers))
    assert all(len(step) == accumulation for step in steps)
    assert_same_steps(steps, reference)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
    assert (steps[0][0]["pid"] == os.getpid()) == (workers == 0)


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (3, 2)])
def test_batches_do_not_depend_on_the_number_of_processes(plan, reference, world, accumulation):
    ranks = [
        stream(Numbers(), plan, start=0, stop=10, rank=rank, world_size=world, accumulation=accumulation)
        for rank in range(world)
    ]
    together = [[part for step in steps for part in step] for steps in zip(*ranks, strict=True)]
    assert_same_steps(together, reference)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 4, 9])
def test_any_step_can_be_the_first(plan, reference, workers, start):
    assert_same_steps(list(stream(Numbers(), plan, start=start, stop=10, num_workers=workers)), reference[start:])


def test_starting_late_costs_nothing(plan):
    begin = time.perf_counter()
    next(stream(Numbers(), plan, start=10**9, stop=10**9 + 1))
    assert time.perf_counter() - begin < 0.5


def test_an_empty_range_yields_nothing(plan):
    assert list(stream(Numbers(), plan, start=5, stop=5)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_our_errors_arrive_as_they_were_raised(plan, workers):
    with pytest.raises(DataError) as caught:
        list(stream(Numbers(fail_at=17), plan, start=0, stop=4, num_workers=workers))
    assert str(caught.value) == "sample 17 is broken"


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_keep_their_type_and_message(plan, workers):
    with pytest.raises(ZeroDivisionError, match="sample 17 is broken"):
        list(stream(Numbers(fail_at=17, error=ZeroDivisionError), plan, start=0, stop=4, num_workers=workers))


def test_too_many_parts_are_refused(plan):
    with pytest.raises(DataError, match="12 samples cannot be cut into 16 parts"):
        next(stream(Numbers(), plan, start=0, stop=1, world_size=4, accumulation=4))


def test_wrong_calls_are_refused_at_once(plan):
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        stream(Numbers(), plan, start=0, stop=1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="accumulation must be at least 1, got 0"):
        stream(Numbers(), plan, start=0, stop=1, accumulation=0)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.0, got -1"):
        single_pass(Numbers(), SequentialBatches(50, 4), rank=-1)


def test_workers_end_when_the_source_fails(plan):
    before = set(multiprocessing.active_children())
    with pytest.raises(ZeroDivisionError) as caught:  # whose traceback keeps the loader's frames
        list(stream(Numbers(fail_at=17, error=ZeroDivisionError), plan, start=0, stop=4, num_workers=2))
    assert caught.tb is not None
    assert set(multiprocessing.active_children()) == before


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_live_through_the_stream_and_end_with_it(plan):
    steps = stream(Numbers(), plan, start=0, stop=1000, num_workers=2)
    pids = {next(steps)[0]["pid"] for _ in range(12)}  # three epochs
    assert len(pids) == 2
    assert all(os.getpgid(pid) != os.getpgid(0) for pid in pids)  # Ctrl-C does not reach them
    steps.close()
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_single_pass_sees_every_sample_once(workers, world):
    plan = SequentialBatches(50, 8)
    parts = [
        list(single_pass(Numbers(), plan, rank=rank, world_size=world, num_workers=workers)) for rank in range(world)
    ]
    for rank, batches in enumerate(parts):
        wanted = [plan.batch(step).indices.tolist() for step in range(rank, 7, world)]
        assert [batch["index"].tolist() for batch in batches] == wanted
    assert sum(batch["num_items"] for batches in parts for batch in batches) == 50


def test_a_process_without_a_batch_sees_none():
    assert list(single_pass(Numbers(3), SequentialBatches(3, 8), rank=1, world_size=2)) == []


MEASURE = """
import time
from tameformer.data import ShuffledBatches, stream

class Trivial:
    def __len__(self): return 50
    def fetch(self, keys): return {"num_items": len(keys)}

def microseconds():
    begin = time.perf_counter()
    for _ in stream(Trivial(), ShuffledBatches(50, 12, 0), start=0, stop=2000): pass
    return (time.perf_counter() - begin) / 2000 * 1e6

print(min(microseconds() for _ in range(5)))
"""


def test_overhead_per_step():
    # In an interpreter of its own: here every annotation is checked, which costs ten times as much.
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 60  # measured 17, a permutation every fourth step included
