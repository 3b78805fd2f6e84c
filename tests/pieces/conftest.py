import copy
from collections.abc import Iterator

import pytest

from memkit.pieces import registry


@pytest.fixture
def own_kinds() -> Iterator[None]:
    """What a test registers is forgotten at its end."""
    before = copy.deepcopy({family: dict(known) for family, known in registry._REGISTRY.items()})
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)
