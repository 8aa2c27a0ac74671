"""Imports of much code at once."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Around the first import of torch: the garbage collector neither runs meanwhile nor looks at the modules ever again.

    Importing makes half a million objects that stay for good. The collector would go through them several times, which takes
    a sixth of the time of the imports, and once more in each of its full collections. What has been there before is left alone:
    where torch is imported already, in a test or a notebook, nothing happens.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
