import pytest
import torch
from aograph.patterns.cache import UPDATES, memory
from aograph.patterns.language import Builder, Match, match
from torch import nn

from tests.programs import find, program_of

B, H, S, D = 2, 2, 32, 16
POSITIONS = torch.arange(3, 6)


put = torch.ops.aten.index_put_


class Writing(nn.Module):
    """`write(cache, new, positions)` on a cache that it returns the sum of."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.register_buffer("cache", torch.zeros(B, H, S, D))

    def forward(self, new, positions):
        self.write(self.cache, new, positions)
        return self.cache.sum()


def copied(place):
    return lambda cache, new, positions: place(cache, new).copy_(new)


STORES = {
    "index_copy_": (lambda c, n, p: c.index_copy_(2, p, n), "aten.index_copy_"),
    "index_copy_ from the back": (lambda c, n, p: c.index_copy_(-2, p, n), "aten.index_copy_"),
    "index_put_": (lambda c, n, p: put(c, [None, None, p], n), "aten.index_put_"),
    "index_put_, an index for each dimension": (
        lambda c, n, p: put(c, [None, None, p, None], n), "aten.index_put_"),
    "rows": (lambda c, n, p: c.__setitem__((torch.arange(B)[:, None], slice(None), p[None].expand(B, -1)),
                                           n.transpose(1, 2)), "aten.index_put_"),
    "rows, the same positions": (lambda c, n, p: c.__setitem__(
        (torch.arange(B)[:, None], slice(None), p[None]), n.transpose(1, 2)), "aten.index_put_"),
    "slice": (copied(lambda c, n: c[:, :, 3:6]), "aten.copy_"),
    "slice from the back": (copied(lambda c, n: c[:, :, -29:-26]), "aten.copy_"),
    "narrow": (copied(lambda c, n: c.narrow(2, 3, 3)), "aten.copy_"),
    "scatter_": (lambda c, n, p: c.scatter_(2, p[:, None].expand(B, H, 3, D), n), "aten.scatter_"),
}  # fmt: skip


def store(program, operator):
    """Updates that fit the only call of an operator."""
    node = find(program, operator)
    return [(u, m) for u in UPDATES if isinstance(m := match(u.pattern, node), Match)]


@pytest.mark.parametrize("write, operator", STORES.values(), ids=STORES.keys())
def test_updates_say_what_goes_where(write, operator):
    new = torch.randn(B, H, 3, D)
    program = program_of(Writing(write), new, POSITIONS)
    ((update, found),) = store(program, operator)
    assert found.cache.target == "cache" and memory(found.root) in (found.cache, None)
    g = Builder(found.root)
    stored, positions = update.stored(found, g)
    program.graph.output_node().args = ([stored, positions],)
    program.graph_module.recompile()
    stored, positions = program.graph_module(new, POSITIONS)
    assert torch.equal(stored, new)
    assert torch.equal(positions.expand(B, -1), POSITIONS.expand(B, -1))


NO_STORES = {
    "along elements": (lambda c, n, p: put(c, [None, None, None, p], n[:, :, :1, :3].expand(B, H, S, 3)),
                       "aten.index_put_", "None, not a tensor"),
    "accumulated": (lambda c, n, p: put(c, [None, None, p], n, True), "aten.index_put_", "True"),
    "one for all": (lambda c, n, p: put(c, [None, None, p], n[:, :, :1]), "aten.index_put_", "what is stored"),
    "rows in another order": (lambda c, n, p: c.__setitem__(
        (1 - torch.arange(B)[:, None], slice(None), p[None]), n.transpose(1, 2)), "aten.index_put_", "in order"),
    "a step": (copied(lambda c, n: c[:, :, 3:9:2]), "aten.copy_", "argument 2 where 1"),
    "an index by head": (lambda c, n, p: c.scatter_(2, (p[:, None] + torch.arange(H)[:, None, None]).expand(
        B, H, 3, D), n), "aten.scatter_", "same for all heads"),
}  # fmt: skip


@pytest.mark.parametrize("write, operator, why", NO_STORES.values(), ids=NO_STORES.keys())
def test_other_writes_are_no_updates(write, operator, why):
    program = program_of(Writing(write), torch.randn(B, H, 3, D), POSITIONS)
    assert not store(program, operator)
    node = find(program, operator)
    assert any(why in match(u.pattern, node).reason for u in UPDATES)
