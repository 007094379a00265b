"""torch.compile(backend="aograph"): the other door to the same pipeline."""

import copy
import dataclasses
import subprocess
import sys
import threading

import pytest
import torch
from aograph.kernels.int8_linear import int8_linear
from aograph.kernels.kv_attention import kv_attention
from aograph.kernels.kv_cache import INT8
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import aograph
from aograph import InputError, LinearStatistics, RecipeError, WeightError, pipeline
from aograph.backend import Options, cache_key, joined, needed, suited
from aograph.pipeline import Context
from aograph.report import PassRecord, Report
from tests.programs import program_of
from tests.small_models import MLP, Tied

pytestmark = pytest.mark.usefixtures("fresh_compiler")
X = torch.randn(3, 64)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def compiled(model, recipe="int8wo", dynamic=None, fullgraph=False, **options):
    return torch.compile(
        model, backend="aograph", dynamic=dynamic, fullgraph=fullgraph, options={"recipe": recipe, **options}
    )


def close(actual, expected, tolerance=2e-2):
    """Equal but for the rounding of weights to 8 bits."""
    assert (actual - expected).norm() <= tolerance * expected.norm()


class Breaking(MLP):
    """A graph break between its linears."""

    def forward(self, x):
        y = self.up(x).relu()
        torch._dynamo.graph_break()
        return self.down(y)


class Deciding(MLP):
    """Python control flow on a flag and on a size."""

    def forward(self, x, twice=False):
        y = self.down(self.up(x).relu())
        if twice:
            y = self.down(self.up(y).relu())
        return y if x.shape[0] > 2 else -y


@devices
@torch.no_grad()
def test_it_computes_what_optimize_computes(device):
    model, x = MLP().eval().to(device), X.to(device)
    reports = []
    y = compiled(model, report=reports.append, fullgraph=True)(x)
    other = aograph.optimize(model, "int8wo", x)
    torch.testing.assert_close(y, other(x))
    (report,) = reports
    names = [(row.name, row.outcome, row.scheme) for row in report.rows]
    assert names == [(row.name, row.outcome, row.scheme) for row in other.report.rows]
    assert all(0 < row.error < 0.02 for row in report.rows)
    assert (report.bytes_before, report.bytes_after) == (other.report.bytes_before, other.report.bytes_after)


@torch.no_grad()
def test_no_import_is_needed():
    code = "import torch; m = torch.nn.Linear(64, 64); torch.set_grad_enabled(False); x = torch.ones(1, 64)\n"
    code += "y = torch.compile(m, backend='aograph', options={'recipe': 'int8wo', 'report': print})(x)\n"
    code += "assert 0 < (y - m(x)).abs().max() < 0.1"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "1 rewritten" in done.stdout, done.stderr


@torch.no_grad()
def test_graph_breaks_control_flow_and_several_callables_share_one_copy(monkeypatch):
    packed = []
    monkeypatch.setattr(
        aograph.weights.Pack, "run", lambda self, w, run=aograph.weights.Pack.run: packed.append(self) or run(self, w)
    )
    model = Breaking().eval()
    close(compiled(model)(X), model(X))
    close(torch.compile(lambda x: model(x), backend="aograph", options={"recipe": "int8wo"})(X), model(X))
    assert len(packed) == 2
    deciding = Deciding().eval()
    run = compiled(deciding, dynamic=True)
    for x, twice in ((X, False), (X, True), (X[:2], False), (torch.randn(7, 64), False)):
        close(run(x, twice), deciding(x, twice))
    assert len(packed) == 4


@torch.no_grad()
def test_a_table_that_is_embedding_and_head():
    model, ids = Tied().eval(), torch.arange(6)[None]
    reports = []
    close(compiled(model, report=reports.append)(ids), model(ids))
    assert any("keeps its full-precision copy" in note for row in reports[0].rows for note in row.notes)


@pytest.mark.parametrize("model", [MLP, Breaking, Deciding])
@torch.no_grad()
def test_no_more_recompilations_than_inductor(model):
    graphs = {}
    for backend, options in (("aograph", {"recipe": "int8wo"}), ("inductor", None)):
        torch._dynamo.reset()
        counters.clear()
        run = torch.compile(model().eval(), backend=backend, options=options)
        for size in (3, 4, 5, 6, 1, 9):
            run(torch.randn(size, 64))
        graphs[backend] = counters["stats"]["unique_graphs"]
    assert graphs["aograph"] <= graphs["inductor"]


