import copy
import gc
import weakref

import pytest
import torch
from aograph.kernels import int8_linear
from torch import nn

from aograph import InputError, Recipe, WeightError, optimize
from aograph.capture import on_meta
from aograph.optimize import rewrite
from aograph.weights import Source, WeightStore
from tests.programs import Function
from tests.small_models import MLP, Counting, Tied, untouched

IDS = torch.arange(6).view(2, 3)


@pytest.fixture
def x():
    return torch.randn(3, 64)


def eager(model, recipe="int8wo", example_inputs=None, **options):
    return optimize(model.eval(), recipe, example_inputs, compile=False, **options)


# --- what cannot be packed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("hand_over", [False, True])
def test_nan_and_inf_are_named_and_nothing_is_changed(x, bad, hand_over):
    model = MLP().eval()
    model.down.weight.data[7, 100] = bad
    with untouched(model, x), pytest.raises(WeightError, match=r"down\.weight holds NaN or inf, first at \[7, 100\]"):
        eager(model, "int8wo", x, hand_over=hand_over)
    assert not any(p.is_meta for p in model.parameters())


def test_the_advice_on_nan_works(x):
    model = MLP()
    model.down.weight.data[0, 0] = float("nan")
    with pytest.raises(WeightError, match="with the rule down:none"):
        eager(model, "int8wo", x)
    state = eager(model, "int8wo+down:none", x).state_dict()
    assert "up.weight_q" in state and state["down.weight"].isnan().any()


def test_a_bad_weight_that_is_not_packed_is_none_of_our_business(x):
    model = MLP()
    model.down.bias.data[0] = float("nan")
    assert eager(model, "int8wo", x)(x)[:, 0].isnan().all()


# --- packed once -------------------------------------------------------------------------------------------


@pytest.fixture
def packed_shapes(monkeypatch):
    """The shapes of the real weights that int8 packing has seen."""
    shapes = []

    def pack(weight, **settings):
        if type(weight) is torch.Tensor:
            shapes.append(tuple(weight.shape))
        return int8_linear.pack(weight, **settings)

    monkeypatch.setattr(int8_linear.int8_linear, "pack", pack)
    return shapes


def test_a_weight_is_packed_once_for_all_captures(packed_shapes):
    model = MLP()
    optimized = eager(model)
    for shape in [(3, 64), (1, 64), (2, 3, 64)]:
        optimized(torch.randn(shape))
    modules = [captured.program.graph_module for _, captured, _ in optimized._captures.values()]
    assert len(modules) == 3 and packed_shapes == [(128, 64), (64, 128)]
    for name in ("up.weight_q", "up.weight_scale", "up.bias"):
        assert len({m.get_buffer(name).data_ptr() for m in modules}) == 1


def test_one_weight_at_two_places_is_packed_once(packed_shapes, x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            return self.linear(self.linear(x).relu())

    optimized = eager(Twice(), "int8wo", x)
    assert packed_shapes == [(64, 64)] and len(optimized.report.rows) == 2


def test_what_is_not_packed_is_shared_with_the_model(x):
    model = MLP()
    state = eager(model, "up:int8wo", x).state_dict()
    for name in ("up.bias", "down.weight", "down.bias"):
        assert state[name].data_ptr() == model.get_parameter(name).data_ptr()


def test_the_error_of_a_row_is_that_of_its_weight(x):
    model = MLP()
    model.down.weight.data = torch.randint(-127, 128, (64, 128)).float()  # what int8 holds exactly
    model.down.weight.data[:, 0] = 127
    rows = {row.name: row for row in eager(model, "int8wo", x).report.rows}
    assert rows["down"].error < 1e-6 < 1e-3 < rows["up"].error < 0.02


# --- hand over ---------------------------------------------------------------------------------------------


def test_hand_over_releases_originals(x):
    model = MLP()
    expected = eager(model, "int8wo", x)(x)
    released = weakref.ref(model.up.weight.untyped_storage())
    optimized = eager(model, "int8wo", x, hand_over=True)
    gc.collect()
    assert model.up.weight.is_meta and model.down.weight.is_meta and released() is None
    assert isinstance(model.up.weight, nn.Parameter) and model.up.weight.shape == (128, 64)
    assert not model.up.bias.is_meta  # still used
    assert torch.equal(optimized(x), expected)


def test_hand_over_captures_new_shapes_of_what_is_packed(x):
    model = MLP()
    plain = eager(copy.deepcopy(model))
    optimized = eager(model, "int8wo", x, hand_over=True)
    for other in (torch.randn(1, 64), torch.randn(2, 3, 64)):
        assert torch.equal(optimized(other), plain(other))
    assert len(optimized._captures) == 3


def test_without_hand_over_nothing_is_released(x):
    model = MLP().eval()
    with untouched(model, x):
        eager(model, "int8wo", x)
    assert not any(p.is_meta for p in model.parameters())


def test_hand_over_keeps_tied_embeddings():
    model = Tied().eval()
    expected = eager(model, "int8wo", IDS)(IDS)
    optimized = eager(model, "int8wo", IDS, hand_over=True)
    assert model.head.weight is model.embedding.weight and not model.embedding.weight.is_meta
    assert model.middle.weight.is_meta
    assert torch.equal(optimized(IDS), expected)


def test_hand_over_keeps_a_weight_of_which_only_a_part_is_packed(x):
    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(128, 64))

        def forward(self, x):
            return nn.functional.linear(x, self.weight[:64]), nn.functional.linear(x, self.weight[64:])

    model = Slices()
    expected = model(x)
    optimized = eager(model, r"re:weight\[0:64\]:int8wo", x, hand_over=True)
    assert len(optimized.report.rewritten) == 1 and not model.weight.is_meta
    torch.testing.assert_close(optimized(x)[1], expected[1])
    assert not torch.equal(optimized(x)[0], expected[0])


