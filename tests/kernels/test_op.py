"""The Op: declaring one, choosing an implementation, and saying what was chosen."""

from dataclasses import replace

import pytest
import torch
from aograph.kernels.op import OPS, Case, Op, Packing, need

CASE = Case("cpu", torch.float32, None, 8, 8)
ASKED = []  # the cases that "narrow" was asked about


def few(most):
    def supports(case):
        ASKED.append(case)
        return need((case.M is not None, "M is unknown"), ((case.M or 0) <= most, f"M is over {most}"))

    return supports


@pytest.fixture(scope="module")
def op():
    """test_add: x + 1, by "narrow" up to 4 tokens, "middle" up to 20, "wide" on a device called other."""
    op = Op("test_add(Tensor x, Tensor? y=None) -> Tensor")
    op.reference(lambda x, y=None: x + 1)
    op.fake(lambda x, y=None: torch.empty_like(x))
    op.case(lambda x, y=None: replace(CASE, device=x.device.type, M=x.shape[0]))
    op.implementation("narrow", supports=few(4))(lambda x, y=None: x + 1.25)
    op.implementation("middle", supports=few(20), standalone=True)(lambda x, y=None: x + 1.5)
    op.implementation("wide", supports=lambda case: case.device == "other" or "runs elsewhere")(torch.add)
    yield op
    del OPS["test_add"]


def test_registered_under_its_name(op):
    assert OPS["test_add"] is op and op.overload is torch.ops.aograph.test_add.default
    assert str(op.overload._schema) == "aograph::test_add(Tensor x, Tensor? y=None) -> Tensor"
    torch.library.opcheck(op.overload, (torch.ones(3),))


def test_the_first_that_supports_the_arguments_runs(op):
    results = [op(torch.zeros(M))[0].item() for M in (4, 5, 20, 21)]
    assert results == [1.25, 1.5, 1.5, 1]
    assert op.run(torch.zeros(2), implementation="reference")[0] == 1
    with pytest.raises(
        KeyError, match=r"test_add has no implementation 'fast'; it has \['narrow', 'middle', 'wide', 'ref"
    ):
        op.run(torch.zeros(2), implementation="fast")


def test_cases_are_remembered_by_what_they_depend_on(monkeypatch):
    asked = []

    def case(x, factor, y=None):
        asked.append((x.shape, factor))
        if factor < 0:
            raise ValueError("factor")
        return replace(CASE, M=x.shape[0], dtype=x.dtype)

    op = Op("test_known(Tensor x, int factor, Tensor? y=None) -> Tensor")
    op.case(case)
    try:
        x, y = torch.ones(3), torch.ones(2)
        assert op.known_case(x, 1, None) is op.known_case(x + 1, 1, None) and len(asked) == 1
        for other in ((y, 1, None), (x, 2, None), (x, 1, y), (x.double(), 1, None), (x.to("meta"), 1, None)):
            before = len(asked)
            assert op.known_case(*other).dtype is other[0].dtype and len(asked) == before + 1
        for _ in range(2):  # an error is none
            with pytest.raises(ValueError, match="factor"):
                op.known_case(x, -1, None)
        monkeypatch.setattr("aograph.kernels.op.REMEMBERED", 2)
        op.known_case(x, 5, None)
        assert len(op.cases) == 1
    finally:
        del OPS["test_known"]


def test_what_runs_without_the_package(op):
    """The first that is standalone and takes both ends of the range."""
    assert op.standalone(CASE, 1, 4).name == op.standalone(CASE, 0, 20).name == "middle"
    assert op.standalone(CASE, 4, 21).name == op.standalone(CASE, 1, None).name == "reference"
    oracle, op.oracle = op.oracle, replace(op.oracle, standalone=False)
    assert op.standalone(CASE, 1, None) is None
    op.oracle = oracle


def test_packing_is_data(op):
    @op.packing
    def pack(weight, bits):
        return weight * bits, weight + bits

    packing = Packing(op, {"bits": 3})
    assert [t.item() for t in packing(torch.tensor(2.0))] == [6, 5]
    assert packing == Packing(op, {"bits": 3}) != Packing(op, {"bits": 4})


def test_the_choice_is_remembered_until_there_is_another(op):
    case = replace(CASE, M=3)
    op.choose(case)
    asked = len(ASKED)
    assert op.choose(replace(CASE, M=3)).name == "narrow" and len(ASKED) == asked
    assert op.choose(CASE).name == "reference"
    op.implementation("late", supports=lambda case: True)(torch.add)
    try:
        assert op.choose(CASE).name == "late"
    finally:
        op.implementations.pop()
        op.choose.cache_clear()


def test_plan(op):
    everywhere = "narrow (M ≤ 4), middle (5 ≤ M ≤ 20), reference (M > 20)"
    assert op.plan(CASE, 1, None) == op.plan(CASE, 0, 2000) == everywhere
    assert op.plan(CASE, 5, 6) == op.plan(CASE, 20, 20) == "middle"
    assert op.plan(CASE, 3, 5) == "narrow (M ≤ 4), middle (M > 4)"
    assert op.plan(CASE, 17, 21) == "middle (M ≤ 20), reference (M > 20)"
    assert op.plan(replace(CASE, device="other"), 1, None) == "narrow (M ≤ 4), middle (5 ≤ M ≤ 20), wide (M > 20)"


def test_plan_sees_two_changes_between_powers_of_two():
    op = Op("test_steps(Tensor x) -> Tensor")
    op.reference(torch.clone)
    for name, most in [("a", 33), ("b", 35), ("c", 60)]:
        op.implementation(name, supports=few(most))(torch.clone)
    assert op.plan(CASE, 1, 64) == "a (M ≤ 33), b (34 ≤ M ≤ 35), c (36 ≤ M ≤ 60), reference (M > 60)"
    del OPS["test_steps"]


def test_availability(op):
    said = [("narrow", True), ("middle", True), ("wide", "runs elsewhere"), ("reference", True)]
    assert op.availability("cpu") == said


def test_availability_is_asked_about_the_usual_groups():
    op = Op("test_groups(Tensor x) -> Tensor", usual_group_size=64)
    op.reference(torch.clone)
    op.implementation("grouped", supports=lambda case: case.group_size == 64 or "takes groups of 64")(torch.clone)
    assert op.availability("cpu")[0] == ("grouped", True)
    del OPS["test_groups"]


def test_a_later_version_is_another_op():
    second = Op("test_add(Tensor x) -> Tensor", version=2)
    assert second.overload is torch.ops.aograph.test_add_v2.default and OPS["test_add_v2"] is second
    del OPS["test_add_v2"]


def test_need():
    assert need((True, "a"), (True, "b")) is True
    assert need((True, "a"), (False, "b"), (False, "c")) == "b"
