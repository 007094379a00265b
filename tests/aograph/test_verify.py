"""Each promise of the verifier, broken on purpose."""

import pytest
import torch
from aograph.passes import Stage

from aograph import PassError
from aograph.program import set_attribute
from aograph.verify import agree, verify
from tests.models.zoo import build
from tests.programs import apply, find, program_of, up_to
from tests.small_models import MLP, Tied

aten = torch.ops.aten
X = torch.randn(3, 64)


def in_fake(node, *shape, dtype=torch.float32):
    mode = node.meta["val"].fake_mode
    with mode:
        return torch.empty(shape, dtype=dtype)


def wrong_shape(program):
    relu = find(program, "aten.relu")
    relu.meta["val"] = in_fake(relu, 3, 127)


def wrong_rank(program):
    relu = find(program, "aten.relu")
    relu.meta["val"] = in_fake(relu, 3, 128, 1)


def wrong_dtype(program):
    relu = find(program, "aten.relu")
    relu.meta["val"] = in_fake(relu, 3, 128, dtype=torch.bfloat16)


def no_value(program):
    del find(program, "aten.relu").meta["val"]


def no_tensor(program):
    find(program, "aten.relu").meta["val"] = 3


def wrong_device(program):
    relu = find(program, "aten.relu")
    relu.meta["val"] = relu.meta["val"].to("meta")


def misfit(program):
    relu = find(program, "aten.relu")
    relu.target, relu.args = aten.mm.default, (relu.args[0], relu.args[0])


def orphan(program):
    program.constants["forgotten"] = torch.ones(2)


def unknown_weight(program):
    program.weights["up.weight"].target = "up.wieght"


def weight_without_tensor(program):
    del program.constants["up.weight"]


def wrong_order(program):
    relu = find(program, "aten.relu")
    relu.next.append(relu)


def foreign_node(program):
    other = program_of(MLP(), X)
    find(program, "aten.relu").args = (find(other, "aten.relu"),)


BROKEN = [
    (wrong_shape, r"relu.* is said to be f32\[3, 127\], but is f32"),
    (wrong_rank, r"relu.* is said to be f32\[3, 128, 1\]"),
    (wrong_dtype, r"relu.* is said to be bf16\[3, 128\], but is f32"),
    (wrong_device, r"is said to be"),
    (no_tensor, "is said to be 3"),
    (no_value, r"relu.* has no meta\['val'\]"),
    (misfit, "does not fit its inputs"),
    (orphan, "the weight forgotten is an orphan"),
    (unknown_weight, "malformed|reads up.wieght"),
    (weight_without_tensor, "reads up.weight, which is neither a weight nor packed"),
    (wrong_order, "malformed"),
    (foreign_node, "malformed"),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wreck, message", BROKEN, ids=[wreck.__name__ for wreck, _ in BROKEN])
def test_what_it_catches(wreck, message, dynamic):
    program = program_of(MLP(), X, dynamic=dynamic)
    wreck(program)
    with pytest.raises(PassError, match=message):
        verify(program)


@pytest.mark.parametrize("wreck, message", BROKEN, ids=[wreck.__name__ for wreck, _ in BROKEN])
def test_what_it_has_seen_once_is_seen_again(wreck, message):
    """What was verified is not propagated again, and still a change is caught."""
    program = program_of(MLP(), X)
    verify(program)
    verify(program)
    wreck(program)
    with pytest.raises(PassError, match=message):
        verify(program)


def test_a_changed_argument():
    program = program_of(lambda m, x: x.sum(0, keepdim=True), X)
    verify(program)
    node = find(program, "aten.sum")
    node.args = (node.args[0], [1], True)
    with pytest.raises(PassError, match=r"is said to be f32\[1, 64\], but is f32\[3, 1\]"):
        verify(program)


def test_an_error_inside_of_vmap_leaves_its_level():
    program = program_of(lambda m, x, y: torch.vmap(lambda each: each + y.exp())(x), X, X[0])
    find(program, "aten.exp").meta["val"] = None
    with pytest.raises(PassError, match=r"exp.* is said to be None"):
        verify(program)
    assert torch._C._functorch.maybe_current_level() is None


def test_a_tied_weight_that_has_become_two():
    program = program_of(Tied(), torch.arange(3)[None])
    verify(program)
    weight = program.weights["embedding.weight"]
    with program.graph.inserting_before(weight):
        set_attribute(program.graph_module, "head.weight", program.constants["embedding.weight"].clone())
        double = program.graph.get_attr("head.weight")
    double.meta["val"] = weight.meta["val"]
    head = next(n for n in program.graph.nodes if n.args[1:2] == (weight,) and n.target is aten.linear.default)
    head.replace_input_with(weight, double)
    program.constants["head.weight"] = program.graph_module.head.weight
    with pytest.raises(PassError, match=r"head.weight is tied to embedding.weight, but has become a weight of its own"):
        verify(program)


def test_a_dtype_that_an_op_does_not_take():
    program = program_of(MLP(), X)
    apply(program, *up_to(Stage.CLEANUP))
    call = next(n for n in program.graph.nodes if n.target is torch.ops.aograph.int8_linear.default)
    call.args[0].meta["val"] = in_fake(call.args[0], 3, 64, dtype=torch.float64)
    with pytest.raises(PassError, match=r"aograph.int8_linear.default does not take f64\[3, 64\]"):
        verify(program)


def test_an_op_on_a_packed_weight_of_the_wrong_kind():
    program = program_of(MLP(), X)
    apply(program, *up_to(Stage.CLEANUP))
    call = next(n for n in program.graph.nodes if n.target is torch.ops.aograph.int8_linear.default)
    call.args[1].meta["val"] = in_fake(call.args[1], 128, 64, dtype=torch.uint8)
    with pytest.raises(PassError, match=r"does not fit its inputs: .*q is uint8"):
        verify(program)


@pytest.mark.parametrize("name", ["llama_with_cache", "mixtral"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_whole_models_pass_and_are_not_specialized(name, dynamic):
    from aograph.capture import capture

    model, inputs = build(name)
    program = capture(model, (), inputs, None if dynamic else dict.fromkeys(inputs)).program
    verify(program)
    sizes = [s for node in program.inputs for s in getattr(node.meta["val"], "shape", ())]
    assert any(isinstance(s, torch.SymInt) for s in sizes) == dynamic
    assert dynamic == (len({str(s) for s in sizes if isinstance(s, torch.SymInt)}) == 2)


def test_values_that_agree():
    def like(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    assert agree(like(2, 3), like(2, 3)) and agree([like(2), 5], [like(2), 5]) and agree(3, 4)
    assert not agree(like(2, 3), like(3, 2)) and not agree([like(2)], [like(2), like(2)])
    assert not agree(like(2), 2) and not agree(2, like(2)) and not agree(like(2), like(2, dtype=torch.half))
