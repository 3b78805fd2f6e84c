"""What a policy carries from one call to the next: a window of exact tokens, slots, and row counters."""

from memkit.memory.memory import Memory, held, row_numbers

__all__ = ["Memory", "held", "row_numbers"]
