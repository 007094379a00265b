"""What is fused with a packed linear, and what is not; the kernel is said to take all, as there may be no GPU."""

import importlib
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels.fused_linear import FUSED
from aograph.kernels.op import Case
from aograph.passes import Stage
from torch import nn

import aograph
from aograph.inline import inline
from aograph.pipeline import packed_linears
from bench.decode_step import HEAD, Layer
from tests.models.zoo import MINI
from tests.programs import apply, find, operators, program_of, up_to

module = importlib.import_module("aograph.passes.fuse_around_linears")
X = torch.randn(2, 1, 64).bfloat16()
FORMS = "aograph.int8_fused_linear", "aograph.int4_fused_linear"


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """The kernel takes everything."""
    monkeypatch.setattr(module, "takes", lambda op, case: True)


class Block(nn.Module):
    """`function(block, x)`, on weights in bf16: a, b [64, 64], wide [128, 64], a norm [64]."""

    def __init__(self, function, bias=False):
        super().__init__()
        self.function = function
        self.a, self.b, self.wide = (nn.Linear(64, n, bias=bias) for n in (64, 64, 128))
        self.norm, self.layer_norm = nn.RMSNorm(64), nn.LayerNorm(64)
        nn.init.uniform_(self.norm.weight)
        self.register_buffer("memory", torch.randn(2, 1, 64))
        self.to(torch.bfloat16).requires_grad_(False)

    def forward(self, x):
        return self.function(self, x)


def fused(function, *, x=X, bias=False, recipe="int8wo", dynamic=False):
    """The program after the pass, which changes nothing the second time; its packed weights are never made."""
    program = program_of(Block(function, bias), x, dynamic=dynamic)
    apply(program, *(name for name in up_to(Stage.LOWER) if name != module.FuseAroundLinears.name), recipe=recipe)
    (program.matches,) = apply(program, module.FuseAroundLinears.name, recipe=recipe)
    before = program.text()
    assert apply(program, module.FuseAroundLinears.name, recipe=recipe) == [0] and program.text() == before
    assert all(site.node.graph is program.graph for site in program.sites)
    return program


def both(model, *args, recipe="int8wo", compile=False, **kwargs):
    """What the optimized model gives, with the pass and without it, and the programs; shapes are static."""
    static = [*({} for _ in args), *({} if isinstance(value, torch.Tensor) else None for value in kwargs.values())]
    made = [
        aograph.optimize(model, recipe, (args, kwargs), compile=compile, disable=disable, dynamic_shapes=static)
        for disable in ((), ("fuse_around_linears",))
    ]
    programs = [next(iter(each._captures.values()))[1].program for each in made]
    return [each(*args, **kwargs) for each in made], programs


