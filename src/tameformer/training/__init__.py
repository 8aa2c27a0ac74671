"""The training loop: handed finished objects, it steps, logs, evaluates, saves and resumes."""

from tameformer.training.checkpoint import CheckpointConfig, CheckpointFolder, Snapshot
from tameformer.training.engine import Engine
from tameformer.training.evaluate import mean_metrics
from tameformer.training.events import Listener, Listeners
from tameformer.training.loop import Loop, Outcome
from tameformer.training.run import LoopConfig, Run, Watch
from tameformer.training.signals import StopRequest
from tameformer.training.step import train_step

__all__ = [
    "CheckpointConfig",
    "CheckpointFolder",
    "Engine",
    "Listener",
    "Listeners",
    "Loop",
    "LoopConfig",
    "Outcome",
    "Run",
    "Snapshot",
    "StopRequest",
    "Watch",
    "mean_metrics",
    "train_step",
]
