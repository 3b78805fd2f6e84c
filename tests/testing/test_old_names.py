"""Names of before go on being found."""

from __future__ import annotations

import pytest

import memkit.testing
from memkit.errors import RenamedWarning


@pytest.mark.parametrize(("old", "new"), [("Exit", "LeavingExample"), ("exits", "leaving_examples")])
def test_a_name_of_before_says_what_it_is_called_now(old: str, new: str):
    with pytest.warns(RenamedWarning, match=f"memkit.testing.{old} is called {new} now"):
        found = getattr(memkit.testing, old)

    assert found is getattr(memkit.testing, new)


def test_another_name_is_none():
    with pytest.raises(AttributeError, match="no attribute 'Exits'"):
        _ = memkit.testing.Exits  # pyright: ignore[reportAttributeAccessIssue]
