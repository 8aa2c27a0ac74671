"""A run that hangs says where, and the command ends with 124; a resume goes on."""

import signal
import threading
import time

import pytest

from tameformer.recipes.launch import train
from tameformer.record import RunReader
from tameformer.training import Engine, Listener
from tameformer.training.watchdog import Watchdog

pytestmark = pytest.mark.usefixtures("unreported")
SMALL = {
    "max_steps": 6,
    "data.batch_size": 24,
    "model.dim": 16,
    "model.num_layers": 1,
    "loop.eval_steps": 3,
    "loop.hang_timeout": 1.0,
    "precision": "fp32",
}


def watched(tmp_path, **options):
    told, ended = [], threading.Event()
    dog = Watchdog(Engine(), tmp_path, grace=0.1, tell=lambda *args: told.append(args), then=ended.set, **options)
    return dog, told, ended


def hang_here(ended):
    assert ended.wait(20)


def test_it_names_the_line_where_the_main_thread_stands(tmp_path):
    dog, told, ended = watched(tmp_path, timeout=0.2)
    with dog:
        hang_here(ended)
    ((message, details),) = told
    assert "No batch came for 0.2 s: the run hangs at threading.py:" in message
    assert "in hang_here" in details["stack"]
    assert "hang_here" in (tmp_path / "hang-rank0.txt").read_text()


@pytest.mark.parametrize("timeout", [0.4, None])
def test_it_is_silent_while_batches_come_or_nobody_asked(tmp_path, timeout):
    dog, told, _ = watched(tmp_path, timeout=timeout)
    with dog:
        for _ in range(12):
            time.sleep(0.05)
            dog._engine.batches_placed += 1
    assert told == []
    time.sleep(0.5)
    assert told == []  # and after the run


class Free(Listener):
    def on_event(self, step, kind, message, details):
        if kind == "hang":
            signal.setitimer(signal.ITIMER_REAL, 0.1)


class Released(Exception):
    pass


def test_the_run_tells_of_it_in_an_event(tmp_path):
    """In process, where nothing ends: an alarm frees the main thread from the fault."""

    def release(number, frame):
        raise Released

    before = signal.signal(signal.SIGALRM, release)
    signal.setitimer(signal.ITIMER_REAL, 30)
    try:
        with pytest.raises(Released):
            train(
                "vit-digits", overrides={**SMALL, "output_dir": str(tmp_path)}, inject="hang@eval", listeners=[Free()]
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    (event,) = (event for event in RunReader(tmp_path).events() if event["kind"] == "hang")
    assert event["step"] == 3
    assert "faults.py" in event["where"]
    assert "evaluated" in event["stack"]
