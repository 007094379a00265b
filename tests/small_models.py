"""Models of a few lines, for tests of everything but whole models."""

import contextlib

import torch
from torch import nn


class MLP(nn.Module):
    """up [128, 64], relu, down [64, 128] on x [..., 64]."""

    def __init__(self, width=64, hidden=128):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Tied(nn.Module):
    """A table of 96 embeddings of 64, which is the head's weight too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(96, 64)
        self.middle = nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.middle(self.embedding(ids)))


class Counting(nn.Module):
    """A linear whose calls are counted in a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.linear(x) + self.calls


class Branching(nn.Module):
    """Control flow that depends on data."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        if x.sum() > 0:  # the branch
            return self.linear(x)
        return x


@contextlib.contextmanager
def untouched(model, *args, **kwargs):
    """Fails if the body changes a bit of the model, of what it computes, or a module's mode."""

    def look():
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            output = model(*args, **kwargs)
        modes = [module.training for module in model.modules()]
        return {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items()}, modes, output

    state, modes, output = look()
    yield
    new_state, new_modes, new_output = look()
    assert new_state.keys() == state.keys() and new_modes == modes
    for name, (address, tensor) in state.items():
        assert new_state[name][0] == address, name
        torch.testing.assert_close(new_state[name][1], tensor, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(new_output, output, rtol=0, atol=0, equal_nan=True)
