"""Packed weights by parameter: made once, noticed to be stale, filled in place, gone with the module."""

import gc
import weakref

import pytest
import torch
from torch import nn

from aograph import InputError, WeightError, frozen
from aograph.expression import Expression
from aograph.frozen import Frozen, packed, refresh
from aograph.weights import Pack

needs_guard = pytest.mark.skipif(frozen.FORBID is None, reason="this build of torch cannot guard freed memory")


@pytest.fixture(autouse=True)
def calls():
    """How often each weight was packed."""
    CALLS.clear()
    return CALLS


CALLS: list[torch.Tensor] = []


def double(weight):
    CALLS.append(weight)
    return (weight * 2, weight.sum(1))


def pack(name="weight", kind="double"):
    return Pack(kind, Expression(name), double, (f"{name}_twice", f"{name}_sum"))


def graph(names, unpacked=(), release=False, ready=lambda: None):
    """What a compiled graph holds whose inputs are the weights `names`, then those `unpacked`."""
    order = [*names, *unpacked]
    return Frozen([pack(n) for n in names], unpacked, lambda name, inputs: inputs[order.index(name)], release, ready)


def test_one_copy_whatever_graphs_and_names():
    w = nn.Parameter(torch.randn(3, 4))
    first, second = graph(["weight"]), graph(["model.weight"])
    tensors = first([w])
    assert all(a is b for a, b in zip(tensors, second([w]), strict=True)) and len(CALLS) == 1
    assert first([w]) is tensors
    assert torch.equal(tensors[0], w * 2)


def test_once_all_is_packed_it_says_so():
    w, said = torch.randn(3, 4), []
    run = graph(["weight"], ready=lambda: said.append(len(CALLS)))
    run([w])
    run([w.add_(1)])
    assert said == [1]


def test_another_kind_and_another_weight_are_packed_apart():
    w, other = torch.randn(3, 4), torch.randn(3, 4)
    assert packed(pack(), [w]) is packed(pack("any.name"), [w])
    assert packed(pack(kind="other"), [w]) is not packed(pack(), [w])
    run = graph(["weight"])
    assert torch.equal(run([w])[0], w * 2) and torch.equal(run([other])[0], other * 2)
    assert torch.equal(run([w])[0], w * 2) and len(CALLS) == 3


def test_weights_in_another_order_are_another_pack():
    a, b = torch.zeros(2, 2), torch.ones(2, 2)
    cat = Expression(torch.ops.aten.cat.default, ([Expression("a"), Expression("b")],))
    swapped = Expression(torch.ops.aten.cat.default, ([Expression("b"), Expression("a")],))
    results = [packed(Pack("double", e, double, ("x", "y")), given) for e, given in ((cat, [a, b]), (swapped, [b, a]))]
    assert results[0] is not results[1]
    assert torch.equal(results[1].tensors[0], torch.cat([b, a]) * 2)
    assert packed(Pack("double", swapped, double, ("x", "y")), [a, b]) is results[0]  # the same under other names


def test_a_write_in_place_is_noticed_and_filled_in_where_it_is():
    w = nn.Parameter(torch.randn(3, 4))
    run = graph(["weight"])
    tensors = run([w])
    addresses = [t.data_ptr() for t in tensors]
    with torch.no_grad():
        w.add_(1)
    assert torch.equal(run([w])[0], w * 2)
    assert [t.data_ptr() for t in run([w])] == addresses and len(CALLS) == 2


def test_refresh_finds_what_torch_does_not_count():
    model = nn.Linear(4, 3)
    run = graph(["weight"])
    run([model.weight])
    model.weight.data.add_(1)
    assert not torch.equal(run([model.weight])[0], model.weight * 2)
    assert refresh(model) == 1
    assert torch.equal(run([model.weight])[0], model.weight * 2)
    assert refresh(nn.Linear(4, 3)) == 0


@torch.inference_mode()
def test_in_inference_mode_too():
    w = torch.randn(3, 4)
    assert w.is_inference()
    tensors = graph(["weight"])([w])
    assert torch.equal(tensors[0], w * 2) and not tensors[0].is_inference()


def test_an_identity_is_a_copy_of_its_own():
    w = nn.Parameter(torch.randn(4))
    same = Pack("constant", Expression("bias"), lambda t: (t,), ("bias_folded",))
    (tensor,) = packed(same, [w]).tensors
    assert tensor.data_ptr() != w.data_ptr() and torch.equal(tensor, w)


def test_what_is_packed_goes_with_the_weight():
    gc.collect()  # what other tests have left
    w = nn.Parameter(torch.randn(3, 4))
    run = graph(["weight"])
    tensors = [weakref.ref(t) for t in run([w])]
    known = len(frozen.KNOWN)
    del w
    CALLS.clear()
    gc.collect()
    assert [t() for t in tensors] == [None, None]
    assert len(frozen.KNOWN) == known - 1


def test_nan_is_named_and_what_was_packed_stays():
    w = torch.randn(3, 4)
    rounding = Pack("double", Expression("up.weight"), double, ("a", "b"), lambda x, packed: x @ (packed[0] / 2).T)
    before = packed(rounding, [w]).tensors[0].clone()
    w[1, 2] = torch.nan
    with pytest.raises(WeightError, match=r"up\.weight holds NaN or inf, first at \[1, 2\]"):
        packed(rounding, [w])
    w[1, 2] = 0
    assert torch.equal(packed(rounding, [w]).tensors[0], w * 2) and not torch.equal(before, w * 2)


@needs_guard
def test_release_frees_the_original_and_every_use_of_it_raises(tmp_path):
    model = nn.Linear(4, 3)
    run = graph(["weight"], release=True)
    expected = model.weight.detach() * 2
    tensors = run([model.weight])
    assert model.weight.untyped_storage().nbytes() == 0 and model.bias.untyped_storage().nbytes() > 0
    assert torch.equal(tensors[0], expected) and run([model.weight])[0] is tensors[0]
    assert torch.equal(graph(["weight"])([model.weight])[0], expected)  # another graph needs no original
    for use in (model.state_dict, lambda: nn.Sequential(model).state_dict(), lambda: model.load_state_dict({})):
        with pytest.raises(WeightError, match=r"weight was released .* load the original checkpoint"):
            use()
    for use in (lambda: model.weight.sum(), lambda: model.weight.clone(), lambda: model(torch.zeros(2, 4))):
        with pytest.raises(RuntimeError):
            use()
    with pytest.raises(WeightError, match="nothing can be packed from it again"):
        refresh(model)
    with pytest.raises(WeightError, match="is needed as it is here, but was released"):
        graph([], unpacked=["weight"])([model.weight])


@needs_guard
def test_what_a_graph_reads_unpacked_is_not_released():
    table, shared = torch.randn(3, 4), torch.randn(6, 4)
    graph([], unpacked=["table"])([table])
    graph(["table"], release=True)([table])
    graph(["half"], release=True)([shared[:3]])
    assert table.untyped_storage().nbytes() and shared.untyped_storage().nbytes()


@pytest.mark.skipif(frozen.FORBID is not None, reason="this build of torch can guard freed memory")
def test_release_is_refused_where_freed_memory_cannot_be_guarded():
    with pytest.raises(InputError, match="hand_over=True"):
        graph(["weight"], release=True)
