"""PackedCache: the cache of a model of transformers in packed form, as it is, optimized, and behind torch.compile."""

import copy

import pytest
import torch

import aograph
from aograph import InputError, optimize
from aograph.decoding import CacheShape
from aograph.huggingface import cache_argument
from aograph.recipe import Recipe
from tests.models.zoo import build, ids, sliding

transformers = pytest.importorskip("transformers")
from transformers import StaticCache  # noqa: E402
from transformers.cache_utils import StaticSlidingWindowLayer  # noqa: E402

from aograph.packed_cache import PackedCache, PackedLayer, PackedWindowLayer, packed_shape  # noqa: E402

LENGTH = 64
LARGEST = {"kv8": 0.02, "kvfp8": 0.06, "kv4": 0.1}  # of the relative error of logits
recipes = pytest.mark.parametrize("recipe", LARGEST)
TOKEN = 2 * 2 * 2 * 64  # layers, keys and values, heads, their size
BYTES = {"kv8": TOKEN + 32, "kvfp8": TOKEN + 32, "kv4": TOKEN // 2 + 48}  # of a token: codes and scales


@pytest.fixture(scope="module")
def mini():
    return build("llama_with_cache")[0]


def prompts():
    """Token ids and their mask; the first row is padded on the left."""
    tokens = ids(2, 9, 4096)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def generated(model, **options):
    """(tokens, logits [steps, B, V]) of a greedy generate."""
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "disable_compile": True}
    found = model.generate(**{**prompts(), **how, **options}, return_dict_in_generate=True, output_logits=True)
    return found.sequences, torch.stack(found.logits)


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def steps(model, tokens, cache, cuts=(5, 1, 1, 1), mask=None):
    """The logits of the last token of each piece; mask [B, S]: of padding."""
    found, end = [], 0 if mask is None else mask.shape[1] - tokens.shape[1]
    for piece in tokens.split(list(cuts), 1):
        end += piece.shape[1]
        more = {} if mask is None else {"attention_mask": mask[:, :end]}
        with torch.no_grad():
            found.append(model(piece, past_key_values=cache, **more).logits[:, -1])
    return torch.stack(found)


def is_packed(cache, recipe):
    dtypes = {"kv8": torch.int8, "kvfp8": torch.float8_e4m3fn, "kv4": torch.uint8}
    assert all(type(layer) is PackedLayer for layer in cache.layers)
    assert all(part[0].dtype is dtypes[recipe] for layer in cache.layers for part in (layer.keys, layer.values))
    assert cache.token_bytes == BYTES[recipe]
    return True


# --- the doors ---------------------------------------------------------------------------------------------


def as_it_is(model, recipe):
    return model, []


def optimized(model, recipe):
    fast = optimize(model, recipe, compile=False)
    return fast, fast._captures


def compiled(model, recipe):
    model, reports = copy.deepcopy(model), []
    model.compile(backend="aograph", options={"recipe": recipe, "compile": False, "report": reports.append})
    return model, reports


def compiled_forward(model, recipe):
    model, reports = copy.deepcopy(model), []
    options = {"recipe": recipe, "compile": False, "report": reports.append}
    model.forward = torch.compile(model.forward, backend="aograph", options=options)
    return model, reports


WAYS = [
    *((as_it_is, recipe) for recipe in LARGEST), (optimized, "kv4"), (compiled, "kvfp8"), (compiled_forward, "kv8")
]  # fmt: skip


