"""Hugging Face models: generate, token for token, and caches in and out of graphs."""

import copy
import functools
from pathlib import Path

import pytest
import torch

from aograph import InputError, RecipeError, optimize
from aograph.generation import OptimizedPreTrained
from tests.models.dequantized import INT4, INT8, dequantized
from tests.models.zoo import MINI, build, ids

transformers = pytest.importorskip("transformers")
from transformers import DynamicCache, EncoderDecoderCache, StaticCache  # noqa: E402

SMALL = Path(__file__).parents[3] / "shared" / "models" / "small"
TOKENS = 12

both_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
both_caches = pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])


def prompts(batch, length, device="cpu"):
    """Token ids and their mask: the rows of a batch are padded on the left, each by another length."""
    tokens = ids(batch, length, 4096).to(device)
    mask = torch.ones_like(tokens)
    for row in range(batch - 1):
        mask[row, : row + 1] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model, **options):
    """The tokens that a model makes, as many whatever they are; sampled ones from the same seed."""
    torch.manual_seed(0)
    options = {"do_sample": False, "max_new_tokens": TOKENS, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(**options)


WAYS = {
    "one": lambda device: prompts(1, 7, device),
    "padded": lambda device: prompts(4, 9, device),
    "sampled": lambda device: prompts(4, 9, device) | {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": lambda device: prompts(2, 6, device) | {"num_beams": 3},
}


@functools.cache
def pretrained(folder, recipe, device):
    """(the original, the optimized, the dequantized), of one layer; the last knows all graphs that the ways need."""
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder.name} is not in {folder.parent}")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    optimized = optimize(model, recipe, compile=False)
    optimized(**WAYS["padded"](device))
    return model, optimized, dequantized(model, optimized, recipe)


@both_devices
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "folder, recipe, cache",
    [(MINI, INT8, None), (MINI, INT4, "static"), (SMALL, INT8, "static"), (SMALL, INT4, None)],
    ids=["mini-int8-dynamic", "mini-int4-static", "small-int8-static", "small-int4-dynamic"],
)
def test_tokens_are_those_of_the_dequantized_model(folder, recipe, way, cache, device):
    _, optimized, reference = pretrained(folder, recipe, device)
    options = WAYS[way](device) | {"cache_implementation": cache}
    expected = generate(reference, **options)
    assert torch.equal(generate(optimized, **options), expected)
    assert expected.unique().numel() > TOKENS / 2  # the models say something


def counted(optimized):
    return optimized._count


@both_caches
def test_a_graph_for_the_prompt_and_one_for_all_tokens(cache):
    """Whatever the length of the prompt: 2 key heads, 4 heads, 64 wide, are lengths too."""
    model, _ = build("llama_with_cache", layers=1)
    optimized = optimize(model, INT8, compile=False)
    for length in (4, 9, 2, 64):
        generate(optimized, **prompts(2, length), cache_implementation=cache)
    assert counted(optimized) == 2
    generate(optimized, **prompts(4, 64), cache_implementation=cache)
    assert counted(optimized) == 2


@pytest.fixture(scope="module")
def tiny():
    model, _ = build("llama_with_cache", layers=1)
    return model, optimize(model, "none", compile=False)


pytestmark = pytest.mark.filterwarnings("ignore:the recipe .* rewrote nothing")


@pytest.mark.parametrize("filled", [False, True])
def test_the_cache_of_the_caller_is_updated(filled, tiny):
    model, optimized = tiny
    given = DynamicCache(config=model.config) if filled else DynamicCache()
    expected = DynamicCache()
    for piece in ids(2, 8).split([5, 1, 1, 1], dim=1):
        output = optimized(piece, past_key_values=given)
        wanted = model(piece, past_key_values=expected)
        assert output.past_key_values is given
        torch.testing.assert_close(output.logits, wanted.logits)
        for layer, other in zip(given.layers, expected.layers, strict=True):
            torch.testing.assert_close((layer.keys, layer.values), (other.keys, other.values))
    assert given.get_seq_length() == 8


def test_a_static_cache_is_written_where_it_is(tiny):
    model, optimized = tiny
    given, expected = (StaticCache(model.config, max_cache_len=16) for _ in range(2))
    tokens = ids(2, 8)
    optimized(tokens[:, :6], past_key_values=given)
    model(tokens[:, :6], past_key_values=expected)
    addresses = [(layer.keys.data_ptr(), layer.cumulative_length.data_ptr()) for layer in given.layers]
    for step in (6, 7):
        output = optimized(tokens[:, step : step + 1], past_key_values=given)
        wanted = model(tokens[:, step : step + 1], past_key_values=expected)
        torch.testing.assert_close(output.logits, wanted.logits)
        assert output.past_key_values is given and int(given.get_seq_length()) == step + 1
    assert [(layer.keys.data_ptr(), layer.cumulative_length.data_ptr()) for layer in given.layers] == addresses
    for layer, other in zip(given.layers, expected.layers, strict=True):
        assert vars(layer).keys() == vars(other).keys()
        torch.testing.assert_close((layer.keys, layer.values), (other.keys, other.values))


