import os
import sys
import types
from pathlib import Path

# One thread a test process: two pytest workers share two cores, and results are bit-equal only at a fixed thread count.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

settings.register_profile("shared-machine", deadline=None)  # a busy neighbour is not a failure
settings.load_profile("shared-machine")

# Every annotated shape in the package is checked while tests run; an int is a float, as type checkers have it.
_checks = types.ModuleType("shape_checks")
_checks.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules["shape_checks"] = _checks
install_import_hook("tameformer", "shape_checks.check")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The development data sets beside the checkout; they carry no licence to ship them."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the development data is not beside the checkout (folder shared/data)")
    return SHARED_DATA


@pytest.fixture
def unreported(monkeypatch):
    """Runs in this process end without their page: drawing it takes longer than a tiny run, and it has tests of its own."""
    from tameformer.recipes import launch

    monkeypatch.setattr(launch.report, "write_report", lambda folder: None)
