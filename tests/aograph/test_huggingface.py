import subprocess
import sys

import pytest
import torch

from aograph import InputError, optimize
from aograph.huggingface import load, register_pytrees
from tests.models.zoo import MINI, build

transformers = pytest.importorskip("transformers")


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
