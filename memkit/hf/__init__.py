"""Stock Hugging Face decoders under a memory policy.

Importing this package imports transformers; `import memkit` does not.
"""

from memkit.hf.attachment import attach, check_policy, memories
from memkit.hf.loading import LoadedModel, load

__all__ = ["LoadedModel", "attach", "check_policy", "load", "memories"]
