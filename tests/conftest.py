"""What all tests share: the same seed, quiet libraries, a fresh compiler, and no CUDA tests without a GPU."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

pytest_plugins = ["tests.artifacts"]

hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """For tests that compile: nothing that an earlier test compiled counts against the recompilation limit."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
