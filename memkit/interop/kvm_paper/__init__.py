"""The Key-Value Means authors' models (arXiv 2605.09877): their configuration and weights → a `MemoryLM`.

`fields` knows every field of a configuration, `policies` what they mean (`model_spec`), `weights` pairs the names of
weights (`weight_names`), `loading` puts a model together. What memkit cannot represent is named and refused: nothing is
read half.
"""

from memkit.interop.kvm_paper.loading import import_files, load_model
from memkit.interop.kvm_paper.policies import model_spec
from memkit.interop.kvm_paper.weights import weight_names

__all__ = ["import_files", "load_model", "model_spec", "weight_names"]
