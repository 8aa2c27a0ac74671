import pytest

from zoo import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each family in its turn."""
    return FAMILIES[request.param]
