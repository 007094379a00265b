import inspect
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from aograph import (
    CaptureError,
    InputError,
    Int8WeightOnly,
    PassError,
    RecipeError,
    Rule,
    WeightError,
    explain,
    optimize,
)
from aograph.optimize import call_of, device_of, no_compiler
from tests.small_models import MLP, Branching, Tied, untouched


@pytest.fixture
def model():
    return MLP().eval()


@pytest.fixture
def x():
    return torch.randn(3, 64)


def relative(a, b):
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm())


def eager(model, recipe="int8wo", example_inputs=None, **options):
    return optimize(model, recipe, example_inputs, compile=False, **options)


# --- what it computes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recipe, error", [("int8wo", 0.02), ("int4wo(group_size=32)", 0.2)])
def test_dtypes(model, x, dtype, recipe, error):
    model, x = model.to(dtype), x.to(dtype)
    y = eager(model, recipe, x)(x)
    assert y.dtype == dtype
    assert 0 < relative(y, model(x)) < error


def test_compiled_is_eager(model, x, fresh_compiler):
    compiled = optimize(model, "int8wo", x)
    torch.testing.assert_close(compiled(x), eager(model, "int8wo", x)(x), rtol=1e-5, atol=1e-5)


def test_compile_options_reach_the_compiler(model, x, fresh_compiler):
    seen = []

    def backend(graph_module, inputs):
        seen.append([node.target for node in graph_module.graph.nodes])
        return graph_module.forward

    optimize(model, "int8wo", compile_options={"backend": backend})(x)
    assert sum(target is torch.ops.aograph.int8_linear.default for target in seen[0]) == 2


def test_the_model_is_left_as_it_was(model, x):
    with untouched(model, x):
        eager(model, "int8wo", x)(x)


def test_a_model_in_training_mode_is_optimized_for_inference(x):
    model = nn.Sequential(MLP(), nn.Dropout(0.5), nn.BatchNorm1d(64).eval(), nn.Linear(64, 64)).train()
    model[2].eval()
    with untouched(model, x):
        y = eager(model, "int8wo", x)(x)
    assert relative(y, model.eval()(x)) < 0.02  # without dropout


def test_outputs_keep_their_structure(x):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x, scale=1.0):
            y = self.linear(x)
            return {"y": (y, [y * scale]), "none": None, "number": 7}

    y = eager(Nested().eval())(x, scale=2.0)
    assert y["none"] is None and y["number"] == 7
    torch.testing.assert_close(y["y"][1][0], y["y"][0] * 2)


# --- captures ----------------------------------------------------------------------------------------------


def test_one_capture_serves_other_shapes(model):
    optimized = eager(model, "int8wo", torch.randn(3, 64))
    for shape in [(5, 64), (17, 64), (2, 64)]:
        x = torch.randn(shape)
        assert relative(optimized(x), model(x)) < 0.02
    assert len(optimized._captures) == 1


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 5, 64), (0, 64), (4, 1, 64)])
def test_shapes_that_do_not_fit_are_captured_again(model, shape):
    optimized = eager(model, "int8wo", torch.randn(3, 64))
    x = torch.randn(shape)
    assert optimized(x).shape == shape
    torch.testing.assert_close(optimized(x), model(x), rtol=0.05, atol=0.05)
    assert len(optimized._captures) == 2


def test_captured_at_the_first_call(model, x):
    optimized = eager(model)
    assert optimized.report is None and "first call" in repr(optimized)
    optimized(x)
    assert len(optimized.report.rewritten) == 2 and "2 rewritten" in repr(optimized)


def test_captures_are_bounded_and_the_least_recently_used_goes(x):
    class Scaled(MLP):
        def forward(self, x, scale):
            return super().forward(x) * scale

    optimized = eager(Scaled().eval(), max_captures=2)
    for scale in (1, 2, 1, 3):  # 2 was used before 1
        optimized(x, scale)
    assert [known[1][1][1] for known, _, _ in optimized._captures.values()] == [1, 3]
    packed = dict(optimized._store.packed)
    optimized(x, 2)
    assert len(optimized._captures) == 2
    assert optimized._store.packed.keys() == packed.keys()  # nothing was packed again


@pytest.mark.parametrize("batch, accepted", [(2, True), (7, True), (8, True), (9, False)])
def test_explicit_dynamic_shapes(model, batch, accepted):
    dynamic = ({0: torch.export.Dim("batch", min=2, max=8)},)
    optimized = eager(model, "int8wo", torch.randn(3, 64), dynamic_shapes=dynamic)
    x = torch.randn(batch, 64)
    if accepted:
        assert optimized(x).shape == x.shape
        return
    with untouched(model, x), pytest.raises(InputError, match=r"dynamic_shapes.*9"):
        optimized(x)


def test_explicit_static_shapes(model, x):
    optimized = eager(model, "int8wo", x, dynamic_shapes=(None,))
    optimized(x)
    with pytest.raises(InputError, match=r"shape\[0\] is 4, captured as 3"):
        optimized(torch.randn(4, 64))


