import pytest
import torch
from aograph.patterns.masks import limit, parts

from tests.programs import program_of

B, S = 2, 32
POSITIONS, ROWS = torch.arange(3, 6), torch.stack([torch.arange(3), torch.arange(4, 7)])


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
    found = limit(part, str(S))
    assert found.node.target == "inputs_0" and (found.dims, found.shift) == (dims, shift)


def test_the_horizon_of_rows():
    _, node = mask(lambda p: torch.arange(S) <= p[:, None, :, None], ROWS)
    (part,) = parts(node, [0, 1, 2, 3])
    assert limit(part, str(S)).dims == [0, 1]


FIRSTS = {
    ">": (lambda p: torch.arange(S) > (p - 5)[:, None], -4),
    "the other way": (lambda p: (p[:, None] + 2) <= torch.arange(S), 2),
    "not": (lambda p: ~(torch.arange(S) <= p[:, None] - 5), -4),
    "in two steps": (lambda p: torch.arange(S) >= (p[:, None] - 3) + 1, -2),
}


@pytest.mark.parametrize("function, shift", FIRSTS.values(), ids=FIRSTS.keys())
def test_the_first_that_is_seen(function, shift):
    _, node = mask(lambda p: function(p)[None, None], POSITIONS)
    (part,) = parts(node, [0, 1, 2, 3])
    found = limit(part, str(S))
    assert found.first and found.node.target == "inputs_0" and (found.dims, found.shift) == ([None, 0], shift)


@pytest.mark.parametrize("sum_too", [False, True])
def test_numbers_are_not_looked_behind_where_something_is_written(sum_too):
    def function(p):
        ahead = p + 3
        (ahead[:1] if sum_too else p).zero_()
        return (torch.arange(S) <= ahead[:, None])[None, None]

    _, node = mask(function, POSITIONS.clone())
    (part,) = parts(node, [0, 1, 2, 3])
    found = limit(part, str(S))
    assert found.node.target is torch.ops.aten.add.Tensor and found.shift == 0


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
    found = [limit(part, str(S)) for part in parts(node, [0, 1, 2, 3])]
    assert all(each is None or each.first for each in found)


def test_parts_of_a_mask():
    _, node = mask(lambda p, a: (~((torch.arange(S) > p[:, None]) | (torch.arange(S) == 2)) & a[0])[None, None],
                   POSITIONS, torch.ones(B, S, dtype=torch.bool))  # fmt: skip
    found = list(parts(node, [0, 1, 2, 3]))
    assert [part.negated for part in found] == [True, True, False]
    assert [part.dims for part in found] == [[None, None, 0, 1], [None, None, None, 0], [None, None, None, 0]]
