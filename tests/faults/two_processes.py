"""Several runs of two processes that are started once: `torchrun --nproc_per_node 2 two_processes.py FOLDER`."""

import json
import sys
from pathlib import Path

import torch

from tameformer.recipes import launch
from tameformer.training.engine import leave

SMALL = {
    "max_steps": 12,
    "data.batch_size": 48,
    "model.dim": 16,
    "model.num_layers": 1,
    "model.dropout": 0.0,
    "loop.logging_steps": 1,
    "loop.eval_steps": 6,
    "checkpoint.every": 4,
    "checkpoint.keep_last": 3,
    "optim.name": "sgd",
    "optim.peak_lr": 0.05,
    "optim.ema_decay": 0.9,
    "precision": "fp32",
    "stabilize": ["sigma_reparam"],  # its state is in buffers, which DDP exchanges before a forward pass
}
MANY = {"max_steps": 24, "checkpoint.every": 6, "guard.min_values": 8, "guard.healthy_steps": 2, "guard.max_skips": 3}
PARTS = {"gradient_accumulation_steps": 2}
AUGMENTED = {"data.augment": ["shift"], "data.num_workers": 2, "model.dropout": 0.1}


def main(folder: Path) -> None:
    launch.report.write_report = lambda folder: None
    codes = []

    def run(name: str, inject: str = "", **overrides) -> None:
        resume = "auto" if (folder / name).exists() else "never"
        values = {**SMALL, **overrides, "output_dir": str(folder / name)}
        torch.distributed.is_initialized() and torch.distributed.barrier()  # all have looked for the folder
        codes.append(launch.train("vit-digits", overrides=values, inject=inject, resume=resume).exit_code)

    faults = "nan@3:rank1,inf-grad@5:rank0,bad-batch@7:rank1,spike@12x1000:rank1,nan@16-19:rank1"
    run("faults", faults, **MANY)
    run("faults-fsdp", faults, fsdp=True, **MANY)
    run("clean", **PARTS)
    run("short", "oom@2:rank1,oom@6:rank0,oom@9", **PARTS)
    run("straight", **AUGMENTED)
    run("cut", "term@3:rank1", **AUGMENTED)
    run("cut", "term@8:rank0", **AUGMENTED)
    run("cut", **AUGMENTED)
    (folder / f"codes-{torch.distributed.get_rank()}.json").write_text(json.dumps(codes))
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
