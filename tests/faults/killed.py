"""Runs that end badly and are resumed, each in a fork of one process that imports once: `python killed.py CASES FOLDER`.

CASES is a JSON file of {name: [words of the first command, words of the second]}; printed are the exit codes of both, as shells
and `subprocess` have them: a negative number is the signal that killed the process.
"""

import json
import os
import sys
import traceback
from pathlib import Path


def command(words: list[str], log: Path) -> int:
    """The exit code of `tame` with these words, in a process of its own."""
    child = os.fork()
    if not child:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    # Nothing is computed before the forks, so that they find no threads.
    import torch.utils.tensorboard  # noqa: F401

    from tameformer.cli.__main__ import main
    from tameformer.recipes import launch

    launch.report.write_report = lambda folder: None
    cases = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[2])
    codes = {
        name: [
            command(["train", "vit-digits", *words, f"--output_dir={folder / name}"], folder / f"{name}.txt")
            for words in commands
        ]
        for name, commands in cases.items()
    }
    print(json.dumps(codes))
