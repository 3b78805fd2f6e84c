"""Laws of merge rules: what a slot is after it has taken its tokens."""

from memkit.testing.laws.merging.gradients import merge_gradients
from memkit.testing.laws.merging.invariance import (
    associativity,
    chunks_do_not_matter,
    isotropy,
    merging_batch_invariance,
    order_of_tokens,
)
from memkit.testing.laws.merging.means import convexity, duplicates
from memkit.testing.laws.merging.purity import merging_is_pure
from memkit.testing.laws.merging.sums import conservation, weight_zero, weights_are_weights

__all__ = [
    "MERGING_LAWS",
    "associativity",
    "chunks_do_not_matter",
    "conservation",
    "convexity",
    "duplicates",
    "isotropy",
    "merge_gradients",
    "merging_batch_invariance",
    "merging_is_pure",
    "order_of_tokens",
    "weight_zero",
    "weights_are_weights",
]

MERGING_LAWS = (
    weights_are_weights,
    conservation,
    order_of_tokens,
    associativity,
    chunks_do_not_matter,
    convexity,
    duplicates,
    merging_batch_invariance,
    isotropy,
    weight_zero,
    merge_gradients,
    merging_is_pure,
)
