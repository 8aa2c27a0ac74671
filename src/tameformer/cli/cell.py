"""`tame train` as a part of something larger: it saves and stops when whoever started it is gone.

Started as `python -m tameformer.cli.cell RECIPE ...` with a pipe as its standard input, whose other end closes with the
process that holds it, even if that was killed.
"""

import os
import signal
import sys
import threading

from tameformer.cli.__main__ import main


def _stop_when_alone() -> None:
    os.read(sys.stdin.fileno(), 1)  # not through the buffer, whose lock would hold up the exit
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_when_alone, daemon=True).start()
    sys.exit(main(["train", *sys.argv[1:]]))
