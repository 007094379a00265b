import contextlib
import io
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aograph import CaptureError, InputError, Recipe, RecipeError, WeightError, calibrate, optimize, pipeline
from aograph.calibrate import Seen, Watched
from aograph.expression import Expression
from tests.models.zoo import build, ids
from tests.programs import Function
from tests.small_models import MLP, Branching, Counting, Tied, untouched

MLP_ONE = MLP()


def statistics(model, *batches, recipe="int8wo", **options):
    return calibrate(model.eval(), recipe, batches, progress=False, **options).statistics


def check(found, *xs):
    """That statistics are those of the rows of some tensors."""
    x = torch.cat([x.detach().double().reshape(-1, x.shape[-1]) for x in xs])
    assert found.tokens == len(x)
    expected = [x.min(), x.max(), x.abs().max()]
    torch.testing.assert_close(torch.tensor([found.low, found.high, found.absmax]), torch.stack(expected).float())
    assert found.norms.dtype == torch.float32
    torch.testing.assert_close(found.norms, torch.linalg.vector_norm(x, dim=0).float(), rtol=1e-5, atol=1e-5)


# --- what is seen ------------------------------------------------------------------------------------------


def test_statistics_are_what_hooks_see():
    model, _ = build("llama")
    batches = [{"input_ids": ids(2, 12), "use_cache": False}, {"input_ids": ids(3, 7), "use_cache": False}]
    found = statistics(model, *batches)
    seen, modules = {}, {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda _, given, n=name: seen.setdefault(n, []).append(given[0]))
            hooks.callback(hook.remove)
        for batch in batches:
            model(**batch)
    assert len(modules) == 15 and found.keys() == {f"{n}.weight" for n in modules} | {"model.embed_tokens.weight"}
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]  # tied
    for name, xs in seen.items():
        check(found[f"{name}.weight"], *xs)


def test_linears_that_are_no_modules():
    model, inputs = build("functional")
    found, x = statistics(model, inputs), inputs["x"]
    with torch.no_grad():
        second = torch.addmm(model.bias, x.flatten(0, 1), model.first).relu()
        y = F.linear(second, model.second).unflatten(0, (2, 12))
        q, k, v = F.linear(y, model.both).split(64, -1)
        mixed = q * k + v
        back = torch.einsum("bsd,dhe->bshe", mixed, model.heads).flatten(2)
        last = model(x)[0]
    check(found["first"], x)
    check(found["second"], second)
    check(found["heads"], mixed)
    check(found["back"], back)
    check(found["vector"], last)
    check(found["both"], y, last)  # y once, though three slices of the weight read it


def test_a_weight_that_serves_twice():
    def twice(m, x):
        return F.linear(F.linear(x, m.w).relu(), m.w)

    x, w = torch.randn(5, 64), torch.randn(64, 64)
    check(statistics(Function(twice, w=w), x)["w"], x, F.linear(x, w).relu())


def test_a_weight_that_serves_two_widths_has_no_norms():
    def both(m, x):
        return F.linear(F.linear(x, m.w), m.w.t())

    x, w = torch.randn(5, 64), torch.randn(96, 64)
    found = statistics(Function(both, w=w), x)["w"]
    y = x @ w.t()
    assert found.norms.shape == (0,) and found.tokens == 10
    assert found.high == pytest.approx(float(max(x.max(), y.max())), rel=1e-6)


def test_all_leaves_of_a_weight_that_is_computed():
    model = Function(lambda m, x: F.linear(x, torch.cat([m.a, m.b])), a=torch.randn(8, 64), b=torch.randn(8, 64))
    x = torch.randn(5, 64)
    found = statistics(model, x)
    check(found["a"], x)
    assert found["a"] == found["b"]