@pytest.mark.parametrize("door, recipe", WAYS, ids=lambda each: getattr(each, "__name__", each))
def test_generate(mini, door, recipe, fresh_compiler):
    """Padded rows; the same cache for one text after another; the tokens are those of the full-precision cache."""
    model, seen = door(mini, recipe)
    cache = PackedCache(model, recipe, 2, LENGTH)
    assert is_packed(cache, recipe)
    expected, logits = generated(mini, cache_implementation="static")
    addresses = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors]
    for _ in range(2):
        cache.reset()
        tokens, found = generated(model, past_key_values=cache)
        same = (tokens == expected).all(0).sum() - prompts()["input_ids"].shape[1]  # steps that went the same way
        assert same >= 3 and 0 < error(found[:same], logits[:same]) < LARGEST[recipe]
    assert addresses == [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors]
    assert int(cache.get_seq_length()) == tokens.shape[1] - 1
    if seen:
        reports = [model.report] if door is optimized else seen
        for report in reports:
            assert {row.name for row in report.caches} == {"key_0", "value_0", "key_1", "value_1"}
            assert all((row.outcome, row.scheme) == ("rewritten", recipe) for row in report.caches), report
        assert len(seen) == 2  # one for the prompt, one for all tokens


@pytest.mark.filterwarnings("ignore:the recipe .* rewrote nothing")
def test_flex_attention_behind_torch_compile(fresh_compiler):
    """Rows padded on the left; Dynamo leaves transformers' making of the mask out, so that attention is in a graph of
    its own. Its mask_mod reads the length of the cache after it has grown."""
    (tokens, mask), plain = prompts().values(), tiny()
    expected = steps(plain, tokens, StaticCache(plain.config, max_cache_len=LENGTH), (8, 1), mask)[1:]
    cache = PackedCache(plain, "kv8", 2, LENGTH)
    steps(plain, tokens[:, :8], cache, (8,), mask)
    model, reports = compiled(tiny(attn_implementation="flex_attention"), "kv8")
    assert model.config._attn_implementation == "flex_attention" and PackedCache(model, "kv8").token_bytes
    assert 0 < error(steps(model, tokens[:, 8:], cache, (1,), mask), expected) < LARGEST["kv8"]
    rows = [row for report in reports for row in report.caches]
    assert {(row.name, row.outcome) for row in rows} == {("key_0", "rewritten"), ("value_0", "rewritten")}


@pytest.mark.parametrize("door", [as_it_is, optimized], ids=lambda door: door.__name__)
def test_a_conversation_to_the_end(door):
    """Positions go on over several calls, of any number of tokens, until the cache is full."""
    original, tokens, cuts = tiny(), ids(2, 16, 4096), (8, 1, 6, 1)
    expected = steps(original, tokens, StaticCache(original.config, max_cache_len=16), cuts)
    model, _ = door(original, "kv8")
    cache = PackedCache(original, "kv8", 2, 16)
    for _ in range(2):
        assert 0 < error(steps(model, tokens, cache, cuts), expected) < LARGEST["kv8"]
        with pytest.raises(RuntimeError, match="outside of the cache, which holds 0 … 15: make it longer, or begin"):
            steps(model, tokens[:, :1], cache, (1,))
        cache.reset()


@recipes
def test_beams_reorder_what_is_packed(mini, recipe):
    tokens, cache = ids(3, 8, 4096), PackedCache(mini, recipe, 3, LENGTH)
    other = PackedCache(mini, recipe, 3, LENGTH)
    order = torch.tensor([2, 0, 0])
    steps(mini, tokens[:, :7], cache, (5, 1, 1))
    steps(mini, tokens[order, :7], other, (5, 1, 1))
    addresses = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors]
    cache.reorder_cache(order)
    assert addresses == [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors]
    assert torch.equal(steps(mini, tokens[:, 7:], cache, (1,)), steps(mini, tokens[:, 7:], other, (1,)))


# --- generate makes the cache ------------------------------------------------------------------------------


def tiny(**settings):
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 4096, "head_dim": 16} | settings
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, **settings)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def made(monkeypatch):
    """The packed caches that a test makes."""
    found, init = [], PackedCache.__init__

    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        found.append(self)

    monkeypatch.setattr(PackedCache, "__init__", __init__)
    return found


