import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion as Version

from aograph import CaptureError, InputError
from aograph.capture import Capture, capture, flatten, names_of, on_meta, retarget
from aograph.verify import verify
from tests.programs import find, operators, outputs, program_of
from tests.small_models import MLP, Branching, Counting, Tied

X = torch.randn(3, 64)


# --- what a program is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, inputs", [(MLP(), X), (Tied(), torch.arange(3)[None])])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_program_computes_what_the_model_does(model, inputs, dynamic):
    program = program_of(model, inputs, dynamic=dynamic)
    verify(program)
    assert torch.equal(outputs(program, inputs)[0], model(inputs))


def test_constants_share_the_models_storage():
    model = Tied()
    program = program_of(model, torch.arange(3)[None])
    assert sorted(program.constants) == ["embedding.weight", "middle.bias", "middle.weight"]
    assert program.aliases == {"head.weight": "embedding.weight"}
    for name, tensor in program.constants.items():
        assert tensor.data_ptr() == model.get_parameter(name).data_ptr()


def test_weights_that_nothing_uses_are_no_constants():
    model = MLP()
    model.spare = nn.Linear(64, 64)
    assert not any("spare" in name for name in program_of(model, X).constants)


def test_every_call_knows_where_it_came_from():
    program = program_of(nn.Sequential(MLP(), nn.ReLU()), X)
    origins = {n.name: n.meta["origin"] for n in program.graph.nodes if n.op == "call_function"}
    assert set(origins.values()) == {
        ("0.up", "torch.nn.modules.linear.Linear"),
        ("0", "tests.small_models.MLP"),
        ("0.down", "torch.nn.modules.linear.Linear"),
        ("1", "torch.nn.modules.activation.ReLU"),
    }


def test_weights_stand_in_front_of_everything_else():
    kinds = [n.op for n in program_of(MLP(), X).graph.nodes]
    assert kinds.index("call_function") > max(i for i, kind in enumerate(kinds) if kind == "get_attr")


def test_written_buffers_are_named():
    program = program_of(Counting(), X)
    assert program.mutated == {"calls"} and program_of(MLP(), X).mutated == frozenset()


def test_names_of():
    model = Tied()
    names = names_of(model)
    assert names[id(model.head.weight)] == ["embedding.weight", "head.weight"]
    assert names[id(model.middle.bias)] == ["middle.bias"]


# --- calls -------------------------------------------------------------------------------------------------


class Call(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, a, b, *, c, scale=1.0):
        return self.linear(a) + 2 * b + 3 * c * scale


CALLS = [
    ((X, X + 1), {"c": X + 2}),
    ((X, X + 1), {"scale": 2.0, "c": X + 2}),
    ((X,), {"c": X + 2, "b": X + 1}),
    ((), {"c": X + 2, "b": X + 1, "a": X}),
]


@pytest.mark.parametrize("args, kwargs", CALLS)
def test_positional_and_keyword_arguments_in_any_order(args, kwargs):
    model = Call().eval()
    captured = capture(model, args, dict(sorted(kwargs.items())))
    for order in (kwargs, dict(reversed(kwargs.items()))):
        flat, spec = flatten(args, order)
        assert spec == captured.in_spec and captured.accepts(flat) is None
        torch.testing.assert_close(outputs(captured.program, *flat)[0], model(*args, **order).detach())


def test_a_tensor_that_is_given_twice_is_two_inputs():
    class Sum(nn.Module):
        def forward(self, x, y, *, z):
            return x - 2 * y + 4 * z["deep"][0]

    x, y, z = (torch.randn(3, 64) for _ in range(3))
    program = capture(Sum(), (x, x), {"z": {"deep": [x]}}).program
    assert torch.equal(outputs(program, x, y, z)[0], x - 2 * y + 4 * z)


def test_structures_go_in_and_out():
    class Nested(nn.Module):
        def forward(self, inputs):
            return {"sum": inputs["a"][0] + inputs["b"], "parts": inputs["a"]}

    inputs = {"a": [X, X + 1], "b": X + 2}
    captured = capture(Nested(), (inputs,), {})
    flat, spec = flatten((inputs,), {})
    assert spec == captured.in_spec
    result = torch.utils._pytree.tree_unflatten(outputs(captured.program, *flat), captured.out_spec)
    assert torch.equal(result["sum"], X + (X + 2)) and len(result["parts"]) == 2


# --- shapes ------------------------------------------------------------------------------------------------


def accepts(captured: Capture, *inputs):
    return captured.accepts(flatten(inputs, {})[0])


def test_sizes_above_one_are_dynamic():
    captured = capture(MLP().eval(), (torch.randn(2, 1, 64),), {})
    shape = captured.program.inputs[0].meta["val"].shape
    assert isinstance(shape[0], torch.SymInt) and shape[1] == 1 and shape[2] == 64
    assert accepts(captured, torch.randn(9, 1, 64)) is None
    assert accepts(captured, torch.randn(2, 3, 64)).endswith("shape[1] is 3, captured as 1")
    assert "shape[0] is 1, captured for 2 … ∞" in accepts(captured, torch.randn(1, 1, 64))


