"""Stock Hugging Face decoders under a memory policy, and memkit's own models as Hugging Face models.

Importing this package imports transformers; `import memkit` does not.
"""

from memkit.hf.attachment import Attached, attach, detach
from memkit.hf.cache import memories
from memkit.hf.fitting import check_policy
from memkit.hf.kept import MemoryCache
from memkit.hf.loading import LoadedModel, load
from memkit.hf.model import MemkitConfig, MemkitForCausalLM
from memkit.hf.profiling import Measured, measure_profile
from memkit.hf.rereading import connecting_ids

__all__ = [
    "Attached",
    "LoadedModel",
    "Measured",
    "MemkitConfig",
    "MemkitForCausalLM",
    "MemoryCache",
    "attach",
    "check_policy",
    "connecting_ids",
    "detach",
    "load",
    "measure_profile",
    "memories",
]
