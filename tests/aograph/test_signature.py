import dataclasses
import json
from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from aograph import InputError
from aograph.signature import Record, Signature, Value, assemble, evaluate, outline, solve, symbols_of, tree

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "left right")


def signature(*inputs, ranges=None, guards=()):
    return Signature(inputs, (), ranges or {}, tuple(guards), "*", "*")


def x(*sizes, **more):
    return Value("x", "float32", "cpu", sizes, **more)


def test_json_and_back():
    before = Signature(
        (x("s0", 64, within=(0, 9)), Value("flag", value=True)), (x("s0"),), {"s0": (2, None)}, ("Ne(s0, 7)",),
        tree(pytree.tree_structure((1, {"a": [2]}))), "*",
    )  # fmt: skip
    assert Signature.of(json.loads(json.dumps(dataclasses.asdict(before)))) == before


def test_inputs_that_fit_are_not_copied():
    given_x = torch.randn(5, 64)
    (found,) = signature(x("s0", 64), ranges={"s0": (2, 8)}).check([given_x], CPU)
    assert found.data_ptr() == given_x.data_ptr()


@pytest.mark.parametrize("make", [lambda t: t.T.contiguous().T, lambda t: t[:, 1:].clone()[:, :0], lambda t: t])
def test_inputs_are_made_contiguous(make):
    value = make(torch.randn(5, 64))
    (found,) = signature(x("s0", "s1")).check([value], CPU)
    assert found.is_contiguous() and torch.equal(found, value)


def test_inputs_are_aligned():
    value = torch.randn(65)[1:]
    (found,) = signature(x("s0")).check([value], CPU)
    assert found.data_ptr() % 16 == 0 and torch.equal(found, value)
    with pytest.raises(InputError, match="x is written in place"):
        signature(x("s0", written=True)).check([value], CPU)


@pytest.mark.parametrize(
    "like, value, message",
    [
        (x("s0", 64), torch.ones(5, 63), r"x.shape\[1\] is 63; it must be 64"),
        (x("s0", "s0"), torch.ones(5, 4), r"x.shape\[1\] is 4; it must be s0 = 5"),
        (x("4*s0", "s0 + 1"), torch.ones(8, 4), r"x.shape\[1\] is 4; it must be s0 \+ 1 = 3"),
        (x("4*s0"), torch.ones(9), r"x.shape\[0\] is 9; it must be 4\*s0 = 8"),
        (x("s0"), torch.ones(1), "s0 is 1; the graph was compiled for 2 to 8"),
        (x("s0"), torch.ones(9), "s0 is 9; the graph was compiled for 2 to 8"),
        (x("s0"), torch.ones(7), r"compiled for sizes with Ne\(s0, 7\)"),
        (x("s0"), torch.ones(4, 4), r"x is float32\[4, 4\] on cpu; the graph takes x: float32\[s0\]"),
        (x("s0"), torch.ones(4, dtype=torch.float64), "x is float64"),
        (x("s0"), torch.ones(4, device="meta"), "on meta"),
        (x("s0"), torch.ones(4).to_sparse(), "takes x"),
        (x("s0"), 3, "x is 3"),
        (x("s0"), object(), "x is a object"),
        (Value("i", "int64", "cpu", (2,), within=(-3, 2)), torch.tensor([3, 0]), "i holds 3; the graph takes -3 to 2"),
        (Value("i", "int64", "cpu", (2,), within=(-3, 2)), torch.tensor([0, -4]), "i holds -4"),
        (Value("flag", value=True), False, "flag is False: it was True"),
        (Value("flag", value=True), torch.tensor(True), "flag is bool"),
    ],
)
def test_inputs_that_do_not_fit(like, value, message):
    with pytest.raises(InputError, match=message):
        signature(like, ranges={"s0": (2, 8)}, guards=["Ne(s0, 7)"]).check([value], CPU)


@pytest.mark.parametrize(
    "value, expected",
    [
        ((1, [2, {"a": 3}], ()), (1, [2, {"a": 3}], ())),
        (Pair(1, 2), {"left": 1, "right": 2}),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        ({1: "x", 2: "y"}, ("x", "y")),
        (5, 5),
    ],
)
def test_containers_go_through_json(value, expected):
    leaves, spec = pytree.tree_flatten(value)
    found = assemble(json.loads(json.dumps(tree(spec))), iter(leaves))
    assert (found == expected and type(found) is type(expected)) or isinstance(found, Record)


def test_a_record_has_attributes():
    record = Record(logits=1)
    assert record.logits == record["logits"] == 1 and not hasattr(record, "loss")


def test_an_outline():
    container = tree(pytree.tree_structure(((1, [2]), {"k": 3, "m": 4})))
    assert outline(container, iter(["a", "b", "c", "m"])) == "((a, [b]), {k=c, m})"


@pytest.mark.parametrize(
    "text, expected",
    [("2*s0 + s1", 17), ("Mod(s0, 4)", 1), ("(s0//2)", 2), ("Eq(s0, 5) & Ne(s1, 5)", True), ("s0 <= s1", True),
     ("Max(1, s0)", 5), ("-s0", -5), ("s0**2", 25), (3, 3)],
)  # fmt: skip
def test_expressions(text, expected):
    assert evaluate(text, {"s0": 5, "s1": 7}) == expected


@pytest.mark.parametrize("text", ["s9", "__import__('os')", "s0.real", "f(s0)", "[s0]", "s0 +", "'a'", "max(s0)"])
def test_what_is_no_expression_is_not_run(text):
    with pytest.raises(ValueError, match="is no expression"):
        evaluate(text, {"s0": 5})


@given(st.integers(-3, 5).filter(bool), st.integers(-9, 9), st.integers(0, 99))
def test_a_symbol_is_found_from_a_size(a, b, size):
    sizes = {}
    solve(f"{a}*s0 + {b}", a * size + b, sizes)
    assert sizes == {"s0": size} and symbols_of("Max(s0, s1) + s0") == ("s0", "s1")