def test_generate_of_an_optimized_model(mini, made):
    """The cache is packed, with a row for each beam and sequence; two graphs serve all, and texts of other lengths."""
    fast = optimize(mini, "kv8", compile=False)
    ways = {}, {"cache_implementation": "static"}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}
    for way in ways:
        expected, logits = generated(mini, top_k=1, **way)
        tokens, found = generated(fast, top_k=1, **way)
        assert torch.equal(tokens, expected) and 0 < error(found, logits) < 0.05
        cache = made.pop()
        assert is_packed(cache, "kv8") and cache.layers[0].batch_size == logits.shape[1]
    generated(fast, max_new_tokens=2, **{name: value[:, 1:] for name, value in prompts().items()})
    assert fast._count == 2 and not made[1:]
    assert fast.report.cache_token_bytes == (4 * TOKEN, BYTES["kv8"])


@pytest.mark.parametrize("door", ["eager", "optimized"])
def test_under_the_name_that_this_version_has(door):
    """In `generate`, in a call, and in what `explain` is given; a cache without room is still an error."""
    model = tiny()
    name, asked = cache_argument(model.forward), optimize(model, "kv8", compile=False) if door == "optimized" else model
    cache = PackedCache(model, "kv8", 2, LENGTH)
    expected, _ = generated(asked, past_key_values=PackedCache(model, "kv8", 2, LENGTH))
    assert torch.equal(generated(asked, **{name: cache})[0], expected)
    tokens = ids(2, 6, 128)
    cache.reset()
    logits = steps(asked, tokens, PackedCache(model, "kv8", 2, LENGTH), (6,))[0]
    with torch.no_grad():
        torch.testing.assert_close(asked(tokens, **{name: cache}).logits[:, -1], logits, rtol=0, atol=0)
    report = aograph.explain(model, "kv8", {"input_ids": tokens[:, :1], name: cache})
    assert {row.outcome for row in report.caches} == {"rewritten"}
    if door == "optimized":
        with pytest.raises(InputError, match="the cache has room for 12 tokens"):
            generated(asked, **{name: PackedCache(asked, batch_size=2, max_cache_len=12)})


def test_a_cache_without_room():
    model = tiny()
    fast = optimize(model, "kv8", compile=False)
    cache = PackedCache(fast, batch_size=2, max_cache_len=12)
    with pytest.raises(InputError, match="the cache has room for 12 tokens, but the text may take 14: make it longer"):
        generated(fast, past_key_values=cache)
    assert not fast._count


def test_who_chooses_the_cache(monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", lambda _, **options: options)
    fast = optimize(tiny(), "kv8", compile=False)
    for options in ({}, {"use_cache": True}, {"generation_config": transformers.GenerationConfig()}):
        assert fast.generate(**options)["cache_implementation"] == "static"
    for options in ({"cache_implementation": "dynamic"}, {"use_cache": False}, {"past_key_values": object()}):
        assert fast.generate(**options) == {**options, "disable_compile": True}
    with pytest.warns(UserWarning, match="the cache stays as it is: assisted generation takes tokens back"):
        assert "cache_implementation" not in fast.generate(prompt_lookup_num_tokens=2)
    assert "cache_implementation" not in optimize(tiny(), "int8wo", compile=False).generate()


@pytest.mark.filterwarnings("ignore:the recipe .* rewrote nothing")
def test_a_model_without_a_packed_cache():
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match="MambaForCausalLM cannot have a packed cache: "):
        PackedCache(transformers.MambaForCausalLM(config).eval(), "kv8")
    model = tiny(head_dim=24)
    with pytest.raises(
        InputError, match=r"key_0 cannot be packed by kv8: int8: a head of 24; .* by the rule key_0:none"
    ):
        PackedCache(model, "kv8")
    with pytest.warns(UserWarning, match="the cache stays as it is: key_0 cannot be packed"):
        found = generated(optimize(model, "kv8", compile=False), max_new_tokens=1)[0]
    assert torch.equal(found, generated(model, max_new_tokens=1)[0])


