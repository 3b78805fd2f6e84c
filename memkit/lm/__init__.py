"""Language models declared in YAML, whose layers remember as their policies say."""

from memkit.lm.catalog import is_model, load_model_spec, model_header, model_names
from memkit.lm.loading import from_pretrained, load_model, save_pretrained, with_policy
from memkit.lm.memory import ModelMemory
from memkit.lm.mixer import Mixer
from memkit.lm.mixers import AttentionMixerSpec
from memkit.lm.model import MemoryLM
from memkit.lm.parallel import split_heads, split_text
from memkit.lm.parts import MlpSpec
from memkit.lm.rwkv7 import RWKV7MixerSpec
from memkit.lm.spec import LayersSpec, MixerSpec, ModelSpec
from memkit.lm.tokens import ByteTokenizer, Tokenizer

__all__ = [
    "AttentionMixerSpec",
    "ByteTokenizer",
    "LayersSpec",
    "MemoryLM",
    "Mixer",
    "MixerSpec",
    "MlpSpec",
    "ModelMemory",
    "ModelSpec",
    "RWKV7MixerSpec",
    "Tokenizer",
    "from_pretrained",
    "is_model",
    "load_model",
    "load_model_spec",
    "model_header",
    "model_names",
    "save_pretrained",
    "split_heads",
    "split_text",
    "with_policy",
]
