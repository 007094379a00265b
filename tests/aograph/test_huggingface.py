import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree as pytree

from aograph import InputError, optimize
from aograph.huggingface import cache_argument, cache_of, caches, load, register_pytrees
from tests.models.zoo import MINI, build

transformers = pytest.importorskip("transformers")
from transformers import DynamicCache, EncoderDecoderCache, StaticCache  # noqa: E402


def test_importing_aograph_imports_no_transformers():
    code = "import sys, aograph, aograph.huggingface; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_a_folder():
    model, inputs = load(MINI, None, tokens=7)
    assert type(model) is transformers.LlamaForCausalLM and not model.training
    assert model.dtype == torch.bfloat16  # as its config says
    assert inputs["input_ids"].shape == (2, 7) and inputs["use_cache"] is False
    assert model(**inputs).logits.shape == (2, 7, model.config.vocab_size)


def test_another_dtype():
    assert load(MINI, torch.float32, tokens=7)[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_class_and_the_inputs_are_those_of_the_config(name, tmp_path):
    model, inputs = build(name)
    model.save_pretrained(tmp_path)
    again, given = load(tmp_path, None, tokens=12)
    assert type(again) is type(model)
    assert given.keys() >= inputs.keys() and all(given[key].shape == inputs[key].shape for key in inputs)
    assert again(**given).logits.shape == model(**inputs).logits.shape


def test_what_holds_no_model(tmp_path):
    with pytest.raises(InputError, match="holds no model that transformers can load"):
        load(tmp_path, None, tokens=7)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(InputError, match="holds no model that transformers can load"):
        load(tmp_path, None, tokens=7)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install aograph\[hf\]"):
        load(MINI, None, tokens=7)


def test_registering_twice_does_nothing():
    register_pytrees()
    register_pytrees()


def test_a_cache_goes_out_and_comes_back_in():
    """Prefill, then a step on the cache, as generation does it."""
    model, inputs = build("llama_with_cache")
    plain = optimize(model, "int8wo", compile=False)
    start, step = inputs["input_ids"][:, :-1], inputs["input_ids"][:, -1:]
    whole = plain(input_ids=inputs["input_ids"], use_cache=True).logits[:, -1]
    first = plain(input_ids=start, use_cache=True)
    assert first.past_key_values.get_seq_length() == start.shape[1]
    second = plain(input_ids=step, past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(second.logits[:, -1], whole, rtol=1e-3, atol=1e-3)
    assert second.past_key_values.get_seq_length() == start.shape[1] + 1


# --- caches as pytrees -------------------------------------------------------------------------------------


def sizes():
    return transformers.MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=6, layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip


def fill(cache, length):
    own = getattr(cache, "self_attention_cache", cache)
    for layer in range(2):
        own.update(torch.randn(3, 2, length, 8), torch.randn(3, 2, length, 8), layer)
    return cache


def pair(make):
    cache = EncoderDecoderCache(make(), make())
    fill(cache.cross_attention_cache, 5)
    cache.is_updated = {0: True, 1: True}
    return cache


MAKE = {
    "lazy": DynamicCache,
    "dynamic": lambda: DynamicCache(config=sizes()),
    "static": lambda: StaticCache(sizes(), max_cache_len=20),
    "pair": lambda: pair(lambda: DynamicCache(config=sizes())),
}
each_cache = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def state(cache):
    """All that a cache knows, tensors by their addresses."""
    if isinstance(cache, EncoderDecoderCache):
        return state(cache.self_attention_cache), state(cache.cross_attention_cache), cache.is_updated
    skipped = ("_sliding_window_tensor",)
    return [
        {k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in vars(layer).items() if k not in skipped}
        for layer in cache.layers
    ]


@each_cache
@pytest.mark.parametrize("length", [0, 3, 9])
def test_a_cache_is_the_same_after_flattening(make, length):
    register_pytrees()
    cache = fill(make(), length) if length else make()
    leaves, spec = pytree.tree_flatten(cache)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(cache)
    if length:
        assert state(again) == state(cache)
    assert fill(again, 1).get_seq_length() == length + 1


@each_cache
def test_the_structure_does_not_tell_the_length(make):
    """Else each token would need another graph."""
    register_pytrees()
    specs = [pytree.tree_structure(fill(make(), length)) for length in (3, 4, 9)]
    assert specs[0] == specs[1] == specs[2] != pytree.tree_structure(make())
    assert pytree.treespec_loads(pytree.treespec_dumps(specs[0])) == specs[0]


def test_registrations_of_others_are_replaced():
    """In a process of its own: transformers' registration of DynamicCache forgets how far a window has moved."""
    code = """
import torch
from torch.utils import _pytree as pytree
from transformers import DynamicCache, MistralConfig
from transformers.integrations.executorch import register_dynamic_cache_export_support
from aograph.huggingface import register_pytrees
register_dynamic_cache_export_support()
register_pytrees()
register_dynamic_cache_export_support()
cache = DynamicCache(config=MistralConfig(num_hidden_layers=1, sliding_window=4))
cache.update(torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, 9, 8), 0)
print(pytree.tree_unflatten(*pytree.tree_flatten(cache)).get_seq_length())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "9", done.stderr


def test_caches_that_no_graph_can_take():
    register_pytrees()
    offloading = DynamicCache(config=sizes(), offloading=False)
    offloading.offloading = True
    with pytest.raises(InputError, match="a cache that offloads"):
        pytree.tree_flatten(offloading)

    class Strange(DynamicCache):
        pass

    with pytest.raises(InputError, match="a Strange cannot go in or out of a captured graph; those that can: Dynamic"):
        caches({"past_key_values": Strange()})
    unknown = DynamicCache()
    unknown.layers = [type("Novel", (), {})()]
    with pytest.raises(InputError, match="layers of the class Novel"):
        pytree.tree_flatten(unknown)


def test_what_the_cache_of_a_call_is_named():
    """As transformers names it since 5.24, and as it did before; models that are not its own keep the old name."""
    cache = DynamicCache()
    new, old = (lambda input_ids, cache=None: None), (lambda input_ids, past_key_values=None: None)
    assert [cache_argument(forward) for forward in (new, old, lambda x: None)] == ["cache", "past_key_values", None]
    assert cache_of({"cache": cache}) is cache_of({"past_key_values": cache, "cache": None}) is cache
    assert cache_of({"use_cache": True}) is None