# --- weights are frozen ------------------------------------------------------------------------------------


@torch.no_grad()
def test_writes_in_place_are_noticed_at_the_next_call():
    model = MLP().eval()
    run = compiled(model)
    run(X)
    model.down.weight.mul_(3)
    model.down.bias.fill_(1)
    close(run(X), model(X))
    model.load_state_dict(MLP().state_dict())
    close(run(X), model(X))
    assert counters["stats"]["unique_graphs"] >= 1
    model.up.weight.data.mul_(2)  # which torch does not count
    assert aograph.refresh(model) == 2
    close(run(X), model(X))


@torch.no_grad()
def test_groups_are_filled_again_too():
    model = MLP().eval()
    run = compiled(model, "int8wo(group_size=32)", compile=False)
    run(X)
    model.down.weight.mul_(3)
    close(run(X), model(X))
    model.up.weight.data.mul_(2)
    assert aograph.refresh(model) == 2
    close(run(X), model(X))
    fresh = MLP().eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(X), compiled(fresh, "int8wo(group_size=32)", compile=False)(X))


@torch.no_grad()
def test_nan_in_a_weight_is_named_at_the_call_and_nothing_changes():
    model = MLP().eval()
    run = compiled(model)
    expected = run(X)
    kept = model.up.weight[0, 0].item()
    model.up.weight[0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"up\.weight holds NaN"):
        run(X)
    model.up.weight[0, 0] = kept
    torch.testing.assert_close(run(X), expected)


def test_gradients_for_a_packed_weight_are_refused():
    model = MLP()
    run = compiled(model)
    with pytest.raises(InputError, match=r"gradients are needed for 2 weights .* first up\.weight"):
        run(X)
    with torch.no_grad():
        close(run(X), model(X))
    with torch.inference_mode():
        close(run(X), model(X))
    model.requires_grad_(False)
    close(run(X), model(X))


class Adapted(nn.Module):
    """A base and a LoRA adapter beside it, with a part that wants no gradient."""

    def __init__(self):
        super().__init__()
        self.base = MLP().requires_grad_(False)
        self.lora_a = nn.Linear(64, 4, bias=False)
        self.lora_b = nn.Linear(4, 64, bias=False)

    def forward(self, x):
        h = self.lora_b(self.lora_a(x))
        with torch.no_grad():
            aside = self.base(x + h)
        return self.base(x + h) + h.detach() + aside


def test_adapters_train_on_a_packed_base():
    model = Adapted()
    reference = copy.deepcopy(model)
    with torch.no_grad():  # the base that is packed, dequantized
        for linear in (reference.base.up, reference.base.down):
            q, scale = aograph.kernels.int8_linear.pack(linear.weight)
            linear.weight.copy_(q * scale[:, None])
    run = compiled(model, "int8wo + lora_*:none")
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (model, reference)]
    for step in range(3):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(step), requires_grad=True)
        inputs = x, x.detach().clone().requires_grad_()
        for call, given, optimizer in zip((run, reference), inputs, optimizers, strict=True):
            optimizer.zero_grad()
            call(given).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-5)
    for name in ("lora_a", "lora_b"):
        torch.testing.assert_close(getattr(model, name).weight, getattr(reference, name).weight, rtol=1e-3, atol=1e-5)


# --- options and errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"recipe": "int5wo"}, RecipeError, "unknown scheme 'int5wo'; did you mean"),
        ({"recipes": "int4wo"}, InputError, "unknown option 'recipes' for aograph; did you mean 'recipe'"),
        ({"max_autotun": True}, InputError, "did you mean 'max_autotune'"),
        ({"max_autotune": "yes"}, InputError, "Inductor takes bool"),
        ({"mode": "reduce-overhaed"}, InputError, "did you mean 'reduce-overhead'"),
        ({"recipe": "int4wo + lm_head:none", "strict": True}, RecipeError, "rewrote nothing|K = 20"),
    ],
)
@torch.no_grad()
def test_a_bad_option_is_one_clear_error(options, error, message):
    run = torch.compile(nn.Linear(20, 20), backend="aograph", options=options)
    for _ in range(2):
        with pytest.raises(error, match=message):
            run(torch.randn(2, 20))


