"""The ten laws of a policy, shipped or a user's: one file each, by their number in the design.

Laws 1 and 3 hold to rounding given equal plans, so both sides are given one plan; that plans are equal is verified
apart, on data whose decisions have a margin.
"""

from memkit.testing.laws.policy.law_01_split import split_equals_whole
from memkit.testing.laws.policy.law_02_causality import causality
from memkit.testing.laws.policy.law_03_batch_invariance import batch_invariance
from memkit.testing.laws.policy.law_04_budget import budget
from memkit.testing.laws.policy.law_05_conservation import conservation_in_memory
from memkit.testing.laws.policy.law_06_sinks import sinks
from memkit.testing.laws.policy.law_07_limits import limits
from memkit.testing.laws.policy.law_08_same_plan import same_plan_same_answer
from memkit.testing.laws.policy.law_09_determinism import determinism
from memkit.testing.laws.policy.law_10_round_trip import round_trip

__all__ = [
    "POLICY_LAWS",
    "batch_invariance",
    "budget",
    "causality",
    "conservation_in_memory",
    "determinism",
    "limits",
    "round_trip",
    "same_plan_same_answer",
    "sinks",
    "split_equals_whole",
]

POLICY_LAWS = (
    split_equals_whole,
    causality,
    batch_invariance,
    budget,
    conservation_in_memory,
    sinks,
    limits,
    same_plan_same_answer,
    determinism,
    round_trip,
)
"""The ten, in their order."""
