import pytest
import torch
from aograph.patterns.cache import ATTENTIONS, UPDATES, behind, counts, horizon, memory, parts, scale_of, softcap_of
from aograph.patterns.language import Builder, Match, match
from torch import nn

from tests.programs import find, program_of

B, H, S, D = 2, 2, 32, 16
POSITIONS, ROWS = torch.arange(3, 6), torch.stack([torch.arange(3), torch.arange(4, 7)])


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


# --- attention ---------------------------------------------------------------------------------------------


class Reading(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(B, H, S, D))

    def forward(self, q):
        self.keys.add_(1), self.values.add_(1)
        return self.attention(q, self.keys, self.values)


def attention(how, heads=H):
    program = program_of(Reading(how), torch.randn(B, heads, 3, D))
    found = [m for n in program.graph.nodes for p in ATTENTIONS if isinstance(m := match(p, n), Match)]
    return found[0] if found else None


@pytest.mark.parametrize(
    "how, scale, softcap",
    [
        (lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v), D**-0.5, 0),
        (lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5), 0.5, 0),
        (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, 1, 0),
        (lambda q, k, v: (q @ k.mT * 0.5).softmax(-1) @ v, 0.5, 0),
        (lambda q, k, v: (q @ k.mT / 8).softmax(-1) @ v, 0.125, 0),
        (lambda q, k, v: (((q @ k.permute(0, 1, 3, 2)) / 8 / 5).tanh() * 5).softmax(-1) @ v, 0.125, 5),
    ],
)
def test_attention(how, scale, softcap):
    found = attention(how)
    assert (found.key.target, found.value.target) == ("keys", "values")
    assert scale_of(found) == scale and softcap_of(found) == softcap


@pytest.mark.parametrize(
    "how",
    [
        lambda q, k, v: (q @ k.mT).sigmoid() @ v,
        lambda q, k, v: (q @ k.mT).softmax(1) @ v,
        lambda q, k, v: ((q @ k.mT / 5).tanh() * 4).softmax(-1) @ v,
        lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v * 2),
        lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k.flip(1), v),
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v.transpose(0, 1),
    ],
)
def test_no_attention(how):
    assert attention(how) is None


# --- masks -------------------------------------------------------------------------------------------------


def mask(function, *inputs):
    """The node of a mask [B, 1, T, S], and the program."""
    program = program_of(lambda m, *given: function(*given) & True, *inputs)
    node = program.graph.output_node().args[0][0]
    return program, node.all_input_nodes[0]


HORIZONS = {
    "<=": (lambda p: (torch.arange(S) <= p[:, None])[None, None], [None, 0], 0),
    "<": (lambda p: (torch.arange(S) < p[:, None])[None, None], [None, 0], -1),
    "the other way": (lambda p: (p[:, None] > torch.arange(S)[None])[None, None], [None, 0], -1),
    "not": (lambda p: ~(torch.arange(S) > p[:, None])[None, None], [None, 0], 0),
    "not, the other way": (lambda p: ~(p[:, None] <= torch.arange(S))[None, None], [None, 0], -1),
    "expanded": (lambda p: (torch.arange(S) <= p[:, None])[None, None].expand(B, 4, -1, -1), [None, 0], 0),
    "views": (lambda p: torch.arange(S).view(1, 1, 1, S) <= p.view(1, 1, -1, 1), [None, 0], 0),
}


@pytest.mark.parametrize("function, dims, shift", HORIZONS.values(), ids=HORIZONS.keys())
def test_horizons(function, dims, shift):
    _, node = mask(function, POSITIONS)
    (part,) = parts(node, [0, 1, 2, 3])
    found = horizon(part, str(S))
    assert found.node.target == "inputs_0" and (found.dims, found.shift) == (dims, shift)


def test_the_horizon_of_rows():
    _, node = mask(lambda p: torch.arange(S) <= p[:, None, :, None], ROWS)
    (part,) = parts(node, [0, 1, 2, 3])
    assert horizon(part, str(S)).dims == [0, 1]


NO_HORIZONS = {
    "another length": lambda p: (torch.arange(8) <= p[:, None])[None, None],
    "from 1": lambda p: (torch.arange(1, S + 1) <= p[:, None])[None, None],
    "in steps": lambda p: (torch.arange(0, 2 * S, 2) <= p[:, None])[None, None],
    "==": lambda p: (torch.arange(S) == p[:, None])[None, None],
    "hidden below": lambda p: ~(torch.arange(S) <= p[:, None])[None, None],
    "by head": lambda p: (torch.arange(S) <= p[None, :, None, None]).expand(B, -1, 3, -1),
    "floats": lambda p: (torch.arange(S) <= p[:, None].float())[None, None],
    "positions along the cache": lambda p: (torch.arange(S)[:, None] <= p)[None, None],
}


@pytest.mark.parametrize("function", NO_HORIZONS.values(), ids=NO_HORIZONS.keys())
def test_no_horizons(function):
    _, node = mask(function, POSITIONS)
    assert all(horizon(part, str(S)) is None for part in parts(node, [0, 1, 2, 3]))


def test_parts_of_a_mask():
    _, node = mask(lambda p, a: (~((torch.arange(S) > p[:, None]) | (torch.arange(S) == 2)) & a[0])[None, None],
                   POSITIONS, torch.ones(B, S, dtype=torch.bool))  # fmt: skip
    found = list(parts(node, [0, 1, 2, 3]))
    assert [part.negated for part in found] == [True, True, False]
    assert [part.dims for part in found] == [[None, None, 0, 1], [None, None, None, 0], [None, None, None, 0]]


def test_behind_views():
    _, node = mask(lambda p: p[None, :, None].expand(4, 3, 5).to(torch.int32) > 0, POSITIONS)
    base, dims = behind(node.args[0], [0, 1, 2])
    assert base.target == "inputs_0" and dims == [None, 0, None]
    (arange,) = program_of(lambda m, p: p + torch.arange(3), POSITIONS).graph.find_nodes(
        op="call_function", target=torch.ops.aten.arange.default
    )
    assert counts(arange, "3") and not counts(arange, "4") and not counts(base, "3")
