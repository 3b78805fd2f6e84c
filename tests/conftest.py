import os
from collections.abc import Generator

import pytest
import torch
from hypothesis import Phase, settings

from memkit.pieces import registry

# The same examples in every run, unless asked to look for new ones: MEMKIT_HYPOTHESIS_PROFILE=explore.
# No deadline: a first call may load or compile for seconds.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", derandomize=False, deadline=None, print_blob=True, max_examples=1000)
# Whether a test fails is all that tools/mutants.py asks.
settings.register_profile("verify", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("MEMKIT_HYPOTHESIS_PROFILE", "ci"))

# Kernels for GPUs are interpreted where there is none. Triton asks when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tensors are tiny here: a second thread only waits for the first.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_registry() -> Generator[None]:
    """What a test registers is gone after it."""
    before = {family: dict(known) for family, known in registry._REGISTRY.items()}
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)
