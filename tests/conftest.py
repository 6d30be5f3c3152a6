"""One thread: the tests' models are too small to share, and threads that wait for each other cost minutes.

In CI the property tests repeat the same examples; elsewhere every run tries new ones.
"""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
