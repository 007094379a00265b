import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aograph import (
    InputError,
    LinearStatistics,
    Recipe,
    RecipeError,
    Rule,
    WeightError,
    checkpoint,
    load_pretrained,
    optimize,
    statistics,
)
from aograph.checkpoint import Checkpoint, Contents, divide, host, save, write_weights
from aograph.schemes import Int8WeightOnly
from tests.models.zoo import ids
from tests.small_models import MLP

transformers = pytest.importorskip("transformers")


def load(folder, recipe=None, **options):
    return load_pretrained(folder, recipe, compile=False, **options)


# --- reading -----------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Two files with an index: a and b, c and d."""
    tensors = {name: torch.randn(4, i + 1) for i, name in enumerate("abcd")}
    save_file({name: tensors[name] for name in "ab"}, tmp_path / "one.safetensors")
    save_file({name: tensors[name] for name in "cd"}, tmp_path / "two.safetensors")
    index = {"weight_map": {n: "one.safetensors" if n in "ab" else "two.safetensors" for n in "abcd"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path, tensors


def test_shards(shards):
    folder, tensors = shards
    found = Checkpoint(folder)
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in "adbc":
        assert torch.equal(found.read(name), tensors[name])
        assert found.open[0] == found.shards[name]  # the only one


def test_one_file_goes_before_an_index(shards):
    folder, _ = shards
    save_file({"e": torch.ones(3)}, folder / "model.safetensors")
    assert Checkpoint(folder).shards == {"e": folder / "model.safetensors"}


def test_a_missing_shard(shards):
    (shards[0] / "two.safetensors").unlink()
    with pytest.raises(InputError, match=r"index\.json names files that are not there: two\.safetensors"):
        Checkpoint(shards[0])


@pytest.mark.parametrize("size", [0, 4, 60, -1])
def test_a_broken_shard(shards, size):
    path = shards[0] / "two.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"two\.safetensors is no whole safetensors file"):
        Checkpoint(shards[0])


def test_an_index_that_names_absent_tensors(shards):
    folder, tensors = shards
    save_file({"d": tensors["d"]}, folder / "two.safetensors")
    with pytest.raises(InputError, match=r"puts the tensor c into two\.safetensors, where it is not"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
def test_a_broken_index(shards, text):
    (shards[0] / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json is no index"):
        Checkpoint(shards[0])


def test_only_pickles(tmp_path):
    with pytest.raises(InputError, match=r"holds no model\.safetensors and no model\.safetensors\.index\.json$"):
        Checkpoint(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pytorch_model\.bin: .* convert them once with .*save_pretrained"):
        Checkpoint(tmp_path)


# --- writing and reading back ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a Llama of one layer in bf16, and a tokenizer's file."""
    folder = tmp_path_factory.mktemp("original")
    config = transformers.LlamaConfig(
        vocab_size=144, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not for serving")
    return folder


@pytest.fixture(scope="module")
def optimized(original):
    """Packed in two schemes."""
    return load(original, "int4wo(group_size=32) + lm_head:int8wo")


@pytest.fixture
def packed(optimized, tmp_path):
    save(optimized, tmp_path / "packed", shard_bytes=10_000)
    return tmp_path / "packed"


def check_same(one, other):
    state, expected = one.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))  # torch compares no float8


def test_what_is_written(packed, original):
    files = {path.name for path in packed.iterdir()}
    count = len([name for name in files if name.startswith("packed-")])
    assert count > 2 and files - {f"packed-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)} == {
        "config.json", "generation_config.json", "tokenizer.json", "packed.safetensors.index.json",
    }  # fmt: skip
    names = Checkpoint(packed, "packed").shards.keys()
    assert not names & Checkpoint(original).shards.keys() - {
        "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }  # fmt: skip


def test_bit_for_bit(optimized, packed):
    again = load(packed)
    check_same(again, optimized)
    assert again.recipe == optimized.recipe and str(again.report) == str(optimized.report)
    inputs = {"input_ids": ids(3, 7), "use_cache": False}
    assert torch.equal(again(**inputs).logits, optimized(**inputs).logits)


def test_in_another_process(optimized, packed, tmp_path):
    code = (
        "import sys, torch, aograph\n"
        "aograph.weights.Pack.run = None  # nothing is packed again\n"
        "optimized = aograph.load_pretrained(sys.argv[1], compile=False)\n"
        "torch.save(dict(optimized.state_dict()), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(packed), str(tmp_path / "state.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "state.pt")
    expected = optimized.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_a_model_that_was_loaded_by_transformers(original, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(original).eval()
    inputs = {"input_ids": ids(), "use_cache": False}
    optimized = optimize(model, "int8wo", inputs, compile=False, disable=["merge_linears"])
    optimized.save_pretrained(tmp_path / "packed")
    assert (tmp_path / "packed" / "tokenizer.json").is_file()
    again = load(tmp_path / "packed")
    check_same(again, optimized)
    assert torch.equal(again(**inputs).logits, optimized(**inputs).logits)


def test_int8_in_groups(original, tmp_path):
    optimized = load(original, "int8wo(group_size=32)")
    optimized.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert again.recipe == optimized.recipe and str(again.report) == str(optimized.report)
    assert all(tensor.dim() == 2 for name, tensor in again.state_dict().items() if name.endswith("_scale"))
    check_same(again, optimized)


def test_float8(original, tmp_path):
    optimized = load(original, "float8dq")
    optimized.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert again.recipe == optimized.recipe and str(again.report) == str(optimized.report)
    assert torch.float8_e4m3fn in {tensor.dtype for tensor in again.state_dict().values()}
    check_same(again, optimized)
    inputs = {"input_ids": ids(3, 7), "use_cache": False}
    assert torch.equal(again(**inputs).logits, optimized(**inputs).logits)


def test_the_recipe_may_be_given_again(packed):
    assert load(packed, "int4wo(group_size=32) + lm_head:int8wo").report
    with pytest.raises(InputError, match=r"is packed by the recipe .*group_size=32.*, not '→ int8wo'"):
        load(packed, "int8wo")


def test_a_calibrated_recipe_keeps_its_statistics(original, tmp_path):
    found = {"lm_head.weight": LinearStatistics(-1.5, 2.0, torch.rand(64), 7)}
    recipe = dataclasses.replace(Recipe.of("int8wo"), statistics=found)
    packed, path = tmp_path / "packed", tmp_path / "packed" / "packed.statistics.safetensors"
    load(original, recipe).save_pretrained(packed)
    again = load(packed)
    assert again.recipe == load(packed, "int8wo").recipe == load(packed, recipe).recipe == recipe
    again.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").recipe == recipe
    other = {"lm_head.weight": LinearStatistics(-1.5, 3.0, torch.rand(64), 7)}
    with pytest.raises(InputError, match="is packed by the recipe"):
        load(packed, dataclasses.replace(recipe, statistics=other))
    statistics.write(path, other)
    with pytest.raises(InputError, match=r"was not saved with the statistics in its packed\.statistics\.safetensors"):
        load(packed)
    path.unlink()
    with pytest.raises(RecipeError, match=r"packed\.statistics\.safetensors cannot be read"):
        load(packed)


def test_another_dtype(packed):
    with pytest.raises(InputError, match=r"is packed in torch\.bfloat16, not torch\.float32"):
        load(packed, dtype=torch.float32)


def test_plain_transformers_refuses(packed):
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(packed)


def test_forms_that_a_packed_folder_does_not_hold(original, tmp_path):
    recipe = [Rule(Int8WeightOnly()), Rule(Int8WeightOnly(algorithm="mse"), shape="M <= 1", optional=True)]
    load(original, recipe).save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    with pytest.raises(WeightError, match=r"does not hold the tensor .*q_proj\.weight .* from the original checkpoint"):
        again(input_ids=ids(1, 1), use_cache=False)
    assert again(input_ids=ids(), use_cache=False).logits.isfinite().all()


# --- folders of other versions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 99, "package": "9.9"}, r"packed in format 99 by aograph 9\.9; this aograph reads format 1"),
        ({"ops": {"int4_linear": 7}}, "for version 7 of int4_linear, and this aograph knows version 1"),
        ({"ops": {"int2_linear": 1}}, "for version 1 of int2_linear, and this aograph does not know that op"),
        ({"kept": {"a": "a"}}, "lacks the tensors a"),
        ({"packs": None}, "holds no packed weights of aograph"),
        ({"surplus": 1}, "holds no packed weights of aograph"),
    ],
)
def test_other_contents(optimized, tmp_path, change, message):
    write_weights(optimized, tmp_path, checkpoint.SHARD)
    path = tmp_path / "packed.safetensors"
    with safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["aograph"])
    assert dataclasses.asdict(Contents.of(Checkpoint(tmp_path, "packed"))) == fields
    save_file(load_file(path), path, {"aograph": json.dumps(fields | change)})
    with pytest.raises(InputError, match=message):
        Contents.of(Checkpoint(tmp_path, "packed"))


def test_shards_of_two_saves(packed):
    path = sorted(packed.glob("packed-*"))[-1]
    with safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["aograph"])
    save_file(load_file(path), path, {"aograph": json.dumps(fields | {"recipe": "other"})})
    with pytest.raises(InputError, match="was not written together with the other files"):
        load(packed)


# --- what is not overwritten -------------------------------------------------------------------------------


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_packed_folder_is_replaced(optimized, packed):
    (packed / "vocab.txt").write_text("of the old one")
    save(optimized, packed)
    assert (packed / "packed.safetensors").is_file()
    assert not list(packed.glob("packed-*")) and not (packed / "vocab.txt").exists()
    assert [path.name for path in packed.parent.iterdir()] == ["packed"]


def test_an_empty_folder_is_filled(optimized, tmp_path):
    save(optimized, tmp_path)
    assert (tmp_path / "packed.safetensors").is_file()


@pytest.mark.parametrize("step", ["save_file", "write_settings", "replace_folder"])
def test_a_failure_leaves_the_old_folder(optimized, packed, monkeypatch, step):
    before = snapshot(packed)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, step, full)
    with pytest.raises(InputError, match="cannot be written: No space left on device; what was there before is unch"):
        save(optimized, packed)
    assert snapshot(packed) == before and [path.name for path in packed.parent.iterdir()] == ["packed"]


def test_folders_of_others_are_left_alone(optimized, packed, original, tmp_path):
    before = snapshot(original)
    with pytest.raises(InputError, match=r"holds model\.safetensors, notes\.txt, which was not written by saving"):
        save(optimized, original)
    (packed / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"holds README\.md, which was not written by saving"):
        save(optimized, packed)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file: give a folder"):
        save(optimized, tmp_path / "file")
    assert snapshot(original) == before


def test_the_folder_that_a_model_came_from(optimized, packed):
    again = load(packed)
    with pytest.raises(InputError, match="is where the model was loaded from"):
        again.save_pretrained(packed)


def test_what_cannot_be_saved(original, tmp_path):
    with pytest.raises(InputError, match="MLP is no model of transformers"):
        save(optimize(MLP().eval(), "int8wo", torch.randn(2, 64), compile=False), tmp_path / "packed")
    model = transformers.LlamaForCausalLM.from_pretrained(original)
    with pytest.raises(InputError, match="nothing is packed before the first call"):
        save(optimize(model, "int8wo", compile=False), tmp_path / "packed")
    assert not list(tmp_path.iterdir())


# --- parts -------------------------------------------------------------------------------------------------


def test_division_into_shards():
    assert divide({"a": 3, "b": 4, "c": 4, "d": 20, "e": 1}, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert divide({"a": 9}, 8) == [["a"]]


def test_views_are_written_alone():
    whole = torch.randn(4, 4)
    for view in (whole[1:], whole.T, whole[:, 1]):
        assert torch.equal(host(view), view) and host(view).untyped_storage().nbytes() == view.nbytes
    assert host(whole) is not None and host(whole).data_ptr() == whole.data_ptr()