# --- buffers that graphs write -----------------------------------------------------------------------------


def test_the_callers_buffers_never_change(x):
    model = Counting().eval()
    optimized = eager(model, "int8wo", x)
    assert model.calls == 0
    outputs = [optimized(x) for _ in range(3)]
    assert model.calls == 0 and optimized.state_dict()["calls"] == 3
    torch.testing.assert_close(outputs[2] - outputs[0], torch.full((3, 64), 2.0))


def test_captures_share_the_buffers_that_they_write(x):
    model = Counting().eval()
    optimized = eager(model)
    optimized(x), optimized(x[:1]), optimized(x[None])
    assert len(optimized._captures) == 3 and model.calls == 0
    assert optimized.state_dict()["calls"] == 3


def test_a_weight_that_the_graph_writes_is_not_packed(x):
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randn(64, 64))
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            self.weight.mul_(2)
            return nn.functional.linear(self.linear(x), self.weight)

    model = Written().eval()
    weight = model.weight.clone()
    optimized = eager(model, "int8wo", x)
    first, second = optimized(x), optimized(x)
    torch.testing.assert_close(second, first * 2)
    assert torch.equal(model.weight, weight)
    assert [row.name for row in optimized.report.rewritten] == ["linear"]


def test_handed_over_buffers_are_written_in_place(x):
    model = Counting()
    optimized = eager(model, "int8wo", x, hand_over=True)
    optimized(x)
    assert model.calls == 1  # given away: no copy is made


# --- sources -----------------------------------------------------------------------------------------------


class Kept(Source):
    """A source that gives copies of a state, and says what was asked for."""

    def __init__(self, state):
        self.state, self.read = state, []

    def check(self, name):
        if name not in self.state:
            raise WeightError(f"{name} is nowhere")

    def original(self, name):
        self.read.append(name)
        return self.state[name].clone()


def from_source(model, state, x):
    """Packs a model on meta from a state; (outputs, store)."""
    source = Kept(state)
    captured, _ = rewrite(on_meta(model.eval()), Recipe.of("int8wo"), (x,), {}, None, x.device)
    store = WeightStore(model, x.device, False, source)
    store.materialize(captured.program)
    captured.program.graph_module.recompile()
    return captured.program.graph_module(x)[0], store


def test_a_model_on_meta_is_packed_from_a_source(x):
    model = MLP()
    output, store = from_source(model, model.state_dict(), x)
    assert torch.equal(output, eager(model, "int8wo", x)(x))
    assert store.source.read == ["up.weight", "down.weight", "up.bias", "down.bias"]  # each once


def test_what_a_source_does_not_have_is_known_before_anything_is_read(x):
    model = MLP()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "down.bias"}
    source = Kept(state)
    captured, _ = rewrite(on_meta(model.eval()), Recipe.of("int8wo"), (x,), {}, None, x.device)
    with pytest.raises(WeightError, match=r"down\.bias is nowhere"):
        WeightStore(model, x.device, False, source).materialize(captured.program)
    assert not source.read


def test_nan_in_a_source_is_named(x):
    model = MLP()
    model.down.weight.data[7, 100] = float("nan")
    with pytest.raises(WeightError, match=r"down\.weight holds NaN or inf, first at \[7, 100\]"):
        from_source(model, model.state_dict(), x)


def test_what_was_not_handed_over_yet_is_the_models(x):
    """A later call may need a weight as it is that the first did not need at all."""

    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = MLP(), MLP()

        def forward(self, x, other=False):
            return self.other(x) if other else self.one(x)

    model = Either()
    expected = eager(copy.deepcopy(model))(x, other=True)
    optimized = eager(model, "int8wo", x, hand_over=True)
    assert model.one.up.weight.is_meta and not model.other.up.weight.is_meta
    assert torch.equal(optimized(x, other=True), expected)
    assert model.other.up.weight.is_meta


# --- devices -----------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_packing_on_a_gpu_needs_one_layer_at_a_time():
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16))).bfloat16()
    x = torch.randn(2, 1024, dtype=torch.bfloat16)
    eager(nn.Linear(1024, 1024).bfloat16(), "int8wo", x, device="cuda")  # cuBLAS's workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimized = eager(model, "int8wo", x, device="cuda")
    peak = torch.cuda.max_memory_allocated() - before
    packed = sum(t.nbytes for t in optimized.state_dict().values())
    assert peak < packed + 16 * 2**20  # a layer is 2 MB in bf16; packing works in fp32
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_one_state_for_no_prefix(x):
    with pytest.raises(InputError, match="call state_dict"):
        eager(MLP(), "int8wo", x).state_dict({})


def test_a_weight_that_is_computed_to_nan_is_named(x):
    model = Function(lambda m, x: x @ (m.w / m.w.norm(dim=0)), w=torch.zeros(64, 64))
    with pytest.raises(WeightError, match="computed from finite values, but holds NaN"):
        optimize(model, "int8wo", x, compile=False)


def test_a_weight_of_zeros_has_no_error(x):
    model = nn.Linear(64, 64)
    nn.init.zeros_(model.weight)
    (row,) = optimize(model, "int8wo", x, compile=False).report.rows
    assert row.error == 0