def test_siblings_around_a_write():
    def write_between(m, x):
        x = x.clone()
        y = F.linear(x, m.a)
        x.add_(1)
        return y + F.linear(x, m.b)

    x = torch.randn(5, 64)
    found = statistics(Function(write_between, a=torch.randn(8, 64), b=torch.randn(8, 64)), x)
    check(found["a"], x)
    check(found["b"], x + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x = torch.randn(700, 64, dtype=dtype)  # more rows than are summed at a time
    check(statistics(MLP().to(dtype), x)["up.weight"], x)


def test_padding_counts():
    model = Tied()
    padded = torch.tensor([[5, 7, 0, 0]])
    check(statistics(model, padded)["middle.weight"], model.embedding(padded))


# --- batches -----------------------------------------------------------------------------------------------


def test_lengths_may_differ():
    batches = [torch.randn(*shape, 64) for shape in ((2, 12), (3, 5), (1, 1), (2, 0), (4, 12))]
    model = MLP().eval()
    check(statistics(model, *batches)["up.weight"], *batches)
    watched = Watched(model, Recipe.of("int8wo"), torch.device("cpu"))
    with torch.no_grad():
        for x in batches:
            watched(x)
    assert len(watched._captures) <= 3  # any, one, and no token


def test_models_that_know_one_length_only():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            return self.linear(x) * (1 if x.shape[0] == 4 else 2)

    batches = [torch.randn(rows, 64) for rows in (4, 5, 6)]
    check(statistics(Fixed(), *batches)["linear.weight"], *batches)


def test_the_ways_to_write_a_call():
    x = torch.randn(3, 64)
    calls = [x, (x,), [x], {"x": x}, ((x,), {}), ((), {"x": x})]
    found = {id(call): statistics(MLP_ONE, call)["up.weight"] for call in calls}
    assert all(each == found[id(x)] for each in found.values())


def test_generators_and_loaders():
    data = torch.randn(8, 64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=3)
    expected = statistics(MLP_ONE, *data.split(3))
    assert calibrate(MLP_ONE, "int8wo", loader, progress=False).statistics == expected
    assert calibrate(MLP_ONE, "int8wo", (x for x in data.split(3)), progress=False).statistics == expected


def test_the_same_batches_give_the_same_bits():
    batches = [torch.randn(100, 64) for _ in range(3)]
    assert statistics(MLP_ONE, *batches) == statistics(MLP_ONE, *batches)


def test_sums_stay_exact_over_many_batches():
    torch.manual_seed(0)
    batches = [torch.full((1, 1), 4096.0), *torch.rand(3000, 1, 1).mul(1e-2).unbind()]
    total = Seen.of(batches[0])
    for x in batches[1:]:
        total = total + Seen.of(x)
    exact = math.sqrt(math.fsum(float(x) ** 2 for x in batches))
    assert float(total.squares.sqrt()) == pytest.approx(exact, rel=1e-14)
    in_float32 = torch.zeros(())
    for x in batches:
        in_float32 += x.square().sum()
    assert float(in_float32.sqrt()) != pytest.approx(exact, rel=1e-12)  # what this test would miss otherwise


def test_squares_that_float32_cannot_hold():
    x = torch.full((2, 64), 1e30, dtype=torch.bfloat16)
    found = statistics(nn.Linear(64, 8, dtype=torch.bfloat16), x)["weight"]
    torch.testing.assert_close(found.norms, torch.full((64,), float(x[0, 0]) * 2**0.5))


# --- the model and the recipe ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [MLP(), MLP().train()])
def test_the_model_stays_as_it_is(model):
    x = torch.randn(3, 64)
    with untouched(model, x):
        calibrate(model, "int8wo", [x, x[:2]], progress=False)


def test_buffers_that_the_model_writes_change_in_a_copy():
    class Growing(Counting):
        def forward(self, x):
            self.calls.add_(1)
            return self.linear(x * self.calls)

    model, x = Growing(), torch.randn(3, 64)
    check(statistics(model, x, x, x[:1])["linear.weight"], x, 2 * x, 3 * x[:1])
    assert float(model.calls) == 0


def test_the_recipe_keeps_its_rules_and_gets_new_statistics():
    recipe, x = Recipe.of("int4wo(group_size=32) + down:none"), torch.randn(3, 64)
    first = calibrate(MLP_ONE, recipe, [x], progress=False)
    assert first.rules == recipe.rules and recipe.statistics == {}
    assert first.statistics.keys() == {"up.weight", "down.weight"}  # whatever the rule
    again = calibrate(MLP_ONE, first, [2 * x], progress=False)
    assert again.statistics["up.weight"].high == 2 * first.statistics["up.weight"].high
    assert again.statistics["up.weight"].tokens == 3


@pytest.mark.parametrize("build_model", [MLP, Tied])
def test_passes_find_the_statistics_through_both_doors(build_model, monkeypatch):
    contexts, programs = [], []

    class Context(pipeline.Context):
        def __init__(self, recipe, statistics):
            super().__init__(recipe, statistics)
            contexts.append(self)

    monkeypatch.setattr(pipeline, "Context", Context)
    monkeypatch.setattr(pipeline, "missing_kernels", lambda program: programs.append(program) or [])
    model = build_model().eval()
    x = torch.randn(3, 64) if build_model is MLP else torch.tensor([[1, 2, 3]])
    calibrated = calibrate(model, "int8wo", [x], progress=False)
    optimize(model, calibrated, x, compile=False)
    with torch.no_grad():
        torch.compile(model, backend="aograph", options={"recipe": calibrated, "compile": False})(x)
    watched, optimized, compiled = programs
    assert all(context.statistics == calibrated.statistics for context in contexts[1:])
    for program in (optimized, compiled):
        leaves = {name for pack in program.packs.values() for name in pack.weight.leaves}
        assert leaves and leaves <= calibrated.statistics.keys()
    assert {n for site in watched.sites for n in Expression.of(site.weight).leaves} <= calibrated.statistics.keys()


# --- progress ----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "stream, progress, shown", [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_progress_is_shown_on_a_terminal(monkeypatch, stream, progress, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    calibrate(MLP_ONE, "int8wo", [torch.randn(3, 64)], progress=progress)
    assert ("calibrating" in sys.stderr.getvalue()) is shown


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[], iter([])])
def test_no_batches(batches):
    with pytest.raises(InputError, match="batches is empty: there is nothing to calibrate on"):
        calibrate(MLP_ONE, "int8wo", batches)


