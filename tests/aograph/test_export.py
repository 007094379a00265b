import warnings
from dataclasses import replace
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
from aograph.kernels.kv_cache import INT4, INT8
from torch import nn

import aograph
from aograph import (
    KV8,
    CompileError,
    InputError,
    Int8WeightOnly,
    Keep,
    LinearStatistics,
    Rule,
    archive,
    export,
)
from aograph.artifact import inspect, load
from aograph.decoding import CacheShape, cache_shapes
from tests.artifacts import FAST_BUILD
from tests.models.zoo import MINI, build, ids, sliding
from tests.small_models import MLP, Branching

SHAPE = CacheShape(2, 64, 64, torch.float32)


def optimized(model=None, *inputs, **options):
    return aograph.optimize(model or MLP(), "int8wo", inputs or (torch.randn(5, 64),), compile=False, **options)


@pytest.mark.parametrize(
    "make, name, options, message",
    [
        (optimized, "model.zip", {}, "give .*model.pt2"),
        (optimized, "no/such/model.pt2", {}, "cannot be written"),
        (optimized, "model.pt2", {"batch_size": 0}, "batch_size is 0"),
        (optimized, "model.pt2", {"max_length": 1}, "max_length is 1"),
        (optimized, "model.pt2", {"max_length": "many"}, "max_length is 'many'"),
        (optimized, "model.pt2", {"tokenizer": "/dev"}, "no files of a tokenizer"),
        (lambda: aograph.optimize(MLP(), "int8wo"), "model.pt2", {}, "no graph to save yet"),
    ],
)
def test_requests_that_cannot_be_met(make, name, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        make().save(tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_the_hash_of_a_recipe_is_of_its_statistics_too():
    fast, hashes = optimized(), []
    for high in (None, 1.0, 2.0):
        found = {} if high is None else {"up.weight": LinearStatistics(-1.0, high, torch.ones(64), 3)}
        fast.recipe = replace(fast.recipe, statistics=found)
        about = export.about_recipe(fast)
        assert about["recipe"] == aograph.Recipe.of("int8wo").to_toml()
        hashes.append(about["recipe_sha256"])
    assert len(set(hashes)) == 3 and hashes[0] == sha256(about["recipe"].encode()).hexdigest()


def test_a_model_in_parts_has_no_graph(tmp_path, fresh_compiler):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = optimized(Branching())
    with pytest.raises(InputError, match="runs in parts"):
        fast.save(tmp_path / "model.pt2")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")
    with pytest.raises(aograph.CompileError, match="AOTInductor could not compile the graph forward"):
        optimized().save(path, options={"no_such_option": 1})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("hand_over", [False, True])
def test_steps_share_what_forward_has_packed(hand_over):
    model, inputs = build("llama")
    fast = aograph.optimize(model, "int8wo", inputs, hand_over=hand_over, compile=False)
    before = {key: [t.data_ptr() for t in packed] for key, packed in fast._store.packed.items()}
    whole = export.on_meta(model) if hand_over else model
    graphs = export.step_graphs(fast, whole, cache_shapes(whole, 16), 2, 16)
    assert {key: [t.data_ptr() for t in packed] for key, packed in fast._store.packed.items()} == before
    prefill, decode = (graphs[name].program.graph_module for name in ("prefill", "decode"))
    cache = [torch.zeros(2, 2, 16, 64) for _ in range(4)]
    tokens = ids(1, 6)
    with torch.no_grad():
        expected = fast(input_ids=tokens.expand(2, -1), use_cache=False).logits[:1]
        first = prefill(tokens[:, :5], torch.arange(5)[None], *(t[1:] for t in cache))[0]
        positions = torch.tensor([[0], [5]])
        second = decode(tokens[:, 5:].expand(2, 1), positions, *cache)[0][1:]
    torch.testing.assert_close(first, expected[:, 4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(second, expected[:, 5], rtol=1e-3, atol=1e-3)


def test_what_the_file_says(language_model):
    about = inspect(language_model.path)
    assert about["graphs"].keys() == {"forward", "prefill", "decode"} and not about["notes"] and not about["misfits"]
    assert about["generation"]["batch_size"] == 2 and about["generation"]["max_length"] == 48
    assert about["generation"]["eos_token_id"] == [0]
    prefill = about["graphs"]["prefill"]
    assert [value["name"] for value in prefill["inputs"][:4]] == ["input_ids", "positions", "key_0", "value_0"]
    (symbol,) = {size for value in prefill["inputs"] for size in value["sizes"] if isinstance(size, str)}
    assert prefill["ranges"] == {symbol: [2, 48]}
    assert [value["written"] for value in prefill["inputs"]] == [False, False, True, True]
    assert about["graphs"]["forward"]["report"]["bytes_after"] == language_model.fast.report.bytes_after


@pytest.mark.parametrize(
    "recipe, notes",
    [
        ("int8wo", []),
        ("int8wo + kv4", ["caches that are not packed: key_0, value_0, key_1, value_1: int4: a head of 24; expected"]),
        ([Rule(Int8WeightOnly()), Rule(KV8()), Rule(Keep(), name="re:(key|value)_.*", optional=True)], []),
    ],
)
def test_caches_that_are_not_packed(recipe, notes):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=128, n_embd=96, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    fast = aograph.optimize(model, recipe, {"input_ids": ids(), "use_cache": False}, compile=False)
    graphs = export.step_graphs(fast, model, cache_shapes(model, 16), 2, 16)
    found = export.unpacked(graphs["decode"].program)
    assert len(found) == len(notes) and all(map(str.startswith, found, notes)), found
    assert graphs["decode"].names[2:] == ["key_0", "value_0", "key_1", "value_1"]


def test_steps_that_would_read_a_cache_in_two_forms():
    def program(form):
        return SimpleNamespace(caches=[SimpleNamespace(format=form, row=SimpleNamespace(name="key_0"))])

    (shape,) = export.packed_shapes([SHAPE], {"prefill": program(INT8), "decode": program(INT8)})
    assert shape.key_format is INT8 and shape.value_format is None
    for other in (INT4, None):
        with pytest.raises(CompileError, match="key_0 is not in the same form in prefill and in decode"):
            export.packed_shapes([SHAPE], {"prefill": program(INT8), "decode": program(other)})


class Lookups(nn.Module):
    """Indices that go through views, and such that nothing is known about."""

    def __init__(self):
        super().__init__()
        self.table, self.few = nn.Embedding(10, 64), nn.Embedding(7, 64)
        self.register_buffer("grid", torch.randn(5, 64))

    def forward(self, a, b, c, d):
        return self.table(a.view(-1)) + self.few(a.view(-1)), self.grid[b], self.table(c + 1), d


def test_the_numbers_that_indices_may_be():
    inputs = [torch.zeros(2, 3, dtype=torch.int64) for _ in range(4)]
    with pytest.warns(UserWarning, match="rewrote nothing"):
        _, captured, _ = optimized(Lookups(), *inputs)._captures[0]
    assert [export.within(node) for node in captured.program.inputs] == [(0, 6), (-5, 4), None, None]


def test_no_weight_is_a_number_in_the_code(few_tokens):
    """However small, such as a bias of few numbers: it could not be updated."""
    names = {entry.name for entry in archive.Archive(few_tokens.path).index}
    assert {"up.bias", "down.bias"} <= names


class Odd(nn.Module):
    """Sizes in products, an input that is an output, one that is no tensor, a buffer that counts, small weights."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x, scale):
        self.calls.add_(1)
        pairs = x.view(-1, 2, 64)
        return {
            "y": self.linear(pairs) * (scale["by"] * (self.scale + 1)),
            "count": self.calls.clone(),
            "none": None,
            "again": [x],
        }


def test_an_odd_model(tmp_path):
    model = Odd().eval()
    x, scale = torch.randn(6, 64), {"by": torch.tensor(2.0)}
    fast = aograph.optimize(model, "int8wo", (x, scale), compile=False)
    fast.save(tmp_path / "odd.pt2", options=FAST_BUILD)
    artifact = load(tmp_path / "odd.pt2")
    x = torch.randn(10, 64)
    found, expected = artifact(x, scale), fast(x, scale)
    torch.testing.assert_close(found["y"], expected["y"], rtol=1e-4, atol=1e-4)
    assert found["none"] is None and torch.equal(found["again"][0], x)
    assert artifact(x, scale)["count"] == found["count"] + 1
    with pytest.raises(InputError, match=r"compiled for sizes with .*Mod"):
        artifact(torch.randn(9, 64), scale)
    bias = model.linear.bias.detach()
    artifact.update_weights({"linear.bias": bias + 1})
    torch.testing.assert_close(artifact(x, scale)["y"], found["y"] + 4, rtol=1e-4, atol=1e-4)
    artifact.update_weights({"scale": torch.zeros(())})
    torch.testing.assert_close(artifact(x, scale)["y"], found["y"] / 2 + 2, rtol=1e-4, atol=1e-4)


def test_files_of_a_tokenizer():
    transformers = pytest.importorskip("transformers")
    of_folder = export.tokenizer_files(MINI)
    assert of_folder.keys() == {"tokenizer.json", "tokenizer_config.json"}
    of_object = export.tokenizer_files(transformers.AutoTokenizer.from_pretrained(MINI))
    assert "tokenizer.json" in of_object and export.tokenizer_files(None) == {}


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", ["int8wo", "int4wo"])
@pytest.mark.parametrize("tokens", [4, None])
def test_on_a_gpu(recipe, tokens, tmp_path):
    """Few tokens: Triton kernels in the package; any number of tokens: dequantization."""
    model = MLP(256, 512).to("cuda", torch.bfloat16).eval()
    x = torch.randn(4, 256).to("cuda", torch.bfloat16)
    shapes = ({},) if tokens else None
    fast = aograph.optimize(model, recipe, x, dynamic_shapes=shapes, compile=False)
    fast.save(tmp_path / "model.pt2")
    artifact = load(tmp_path / "model.pt2")
    kernels = {kernel for _, kernel, _ in artifact.about["graphs"]["forward"]["kernels"]}
    assert kernels == {"triton" if tokens else "dequantize"} and artifact.environment["architecture"].startswith("sm_")
    for M in [tokens] if tokens else [2, 100, 1000]:
        x = torch.randn(M, 256).to(model.up.weight)
        torch.testing.assert_close(artifact(x), fast(x), rtol=3e-2, atol=3e-2)
    artifact.update_weights({name: -tensor for name, tensor in model.state_dict().items() if "down" in name})
    torch.testing.assert_close(artifact(x), -fast(x), rtol=3e-2, atol=3e-2)


@pytest.mark.filterwarnings("ignore:the recipe .* rewrote nothing")
def test_steps_pack_the_caches_of_layers_that_slide():
    """And those of layers that do not; attention adds its mask to its scores, and has sinks."""
    model, tokens = sliding("gpt_oss", 16), ids(2, 24)
    fast = aograph.optimize(model, "kv8", {"input_ids": tokens, "use_cache": False}, compile=False)
    shapes = cache_shapes(model, 64)
    programs = {kind: graph.program for kind, graph in export.step_graphs(fast, model, shapes, 2, 64).items()}
    rows = [cache.row for program in programs.values() for cache in program.caches]
    assert [row.outcome for row in rows] == ["rewritten"] * 8, rows
    cache = [t for each in export.packed_shapes(shapes, programs) for t in each.empty(2, 64, torch.device("cpu"))]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits[:, -1]
        for row in range(2):
            mine = [tensor[row : row + 1] for tensor in cache]
            programs["prefill"].graph_module(tokens[row : row + 1, :-1], torch.arange(23)[None], *mine)
        (found,) = programs["decode"].graph_module(tokens[:, -1:], torch.full((2, 1), 23), *cache)
    assert 0 < (found - expected).norm() / expected.norm() < 0.02


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", ["int4wo", "int4wo + kv8", "int4wo + kvfp8"])
def test_a_language_model_on_a_gpu(recipe, tmp_path):
    model, inputs = build("llama")
    model = model.to("cuda", torch.bfloat16)
    fast = aograph.optimize(model, recipe, {**inputs, "input_ids": inputs["input_ids"].cuda()}, compile=False)
    fast.save(tmp_path / "model.pt2", max_length=48, batch_size=2)
    artifact = load(tmp_path / "model.pt2")
    assert "triton" in {kernel for _, kernel, _ in artifact.about["graphs"]["decode"]["kernels"]}
    prompt = ids(2, 9).cuda()
    found = artifact.generate(prompt, 16)
    cache = artifact.new_cache()
    logits = torch.cat([artifact.prefill(prompt[row : row + 1], cache, row) for row in range(2)])
    expected = fast(input_ids=prompt, use_cache=False).logits[:, -1]
    assert (logits - expected).norm() <= (6e-2 if "kv" in recipe else 3e-2) * expected.norm()
    assert found.shape == (2, 25) and torch.equal(found, artifact.generate(prompt, 16))
