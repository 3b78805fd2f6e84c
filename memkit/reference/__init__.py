"""The oracle: the same mathematics once more, one row, one head, one token after another, in float64.

It shares nothing with the fast engine but the types at its border (`AttendInputs`, `Memory`, `Plan`), so that each can
be tested against the other. Shipped pieces are read from their specs' fields and worked out here; a user's own piece is
asked through its public methods. Gradients are autograd's.

In the order of the Key-Value Means paper (arXiv 2605.09877, section 3): `treatment` and `slot` say what a token brings,
what a slot is and how it is read; `rules` which tokens a query sees and how many slots there may be; `assignment` which
tokens found and join them; `head` the softmax over all of it; `api` runs every row and head.
"""

from memkit.reference.api import ask_again, attend, plan

__all__ = ["ask_again", "attend", "plan"]
