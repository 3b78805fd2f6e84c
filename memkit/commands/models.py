"""What commands need to know of a model besides its declaration."""

from __future__ import annotations

from pathlib import Path

from memkit.catalog import is_file
from memkit.errors import InputError, short
from memkit.lm import ByteTokenizer, Tokenizer, load_model_spec

__all__ = ["tokenizer_of"]


def tokenizer_of(model: str) -> Tokenizer:
    """The tokenizer in a model's folder, else bytes. Raises `InputError` where the model has another vocabulary."""
    folder = Path(model)
    if is_file(folder / "tokenizer_config.json"):
        try:
            from memkit.training.tokenizers import load_tokenizer
        except ImportError as error:
            raise InputError(
                f"{short(model)}: its tokenizer needs transformers, got: {error}; pip install 'memkit-attention[train]'"
            ) from None
        return load_tokenizer(folder)
    vocabulary = load_model_spec(model).vocabulary
    if vocabulary != ByteTokenizer.vocabulary:
        raise InputError(
            f"{short(model)}: has no tokenizer beside it, and {vocabulary} token ids are no bytes; give --prompt-ids"
        )
    return ByteTokenizer()
