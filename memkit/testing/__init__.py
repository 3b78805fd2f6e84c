"""Property tests for memory policies and their pieces, memkit's own and anyone's.

    from memkit.testing import check_merge_rule

    def test_my_rule():
        check_merge_rule(MyMerge)

Needs hypothesis: `pip install memkit-attention[testing]`. `import memkit` does not import this package.
"""

from memkit.errors import RenamedWarning, warn
from memkit.testing import laws
from memkit.testing.cases import Case, cases, lengths, plans, splits
from memkit.testing.checks import (
    calls,
    check,
    check_admission,
    check_growth,
    check_merge_rule,
    check_policy,
    check_readout,
    check_routing,
    examine,
    examine_policies,
)
from memkit.testing.claims import CLAIMS
from memkit.testing.given import as_spec
from memkit.testing.law import Law, LawBroken
from memkit.testing.laws.leaving import LeavingExample, leaving_examples
from memkit.testing.laws.merged import Merged, merged_tokens
from memkit.testing.laws.merging.tokens import Merge, merges
from memkit.testing.laws.readout import Sums, sums_of_slots
from memkit.testing.report import Report, Verdict
from memkit.testing.scaling import scaled_down
from memkit.testing.specs import policies, specs

__all__ = [
    "CLAIMS",
    "Case",
    "Law",
    "LawBroken",
    "LeavingExample",
    "Merge",
    "Merged",
    "Report",
    "Sums",
    "Verdict",
    "as_spec",
    "calls",
    "cases",
    "check",
    "check_admission",
    "check_growth",
    "check_merge_rule",
    "check_policy",
    "check_readout",
    "check_routing",
    "examine",
    "examine_policies",
    "laws",
    "leaving_examples",
    "lengths",
    "merged_tokens",
    "merges",
    "plans",
    "policies",
    "scaled_down",
    "specs",
    "splits",
    "sums_of_slots",
]

_RENAMED = {"Exit": LeavingExample, "exits": leaving_examples}


def __getattr__(name: str) -> object:
    """Names of before; they say so when they are imported."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warn(f"memkit.testing.{name} is called {new.__name__} now", RenamedWarning)
    return new
