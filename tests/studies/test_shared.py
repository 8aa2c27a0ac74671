"""A comparison spread over workers that share a database: each cell once, and a dead worker's cell comes back."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tameformer.record import RunReader, RunWriter
from tameformer.studies import shared
from tameformer.studies.cells import write_exit
from tameformer.studies.grid import Choice, Factor, Grid

pytest.importorskip("optuna", reason="the extra `sweep` is not installed")

GRID = Grid("vit-digits", (), (Factor("model.dim", tuple(Choice(str(n), str(n), n) for n in (8, 16, 24))),), (0,))


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "SECONDS_BETWEEN_OFFERS", 0.0)

    def open_queue(grid: Grid = GRID) -> shared.StorageQueue:
        storage = f"sqlite:///{tmp_path}/study.db"
        name = shared.study_name(tmp_path / "study", "key", grid.cells)
        return shared.StorageQueue(storage, name, tmp_path / "study", grid.cells, heartbeat_seconds=1, grace_seconds=2)

    (tmp_path / "study").mkdir()
    return open_queue


def finish(queue: shared.StorageQueue, taken) -> None:
    cell, lock = taken
    writer = RunWriter(queue.folder / cell.name)
    writer.log(1, {"eval/loss": 1.5})
    writer.event(1, "finish", "finished")
    writer.close()
    write_exit(queue.folder / cell.name, 0, "")
    os.close(lock)
    queue.settle(cell, "finished")


def test_two_workers_take_every_cell_once(queue):
    first, second = queue(), queue()
    taken = [first.take(), second.take(), first.take()]
    assert sorted(cell.name for cell, _ in taken) == sorted(cell.name for cell in GRID.cells)
    assert first.take() is None
    assert second.take() is None
    assert not first.is_done
    for owner, one in zip((first, second, first), taken, strict=True):
        finish(owner, one)
    assert first.is_done
    assert second.is_done
    assert queue().take() is None
    states = [(trial.state.name, trial.value) for trial in first._study.trials]
    assert states == [("COMPLETE", 1.5)] * 3


def test_a_cell_that_two_workers_offered_at_once_is_run_once(queue):
    first, second = queue(), queue()
    for worker in (first, second):  # as if both had looked before either had offered
        worker._study.enqueue_trial({}, user_attrs={shared.CELL: GRID.cells[0].name})
    taken = [first.take(), second.take(), first.take(), second.take()]
    names = [one[0].name for one in taken if one is not None]
    assert sorted(names) == sorted(cell.name for cell in GRID.cells)
    assert [trial.state.name for trial in first._study.trials].count("PRUNED") == 1
    for one in filter(None, taken):
        os.close(one[1])


def test_a_silent_worker_loses_its_cell_and_one_that_beats_keeps_it(queue):
    dead, alive = queue(), queue()
    cell, lock = dead.take()
    mine, my_lock = alive.take()
    os.close(lock)  # the kernel does so when a process dies
    deadline = time.monotonic() + 30
    while (other := alive.take()) is not None and other[0] != cell:
        finish(alive, other)
    while other is None:
        assert time.monotonic() < deadline
        alive.beat([mine])
        time.sleep(0.1)
        other = alive.take()
    assert other[0] == cell
    assert queue().take() is None  # mine was never offered again
    os.close(other[1])
    os.close(my_lock)


def test_an_interrupted_cell_goes_back_and_one_that_crashes_is_given_up(queue):
    worker = queue()
    taken = worker.take()
    for other in (worker.take(), worker.take()):
        finish(worker, other)
    cell, lock = taken
    write_exit(worker.folder / cell.name, 143, "")  # asked to stop: that may happen as often as anyone likes
    for _ in range(shared.MAX_CRASHES + 1):
        os.close(lock)
        worker.settle(cell, "interrupted")
        again, lock = worker.take()
        assert again == cell
    write_exit(worker.folder / cell.name, -9, "")
    for attempt in range(shared.MAX_CRASHES):
        os.close(lock)
        worker.settle(cell, "interrupted")
        found = worker.take()
        assert (found is None) == (attempt == shared.MAX_CRASHES - 1)
        if found is not None:
            lock = found[1]
    assert worker.is_done


def test_a_cell_whose_run_has_outlived_its_worker_waits(queue):
    worker = queue()
    lock = shared.try_lock(worker.folder / GRID.cells[0].name)
    names = {worker.take()[0].name for _ in range(2)}
    assert names == {cell.name for cell in GRID.cells[1:]}
    assert worker.take() is None
    os.close(lock)
    assert worker.take()[0] == GRID.cells[0]


@pytest.mark.parametrize("storage", ["study.db", "nonsense://x", "sqlite:////no/such/folder/study.db"])
def test_a_storage_that_cannot_be_opened_is_refused(storage, tmp_path):
    with pytest.raises(shared.ConfigError, match=r"expected an address such as sqlite:////shared/study.db"):
        shared.StorageQueue(storage, "name", tmp_path, GRID.cells)


def test_without_optuna_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'pip install "tameformer\[sweep\]"'):
        shared.StorageQueue("sqlite://", "name", tmp_path, GRID.cells)


WORKER = """
import sys
from pathlib import Path
from tameformer.studies.compare import conclude, run_grid
from tameformer.studies.grid import make_grid
from tameformer.studies.shared import StorageQueue, study_name
from tameformer.training.signals import StopRequest

shared_arguments = ["--max_steps=" + sys.argv[1], "--num_train_epochs=null", "--loop.logging_steps=1",
                    "--loop.eval_steps=100000", "--checkpoint.every=20", "--probes.attention_entropy=null"]
grid = make_grid("vit-digits", shared_arguments, {"model.dim": [8, 16]}, [0])


def queue(folder, key, grid):
    name = study_name(folder, key, grid.cells)
    return StorageQueue("sqlite:///study.db", name, folder, grid.cells, heartbeat_seconds=1, grace_seconds=3)


with StopRequest() as stop:
    run_grid(grid, Path("study"), jobs=1, retry_failed=False, queue=queue, stop=stop)
print(conclude(Path("study"), grid, metric="eval/loss", usable=0.1).counts())
"""


def test_two_real_workers_share_the_cells_and_one_takes_over_from_one_that_was_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", WORKER, "250"], stdout=subprocess.PIPE, text=True)

    killed, survivor = start(), start()
    deadline = time.monotonic() + 120
    runs = [Path("study/dim=8,seed=0"), Path("study/dim=16,seed=0")]
    while not all((run / "log.jsonl").is_file() and len((run / "log.jsonl").read_bytes()) > 2000 for run in runs):
        assert time.monotonic() < deadline
        assert survivor.poll() is None
        time.sleep(0.02)
    killed.kill()
    out, _ = survivor.communicate(timeout=150)
    killed.communicate(timeout=60)
    assert survivor.returncode == 0
    assert out.strip() == "{'finished': 2}"
    kinds = [[event["kind"] for event in RunReader(run).events()] for run in runs]
    assert [found.count("start") for found in kinds] == [1, 1]
    assert sorted(found.count("resume") for found in kinds) == [0, 1]  # one was taken over, the other never touched
    assert [found.count("finish") for found in kinds] == [1, 1]
    for run in runs:
        assert [line["step"] for line in RunReader(run).log() if "train/loss" in line] == list(range(1, 251))
