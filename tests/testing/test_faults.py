"""Every planted fault is caught by the law that names it."""

import pytest

from memkit.testing import examine, examine_policies
from tests.faults import FAULTS, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_caught(fault: Fault):
    if fault.subject is not None:
        broken = examine(fault.subject, 60, laws=(fault.law,), shrink=False).broken
    else:
        with fault.planted():
            verdict = examine_policies(fault.law, 150, shrink=False, **dict(fault.fixed))
        broken = [] if verdict.error is None else [verdict.error]

    assert broken, f"{fault.name} broke no {fault.law}"
    assert broken[0].law is fault.law
    for misplaced in (TypeError, AttributeError, NameError):  # a fault that does not fit its place says nothing
        assert f"raised {misplaced.__name__}" not in str(broken[0])


def test_there_are_enough_of_them():
    assert len(FAULTS) >= 25
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
