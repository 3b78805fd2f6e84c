"""The engine: `attend` and `plan`, by the torch engine or the oracle."""

from memkit.engine.api import attend, plan

__all__ = ["attend", "plan"]
