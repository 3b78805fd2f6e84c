import os

import pytest
import torch
from transformers import LlamaForCausalLM

from memkit import hf
from memkit.errors import ModelError
from tests.hf.tiny import randomised, tiny_config


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    return randomised(LlamaForCausalLM(tiny_config()))


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of 90 tokens, none twice: the first layer's un-rotated keys of equal tokens tie up to rounding."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([3 + torch.randperm(208, generator=generator)[:90] for _ in range(2)])


@pytest.fixture(scope="session")
def smollm() -> hf.LoadedModel:
    try:
        return hf.load()
    except ModelError as error:
        if os.environ.get("CI"):  # there the package is always installed: its absence is a fault
            raise
        pytest.skip(str(error))  # elsewhere a developer may do without the 100 MB model