# --- which layers ------------------------------------------------------------------------------------------


def test_a_window_as_long_as_the_cache():
    model, tokens, cuts = sliding("gemma3", LENGTH), ids(2, 12, 128), (9, 1, 1, 1)
    expected = steps(model, tokens, StaticCache(model.config, max_cache_len=LENGTH), cuts)
    cache = PackedCache(model, "kv8", 2, LENGTH)
    assert [type(layer) for layer in cache.layers] == [PackedLayer] * 2
    assert 0 < error(steps(model, tokens, cache, cuts), expected) < LARGEST["kv8"]


SHORT = 16  # tokens of a window
CUTS = (9, 1, 10, *[1] * 5, 3, *[1] * 12)  # to the edge, over it, on by one, on by several


@pytest.mark.parametrize("name, recipe", [("gemma3", "kv8"), ("gemma2", "kvfp8"), ("mistral", "kv4")])
def test_windows_shorter_than_the_cache(name, recipe):
    """Token by token and by several, before and behind the edge of the window, and again after a reset."""
    model, tokens = sliding(name, SHORT), ids(2, 40, 128)
    expected = steps(model, tokens, StaticCache(model.config, max_cache_len=LENGTH), CUTS)
    cache = PackedCache(model, recipe, 2, LENGTH)
    assert PackedWindowLayer in [type(layer) for layer in cache.layers] and cache.max_cache_len == LENGTH
    assert all(layer.values[0].shape[2] == layer.get_max_length() for layer in cache.layers)
    for _ in range(2):
        found = steps(model, tokens, cache, CUTS)
        assert 0 < error(found, expected) < LARGEST[recipe]
        cache.reset()


@pytest.mark.parametrize("name, recipe", [("gemma3", "kv8"), ("mistral", "kv4(keys=token)")])
def test_windows_of_an_optimized_model(name, recipe):
    """One graph for all single tokens behind the edge, in which attention reads what is packed."""
    model, tokens = sliding(name, SHORT), ids(2, 40, 128)
    cuts = (20, *[1] * 20)
    expected = steps(model, tokens, StaticCache(model.config, max_cache_len=LENGTH), cuts)
    fast = optimize(model, recipe, compile=False)
    cache = PackedCache(fast, batch_size=2, max_cache_len=LENGTH)
    assert 0 < error(steps(fast, tokens, cache, cuts), expected) < LARGEST[recipe[:3]]
    assert fast._count == 2
    report = aograph.explain(model, recipe, {"input_ids": tokens[:, :1], "past_key_values": cache})
    assert {(row.outcome, row.scheme[:3]) for row in report.caches} == {("rewritten", recipe[:3])}


def test_sinks_and_windows_of_gpt_oss():
    """A text longer than the window, then token by token: sinks go into attention over what is packed."""
    model, tokens, cuts = sliding("gpt_oss", SHORT), ids(2, 32, 128), (20, *[1] * 12)
    expected = steps(model, tokens, StaticCache(model.config, max_cache_len=LENGTH), cuts)
    cache = PackedCache(model, "kv8", 2, LENGTH)
    assert [type(layer) for layer in cache.layers] == [PackedWindowLayer, PackedLayer]
    prompt = aograph.explain(model, "kv8", {"input_ids": tokens[:, :20], "past_key_values": cache})
    assert prompt.caches[0].notes == ["attention reads the new tokens as they are, and not the cache"]
    fast = optimize(model, "kv8", compile=False)
    assert 0 < error(steps(fast, tokens, cache, cuts), expected) < LARGEST["kv8"]
    assert fast._count == 2
    step = aograph.explain(model, "kv8", {"input_ids": tokens[:, :1], "past_key_values": cache})
    assert [row.outcome for row in step.caches] == ["rewritten"] * 4


