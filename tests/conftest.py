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


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of its own
def pytest_collection_modifyitems(items):
    """Skips what needs a GPU where there is none; parallel runs keep together what shares an artifact or a file."""
    for item in items:
        artifacts = "language_model", "packed_cache", "few_tokens"
        shared = next((name for name in artifacts if name in item.fixturenames), item.path.stem)
        item.add_marker(pytest.mark.xdist_group(shared))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
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
