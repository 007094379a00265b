"""Hugging Face generate behind torch.compile(backend="aograph"): token for token that of the dequantized model."""

import copy

import pytest
import torch
from aograph.kernels import int8_linear
from torch._dynamo.utils import counters

from .zoo import MINI

pytestmark = pytest.mark.usefixtures("fresh_compiler")
LAYERS = 2
PROMPTS = ["The for statement is used to", "A class", "In Python, an exception is raised when the value of", "If"]


@pytest.fixture(scope="module")
def mini():
    """(the first layers of mini in fp32, tokenizer)"""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(MINI, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.decode([0])
    model = transformers.AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32).eval()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:LAYERS], LAYERS
    return model, tokenizer


@torch.no_grad()
def dequantized(model):
    """A copy with each linear rounded to 8 bits; the head gets a weight of its own."""
    model = copy.deepcopy(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(int8_linear.unpack(*int8_linear.pack(module.weight)))
    return model


WAYS = {
    "greedy, one row": (PROMPTS[:1], {}),
    "greedy, four rows": (PROMPTS, {}),
    "sampling": (PROMPTS[:2], {"do_sample": True, "temperature": 0.8}),
    "beams": (PROMPTS[:1], {"num_beams": 3}),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("cache", ["static", None])
def test_a_compiled_model(mini, cache, device):
    """All ways one after another on one model, which is compiled again only where a graph does not fit; one way over
    a cache that grows."""
    model, tokenizer = mini
    reference, model = dequantized(model).to(device), copy.deepcopy(model).to(device)
    reports = []
    model.compile(backend="aograph", options={"recipe": "int8wo", "report": reports.append, "compile": False})
    for way, (prompts, how) in [*WAYS.items()] if cache else [*WAYS.items()][1:2]:
        how = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "disable_compile": True, **how}
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
        results = []
        for each in (reference, model):
            torch.manual_seed(0)
            results.append(each.generate(**inputs, **how))
        assert torch.equal(*results), way
    assert reports and all(len(report.rewritten) == 7 * LAYERS + 1 for report in reports if report.rows)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_compile_config(mini, device):
    """transformers compiles the steps after the first: that runs eagerly, on the original weights."""
    import transformers

    model, tokenizer = mini
    reference, model = dequantized(model).to(device), copy.deepcopy(model).to(device)
    whole = copy.deepcopy(model)
    inputs = tokenizer(PROMPTS[:1], return_tensors="pt").to(device)
    forward = reference.forward
    reference.forward = lambda input_ids=None, **kwargs: (whole if input_ids.shape[1] > 1 else forward)(
        input_ids=input_ids, **kwargs
    )
    reports = []
    config = transformers.CompileConfig(
        backend="aograph", mode=None, dynamic=False, options={"recipe": "int8wo", "report": reports.append}
    )
    config._compile_all_devices = True
    how = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    expected = reference.generate(**inputs, **how, disable_compile=True)
    counters.clear()
    assert torch.equal(model.generate(**inputs, **how, compile_config=config), expected)
    assert torch.equal(model.generate(**inputs, **how, compile_config=config), expected)
    (report,) = reports
    assert len(report.rewritten) == 7 * LAYERS + 1 and counters["stats"]["unique_graphs"] == 1
