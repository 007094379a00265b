import pytest
import torch
import torch.nn.functional as F
from aograph.passes import Stage
from aograph.patterns.language import arguments

from tests.models.zoo import build
from tests.programs import apply, find, operators, outputs, program_of, up_to

Q = torch.randn(2, 4, 6, 8)


def written_through_a_view(x):
    position = torch.arange(6)
    position[:3].sub_(9)
    return position >= 0


POSITIONS = {
    "a range": (lambda x: torch.arange(x.shape[2]) >= 0, True),
    "a shifted range": (lambda x: torch.arange(x.shape[2]) + 3 >= 0, True),
    "a range in two dimensions": (lambda x: torch.arange(6)[None, None, :, None].expand(2, 1, -1, 6) >= 0, True),
    "expanded afterwards": (lambda x: (torch.arange(x.shape[2]) >= 0)[None].expand(6, -1), True),
    "a range that goes below": (lambda x: torch.arange(x.shape[2]) - 3 >= 0, False),
    "a range from below": (lambda x: torch.arange(-3, 3) >= 0, False),
    "a range over a limit": (lambda x: torch.arange(x.shape[2]) >= 1, False),
    "data": (lambda x: x[0, 0, :, 0] >= 0, False),
    "floats": (lambda x: torch.arange(x.shape[2]) * 0.5 >= 0, False),
    "a range that is written": (lambda x: torch.arange(6).sub_(3) >= 0, False),
    "a range that is written through a view": (written_through_a_view, False),
}


def attention(function):
    def forward(m, x):
        mask = function(x)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask.expand(6, 6) if mask.ndim == 1 else mask)

    return forward


@pytest.mark.parametrize("function, removed", POSITIONS.values(), ids=POSITIONS.keys())
def test_only_a_mask_that_hides_nothing_goes(function, removed):
    program = program_of(attention(function), Q)
    expected = outputs(program, Q)
    apply(program, "remove_noops")
    assert apply(program, "remove_true_masks") == [int(removed)]
    node = find(program, "aten.scaled_dot_product_attention")
    assert (arguments(node)[3] is None) == removed
    assert ("aten.ge" in operators(program)) == (not removed)
    torch.testing.assert_close(outputs(program, Q), expected)
    assert apply(program, "remove_true_masks") == [0]


def test_an_additive_mask_stays():
    def forward(m, x):
        mask = torch.arange(6).expand(6, 6) >= 0
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask.float())

    program = program_of(forward, Q)
    expected = outputs(program, Q)
    apply(program, "remove_noops")
    assert apply(program, "remove_true_masks") == [0]
    torch.testing.assert_close(outputs(program, Q), expected)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_encoders_of_transformers(name):
    model, inputs = build(name)
    program = program_of(model, *inputs.values(), dynamic=True)
    apply(program, *up_to(Stage.NORMALIZE))
    attentions = [n for n in program.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert len(attentions) == 2 and all(arguments(n)[3] is None for n in attentions)
