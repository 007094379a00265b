import torch
from aograph.patterns.broadcast import arranged, behind, counts, sizes
from aograph.patterns.language import Builder

from tests.programs import find, program_of

POSITIONS = torch.arange(3, 6)


def test_behind_views():
    program = program_of(lambda m, p: p[None, :, None].expand(4, 3, 5).to(torch.int32) > 0, POSITIONS)
    node = find(program, "aten.gt").args[0]
    base, dims = behind(node, [0, 1, 2])
    assert base.target == "inputs_0" and dims == [None, 0, None]
    found = arranged(Builder(program.graph.output_node()), base, [None, None, 0])
    assert sizes(found) == ["1", "1", "3"]


def test_what_is_no_view_stays():
    program = program_of(lambda m, p: p.view(3, 2)[None].to(torch.float32) > 0, torch.arange(6))
    node = find(program, "aten.gt").args[0]
    assert behind(node, [0, 1, 2]) == (node, [None, 1, 2])


def test_counts():
    for function, yes in (
        (lambda m, p: p + torch.arange(3), True),
        (lambda m, p: p + torch.arange(0, 3), True),
        (lambda m, p: p + torch.arange(1, 4), False),
        (lambda m, p: p + torch.arange(0, 6, 2), False),
    ):
        program = program_of(function, POSITIONS)
        (arange,) = (n for n in program.graph.nodes if "arange" in str(n.target))
        assert counts(arange, "3") == yes and not counts(arange, "4") and not counts(program.inputs[0], "3")