@torch.no_grad()
def test_nothing_is_silent():
    with pytest.warns(UserWarning, match="rule 2 .* matches nothing: no name 'lm_head'"):
        compiled(MLP().eval(), "int8wo + lm_head:none")(X)
    with pytest.warns(UserWarning, match="rewrote nothing of this graph: K = 20 is not divisible"):
        compiled(nn.Linear(20, 20), "int4wo")(torch.randn(2, 20))
    told = pytest.warns(UserWarning, match="under autocast, where nothing is rewritten")
    with told, torch.autocast("cpu", torch.bfloat16):
        assert compiled(MLP().eval())(X).dtype is torch.bfloat16


@pytest.mark.parametrize("compile", [False, True])
def test_what_cannot_be_traced_runs_as_it_is(compile):
    class Checkpointed(MLP):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model, x = Checkpointed(), X.clone().requires_grad_()
    with pytest.warns(UserWarning, match="cannot be traced to ATen, so nothing of it is rewritten: .*checkpoint"):
        y = compiled(model, compile=compile)(x)
    close(y, model(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    close(gradient, torch.autograd.grad(model(x).sum(), x)[0])


def test_inductors_options_and_modes_go_through():
    options = Options.of("max-autotune", {"recipe": "int8wo", "max-fusion-size": 3, "epilogue_fusion": False})
    assert options.inductor["max_fusion_size"] == 3 and options.inductor["max_autotune"] is True
    assert options.inductor["epilogue_fusion"] is False
    assert Options.of(None, {"mode": "reduce-overhead"}).inductor == {"triton.cudagraphs": True}


@torch.no_grad()
def test_custom_passes_of_the_user_keep_working():
    seen = []
    run = compiled(MLP().eval(), post_grad_custom_post_pass=lambda graph: seen.append(str(graph)))
    run(X)
    assert len(seen) == 1 and "aograph.int8_linear" in seen[0]


@torch.no_grad()
def test_stances():
    model = MLP().eval()
    run = compiled(model)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(run(X), model(X))
    rounded = run(X)
    assert not torch.equal(rounded, model(X))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run(X), rounded)


def test_two_threads():
    model = MLP().eval()
    run = compiled(model, dynamic=True)
    inputs = [torch.randn(n, 64) for n in (3, 4, 5, 6)] * 4
    results = [None] * len(inputs)

    def work(start):
        with torch.no_grad():
            for i in range(start, len(inputs), 2):
                results[i] = run(inputs[i])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    with torch.no_grad():
        for x, y in zip(inputs, results, strict=True):
            close(y, model(x))


@pytest.mark.cuda
@torch.no_grad()
def test_cuda_graphs():
    model, x = MLP().eval().to("cuda", torch.bfloat16), X.to("cuda", torch.bfloat16)
    counters.clear()
    run = compiled(model, mode="reduce-overhead")
    for _ in range(4):
        x.normal_()
        close(run(x).float(), model(x).float())
    assert counters["inductor"]["cudagraph_skips"] == 0
    model.up.weight.mul_(2)  # filled in where the recorded graphs read it
    close(run(x).float(), model(x).float())


# --- compilation caches ------------------------------------------------------------------------------------

CACHED = """
import sys, torch, aograph
from torch._dynamo.utils import counters
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
for version in sys.argv[1:]:
    torch.compiler.reset()
    counters.clear()
    aograph.__version__ = version
    with torch.no_grad():
        y = torch.compile(model, backend="aograph", options={"recipe": "int8wo"})(torch.ones(2, 64))
    print(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"], y.sum().item())
"""


def test_the_second_process_hits_the_caches_and_a_changed_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")  # no trials of what the compiler can do, which a cache keeps

    def run(*versions):
        done = subprocess.run([sys.executable, "-c", CACHED, *versions], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        return [int(hits) > 0 for hits, _ in lines], {float(total) for _, total in lines}

    first, total = run("1.0")
    second, totals = run("2.0", "1.0")
    assert first == [False] and second == [False, True] and total == totals


def test_every_part_changes_the_key(monkeypatch):
    options = Options.of(None, {"recipe": "int8wo"})
    keys = {cache_key(options)}
    assert cache_key(Options.of(None, {"recipe": "int8wo"})) in keys
    for recipe in ("int4wo", "int8wo(algorithm=mse)", "int8wo + lm_head:none", "int4wo(group_size=32)"):
        keys.add(cache_key(Options.of(None, {"recipe": recipe})))
    keys.add(cache_key(dataclasses.replace(options, disable=("merge_linears",))))
    for high in (1.0, 2.0):
        found = {"up.weight": LinearStatistics(-1.0, high, torch.ones(64), 3)}
        calibrated = dataclasses.replace(options.recipe, statistics=found)
        keys.add(cache_key(dataclasses.replace(options, recipe=calibrated)))
    with monkeypatch.context() as patch:
        patch.setattr(aograph, "__version__", "0.0.0")
        keys.add(cache_key(options))
    with monkeypatch.context() as patch:
        patch.setattr(int8_linear, "version", 2)
        keys.add(cache_key(options))
    assert len(keys) == 10
    unnamed = Options.of(None, {"recipe": [aograph.Rule(aograph.Int8WeightOnly(), shape=lambda shape: shape.N > 8)]})
    assert cache_key(unnamed) != cache_key(unnamed)  # a function has no text: never a wrong hit


def test_statistics_are_for_graphs_of_one_layer_only(monkeypatch):
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Breaking() for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    seen, model = [], Layers().eval()
    found = {name: LinearStatistics(-1.0, 1.0, torch.ones(64), 3) for name, _ in model.named_parameters()}
    recipe = dataclasses.replace(aograph.Recipe.of("int8wo"), statistics=found)
    monkeypatch.setattr(pipeline, "Context", lambda recipe, found: seen.append(found) or Context(recipe, found))

    def run(each):
        options = {"recipe": recipe, "compile": False, "model": each}
        return torch.compile(each, backend="aograph", options=options)(X)

    with torch.no_grad():
        with pytest.warns(UserWarning, match="Dynamo may call one graph with the weights of several layers"):
            close(run(model), model(X))
        assert len(seen) < 6 and not any(seen)  # graphs are shared by layers
        run(model.layers[0])
    assert seen[-1] == found


def report(matches, name="fuse_around_linears"):
    return Report(history=[PassRecord(name, "lower", matches, bool(matches), 0.0, 0.0)])


def test_small_kernels_start_as_one_where_tokens_are_few():
    assert suited(Report()) == suited(report(0)) == {}
    assert suited(report(2)) == {"combo_kernels": True}


def test_kernels_that_quantize_are_tuned():
    expected = {"max_autotune_pointwise": True, "triton.multi_kernel": 1}
    assert suited(report(1, "int8_dynamic")) == suited(report(1, "float8_dynamic")) == expected


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {"options": {"combo_kernels": True}}),
        ({"mode": "default"}, {"options": {"combo_kernels": True}}),
        ({"mode": "reduce-overhead"}, {"options": {"combo_kernels": True, "triton.cudagraphs": True}}),
        (
            {"dynamic": False, "options": {"combo_kernels": False}},
            {"dynamic": False, "options": {"combo_kernels": False}},
        ),
        ({"backend": "eager"}, {"backend": "eager"}),
    ],
)
def test_settings_join_the_users_options(options, expected):
    assert joined(options, suited(report(1))) == expected
    assert joined(options, suited(report(0))) == options


