"""Predicates over ranges, against brute force: True and False must be right, and None must be right to hesitate."""

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from aograph.errors import RecipeError
from aograph.predicate import Shape, holds, parse

M = sympy.Symbol("M")


def shape(low, high, N=64, K=128):
    return Shape(M, N, K, (low, high))


@pytest.mark.parametrize(
    "text, bounds, expected",
    [
        ("M <= 16", (1, 16), True),
        ("M <= 16", (17, None), False),
        ("M <= 16", (1, None), None),
        ("M < 16", (1, 16), None),
        ("M >= 1", (1, None), True),
        ("M == 4", (4, 4), True),
        ("M == 4", (4, 5), None),
        ("M == 4", (5, None), False),
        ("M != 4", (5, None), True),
        ("M != 4", (4, 4), False),
        ("M != 4", (1, 9), None),
        ("1 <= M <= 16", (2, 8), True),
        ("1 <= M <= 16", (20, 30), False),
        ("1 <= M <= 16", (0, 8), None),
        ("K >= 128 and N < 100", (1, None), True),
        ("K > 128 and M < 3", (1, None), False),  # decided without M
        ("K > 128 or M < 3", (1, None), None),
        ("K >= 128 or M < 3", (1, None), True),
        ("not M <= 16", (17, 20), True),
        ("not M <= 16", (1, 20), None),
        ("not (K == 128 and M < 3)", (3, None), True),
        ("K % 128 == 0", (1, None), True),
        ("N * K > 8191", (1, None), True),
        ("K // 3 == 42", (1, None), True),
        ("M * K >= 1280", (10, None), True),
        ("M - N < 0", (1, 63), True),
        ("M - N < 0", (1, 64), None),
        ("M * 0 == 0", (0, None), True),
    ],
)
def test_holds(text, bounds, expected):
    assert holds(text, shape(*bounds)) is expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("K >=", "no expression"),
        ("L > 3", "knows M, N and K, not 'L'"),
        ("K > 3.5", "may not contain '3.5'"),
        ("K > True", "may not contain 'True'"),
        ("len(K) > 3", "may not contain"),
        ("K.real > 3", "may not contain"),
        ("K / 2 > 3", "may not contain"),
        ("__import__('os')", "may not contain"),
        ("[K][0] > 1", "may not contain"),
        ("K > 3 if M else N", "may not contain"),
        ("K << 4000 > 1", "may not contain"),
        ("-K > 1", "may not contain"),
    ],
)
def test_what_a_predicate_may_not_say(text, message):
    with pytest.raises(RecipeError, match="shape predicate .*" + message.replace("(", r"\(")):
        parse(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("K", "is no condition"),
        ("K + 1", "is no condition"),
        ("(K > 1) + 1 > 2", "is no number"),
        ("K % 0 == 1", "zero"),
        ("K // (N - 64) == 1", "zero"),
    ],
)
def test_what_has_no_truth_value(text, message):
    with pytest.raises(RecipeError, match=message):
        holds(text, shape(1, 4))


sizes = st.sampled_from(["M", "N", "K", "0", "1", "2", "3", "5", "7"])
numbers = st.recursive(
    sizes,
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map("({0[0]} {0[1]} {0[2]})".format),
    max_leaves=3,
)
divisions = st.tuples(numbers, st.sampled_from(["%", "//"]), st.sampled_from("2357")).map(
    "({0[0]} {0[1]} {0[2]})".format
)
terms = st.one_of(numbers, divisions)
relations = st.tuples(terms, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), terms).map(" ".join)
chains = st.tuples(terms, st.just("<="), terms, st.just("<"), terms).map(" ".join)
conditions = st.recursive(
    st.one_of(relations, chains),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map("({0[0]}) {0[1]} ({0[2]})".format),
        inner.map("not ({})".format),
    ),
    max_leaves=4,
)


@settings(max_examples=400)
@given(conditions, st.integers(0, 6), st.integers(0, 6), st.integers(0, 6), st.integers(0, 6))
def test_a_decision_is_right_for_every_m(text, low, length, N, K):
    decided = holds(text, shape(low, low + length, N, K))
    truths = {bool(eval(text, {"M": m, "N": N, "K": K})) for m in range(low, low + length + 1)}
    if decided is not None:
        assert truths == {decided}
    else:
        assert length > 0  # a static M decides everything


@settings(max_examples=200)
@given(conditions, st.integers(0, 6), st.integers(0, 6), st.integers(0, 6))
def test_without_an_upper_bound(text, low, N, K):
    decided = holds(text, shape(low, None, N, K))
    if decided is not None:
        assert {bool(eval(text, {"M": m, "N": N, "K": K})) for m in range(low, low + 60)} == {decided}


@settings(max_examples=200)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]))
def test_a_relation_hesitates_only_where_it_must(low, length, limit, relation):
    decided = holds(f"M {relation} {limit}", shape(low, low + length))
    truths = {eval(f"{m} {relation} {limit}") for m in range(low, low + length + 1)}
    assert decided is (truths.pop() if len(truths) == 1 else None)