@pytest.mark.parametrize("model, rows", [(MLP_ONE, 0), (nn.ReLU(), 3)])
def test_nothing_goes_into_a_linear(model, rows):
    with pytest.raises(InputError, match="nothing went into a linear: the batches hold no token, or the model's graph"):
        calibrate(model, "int8wo", [torch.randn(rows, 64)], progress=False)


@pytest.mark.parametrize("batches", [3, None, torch.randn(3, 64), {"x": torch.randn(3, 64)}, "text.txt"])
def test_what_is_no_iterable_of_batches(batches):
    with pytest.raises(InputError, match=f"batches is a {type(batches).__name__}: give an iterable of calls"):
        calibrate(MLP_ONE, "int8wo", batches)


@pytest.mark.parametrize(
    "batch, message",
    [
        (3, "batch 1 is a int: give a tensor, a tuple"),
        ({"y": torch.randn(3, 64)}, "batch 1 is no call of MLP: it does not fit its forward"),
        ((torch.randn(3, 64),) * 2, "batch 1 is no call of MLP"),
    ],
)
def test_what_is_no_batch(batch, message):
    with pytest.raises(InputError, match=message):
        calibrate(MLP_ONE, "int8wo", [torch.randn(3, 64), batch], progress=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value):
    x = torch.randn(3, 64)
    x[1, 2] = value
    with pytest.raises(InputError, match="NaN or inf goes into the linear up in batch 1"):
        calibrate(MLP_ONE, "int8wo", [torch.randn(3, 64), x], progress=False)


def test_the_first_linear_that_gets_what_is_not_finite_is_named():
    model = MLP().half()
    with torch.no_grad():
        model.up.weight.fill_(100.0)
    with pytest.raises(InputError, match="into the linear down in batch 0"):
        calibrate(model, "int8wo", [torch.full((3, 64), 100.0, dtype=torch.float16)], progress=False)


def test_a_model_that_cannot_be_captured_whole():
    with pytest.raises(CaptureError, match=r"calibration needs the whole model in one graph: torch.export could not"):
        calibrate(Branching(), "int8wo", [torch.randn(3, 64)], progress=False)


def test_a_model_without_weights():
    with pytest.raises(WeightError, match="is on the meta device"):
        calibrate(MLP().to("meta"), "int8wo", [torch.randn(3, 64)], progress=False, device="cpu")


def test_what_is_no_model_and_no_recipe():
    with pytest.raises(InputError, match=r"an nn.Module, not a int"):
        calibrate(3, "int8wo", [torch.randn(3, 64)])
    with pytest.raises(InputError, match="optimized already"):
        calibrate(optimize(MLP_ONE, "int8wo", compile=False), "int8wo", [torch.randn(3, 64)])
    with pytest.raises(RecipeError, match="no name 'upp'; did you mean 'up'"):
        calibrate(MLP_ONE, "int8wo + upp:none", [torch.randn(3, 64)], progress=False)


# --- GPUs --------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_on_a_gpu():
    x = torch.randn(700, 64)
    model, batches = MLP().eval(), [x, x[:300]]
    found = statistics(model, *batches, device="cuda")
    check(found["up.weight"], *batches)
    assert found["up.weight"].norms.device.type == "cpu" and not next(model.parameters()).is_cuda
    assert found == statistics(model, *batches, device="cuda")


@pytest.mark.cuda
def test_the_gpu_is_not_waited_for_within_a_batch():
    model, x = MLP().cuda().eval(), torch.randn(700, 64, device="cuda")
    watched = Watched(model, Recipe.of("int8wo"), torch.device("cuda", 0))
    with torch.no_grad():
        watched(x)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            watched(x)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    watched.close(0)
    assert watched.statistics()["up.weight"].tokens == 1400