def test_dimensions_that_must_be_equal():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    captured = capture(Sum(), (torch.randn(3, 4), torch.randn(3, 4)), {})
    assert accepts(captured, torch.randn(5, 6), torch.randn(5, 6)) is None
    assert "captured as equal is 5" in accepts(captured, torch.randn(5, 6), torch.randn(7, 6))


def test_sizes_that_depend_on_one_another():
    class Halves(nn.Module):
        def forward(self, a, b):
            return a + torch.cat([b, b])

    captured = capture(Halves(), (torch.randn(6, 4), torch.randn(3, 4)), {})
    assert accepts(captured, torch.randn(8, 4), torch.randn(4, 4)) is None
    assert accepts(captured, torch.randn(8, 4), torch.randn(3, 4)) is not None


def test_sizes_that_are_computed_from_another():
    class Every(nn.Module):
        def forward(self, a, b):
            return a[::2] + b

    captured = capture(Every(), (torch.randn(6, 4), torch.randn(3, 4)), {})
    for length in (6, 7, 12):
        assert accepts(captured, torch.randn(length, 4), torch.randn((length + 1) // 2, 4)) is None
        assert accepts(captured, torch.randn(length, 4), torch.randn(length // 2 + 2, 4)) is not None


def test_keyword_arguments_that_the_signature_does_not_name():
    class Rest(nn.Module):
        def forward(self, x, **rest):
            return x + rest["y"] if rest["flag"] else x

    model = Rest()
    captured = capture(model, (torch.randn(3, 4),), {"flag": True, "y": torch.randn(3, 4)})
    assert accepts(captured, torch.randn(5, 4), True, torch.randn(5, 4)) is None
    assert type(model) is Rest and "forward" not in vars(model)


def test_a_model_that_needs_one_size_is_captured_with_it():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(5, 64))

        def forward(self, x):
            return x + self.position

    captured = capture(Fixed(), (torch.randn(2, 5, 64),), {})
    assert accepts(captured, torch.randn(7, 5, 64)) is None
    assert "is 6, captured as 5" in accepts(captured, torch.randn(2, 6, 64))


def test_sizes_in_control_flow_are_guarded():
    class Guarded(nn.Module):
        def forward(self, x):
            return x + 1 if x.shape[0] > 5 else x - 1

    captured = capture(Guarded(), (torch.randn(3, 4),), {})
    assert accepts(captured, torch.randn(5, 4)) is None
    assert accepts(captured, torch.randn(6, 4)) is not None


def test_ranges_are_those_that_were_asked_for():
    shapes = ({0: torch.export.Dim("batch", min=3, max=17)},)
    captured = capture(MLP().eval(), (torch.randn(4, 64),), {}, shapes)
    assert list(captured.program.ranges.values()) == [(3, 17)]
    assert "is 18, captured for 3 … 17" in accepts(captured, torch.randn(18, 64))


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="torch.export of this release indexes by no scalar from data"
)
def test_an_index_that_depends_on_data():
    program = program_of(lambda m, x: x @ m.w[x[0].argmax()], X, w=torch.randn(64, 64))
    torch.testing.assert_close(outputs(program, X)[0], X @ program.constants["w"][X[0].argmax()])


# --- the model and the process are left as they were -------------------------------------------------------


def test_modes_come_back():
    model = nn.Sequential(nn.Dropout(), MLP(), nn.BatchNorm1d(64)).train()
    model[2].eval()
    program = capture(model, (X,), {}).program
    assert [m.training for m in model] == [True, True, False]
    assert find(program, "aten.dropout").args[2] is False  # captured in eval mode


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Dropout(), Branching()).train()
    with pytest.raises(CaptureError):
        capture(model, (X,), {})
    assert all(m.training for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_no_fast_path_hides_linears(enabled):
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        program = program_of(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), torch.randn(2, 5, 64))
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert operators(program)["aten.linear"] == 4
    assert not any("transformer" in name or "multi_head" in name for name in operators(program))


def test_an_error_says_where_and_what_to_try():
    class Printing(nn.Module):
        def forward(self, x):
            return torch.as_tensor(x.tolist())

    with pytest.raises(CaptureError) as caught:
        capture(Printing(), (X,), {})
    assert "could not capture Printing at " in str(caught.value) and "test_capture.py" in str(caught.value)
    assert "Try: " in str(caught.value) and caught.value.__cause__ is not None


def test_inputs_that_cannot_be_flattened():
    with pytest.raises(InputError, match="cannot be flattened"):
        flatten((), {1: X, "a": X})


# --- devices -----------------------------------------------------------------------------------------------


def test_a_copy_on_meta():
    model = Tied()
    copy = on_meta(model)
    assert all(p.is_meta for p in copy.parameters()) and not any(p.is_meta for p in model.parameters())
    assert copy.head.weight is copy.embedding.weight and isinstance(copy.head.weight, nn.Parameter)
    assert [n for n, _ in copy.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_retarget():
    def forward(m, x):
        return x @ m.w + torch.ones(4, device=x.device) + torch.arange(4, device="cpu")

    meta = torch.device("meta")
    program = program_of(forward, torch.randn(3, 4), w=torch.randn(4, 4))
    retarget(program, torch.device("cpu"), meta)
    assert {n.meta["val"].device for n in program.graph.nodes if n.op != "output"} == {meta}
    assert program.constants["w"].device.type == "cpu"  # the weight store moves them
    verify(program)
