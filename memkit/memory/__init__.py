"""What a policy carries from one call to the next: a window of exact tokens, slots, and row counters."""

from memkit.memory.heads import HeadsMemory
from memkit.memory.memory import Memory, row_numbers, tokens_in_window

__all__ = ["HeadsMemory", "Memory", "row_numbers", "tokens_in_window"]
