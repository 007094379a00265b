import gc
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from aograph import InputError, Rule, WeightError, huggingface, load_pretrained, optimize
from aograph.checkpoint import Checkpoint, Streamed
from aograph.pretrained import dtype_of, fit_of, load_generation_config, skeleton
from aograph.schemes import Int8WeightOnly
from tests.models.test_models import SMALL
from tests.models.zoo import MINI, build, ids

transformers = pytest.importorskip("transformers")


def tiny_config(**changes):
    settings = dict(
        vocab_size=144, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaConfig(**settings | changes)


@pytest.fixture
def folder(tmp_path):
    """A Llama of one layer in bf16, its embedding tied to its head."""
    model = transformers.LlamaForCausalLM(tiny_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def load(folder, recipe="int8wo", **options):
    return load_pretrained(folder, recipe, compile=False, **options)


def whole(folder, kind=transformers.AutoModelForCausalLM, recipe="int8wo", **options):
    """The same, by way of the whole model."""
    model = kind.from_pretrained(folder, dtype="auto", **options).eval()
    inputs = {"input_ids": torch.arange(32).view(2, 16), "use_cache": False}
    return optimize(model, recipe, inputs, compile=False)


def check_equal(one, other, **inputs):
    """Bit for bit: outputs, state, errors."""
    outputs, expected = one(**inputs), other(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(outputs.to_tuple(), expected.to_tuple(), strict=True))
    state, expected = one.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert [row.error for row in one.report.rows] == [row.error for row in other.report.rows]


@torch.no_grad()
def check_near(optimized, model, **inputs):
    """As the model that was not quantized, but for rounding to 8 bits."""
    logits, expected = optimized(**inputs).logits.float(), model(**inputs).logits.float()
    assert 0 < (logits - expected).norm() / expected.norm() < 0.05


def rewrite(folder, change):
    """Changes the tensors of a folder's only file."""
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check_weights(folder):
    """That each tensor of the model is what transformers loads; the fit of the names."""
    config, kind = huggingface.architecture(folder)
    expected, info = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    checkpoint = Checkpoint(folder)
    model = skeleton(kind, config, config.dtype or dtype_of(checkpoint))
    fit = fit_of(model, checkpoint)
    source = Streamed(model, checkpoint, fit.keys, torch.device("cpu"))
    tensors = dict([*expected.named_parameters(remove_duplicate=False), *expected.named_buffers()])
    assert tensors.keys() == dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()]).keys()
    for name, tensor in tensors.items():
        source.check(name)
        original = source.original(name)
        assert original.dtype is tensor.dtype and torch.equal(original, tensor), name
    parameters = [*model.parameters()]
    assert len(parameters) == len([*expected.parameters()]) and all(p.is_meta for p in parameters)
    assert not info["missing_keys"] and set(fit.unexpected) == info["unexpected_keys"] and fit.why_whole is None
    return fit


# --- the same as by way of the whole model -----------------------------------------------------------------


def test_mini():
    optimized = load(MINI)
    assert optimized.loading_report.streamed and optimized.loading_report.tied == ("lm_head.weight",)
    check_equal(optimized, whole(MINI), input_ids=ids(3, 21), use_cache=False)


@pytest.mark.skipif(not SMALL.is_dir(), reason="the model small is not here")
def test_shards():
    assert check_weights(SMALL).tied == ("lm_head.weight",)


def bart():
    config = transformers.BartConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def t5():
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_other_architectures(name, tmp_path):
    model, inputs = build(name)
    model.save_pretrained(tmp_path)
    check_weights(tmp_path)
    optimized = load(tmp_path)
    assert optimized.loading_report.streamed
    check_equal(optimized, optimize(model, "int8wo", inputs, compile=False), **inputs)


def test_an_encoder_and_a_decoder(tmp_path):
    model = t5().eval()
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": ids(), "decoder_input_ids": ids(2, 5), "use_cache": False}
    check_near(load(tmp_path), model, **inputs)


