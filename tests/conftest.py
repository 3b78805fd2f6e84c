import os

import torch
from hypothesis import settings

# The same examples in every run, unless asked to look for new ones: MEMKIT_HYPOTHESIS_PROFILE=explore.
# No deadline: a first call may load or compile for seconds.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", derandomize=False, deadline=None, print_blob=True, max_examples=1000)
settings.load_profile(os.environ.get("MEMKIT_HYPOTHESIS_PROFILE", "ci"))

# Tensors are tiny here: a second thread only waits for the first.
torch.set_num_threads(1)
