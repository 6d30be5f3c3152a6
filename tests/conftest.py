"""One thread: the tests' models are too small to share, and threads that wait for each other cost minutes."""

import torch

torch.set_num_threads(1)