def close(actual, expected, tolerance=1e-2):
    """Equal but for roundings to bf16."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def parts_of(program):
    """For each fused call: the names of what it has taken."""
    found = [module.call(node) for node in program.graph.nodes if node.target in module.FORMS]
    return [[name for name in ("norm", "gated", "residual") if call[name] not in (None, False)] for call in found]


def of_transformers(m, x):
    wide = x.to(torch.float32)
    return m.norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def gate(y):
    first, second = y.chunk(2, -1)
    return F.silu(first) * second


FUSE = {
    "norm": (lambda m, x: m.a(m.norm(x)), ["norm"], "the norm before it"),
    "norm as transformers writes it": (lambda m, x: m.a(of_transformers(m, x)), ["norm"], "the norm before it"),
    "gate": (lambda m, x: gate(m.wide(x)), ["gated"], "the gate after it"),
    "gate of merged linears": (lambda m, x: F.silu(m.a(x)) * m.b(x), ["gated"], "the gate after it"),
    "gate, swapped": (lambda m, x: m.b(x) * F.silu(m.a(x)), None, None),  # b is the first half then
    "gate, the other way": (lambda m, x: (lambda u, s: s * F.silu(u))(*m.wide(x).chunk(2, 2)), ["gated"], None),
    "residual": (lambda m, x: x + m.a(x), ["residual"], "the residual after it"),
    "residual, the other way": (lambda m, x: m.a(x) + x, ["residual"], None),
    "norm and residual": (
        lambda m, x: x + m.a(m.norm(x)), ["norm", "residual"], "the norm before it, the residual after it"
    ),
    "norm and gate": (lambda m, x: gate(m.wide(m.norm(x))), ["norm", "gated"], None),
    "gate and residual": (
        lambda m, x: x + gate(m.wide(x)), ["gated", "residual"], "the gate and the residual after it"
    ),
    "all": (
        lambda m, x: gate(m.wide(of_transformers(m, x))) + x,
        ["norm", "gated", "residual"],
        "the norm before it, the gate and the residual after it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe, bias", [("int8wo", False), ("int4wo", True)], ids=["int8", "int4-bias"])
@pytest.mark.parametrize("function, parts, note", FUSE.values(), ids=FUSE)
def test_what_is_fused(function, parts, note, bias, recipe):
    program = fused(function, bias=bias, recipe=recipe)
    assert parts_of(program) == ([parts] if parts else []) and program.matches == bool(parts)
    if parts:
        assert program.sites[0].node.target in module.FORMS
        calls = operators(program)
        assert sum(calls.values()) == 1, calls
    if note:
        assert all(row.notes[-1] == f"fused with {note}" for row in program.rows)
    (actual, expected), (made, _) = both(Block(function, bias), X, recipe=recipe)
    close(actual, expected)
    assert parts_of(made) == parts_of(program)


def test_one_of_two_linears_that_are_added():
    program = fused(lambda m, x: m.a(x) + m.b(x.relu()))
    assert parts_of(program) == [["residual"]] and operators(program)["aograph.int8_linear"] == 1


def test_a_chain_of_residuals():
    """What one linear's call gives is the next one's residual and, normalized, its x."""

    def function(m, x):
        x = x + m.a(m.norm(x))
        return x + gate(m.wide(m.norm(x)))

    program = fused(function)
    assert parts_of(program) == [["norm", "residual"], ["norm", "gated", "residual"]]
    (actual, expected), _ = both(Block(function), X)
    close(actual, expected)


def test_the_call_stands_where_the_last_of_its_parts_stood():
    """Behind the residual, which is computed after the linear."""

    def function(m, x):
        y = m.a(x)
        return x.relu().sin() + y

    program = fused(function)
    assert parts_of(program) == [["residual"]]
    assert module.call(find(program, FORMS[0]))["residual"].target is torch.ops.aten.sin.default


# --- what is not fused -------------------------------------------------------------------------------------


def written_later(m, x):
    y = x + 1
    z = m.a(y)
    y.mul_(2)
    return z + x, y


def written_through_a_view(m, x):
    """The residual is a view, and what it is a view of is written."""
    base = torch.cat([x, x], -1)
    residual = base[..., :64]
    z = m.a(x)
    base[..., 32:].mul_(2)
    return z + residual


def residual_written(m, x):
    y = x + 1
    z = m.a(x)
    z = y + z
    y.mul_(2)
    return z, y


def memory_written(m, x):
    """A step over a state: the residual is the state from before, which the graph then writes."""
    y = m.a(x)
    z = m.memory + y
    m.memory.copy_(z)
    return z


def half_used_twice(m, x):
    first, second = m.wide(x).chunk(2, -1)
    return F.silu(first) * second + first


def silu_used_twice(m, x):
    first, second = m.wide(x).chunk(2, -1)
    return (s := F.silu(first)) * second + s


def unequal(m, x):
    first, second, _ = m.wide(x).split([32, 32, 64], -1)
    return F.silu(first) * second


def other_dimension(m, x):
    first, second = m.a(x).chunk(2, 0)
    return F.silu(first) * second


LEAVE = {
    "a linear alone": lambda m, x: m.a(x).relu(),
    "a norm with two users": lambda m, x: m.a(n := m.norm(x)) * n,
    "a norm that is returned": lambda m, x: (m.a(n := m.norm(x)), n),
    "LayerNorm": lambda m, x: m.a(m.layer_norm(x)),
    "a norm without a weight": lambda m, x: m.a(F.rms_norm(x, (64,))),
    "x is written": written_later,
    "the residual is written": residual_written,
    "the residual is written through a view": written_through_a_view,
    "the residual is a buffer that is written": memory_written,
    "a sum with a factor": lambda m, x: torch.add(x, m.a(x), alpha=2),
    "a sum with a number": lambda m, x: m.a(x) + 1,
    "a sum in place": lambda m, x: m.a(x).add_(x),
    "a sum with itself": lambda m, x: (y := m.a(x)) + y,
    "a residual that is broadcast": lambda m, x: x[:1] + m.a(x),
    "y is broadcast": lambda m, x: x.expand(3, 2, 1, 64) + m.a(x),
    "a residual of another dtype": lambda m, x: x.float() + m.a(x),
    "a linear with two users": lambda m, x: (x + (y := m.a(x))) * y,
    "a half that is used twice": half_used_twice,
    "a gate that is used twice": silu_used_twice,
    "another activation": lambda m, x: (lambda a, b: F.gelu(a) * b)(*m.wide(x).chunk(2, -1)),
    "parts that are no halves": unequal,
    "parts along another dimension": other_dimension,
    "halves of the other order": lambda m, x: (lambda a, b: a * F.silu(b))(*m.wide(x).chunk(2, -1)),
}


@pytest.mark.parametrize("function", LEAVE.values(), ids=LEAVE)
def test_what_is_left_alone(function):
    program = fused(function)
    assert program.matches == 0 and not any(operators(program)[form] for form in FORMS)
    assert not any("fused" in note for row in program.rows for note in row.notes)


@pytest.mark.parametrize("first", [True, False])
def test_a_residual_that_is_not_contiguous(first):
    """Where the sum has its strides, as the first operand's, those further on may rely on them."""

    def function(m, x):
        y, residual = m.a(x.sin()), x.transpose(0, 1).exp()
        return residual + y if first else y + residual

    x = torch.randn(2, 2, 64).bfloat16()
    program = fused(function, x=x)
    assert parts_of(program) == ([] if first else [["residual"]])
    (actual, expected), _ = both(Block(function), x)
    close(actual, expected)
    assert actual.stride() == expected.stride()