@pytest.mark.parametrize("make", [bart, t5, lambda: build("t5_encoder")[0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_of_other_architectures(make, dtype, tmp_path):
    make().to(dtype).save_pretrained(tmp_path)
    check_weights(tmp_path)


def test_another_dtype(folder):
    optimized = load(folder, dtype=torch.float32)
    assert optimized.dtype is torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = {"input_ids": ids(), "use_cache": False}
    check_equal(optimized, optimize(model, "int8wo", inputs, compile=False), **inputs)


def test_weights_that_stay_in_fp32(tmp_path):
    t5().to(torch.float16).save_pretrained(tmp_path)
    model = skeleton(transformers.T5ForConditionalGeneration, t5().config, torch.float16)
    expected = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["encoder.block.0.layer.1.DenseReluDense.wo.weight"] is torch.float32
    assert dtypes == {name: parameter.dtype for name, parameter in expected.named_parameters()}


def test_the_dtype_of_the_checkpoint_where_the_config_names_none(folder):
    configure(folder, dtype=None)
    check_weights(folder)


@pytest.mark.parametrize("own", [True, False])
def test_the_defaults_of_generation(folder, own):
    """From generation_config.json, or else from config.json."""
    (folder / "generation_config.json").unlink()
    configure(folder, num_beams=3)
    if own:
        transformers.GenerationConfig(eos_token_id=5, max_new_tokens=3).save_pretrained(folder)
    config, kind = huggingface.architecture(folder)
    model = skeleton(kind, config, torch.bfloat16)
    load_generation_config(model, folder)
    assert (model.generation_config.eos_token_id, model.generation_config.num_beams) == ((5, None) if own else (1, 3))
    assert model.generation_config.to_dict() == kind.from_pretrained(folder).generation_config.to_dict()


# --- names -------------------------------------------------------------------------------------------------


def test_the_prefix_of_the_base_model_may_be_missing(folder):
    rewrite(folder, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    check_weights(folder)


@pytest.mark.parametrize("classes", [["LlamaModel"], None])
def test_the_prefix_of_the_base_model_may_be_too_much(folder, classes):
    configure(folder, architectures=classes)
    check_weights(folder)


def test_only_the_other_name_of_a_tied_weight(folder):
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors.pop("model.embed_tokens.weight")})
    assert check_weights(folder).tied == ("model.embed_tokens.weight",)


@pytest.mark.parametrize("change", [0, 1])
def test_both_names_of_a_tied_weight(folder, change):
    """Different values untie it, as in transformers."""
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + change})
    assert check_weights(folder).tied == ()


@pytest.mark.parametrize(
    "gone, named",
    [
        (["model.layers.0.mlp.up_proj.weight", "model.norm.weight"], r"layers\.0\.mlp\.up_proj.weight, model\.norm"),
        (["model.embed_tokens.weight"], r"lm_head\.weight, model\.embed_tokens\.weight"),
    ],
)
def test_missing_weights_are_named(folder, gone, named):
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in gone})
    with pytest.raises(WeightError, match=f"lacks weights of LlamaForCausalLM: .*{named}"):
        load(folder)


def test_unexpected_weights_are_one_warning(folder):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # left out without a word
    rewrite(folder, lambda tensors: tensors | old | {"model.extra.weight": torch.ones(2), "other": torch.ones(2)})
    fit = check_weights(folder)
    with pytest.warns(UserWarning, match=r"does not have.*: model\.extra\.weight, other") as warned:
        optimized = load(folder)
    assert len(warned) == 1 and optimized.loading_report.unexpected == fit.unexpected


def test_other_shapes_are_named(folder):
    configure(folder, intermediate_size=192)
    with pytest.raises(WeightError, match=r"layers\.0\.mlp\.down_proj\.weight \[64, 128\] instead of \[64, 192\]"):
        load(folder)


# --- what is loaded whole ----------------------------------------------------------------------------------


def test_checkpoints_that_transformers_converts(tmp_path):
    model, inputs = build("mixtral")
    model.save_pretrained(tmp_path)
    configure(tmp_path, experts_implementation="batched_mm")
    with pytest.warns(UserWarning, match="loaded whole .*: transformers converts its weights"):
        optimized = load(tmp_path)
    assert not optimized.loading_report.streamed
    check_near(optimized, model, **inputs)


def test_weights_that_the_model_computes(tmp_path):
    config = transformers.MarianConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = transformers.MarianMTModel(config).eval()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if "embed_positions" not in name})
    inputs = {"input_ids": ids(), "decoder_input_ids": ids(2, 5), "use_cache": False}
    with pytest.warns(UserWarning, match=r"leaves out .*embed_positions\.weight, which the model computes"):
        optimized = load(tmp_path)
    check_near(optimized, model, **inputs)


