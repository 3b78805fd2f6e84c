"""Property tests for memory policies and their pieces, memkit's own and anyone's.

Needs hypothesis: `pip install memkit-attention[testing]`. `import memkit` does not import this package.
"""

from memkit.testing import laws
from memkit.testing.cases import Case, cases, lengths, splits
from memkit.testing.law import Law, LawBroken
from memkit.testing.scaling import scaled_down
from memkit.testing.specs import policies, specs

__all__ = [
    "Case",
    "Law",
    "LawBroken",
    "cases",
    "laws",
    "lengths",
    "policies",
    "scaled_down",
    "specs",
    "splits",
]
