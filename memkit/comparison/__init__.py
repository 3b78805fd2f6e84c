"""The main job: one stock language model reads one text under several memory policies.

What each policy costs and how well the model then predicts are measured in one run, on the same tokens.
"""

from memkit.comparison.measure import Progress
from memkit.comparison.record import Comparison, Measurement
from memkit.comparison.run import DEFAULT_POLICIES, compare
from memkit.texts import default_text, second_text

__all__ = ["DEFAULT_POLICIES", "Comparison", "Measurement", "Progress", "compare", "default_text", "second_text"]