def test_tensors_that_the_code_makes(folder, monkeypatch):
    """A tensor of Python values on the device of x has none on meta."""
    forward = transformers.LlamaForCausalLM.forward

    def scaled(self, input_ids=None, use_cache=None, **kwargs):
        outputs = forward(self, input_ids=input_ids, use_cache=use_cache)
        outputs.logits = outputs.logits * torch.tensor([2.0], device=outputs.logits.device)
        return outputs

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", scaled)
    with pytest.warns(UserWarning, match="is loaded whole .* of Python values"):
        optimized = load(folder)
    check_near(optimized, transformers.LlamaForCausalLM.from_pretrained(folder), input_ids=ids(), use_cache=False)


# --- memory ------------------------------------------------------------------------------------------------


def test_one_weight_at_a_time(folder, monkeypatch):
    """While a weight is read, of those that were read before only the parts of the same linear are alive."""
    read, alive, most = Checkpoint.read, [], 0

    def counting(self, name):
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        tensor = read(self, name)
        copy = tensor.clone()
        if name.endswith("proj.weight"):
            alive.append(weakref.ref(copy))
        return copy

    def tensors():
        return [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]

    monkeypatch.setattr(Checkpoint, "read", counting)
    before = tensors()  # of other tests
    optimized = load(folder)
    assert len(alive) == 7 and most <= 2  # q and k, while v is read
    gc.collect()
    known = set(map(id, before))
    shapes = {(64, 64), (32, 64), (128, 64), (64, 128), (256, 64)}  # of linears, alone and merged
    floats = [t for t in tensors() if id(t) not in known and t.is_floating_point()]
    assert not [t.shape for t in floats if not t.is_meta and tuple(t.shape) in shapes]
    assert all(parameter.is_meta for parameter in optimized._model[0].parameters())


@pytest.mark.cuda
def test_the_gpu_holds_the_packed_model_and_one_layer(tmp_path):
    config = tiny_config(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="50MB")
    load(tmp_path, device="cuda")  # cuBLAS's workspace, caches
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimized = load(tmp_path, device="cuda")
    peak = torch.cuda.max_memory_allocated() - before
    packed = sum(t.nbytes for t in optimized.state_dict().values())
    assert peak < packed + 120 * 2**20  # gate and up together are 17 MB in bf16; packing works in fp32
    expected = load(tmp_path)(input_ids=ids(), use_cache=False).logits
    torch.testing.assert_close(
        optimized(input_ids=ids().cuda(), use_cache=False).logits.cpu(), expected, rtol=0.1, atol=0.1
    )


# --- later calls -------------------------------------------------------------------------------------------


def test_other_shapes_need_nothing_from_disk(folder):
    optimized = load(folder)
    shutil.rmtree(folder)
    assert optimized(input_ids=ids(1, 1), use_cache=False).logits.shape == (1, 1, 144)
    assert optimized(input_ids=ids(), use_cache=True).past_key_values.get_seq_length() == 12
    assert len(optimized._captures) == 3


def test_other_forms_are_read_again(folder):
    recipe = [Rule(Int8WeightOnly()), Rule(Int8WeightOnly(algorithm="mse"), shape="M <= 1", optional=True)]
    optimized = load(folder, recipe)
    before = list(optimized._store.packed)
    check_near(optimized, transformers.LlamaForCausalLM.from_pretrained(folder), input_ids=ids(1, 1), use_cache=False)
    assert len(optimized._store.packed) == 2 * len(before)


@pytest.mark.parametrize(
    "harm, why", [(lambda path: path.unlink(), "No such file"), (lambda path: path.touch(), "it has changed")]
)
def test_other_forms_need_the_folder(folder, harm, why):
    optimized = load(folder, [Rule(Int8WeightOnly(), shape="M <= 1", optional=True)])
    optimized._store.source.checkpoint.open = None, None
    harm(folder / "model.safetensors")
    with pytest.raises(WeightError, match=rf"q_proj\.weight cannot be read from .*model\.safetensors: .*{why}"):
        optimized(input_ids=ids(1, 1), use_cache=False)
    assert optimized(input_ids=ids(), use_cache=False).logits.isfinite().all()


# --- what cannot be loaded ---------------------------------------------------------------------------------


def test_nan_is_named(folder):
    def spoil(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
        return tensors

    rewrite(folder, spoil)
    with pytest.raises(WeightError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN or inf, first at \[3, 4\]"):
        load(folder)


def test_what_is_no_folder_with_a_model(folder, tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        load("meta-llama/Llama-3.1-8B")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no model that transformers can load"):
        load(tmp_path / "empty")
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="is quantized already, by gptq"):
        load(folder)