def test_a_norm_whose_x_is_written_stays_before_a_linear_with_a_residual():
    def function(m, x):
        y = x + 1
        z = x + m.a(m.norm(y))
        y.mul_(2)
        return z, y

    program = fused(function)
    assert parts_of(program) == [["residual"]] and operators(program)["aten.rms_norm"] == 1


def test_a_gate_that_the_kernel_does_not_take(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "takes", lambda op, case: asked.append(case) or not case.gated)
    program = fused(lambda m, x: x + gate(m.wide(m.norm(x))))
    assert parts_of(program) == [["norm"]]
    assert {case.gated for case in asked} == {True, False} and {(c.M, c.N, c.K) for c in asked} == {(2, 128, 64)}


def test_any_number_of_tokens():
    program = fused(lambda m, x: x + m.a(m.norm(x)), x=X.view(2, 64), dynamic=True)
    assert program.matches == 0


def test_the_kernel_is_asked(monkeypatch):
    monkeypatch.undo()
    assert fused(lambda m, x: x + m.a(m.norm(x))).matches == 0  # on CPU there is none
    case = Case("cuda", torch.bfloat16, 1, 4096, 4096, None, (9, 0))
    for op in FUSED.values():
        chosen = op["cuda"]
        monkeypatch.setattr(op, "choose", lambda case, chosen=chosen: chosen)
        assert module.takes(op, case)


