"""What a run ran on: enough to repeat it, and to explain why another machine gave other bits."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("tameformer", "torch", "numpy", "accelerate", "safetensors", "tokenizers", "transformers", "datasets")


def environment(*, world_size: int) -> dict[str, Any]:
    """Versions, commit, hardware, threads and command of this process, as JSON holds them.

    Two runs are equal to the bit only with the same number of threads, so that it is recorded.
    """
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "git": _commit(Path(__file__).parent),
        "hardware": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "world_size": world_size,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit(folder: Path) -> dict[str, Any]:
    """The commit of a source checkout; empty for an installed package or without git."""

    def git(*arguments: str) -> str:
        # Reading only: `git status` would renew its index, and leave a lock behind where the disk is full.
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    try:
        # A package inside an environment inside somebody's repository is not part of that repository.
        git("ls-files", "--error-unmatch", "environment.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
