"""Fixtures: artifacts that several test files use, each compiled once."""

import copy
import types

import pytest
import torch
from aograph.kernels import int4_linear, int8_linear
from torch import nn

import aograph
from aograph import Recipe, Rule
from aograph.schemes import KV4, KVFP8
from tests.models.zoo import MINI, ids
from tests.small_models import MLP

FAST_BUILD = {"aot_inductor.compile_wrapper_opt_level": "O0"}


def dequantized(model):
    """A copy of a language model whose linears have the weights that its packed ones stand for."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            if name == "lm_head":
                weight = int8_linear.unpack(*int8_linear.pack(weight, "minmax"))
            else:
                weight = int4_linear.unpack(*int4_linear.pack(weight, 32, "mse"), 32, weight.shape[0])
            module.weight = nn.Parameter(weight)
    return model


RECIPE = "int4wo(group_size=32) + lm_head:int8wo"


def mini(layers):
    """The first layers of mini in fp32."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32).eval()
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """A layer of mini, saved for two rows of 48 tokens: `path`, the `model`, `fast`, and `reference`."""
    model = mini(1)
    fast = aograph.optimize(model, RECIPE, {"input_ids": ids(), "use_cache": False}, compile=False)
    path = tmp_path_factory.mktemp("artifact") / "model.pt2"
    fast.save(path, max_length=48, batch_size=2, tokenizer=MINI, options=FAST_BUILD)
    return types.SimpleNamespace(path=path, model=model, fast=fast, reference=dequantized(model))


@pytest.fixture(scope="session")
def packed_cache(tmp_path_factory):
    """The same of two layers, with packed caches of 45 tokens, so that rows of scales are at odd addresses.

    Those of the first are in int8; of the second are keys in int4 and values in float8.
    """
    model = mini(2)
    rules = [*Recipe.of(f"{RECIPE} + kv8").rules, Rule(KV4(), name="key_1", optional=True),
             Rule(KVFP8(), name="value_1", optional=True)]  # fmt: skip
    fast = aograph.optimize(model, rules, {"input_ids": ids(), "use_cache": False}, compile=False)
    path = tmp_path_factory.mktemp("artifact") / "model.pt2"
    fast.save(path, max_length=45, batch_size=2, options=FAST_BUILD)
    return types.SimpleNamespace(path=path, model=model, fast=fast, reference=dequantized(model))


@pytest.fixture(scope="session")
def few_tokens(tmp_path_factory):
    """An MLP in bf16 for four tokens, in the kernels of ATen where the processor has them: `path`, `model`, `fast`."""
    torch.manual_seed(0)
    model = MLP().to(torch.bfloat16).eval()
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    recipe = "int8wo + down:int4wo"
    fast = aograph.optimize(model, recipe, x, dynamic_shapes=({},), compile=False)
    path = tmp_path_factory.mktemp("artifact") / "mlp.pt2"
    fast.save(path, options=FAST_BUILD)
    return types.SimpleNamespace(path=path, model=model, fast=fast)
