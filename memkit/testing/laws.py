"""All laws by name: `laws.split_equals_whole(policy, Case(...))` judges one example and raises `LawBroken`."""

from memkit.testing.policy_laws import (
    POLICY_LAWS,
    budget,
    causality,
    conservation_in_memory,
    determinism,
    limits,
    round_trip,
    rows_are_strangers,
    same_plan_same_answer,
    sinks,
    split_equals_whole,
)

__all__ = [
    "POLICY_LAWS",
    "budget",
    "causality",
    "conservation_in_memory",
    "determinism",
    "limits",
    "round_trip",
    "rows_are_strangers",
    "same_plan_same_answer",
    "sinks",
    "split_equals_whole",
]
