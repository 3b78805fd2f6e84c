"""The engine: `attend` and `plan`, by the torch engine or the oracle."""

from memkit.engine.again import ask_again
from memkit.engine.api import attend, plan
from memkit.engine.compress import compress, next_readers, repeat_readers

__all__ = ["ask_again", "attend", "compress", "next_readers", "plan", "repeat_readers"]
