"""One thread: the tests' models are too small to share, and threads that wait for each other cost minutes.

In CI the property tests repeat the same examples; elsewhere every run tries new ones.
"""

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("default", deadline=None)
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokens that tests make stay out of the user's cache."""
    os.environ["GEARSHIFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
