"""What a policy carries from one call to the next: a window of exact tokens, slots, and row counters."""

from memkit.memory.memory import Memory, held

__all__ = ["Memory", "held"]