def test_called_without_a_cache_it_returns_one(tiny):
    model, optimized = tiny
    output = optimized(ids(2, 8))
    assert type(output) is type(model(ids(2, 8))) and type(output.past_key_values) is DynamicCache
    assert output.past_key_values.get_seq_length() == 8
    assert optimized(ids(2, 8), use_cache=False).past_key_values is None


def test_a_cache_that_does_not_come_back(tiny):
    class Forgetful(type(tiny[0])):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).logits

    model = Forgetful(tiny[0].config).eval()
    with pytest.raises(InputError, match="give use_cache=True"):
        optimize(model, INT8, compile=False)(ids(2, 8), past_key_values=DynamicCache(config=model.config))


def test_the_model_stays_as_it_is(tiny):
    model, _ = tiny
    before = dict(vars(model)), type(model), copy.deepcopy(model.generation_config.to_dict())
    optimized = optimize(model, INT8, compile=False)
    optimized.generation_config.max_new_tokens = 3
    assert optimized.generate(**prompts(1, 4), eos_token_id=None).shape == (1, 7)
    assert (dict(vars(model)), type(model), model.generation_config.to_dict()) == before
    assert type(optimized) is OptimizedPreTrained and optimized.config is model.config
    assert (optimized.device, optimized.dtype) == (model.device, model.dtype)


def test_another_generation_config(tiny):
    optimized = optimize(tiny[0], INT8, compile=False)
    optimized.generation_config = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert optimized.generate(**prompts(1, 4)).shape == (1, 6)


def test_a_streamer_and_an_assistant(tiny):
    model, optimized = tiny

    class Kept(list):
        put = list.append

        def end(self):
            self.append("end")

    kept = Kept()
    expected = generate(model, **prompts(1, 7))
    assert torch.equal(generate(optimized, **prompts(1, 7), streamer=kept), expected)
    assert torch.equal(torch.cat([t.flatten() for t in kept[:-1]]), expected[0]) and kept[-1] == "end"
    assistant = optimize(model, "none", compile=False)
    assert torch.equal(generate(optimized, **prompts(1, 7), assistant_model=assistant), expected)
    assert counted(assistant) > 0
    assert torch.equal(generate(optimized, **prompts(1, 7), prompt_lookup_num_tokens=2), expected)


def test_what_generate_refuses(tiny):
    _, optimized = tiny
    with pytest.raises(InputError, match="leave compile_config out"):
        generate(optimized, **prompts(1, 4), compile_config=transformers.CompileConfig())
    with pytest.raises(InputError, match="a MtpCache cannot go in or out of a captured graph"):
        generate(optimized, **prompts(1, 4), past_key_values=type("MtpCache", (DynamicCache,), {})())
    model, _ = build("bert")
    with pytest.raises(InputError, match="has no generate"):
        optimize(model, INT8, compile=False).generate(ids())


@both_devices
def test_handed_over_there_is_one_copy_of_each_weight(device):
    model = build("llama_with_cache", layers=1)[0].to(device)
    original = copy.deepcopy(model)
    optimized = optimize(model, INT8, hand_over=True, compile=False)
    ways = [prompts(2, 6, device) | {"cache_implementation": cache} for cache in (None, "static")]
    tokens = [generate(optimized, **options) for options in ways]
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in optimized.state_dict().values()}
    assert sum(kept.values()) <= 1.01 * optimized.report.bytes_after
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    own = [m.weight for m in linears if m.weight is not model.get_input_embeddings().weight]
    assert own and all(weight.is_meta for weight in own)
    left = [p for p in model.parameters() if not p.is_meta]
    assert all(p.untyped_storage().data_ptr() in kept for p in left)
    assert optimized.device.type == device and optimized.dtype == torch.float32
    reference = dequantized(original, optimized, INT8)
    for options, made in zip(ways, tokens, strict=True):
        assert torch.equal(made, generate(reference, **options))


# --- other kinds of models ---------------------------------------------------------------------------------


