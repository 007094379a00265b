import pytest
import torch

from aograph.expression import Expression, Literal
from tests.programs import find, program_of

X = torch.randn(3, 8)
WEIGHTS = {"a": torch.randn(8, 8), "b": torch.randn(8, 8)}

EXPRESSIONS = {
    "a weight": (lambda m: m.a, "a", ["a"]),
    "a view": (lambda m: m.a[2:6, :].t().reshape(4, 8)[:, 1:].unsqueeze(0)[0].repeat(2, 1), None, ["a"]),
    "a cast": (lambda m: m.a.to(dtype=torch.float64).float(), None, ["a"]),
    "a concatenation": (lambda m: torch.cat([m.b[:4], m.a[4:]]), None, ["b", "a"]),
    "arithmetic": (lambda m: m.a * 2 + m.b * m.a, None, ["a", "b"]),
    "a chunk": (lambda m: torch.cat(m.a.chunk(2)[::-1]), None, ["a"]),
}


def expression_of(function):
    program = program_of(lambda m, x: (torch.mm(x, function(m)), m.a + m.b), X, **WEIGHTS)
    return Expression.of(find(program, "aten.mm").args[1])


@pytest.mark.parametrize("function, text, leaves", EXPRESSIONS.values(), ids=EXPRESSIONS.keys())
def test_an_expression_computes_what_the_graph_does(function, text, leaves):
    expression = expression_of(function)
    model = type("Weights", (), WEIGHTS)
    assert torch.equal(expression.evaluate(WEIGHTS.__getitem__), function(model))
    assert expression.leaves == leaves
    assert text is None or str(expression) == text


def test_a_literal_is_known_by_its_content():
    one, same, other = (Literal(torch.tensor(values)) for values in ([1.0, 2], [1.0, 2], [1.0, 3]))
    assert str(one) == str(same) != str(other) and str(one).startswith("torch.float32[2]#") and one.leaves == []
    scaled = Expression(torch.ops.aten.mul.Tensor, (Expression("a"), one))
    assert scaled.leaves == ["a"] and str(one) in str(scaled)
    assert scaled.evaluate({"a": torch.ones(3, 2)}.__getitem__).tolist() == [[1, 2]] * 3


def test_the_text_is_the_identity():
    same = [expression_of(lambda m: m.a[:4].t()) for _ in range(2)]
    others = [lambda m: m.b[:4].t(), lambda m: m.a[1:5].t(), lambda m: m.a.t()[:, :4], lambda m: m.a[:4].t() * 2]
    assert str(same[0]) == str(same[1]) == "t.default(slice.Tensor(a, 0, 0, 4))"
    assert len({str(same[0]), *(str(expression_of(f)) for f in others)}) == 5


def test_keyword_arguments_count():
    narrow, wide = (expression_of(lambda m, d=d: m.a.sum(0, dtype=d).expand(8, 8)) for d in (torch.half, torch.float))
    assert str(narrow) != str(wide)
    assert narrow.evaluate(WEIGHTS.__getitem__).dtype == torch.half


def test_views_share_memory():
    view = expression_of(lambda m: m.a[:4].t()).evaluate(WEIGHTS.__getitem__)
    assert view.data_ptr() == WEIGHTS["a"].data_ptr()
