"""The training loop: handed finished objects, it steps, logs, evaluates, saves and resumes."""

from tameformer.train.checkpoint import CheckpointConfig, CheckpointFolder, Snapshot
from tameformer.train.engine import Engine
from tameformer.train.evaluate import mean_metrics
from tameformer.train.events import Listener, Listeners
from tameformer.train.loop import Loop, Outcome
from tameformer.train.run import LoopConfig, Probe, Run
from tameformer.train.signals import StopRequest
from tameformer.train.step import train_step

__all__ = [
    "CheckpointConfig",
    "CheckpointFolder",
    "Engine",
    "Listener",
    "Listeners",
    "Loop",
    "LoopConfig",
    "Outcome",
    "Probe",
    "Run",
    "Snapshot",
    "StopRequest",
    "mean_metrics",
    "train_step",
]