def test_two_threads_at_once(model):
    inputs = [torch.randn(n, 64) for n in (1, 3)] + [torch.randn(2, n, 64) for n in (1, 5)]
    optimized, results = eager(model), {}

    def call(i):
        results[i] = [optimized(inputs[i]) for _ in range(3)]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        for y in results[i]:
            assert relative(y, model(x)) < 0.02
    assert len(optimized._store.packed) == 2


# --- inputs ------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, a, b=None, *, c=None):
        a = a if b is None else a + 2 * b
        return self.linear(a if c is None else a + 3 * c)


A, B, C = (torch.randn(3, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))


@pytest.mark.parametrize(
    "example_inputs, args, kwargs",
    [
        (A, (A,), {}),
        ((A,), (A,), {}),
        ([A, B], (A, B), {}),
        ((A, B), (A, B), {}),
        ({"a": A, "c": C}, (), {"a": A, "c": C}),
        ({"c": C, "b": B, "a": A}, (), {"a": A, "b": B, "c": C}),
        (((A,), {"c": C}), (A,), {"c": C}),
        (((), {"a": A}), (), {"a": A}),
        (((A, B), {}), (A, B), {}),
    ],
)
def test_example_inputs(example_inputs, args, kwargs):
    assert call_of(example_inputs)[1].keys() == kwargs.keys()
    model = Sum().eval()
    optimized = eager(model, "int8wo", example_inputs)
    y = optimized(*args, **dict(reversed(kwargs.items())))
    assert len(optimized._captures) == 1  # the call is the one of the example
    assert relative(y, model(*args, **kwargs)) < 0.02


def test_example_inputs_of_no_known_form(model):
    with pytest.raises(InputError, match="int: give a tensor"):
        eager(model, "int8wo", 3)


def test_explain_needs_inputs(model):
    with pytest.raises(InputError, match="example_inputs"):
        explain(model)


def test_the_number_of_a_plain_input_is_not_forgotten(x):
    """A capture for one value of a plain argument is not used for another."""

    class Powers(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x, n):
            return self.linear(x) * n

    optimized = eager(Powers().eval())
    torch.testing.assert_close(optimized(x, 3), optimized(x, 1) * 3)
    assert not torch.equal(optimized(x, True), optimized(x, 3))


# --- errors, after which the model is as it was ------------------------------------------------------------


def test_inputs_that_require_gradients(model, x):
    optimized = eager(model, "int8wo", x)
    wanting = x.clone().requires_grad_()
    with untouched(model, x), pytest.raises(InputError, match="inference"):
        optimized(wanting)
    with torch.no_grad():
        optimized(wanting)


def test_control_flow_that_depends_on_data(x):
    model = Branching().eval()
    source, start = inspect.getsourcelines(Branching)
    line = start + next(i for i, text in enumerate(source) if "# the branch" in text)
    place = rf"Branching at .*small_models\.py:{line} in forward"
    with untouched(model, x), pytest.raises(CaptureError, match=place) as caught:
        eager(model, "int8wo", x, dynamic_shapes={"x": None})
    assert "Try: replace control flow that depends on tensor values (torch.where, torch.cond)" in str(caught.value)
    with untouched(model, x), pytest.warns(UserWarning, match=place):
        eager(model, "int8wo", x)


def test_a_wrong_call(model, x):
    with untouched(model, x), pytest.raises(CaptureError):
        eager(model, "int8wo", (x, x))


def test_a_weight_with_nan(model, x):
    model.down.weight.data[3, 5] = float("nan")
    with untouched(model, x), pytest.raises(WeightError, match=r"down.weight.*\[3, 5\]"):
        eager(model, "int8wo", x)


@pytest.mark.parametrize("error, recipe", [(RecipeError, "int9wo"), (RecipeError, "nothing.*:int8wo")])
def test_a_wrong_recipe(model, x, error, recipe):
    with untouched(model, x), pytest.raises(error):
        eager(model, recipe, x)


def test_an_unknown_pass_to_disable(model, x):
    with untouched(model, x), pytest.raises(PassError, match="did you mean 'merge_linears'"):
        eager(model, "int8wo", x, disable=["merge_linear"])


def test_nothing_to_rewrite(model, x):
    recipe = [Rule(Int8WeightOnly(), shape="K > 4096", optional=True)]
    with untouched(model, x), pytest.raises(RecipeError, match="rewrote nothing: no rule of the recipe matches"):
        eager(model, recipe, x, strict=True)
    with pytest.warns(UserWarning, match="rewrote nothing") as caught:
        y = eager(model, recipe, x)(x)
    assert len(caught) == 1
    torch.testing.assert_close(y, model(x))


def test_a_model_without_candidates(x):
    with pytest.warns(UserWarning, match="the graph has no candidate"):
        optimized = eager(nn.ReLU(), "int8wo", x)
    assert torch.equal(optimized(x), x.relu())