class Attention(nn.Module):
    def forward(self, q, positions, *caches):
        return kv_attention(q, *caches, positions, None, None, 0.1, 0.0, 0, None, None)


@pytest.mark.parametrize("tokens, settings", [(1, {}), (64, {"triton.cudagraphs": False})])
def test_attention_that_asks_where_its_tokens_are_is_not_recorded(tokens, settings):
    caches = (tensor for _ in range(2) for tensor in INT8.empty(1, 2, 128, 32))
    positions = torch.arange(tokens)[None]
    found = needed(program_of(Attention(), torch.randn(1, 4, tokens, 32), positions, *caches))
    assert found == settings
    options = {"mode": "reduce-overhead"}
    recorded = joined(options, {}, found).get("options", {}).get("triton.cudagraphs")
    assert recorded is (False if settings else None) and joined(options, {}, {}) == options


@torch.no_grad()
def test_settings_reach_inductor(monkeypatch):
    seen = []
    monkeypatch.setattr("aograph.backend.suited", lambda report: {"combo_kernels": True})
    monkeypatch.setattr(torch._inductor, "compile", lambda module, inputs, options: seen.append(options) or module)
    torch.compile(MLP().eval(), backend="aograph", options={"recipe": "int8wo"})(X)
    torch.compile(MLP().eval(), backend="aograph", options={"recipe": "int8wo", "combo_kernels": False})(X)
    assert [options["combo_kernels"] for options in seen] == [True, False]