# --- whole models ------------------------------------------------------------------------------------------


@pytest.fixture
def layer():
    """A layer of a Llama in bf16 that is 512 wide, its inputs, and a norm that is not all ones."""
    layer = Layer(512).to(torch.bfloat16).requires_grad_(False).eval()
    for norm in (layer.input_norm, layer.post_norm):
        nn.init.uniform_(norm.weight)
    angle = torch.rand(HEAD // 2).repeat(2)
    cache = [torch.randn(1, layer.attention.kv_heads, 8, HEAD).bfloat16() for _ in range(2)]
    turn = angle.cos().bfloat16(), angle.sin().bfloat16()
    return layer, lambda: (torch.ones(1, 1, 512).bfloat16(), turn, torch.tensor([5]), *(each.clone() for each in cache))


LAYER = [["norm"], ["residual"], ["norm", "gated"], ["residual"]]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("recipe, compile", [("int8wo", False), ("int4wo", True)], ids=["int8", "int4-inductor"])
def test_a_layer_behind_torch_compile(layer, recipe, compile):
    layer, inputs = layer
    reports, results = [], []
    for disable in ((), ("fuse_around_linears",)):
        options = {"recipe": recipe, "compile": compile, "disable": disable, "report": reports.append}
        fast = torch.compile(layer, backend="aograph", options=options, dynamic=False, fullgraph=True)
        given = inputs()
        with torch.no_grad():
            results.append((fast(*given), *given[-2:]))
        torch.compiler.reset()
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)
    history = {each.name: each for each in reports[0].history}
    assert history["fuse_around_linears"].matches == 4
    notes = [[note for note in row.notes if "fused" in note] for row in reports[0].rows]
    assert len(notes) == 7 and all(len(each) == 1 for each in notes)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("recording", [False, True])
def test_gradients(layer, recording):
    """Where they are recorded nothing is fused, as the fused op has none."""
    reports = []
    layer, inputs = layer
    options = {"recipe": "int8wo", "compile": False, "report": reports.append}
    fast = torch.compile(layer, backend="aograph", options=options, dynamic=False)
    x, *rest = inputs()
    with nullcontext() if recording else torch.no_grad():
        y = fast(x.requires_grad_(recording), *rest)
    history = {each.name: each for each in reports[0].history}
    assert history["fuse_around_linears"].matches == (0 if recording else 4)
    if recording:
        y.sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("recipe", ["int8wo", "int4wo"])
def test_a_model_of_transformers(recipe):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(MINI)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    inputs = {"input_ids": torch.tensor([[7]]), "use_cache": False}
    (actual, expected), (program, plain) = both(model, recipe=recipe, **inputs)
    close(actual.logits, expected.logits, 2e-2)
    assert parts_of(program) == [*LAYER, *LAYER, ["norm"]] and not parts_of(plain)
    assert packed_linears(program) == packed_linears(plain)


@pytest.mark.usefixtures("fresh_compiler")
def test_inductor():
    model = Block(lambda m, x: x + gate(m.wide(m.norm(x + m.a(x)))))
    (actual, expected), (program, _) = both(model, X, compile=True)
    close(actual, expected)
    assert parts_of(program) == [["residual"], ["norm", "gated", "residual"]]


@pytest.mark.parametrize("recipe", ["int8wo", "int4wo"])
def test_an_artifact_has_the_parts(recipe):
    model = Block(lambda m, x: x + gate(m.wide(m.norm(x + m.a(x)))))
    (_, expected), (program, _) = both(model, X, recipe=recipe)
    inlined = inline(program)
    assert not inlined.outside and "aograph" not in str(inlined.exported.graph)
    assert sum(inlined.kernels.values()) == 2 and {name for name, _ in inlined.kernels} < {f[8:] for f in FORMS}
    close(inlined.exported.module()(X)[0], expected)