def test_something_to_rewrite_does_not_warn(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        eager(model, "int8wo", x, strict=True)


def test_what_is_no_model(x):
    with pytest.raises(InputError, match="not a function"):
        eager(lambda x: x, "int8wo", x)


def test_optimized_already(model, x):
    optimized = eager(model, "int8wo", x)
    for again in (optimized, nn.Sequential(optimized)):
        with pytest.raises(InputError, match="optimized already"):
            eager(again, "int8wo", x)
        with pytest.raises(InputError, match="optimized already"):
            explain(again, "int8wo", x)


def test_compiled_already(model, x):
    with pytest.raises(InputError, match="compiled already"):
        eager(torch.compile(model), "int8wo", x)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.to("cpu"), "stays on cpu"),
        (lambda m: m.half(), "stays on cpu"),
        (lambda m: m.train(), "for inference"),
        (lambda m: m.load_state_dict({}), "cannot load weights"),
        (lambda m: m.state_dict(prefix="a."), "state_dict"),
    ],
)
def test_what_an_optimized_module_does_not_do(model, x, change, message):
    optimized = eager(model, "int8wo", x)
    before = optimized(x)
    with pytest.raises(InputError, match=message):
        change(optimized)
    assert torch.equal(optimized(x), before)
    assert optimized.eval() is optimized


PROGRAM_WITHOUT_COMPILER = """
import torch
from aograph import CompileError, optimize
from tests.small_models import MLP

model, x = MLP().eval(), torch.randn(3, 64)
expected = model(x)
optimized = optimize(model, "int8wo", x)
try:
    optimized(x)
except CompileError as error:
    assert "C++ compiler" in str(error) and "compile=False" in str(error), error
    assert torch.equal(model(x), expected)
    print("refused")
print((optimize(model, "int8wo", x, compile=False)(x) - expected).abs().max() < 0.1)
"""


def test_no_compiler_on_the_machine(tmp_path):
    environment = {
        **os.environ, "PATH": "", "CXX": "/nonexistent", "PYTHONPATH": os.getcwd(),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM_WITHOUT_COMPILER], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["refused", "tensor(True)"], done.stderr[-2000:]


def test_only_a_missing_compiler_is_a_compile_error():
    missing = type("InvalidCxxCompiler", (RuntimeError,), {})
    error = RuntimeError("backend failed")
    assert not no_compiler(error)
    error.__cause__ = missing()
    assert no_compiler(error)


# --- state, explain, devices -------------------------------------------------------------------------------


def test_state_dict(model, x):
    state = eager(model, "up:int8wo", x).state_dict()
    assert sorted(state) == ["down.bias", "down.weight", "up.bias", "up.weight_q", "up.weight_scale"]
    assert state["up.weight_q"].dtype == torch.int8 and state["up.weight_q"].shape == (128, 64)
    assert state["down.weight"].data_ptr() == model.down.weight.data_ptr()


def test_state_dict_of_a_tied_model():
    model = Tied().eval()
    state = eager(model, "int8wo", torch.arange(6)[None].repeat(2, 1)).state_dict()
    assert state["embedding.weight"].data_ptr() == model.embedding.weight.data_ptr()
    assert "embedding.weight_q" in state and "head.weight" not in state


def test_explain_touches_no_weight(model, x):
    on_meta = explain(MLP().to("meta").eval(), "int4wo", x, device="cpu")
    here = explain(model, "int4wo", x)
    assert [r.as_dict() for r in on_meta.rows] == [r.as_dict() for r in here.rows]
    assert {r.outcome for r in on_meta.rows} == {"rewritten"} and all(r.error is None for r in on_meta.rows)
    assert on_meta.bytes_after < on_meta.bytes_before == sum(p.nbytes for p in model.parameters())
    assert "up" in on_meta.costs()


def test_explain_is_what_optimize_does(model, x):
    told = [{**r.as_dict(), "error": None} for r in explain(model, "int8wo", x).rows]
    done = eager(model, "int8wo", x).report.rows
    assert told == [{**r.as_dict(), "error": None} for r in done]
    assert all(0 < r.error < 0.02 for r in done)


def test_a_model_on_meta_has_no_weights_to_pack(x):
    with pytest.raises(WeightError, match="meta"):
        eager(MLP().to("meta").eval(), "int8wo", x, device="cpu")


def test_where_a_model_is():
    model = MLP()
    assert device_of(model) == torch.device("cpu") == device_of(nn.ReLU())
    assert device_of(model.to("meta")) == torch.device("meta")
    model.up = nn.Linear(2, 2)
    assert device_of(model) == torch.device("cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", ["int8wo", "int4wo"])
def test_packed_on_the_target_from_a_model_on_cpu(model, x, recipe):
    model, x = model.bfloat16(), x.bfloat16()
    with untouched(model, x):
        there = eager(model, recipe, x, device="cuda")(x.cuda())
    torch.testing.assert_close(there.cpu(), eager(model, recipe, x)(x), rtol=2e-2, atol=2e-2)