@recipes
def test_a_window_holds_what_the_layer_of_transformers_does(recipe):
    """Of tokens that rounding leaves as they are, in pieces of any size, the same is read; then of another text."""
    shape = packed_shape(CacheShape(2, 32, 32, torch.float32), Recipe.of(recipe), 0, by_token=True)
    layer = PackedWindowLayer.empty(shape, 2, SHORT, torch.device("cpu"))
    form = shape.parts[0][1]
    for cuts in (CUTS, (16, 1, 15, 16), (17, 1), (40, 40, 1, 3), (15, 1, 1), (1,) * 20):
        plain = StaticSlidingWindowLayer(max_cache_len=LENGTH, sliding_window=SHORT)
        for count in cuts:
            assert layer.get_mask_sizes(count) == plain.get_mask_sizes(count)
            new = form.dequantize(*form.quantize(torch.randn(4, 2, count, 32)), torch.float32).split(2)
            found, expected = layer.update(*new), plain.update(*new)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, atol=0.02, rtol=0.02)  # rounding twice is not quite once
        assert layer.get_seq_length() == plain.get_seq_length() == sum(cuts)
        layer.reset()


def test_generate_over_windows():
    """Padded rows; tokens and logits are those of the full-precision cache."""
    model, tokens = sliding("gemma3", SHORT), ids(2, 12, 128)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    text = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": 20}
    expected, logits = generated(model, cache_implementation="static", **text)
    for fast in (model, optimize(model, "kv8", compile=False)):
        found, steps = generated(fast, past_key_values=PackedCache(model, "kv8", 2, LENGTH), **text)
        same = (found == expected).all(0).sum() - tokens.shape[1]
        assert same >= 10 and 0 < error(steps[:same], logits[:same]) < LARGEST["kv8"]


def test_rules_by_name_and_bytes_of_a_token():
    model, recipe = tiny(num_hidden_layers=2), "kv8 + re:(key|value)_1:none"
    cache = PackedCache(model, recipe, 2, LENGTH)
    assert [type(layer).__name__ for layer in cache.layers] == ["PackedLayer", "StaticLayer"]
    report = aograph.explain(model, recipe, {"input_ids": ids(2, 8), "past_key_values": cache})
    outcomes = {row.name: row.outcome for row in report.caches}
    assert outcomes == {"key_0": "rewritten", "value_0": "rewritten", "key_1": "excluded", "value_1": "excluded"}
    each = 2 * 2 * 16 * 4  # keys and values, heads, their size, fp32
    assert report.cache_token_bytes == (2 * each, each + cache.token_bytes) and cache.token_bytes == each // 4 + 16
    assert f"cache {2 * each} B → {each + cache.token_bytes} B a token" in report.summary()


# --- what is said ------------------------------------------------------------------------------------------


def test_the_report_says_how_to_get_one(fresh_compiler):
    reports, original = [], tiny()
    options = {"recipe": "kv8", "report": reports.append, "compile": False}
    model = torch.compile(original, backend="aograph", options=options)
    cache = StaticCache(original.config, max_cache_len=LENGTH)
    cache.early_initialization(2, 2, 16, torch.float32, "cpu")
    with pytest.warns(UserWarning, match="rewrote nothing"), torch.no_grad():
        model(ids(2, 4), past_key_values=cache)
    notes = {row.name: row.notes for row in reports[0].caches}
    assert notes.keys() == {"key_0", "value_0"}
    assert all("past_key_values=aograph.PackedCache(" in note[0] for note in notes.values())


def test_recipes_that_pack_nothing(mini):
    with pytest.raises(InputError, match="PackedCache needs a recipe with a rule for caches"):
        PackedCache(mini)
    with pytest.raises(InputError, match="packs no cache of LlamaForCausalLM"):
        PackedCache(mini, "int8wo")
    with pytest.raises(InputError, match="packs no cache of Gemma3ForCausalLM"):
        PackedCache(sliding("gemma3", 8), "kv8 + re:key_.:none")
