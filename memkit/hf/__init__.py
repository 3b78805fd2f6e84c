"""Stock Hugging Face decoders under a memory policy, and memkit's own models as Hugging Face models.

Importing this package imports transformers; `import memkit` does not.
"""

from memkit.hf.attachment import attach, check_policy, memories
from memkit.hf.loading import LoadedModel, load
from memkit.hf.model import MemkitConfig, MemkitForCausalLM

__all__ = ["LoadedModel", "MemkitConfig", "MemkitForCausalLM", "attach", "check_policy", "load", "memories"]