def sharpen(model):
    """Weights that make a model of a random start say more than one word."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (parameter.shape[1] ** -0.5 * 1.5)
    return model.eval()


def t5(layers=2):
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=layers, num_heads=4, decoder_start_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    return sharpen(transformers.T5ForConditionalGeneration(config))


def bart():
    config = transformers.BartConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return sharpen(transformers.BartForConditionalGeneration(config))


def short(batch, length):
    return {key: value % 128 for key, value in prompts(batch, length).items()}


@pytest.mark.parametrize("hand_over", [False, True])
def test_an_encoder_and_a_decoder(hand_over):
    model = t5(1)
    original = copy.deepcopy(model)
    optimized = optimize(model, INT8, hand_over=hand_over, compile=False)
    generate(optimized, **short(3, 7))
    reference = dequantized(dequantized(original, optimized, INT8), optimized.encoder, INT8)
    before = counted(optimized)
    for options in (short(3, 7), short(2, 9), short(2, 9) | {"num_beams": 3}):
        expected = generate(reference, **options)
        assert torch.equal(generate(optimized, **options), expected)
        assert expected.unique().numel() > 4
    assert counted(optimized) == before and counted(optimized.encoder) == 1
    assert optimized.report.rewritten and optimized.encoder.report.rewritten


def test_an_encoder_and_a_decoder_with_a_static_cache():
    model = bart()
    optimized = optimize(model, "none", compile=False)
    for options in (short(3, 7), short(2, 9)):
        expected = generate(model, **options, cache_implementation="static")
        assert torch.equal(generate(optimized, **options, cache_implementation="static"), expected)
    assert counted(optimized) == 2


def test_an_encoder_decoder_model_is_captured_whole():
    model = t5(1)
    optimized = optimize(model, INT8, compile=False)
    inputs = {"input_ids": ids(2, 7), "decoder_input_ids": ids(2, 3)}
    output = optimized(**inputs)
    expected = dequantized(model, optimized, INT8)(**inputs).logits
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    cache = output.past_key_values
    assert type(cache) is EncoderDecoderCache and cache.is_updated == {0: True}
    assert (cache.get_seq_length(), cache.cross_attention_cache.get_seq_length()) == (3, 7)
    packed = dict(optimized._store.packed)
    generate(optimized, **short(3, 7))
    assert optimized._store.packed.keys() == packed.keys()  # the encoder by itself shares them


def test_rules_for_an_encoder_and_a_decoder():
    optimized = optimize(t5(1), f"{INT8} + encoder.*:none + lm_head:none", compile=False)
    generate(optimized, **short(3, 7))
    assert not optimized.encoder.report.rewritten and optimized.report.rewritten
    with pytest.raises(RecipeError, match="no module of the model has a name that the rule name='encode"):
        optimize(t5(1), f"{INT8} + encode.*:none", compile=False)


@both_caches
def test_a_sliding_window(cache):
    """Before the window is full, as it fills, and when it moves."""
    config = transformers.MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=10,
    )  # fmt: skip
    model = sharpen(transformers.MistralForCausalLM(config))
    optimized = optimize(model, "none", compile=False)
    for options in (short(3, 7), short(3, 14)):
        expected = generate(model, **options, cache_implementation=cache)
        assert torch.equal(generate(optimized, **options, cache_implementation=cache), expected)
    before = counted(optimized)
    generate(optimized, **short(2, 8), max_new_tokens=20, cache_implementation=cache)
    assert counted(optimized) == before


# --- compiled ----------------------------------------------------------------------------------------------


def test_compiled(fresh_compiler):
    model, _ = build("llama_with_cache", layers=1)
    optimized = optimize(model, INT8)
    given, expected = (StaticCache(model.config, max_cache_len=20) for _ in range(2))
    tokens = generate(optimized, **prompts(2, 6), past_key_values=given)
    reference = dequantized(model, optimized, INT8)
    assert torch.equal(tokens, generate(reference, **prompts(2, 6), past_key_values=expected))
    assert counted(optimized) == 2 and int(given.get_seq_length()) == 6 + TOKENS - 1
    for layer, other in zip(given.layers, expected.layers, strict=True):
        torch.testing.assert_close((layer.keys, layer.values), (other.keys, other.values), rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
def test_cuda_graphs_on_a_static_cache(fresh_compiler):
    model = build("llama_with_cache")[0].cuda()
    optimized = optimize(model, INT8, compile_options={"mode": "reduce-overhead"})
    for length in (6, 9, 6):
        options = prompts(2, length, "cuda") | {"cache_implementation": "static"}
        tokens = generate(optimized, **options)
        assert torch.equal(tokens, generate(dequantized(model, optimized, INT8), **options))
