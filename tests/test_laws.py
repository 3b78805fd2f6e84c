"""The ten laws, over randomly drawn policies and over every shipped one."""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings

import memkit
from memkit.pieces import registry
from memkit.testing import calls, cases, laws, scaled_down
from tests.as_on_a_gpu import SETTINGS
from tests.testing.ema import EmaSpec

# Fewer, and not made smaller, where the same tests verify hundreds of mutants (make mutants).
FEW = os.environ.get("MEMKIT_LAW_EXAMPLES")
PHASES = [Phase.generate] if FEW else list(Phase)
DRAWN = settings(max_examples=int(FEW or 200), phases=PHASES, suppress_health_check=[HealthCheck.too_slow])
SHIPPED = settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])


each_law = pytest.mark.parametrize("law", laws.POLICY_LAWS, ids=lambda law: law.__name__)


@each_law
def test_drawn_policies(law):
    @DRAWN
    @given(calls())
    def holds(call):
        law(*call)

    holds()


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
    """Chunks are folded and read together."""
    for setting in SETTINGS:
        monkeypatch.setattr(*setting)


@pytest.mark.usefixtures("_as_on_a_gpu")
@each_law
def test_drawn_policies_as_on_a_gpu(law):
    @settings(DRAWN, max_examples=60)
    @given(calls())
    def holds(call):
        law(*call)

    holds()


@pytest.fixture
def _registered(monkeypatch):
    """The kind exists for one test only; others compare lists of kinds."""
    monkeypatch.setitem(registry._REGISTRY["merging"], "test-ema", EmaSpec)


@pytest.mark.usefixtures("_registered")
@each_law
def test_policies_with_a_rule_that_is_not_additive(law):
    if law.claim == "conserves":
        pytest.skip("a moving average forgets on purpose")

    @settings(DRAWN, max_examples=30)
    @given(calls(merging=EmaSpec()))
    def holds(call):
        law(*call)

    holds()


@each_law
@pytest.mark.parametrize("name", memkit.policy_names())
def test_shipped_policies_in_small(law, name):
    spec = scaled_down(memkit.load_policy(name))

    @SHIPPED
    @given(cases(spec.build()))
    def holds(case):
        law(spec, case)

    holds()
