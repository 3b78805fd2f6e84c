"""memkit: how an attention layer remembers, as a configuration choice."""

import importlib
from types import ModuleType

from memkit.attention import MemoryAttention
from memkit.catalog import load_policy, policy_names
from memkit.comparison import Comparison, compare
from memkit.costing import Cost, cost
from memkit.engine import ask_again, attend, compress, plan
from memkit.engine.inputs import Plan
from memkit.errors import InputError, MemkitError, MemoryStateError, ModelError, PolicyError
from memkit.lm import MemoryLM, ModelSpec, load_model, model_names
from memkit.memory import Memory
from memkit.parameters import PolicyParameters
from memkit.pieces.registry import register
from memkit.pieces.rotary import Rotation
from memkit.policy import Policy, PolicySpec
from memkit.rendering import set_renderers, show_in_notebooks
from memkit.version import __version__

__all__ = [
    "Comparison",
    "Cost",
    "InputError",
    "MemkitError",
    "Memory",
    "MemoryAttention",
    "MemoryLM",
    "MemoryStateError",
    "ModelError",
    "ModelSpec",
    "Plan",
    "Policy",
    "PolicyError",
    "PolicyParameters",
    "PolicySpec",
    "Rotation",
    "__version__",
    "ask_again",
    "attend",
    "compare",
    "compress",
    "cost",
    "load_model",
    "load_policy",
    "model_names",
    "plan",
    "policy_names",
    "register",
]

# What is shown knows none of these modules; they load rich when something is shown, and matplotlib when it is drawn.
set_renderers(
    {
        "Bench": "memkit.viz.benchmark",
        "Comparison": "memkit.viz.comparison",
        "Cost": "memkit.viz.costs",
        "Memory": "memkit.viz.memories",
        "MemoryLM": "memkit.viz.models",
        "ModelSpec": "memkit.viz.models",
        "Passkeys": "memkit.viz.passkeys",
        "Plan": "memkit.viz.plans",
        "Policy": "memkit.viz.policies",
        "PolicySpec": "memkit.viz.policies",
        "Report": "memkit.viz.checks",
    }
)
show_in_notebooks(Comparison, Cost, Memory, MemoryLM, ModelSpec, Plan, Policy, PolicySpec)


def __getattr__(name: str) -> ModuleType:
    """`memkit.hf`, `memkit.interop` and `memkit.testing` without an import of their own; each loads when first used."""
    if name in ("hf", "interop", "testing"):
        try:
            return importlib.import_module(f"memkit.{name}")
        except ModuleNotFoundError as error:
            if name == "interop" or (error.name or "memkit").partition(".")[0] == "memkit":
                raise
            raise ModuleNotFoundError(
                f"memkit.{name} needs {error.name}, which is not installed; "
                f"run: pip install 'memkit-attention[{name}]'",
                name=error.name,
            ) from None
    raise AttributeError(f"module 'memkit' has no attribute '{name}'")
