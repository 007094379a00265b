import itertools
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from aograph.kernels.kv_cache import FP8, INT4, INT8

import aograph
from aograph import ArtifactError, InputError, archive, environment
from aograph.artifact import Gate, inspect, load, summary
from aograph.decoding import StaticRows, cache_shapes, run
from tests.models.zoo import MINI, ids


@pytest.fixture(scope="module")
def artifact(language_model):
    return load(language_model.path)


@pytest.fixture
def own(language_model):
    """An artifact that a test may change."""
    return load(language_model.path)


def greedy(model, input_ids, count, **more):
    more = {"attention_mask": torch.ones_like(input_ids), **more}
    return model.generate(input_ids, max_new_tokens=count, do_sample=False, **more)


def edited(path, folder, change):
    """A copy of an artifact whose metadata was changed by `change(about)`."""
    contents = archive.Archive(path)
    about = json.loads(contents.read(archive.ABOUT))
    change(about)
    files = {name: contents.read(name) for name in contents.records if name.split("/")[0] in ("data", "extra")}
    tensors = {entry.record: contents.tensor(entry) for entry in contents.index}
    archive.write(folder / "edited.pt2", {**files, archive.ABOUT: json.dumps(about).encode()}, tensors)
    return folder / "edited.pt2"


# --- what it computes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 12), (5, 3), (3, 40)])
def test_it_computes_what_the_module_in_memory_does(artifact, language_model, shape):
    inputs = {"input_ids": ids(*shape), "use_cache": False}
    expected = language_model.fast(**inputs).logits
    torch.testing.assert_close(artifact(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_few_tokens_in_bf16(few_tokens):
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    artifact = load(few_tokens.path)
    torch.testing.assert_close(artifact(x), few_tokens.fast(x), rtol=3e-2, atol=3e-2)
    kernels = {op: kernel for op, kernel, _ in artifact.about["graphs"]["forward"]["kernels"]}
    assert kernels["int8_linear"] == "aten"


def test_a_process_without_transformers(language_model):
    code = (
        "import sys, torch, aograph; artifact = aograph.load(sys.argv[1]);"
        "print(artifact.generate(torch.tensor([[5, 6, 7]]), 6).tolist());"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, language_model.path], capture_output=True, text=True)
    expected = greedy(language_model.reference, torch.tensor([[5, 6, 7]]), 6)
    assert done.returncode == 0 and json.loads(done.stdout) == expected.tolist(), done.stderr


def test_the_file_holds_the_packed_weights_once_and_nothing_else(language_model):
    contents = archive.Archive(language_model.path)
    packed = sum(tensor.nbytes for tensor in language_model.fast.state_dict().values())
    code = sum(size for name, (_, size, _) in contents.records.items() if name.startswith(archive.CODE))
    tokenizer = sum(size for name, (_, size, _) in contents.records.items() if name.startswith(archive.TOKENIZER))
    stored = sum(size for name, (_, size, _) in contents.records.items() if name.startswith("weights/"))
    assert stored == packed
    assert language_model.path.stat().st_size - code - tokenizer < 1.05 * packed
    mapped = language_model.path.read_bytes()
    for name, weight in language_model.model.named_parameters():
        if "proj" in name:
            assert weight.detach().numpy().tobytes() not in mapped, name
    assert all(offset % 64 == 0 for offset, _, _ in contents.records.values())


# --- generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, length", [(1, 1), (1, 9), (2, 5), (2, 30)])
def test_greedy_generation_is_that_of_transformers(artifact, language_model, batch, length):
    prompt = ids(batch, length)
    torch.testing.assert_close(artifact.generate(prompt, 14), greedy(language_model.reference, prompt, 14))


def test_prompts_padded_on_the_left(artifact, language_model):
    prompt, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :6] = 0
    expected = greedy(language_model.reference, prompt, 10, attention_mask=mask)
    torch.testing.assert_close(artifact.generate(prompt, 10, attention_mask=mask), expected)


def test_ended_rows_are_padded(artifact, language_model):
    prompt = ids(2, 4)
    free = artifact.generate(prompt, 12)
    end = int(free[0, 7])
    expected = greedy(language_model.reference, prompt, 12, eos_token_id=end, pad_token_id=end)
    torch.testing.assert_close(artifact.generate(prompt, 12, eos_token_id=end), expected)


def test_tokens_as_they_come(artifact):
    said = []
    tokens = artifact.generate(ids(2, 4), 5, on_token=lambda row, token: said.append((row, token)))
    assert said == [(row, int(tokens[row, 4 + i])) for i in range(5) for row in range(2)]


def test_sampling_with_a_seed(artifact):
    first, again, other = (
        artifact.generate(ids(2, 4), 12, do_sample=True, temperature=1.5, top_k=50, top_p=0.95, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_rows_at_their_own_positions(artifact, language_model):
    """What a server does: a prompt in parts, a row that joins later, a row that is used again."""
    a, b, c = ids(1, 9), ids(1, 4) + 300, ids(1, 1) + 9
    cache = artifact.new_cache()
    artifact.prefill(a[:, :5], cache, 0)
    new = [artifact.prefill(a[:, 5:], cache, 0, torch.arange(5, 9)[None]).argmax(-1), None]
    texts, places = [[int(new[0])], []], torch.tensor([[9], [0]])
    for step in range(9):
        if step == 3:
            texts[1].append(int(artifact.prefill(b, cache, 1).argmax(-1)))
            places[1] = 4
        if step == 6:
            first = texts[1]
            texts[1] = [int(artifact.prefill(c, cache, 1).argmax(-1))]
            places[1] = 1
        tokens = torch.tensor([[text[-1] if text else 0] for text in texts])
        logits = artifact.decode(tokens, places, cache)
        for row, text in enumerate(texts):
            if text:
                text.append(int(logits[row].argmax()))
                places[row] += 1
    reference = language_model.reference
    assert texts[0] == greedy(reference, a, 10)[0, 9:].tolist()
    assert first == greedy(reference, b, 4)[0, 4:].tolist()
    assert texts[1] == greedy(reference, c, 4)[0, 1:].tolist()


def test_a_step_writes_the_keys_and_values_of_its_tokens_only(artifact, language_model):
    cache = artifact.new_cache()
    for tensor in cache:
        tensor.normal_()
    before, addresses = [t.clone() for t in cache], [t.data_ptr() for t in cache]
    places = torch.tensor([[3], [17]])
    artifact.decode(torch.tensor([[5], [6]]), places, cache)
    assert [t.data_ptr() for t in cache] == addresses
    for old, new in zip(before, cache, strict=True):
        changed = (old != new).any(-1).any(1)  # [rows, S]
        assert changed.nonzero().tolist() == [[0, 3], [1, 17]]


# --- packed caches -----------------------------------------------------------------------------------------


FORMATS = (INT8, INT8), (INT4, FP8)  # of keys and values, by layer


class Rounded(StaticRows):
    """A cache of floats that holds what a packed one stands for."""

    def update(self, keys, values, layer, *_, **__):
        pairs = zip(FORMATS[layer], (keys, values), strict=True)
        return super().update(*(form.dequantize(*form.quantize(new), torch.float32) for form, new in pairs), layer)


class Reference:
    """The steps of an artifact, by the model that its packed weights stand for."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache

    @torch.no_grad()
    def step(self, tokens, positions, rows=slice(None)):
        cache = [tensor[rows] for tensor in self.cache]
        layers = list(zip(cache[::2], cache[1::2], strict=True))
        return run(self.model, tokens, positions, Rounded(layers, positions), self.cache[0].shape[2])

    def prefill(self, tokens, row):
        return self.step(tokens, torch.arange(tokens.shape[1])[None], slice(row, row + 1))


@pytest.fixture(scope="module")
def packed(packed_cache):
    return load(packed_cache.path)


@pytest.fixture
def reference(packed_cache):
    shapes = cache_shapes(packed_cache.reference, 45)
    return Reference(packed_cache.reference, [t for s in shapes for t in s.empty(2, 45, torch.device("cpu"))])


def close(found, expected, largest=2e-3):
    """A code may be another where two ways to round meet halfway."""
    assert (found - expected).norm() < largest * expected.norm()


def test_packed_caches_hold_what_is_rounded(packed, reference):
    cache = packed.new_cache()
    assert cache[2].data_ptr() % 64 == 0 and cache[1][1:].data_ptr() % 16, "rows of scales are not aligned"
    a, b = ids(1, 9), ids(1, 4) + 300
    found = [packed.prefill(a, cache, 0), packed.prefill(b, cache, 1)]
    expected = [reference.prefill(a, 0), reference.prefill(b, 1)]
    places = torch.tensor([[9], [4]])
    for _ in range(6):
        found, expected = torch.cat(found), torch.cat(expected)
        close(found, expected)
        tokens = expected.argmax(-1, keepdim=True)
        found, expected = [packed.decode(tokens, places, cache)], [reference.step(tokens, places)]
        places = places + 1
    pairs = zip(sum(FORMATS, ()), cache[::2], cache[1::2], strict=True)
    stored = [form.dequantize(codes, scales, torch.float32) for form, codes, scales in pairs]
    for mine, theirs in zip(stored, reference.cache, strict=True):
        close(mine, theirs)
        assert mine[0, :, :15].any() and not mine[0, :, 15:].any() and not mine[1, :, 10:].any()


def test_packed_caches_change_little(packed, packed_cache, reference):
    prompt = ids(2, 12)
    cache = packed.new_cache()
    found = torch.cat([packed.prefill(text[None], cache, row) for row, text in enumerate(prompt)])
    with torch.no_grad():
        expected = packed_cache.reference(prompt, use_cache=False).logits[:, -1]
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
    logits = torch.cat([reference.prefill(text[None], row) for row, text in enumerate(prompt)])
    for made in range(8):
        prompt = torch.cat([prompt, logits.argmax(-1, keepdim=True)], 1)
        logits = reference.step(prompt[:, -1:], torch.full((2, 1), 12 + made))
    assert torch.equal(packed.generate(prompt[:, :12], 8), prompt)


def test_many_tokens_of_a_prompt_are_not_rounded_to_each_other(packed, packed_cache):
    """It is the number of tokens in a call that decides, in one graph for all."""
    for tokens, rounded in ((17, False), (30, False), (16, True)):
        prompt = ids(1, tokens)
        with torch.no_grad():
            expected = packed_cache.reference(prompt, use_cache=False).logits[:, -1]
        found = packed.prefill(prompt, packed.new_cache(), 0)
        assert ((found - expected).norm() > 2e-4 * expected.norm()) == rounded


@pytest.mark.parametrize("chunk, parts", [(4, [4, 3, 2]), (5, [5, 4]), (8, [7, 2]), (9, [9])])
def test_a_prompt_in_parts(packed, chunk, parts, monkeypatch):
    whole, cut = packed.new_cache(), packed.new_cache()
    expected = packed.prefill(ids(1, 9), whole, 1)
    lengths, graph = [], packed.graphs["prefill"]
    monkeypatch.setattr("aograph.artifact.CHUNK", chunk)
    monkeypatch.setitem(packed.graphs, "prefill", SimpleNamespace(
        flat=lambda inputs: lengths.append(inputs[0].shape[1]) or graph.flat(inputs)))  # fmt: skip
    torch.testing.assert_close(packed.prefill(ids(1, 9), cut, 1), expected, rtol=1e-3, atol=1e-3)
    assert lengths == parts
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-3, atol=1e-6)  # scales of the first keys


def test_a_row_of_a_packed_cache_is_used_again(packed, reference):
    cache = packed.new_cache()
    packed.prefill(ids(1, 30) + 700, cache, 1)
    text = ids(1, 5)
    close(packed.prefill(text, cache, 1), reference.prefill(text, 1))
    tokens, places = torch.tensor([[0], [7]]), torch.tensor([[0], [5]])
    close(packed.decode(tokens, places, cache)[1], reference.step(tokens, places)[1])


def test_the_bytes_of_packed_caches(packed, packed_cache):
    of_token = 2 * (64 + 4 + 64 + 4) + 2 * (32 + 2 * 2 * 2 + 64 + 4)  # heads; codes and scales of keys and values
    assert packed.generation["cache_token_bytes"] == of_token
    assert sum(tensor.nbytes for tensor in packed.new_cache()) == 2 * 45 * of_token
    text = " ".join(summary(inspect(packed_cache.path)).split())
    assert f"int8 and int4 and fp8: {of_token} bytes a token, 43.9 KB for 2 × 45 tokens" in text


@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_positions_outside_of_packed_caches(packed, graph):
    rows = 1 if graph == "prefill" else 2
    tokens = torch.zeros(rows, 3 - rows, dtype=torch.int64)
    for wrong in (45, -1):
        with pytest.raises(InputError, match=f"positions holds {wrong}; the graph takes 0 to 44"):
            packed.graphs[graph].flat([tokens, torch.full_like(tokens, wrong), *packed.new_cache(rows)])


@pytest.mark.parametrize(
    "how, message",
    [
        (lambda a: a.generate(ids(3, 4), 2), "B from 1 to 2"),
        (lambda a: a.generate(ids(1, 40), 9), "together at most 48"),
        (lambda a: a.generate(ids(1, 4), 0), "max_new_tokens = 0"),
        (lambda a: a.generate(ids(1, 4).int(), 2), "expected int64"),
        (lambda a: a.generate(ids(1, 4), 2, attention_mask=torch.tensor([[1, 0, 1, 1]])), "on the left"),
        (lambda a: a.generate(ids(1, 4), 2, attention_mask=torch.zeros(1, 4)), "0 to 0 tokens"),
        (lambda a: a.generate(ids(1, 4), 2, attention_mask=torch.ones(1, 5)), "attention_mask is"),
        (lambda a: a.generate(ids(1, 4), 2, do_sample=True, temperature=0.0), "temperature"),
        (lambda a: a.generate(ids(1, 4), 2, do_sample=True, top_k=0), "top_k"),
        (lambda a: a.generate(ids(1, 4), 2, do_sample=True, top_p=1.5), "top_p"),
        (lambda a: a.prefill(ids(1, 49), a.new_cache()), "places 0 to 47"),
        (lambda a: a.prefill(ids(2, 4), a.new_cache()), r"input_ids.shape\[0\] is 2"),
        (lambda a: a.decode(ids(2, 1), torch.tensor([[0], [-1]]), a.new_cache()), "places 0 to 47"),
        (lambda a: a.decode(ids(2, 1), ids(2, 1) * 0, a.new_cache(1)), r"key_0.shape\[0\] is 1"),
        (lambda a: a.decode(ids(2, 1), ids(2, 1) * 0, [t.half() for t in a.new_cache()]), "key_0 is float16"),
        (lambda a: a.decode(ids(2, 1), ids(2, 1) * 0, [t.mT.contiguous().mT for t in a.new_cache()]), "contiguous"),
        (lambda a: a.generate(torch.tensor([[5, 4096]]), 2), "input_ids holds 4096; the graph takes 0 to 4095"),
        (lambda a: a.generate(torch.tensor([[-1]]), 2), "input_ids holds -1"),
        (lambda a: a.decode(ids(2, 1) + 5000, ids(2, 1) * 0, a.new_cache()), "input_ids holds"),
        (lambda a: a(input_ids=ids() + 4090, use_cache=False), "input_ids holds"),
        (lambda a: a(ids()), "was saved with"),
        (lambda a: a(input_ids=ids(), use_cache=True), "use_cache is True"),
        (lambda a: a(input_ids=ids(1, 4), use_cache=False), "compiled for 2 to any"),
        (lambda a: a(input_ids=ids().float(), use_cache=False), "input_ids is float32"),
        (lambda a: a(input_ids=ids()[0], use_cache=False), "input_ids is int64"),
        (lambda a: a(input_ids=ids().to("meta"), use_cache=False), "on meta"),
        (lambda a: a(input_ids=[1, 2], use_cache=False), "was saved with"),
        (lambda a: a(input_ids="text", use_cache=False), "'text'"),
    ],
)
def test_inputs_that_do_not_fit(artifact, how, message):
    with pytest.raises(InputError, match=message):
        how(artifact)


def test_inputs_of_any_strides(artifact):
    wide = ids(2, 24)
    expected = artifact(input_ids=wide[:, ::2].contiguous(), use_cache=False).logits
    torch.testing.assert_close(artifact(input_ids=wide[:, ::2], use_cache=False).logits, expected)


def test_what_is_no_language_model(few_tokens):
    with pytest.raises(InputError, match="no graphs prefill and decode: MLP is no language model"):
        load(few_tokens.path).generate(ids(1, 3), 2)


def test_the_tokenizer(artifact, tmp_path):
    transformers = pytest.importorskip("transformers")
    artifact.extract_tokenizer(tmp_path)
    found, expected = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (tmp_path, MINI))
    assert found("Once upon a time").input_ids == expected("Once upon a time").input_ids


# --- new weights -------------------------------------------------------------------------------------------


def scaled(model, factor):
    return {name: tensor.detach() * factor for name, tensor in model.state_dict().items()}


def test_new_weights_are_packed_as_at_save(packed_cache):
    """Those of each layer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    own, new = load(packed_cache.path), transformers.AutoModelForCausalLM.from_config(packed_cache.model.config).eval()
    inputs = {"input_ids": ids(), "use_cache": False}
    assert own.update_weights(new.state_dict()) == len(own.about["packs"])
    expected = aograph.optimize(new, packed_cache.fast.recipe, inputs, compile=False)
    torch.testing.assert_close(own(**inputs).logits, expected(**inputs).logits, rtol=1e-4, atol=1e-4)
    own.update_weights(packed_cache.model.state_dict())
    torch.testing.assert_close(own(**inputs).logits, packed_cache.fast(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_a_part_of_the_weights(own, language_model):
    name = "model.layers.0.mlp.down_proj.weight"
    before = own.generate(ids(1, 5), 8)
    assert own.update_weights({name: -language_model.model.get_parameter(name)}) == 1
    assert not torch.equal(own.generate(ids(1, 5), 8), before)
    own.update_weights({name: language_model.model.get_parameter(name)})
    assert torch.equal(own.generate(ids(1, 5), 8), before)


def test_weights_that_are_not_packed(own, language_model):
    name = "model.norm.weight"
    inputs = {"input_ids": ids(), "use_cache": False}
    before = own(**inputs).logits
    assert own.update_weights({name: 2 * language_model.model.get_parameter(name)}) == 0
    torch.testing.assert_close(own(**inputs).logits, 2 * before)


ATTENTION = "model.layers.0.self_attn.{}_proj.weight"


@pytest.mark.parametrize(
    "state, message",
    [
        ({"model.norm.wait": torch.ones(256)}, "did you mean 'model.norm.weight'"),
        ({"model.norm.weight": torch.ones(255)}, r"is float32 \[255\]; expected float32 \[256\]"),
        ({"model.norm.weight": torch.ones(256).half()}, "is float16"),
        ({"model.norm.weight": torch.full((256,), torch.nan)}, "NaN"),
        ({"model.norm.weight": torch.ones(256, device="meta")}, "on meta"),
        ({"model.norm.weight": [1.0]}, "is a list"),
        ({ATTENTION.format("q"): torch.ones(256, 256)}, "packed together with .*k_proj.*v_proj"),
        (
            {"lm_head.weight": torch.ones(4096, 256), "model.embed_tokens.weight": torch.zeros(4096, 256)},
            "tied",
        ),
    ],
)
def test_weights_that_do_not_fit_change_nothing(own, state, message):
    before = own(input_ids=ids(), use_cache=False).logits
    good = {"model.layers.0.mlp.down_proj.weight": torch.ones(256, 768)}
    for each in (state, {**good, **state}):
        with pytest.raises(InputError, match=message):
            own.update_weights(each)
    assert torch.equal(own(input_ids=ids(), use_cache=False).logits, before)


def test_threads_and_an_update_between_them(own, language_model):
    prompts = [ids(1, length) for length in range(3, 11)]
    states = [scaled(language_model.model, 1), scaled(language_model.model, -0.5)]
    states = [{name: t for name, t in state.items() if "0.mlp.down_proj" in name or "norm" in name} for state in states]
    allowed = []
    for state in states:
        own.update_weights(state)
        allowed.append([own.generate(prompt, 6) for prompt in prompts])
    assert not torch.equal(allowed[0][0], allowed[1][0])
    done = threading.Event()

    def flip():
        for count in range(4):
            own.update_weights(states[count % 2])
        done.set()

    def ask(start):
        found = []
        for i in itertools.count(start):
            found.append((i % 8, own.generate(prompts[i % 8], 6)))
            if done.is_set():
                return found

    with ThreadPoolExecutor(4) as pool:
        flips = pool.submit(flip)
        results = [result for found in pool.map(ask, range(3)) for result in found]
    flips.result()
    for i, found in results:
        assert any(torch.equal(found, sets[i]) for sets in allowed), i


def test_a_change_waits_for_calls_and_calls_for_a_change():
    gate, order = Gate(), []
    started = threading.Event()

    def change():
        started.set()
        with gate.change():
            order.append("change")

    def call():
        with gate.call():
            order.append("call")

    with gate.call():
        threads = [threading.Thread(target=change)]
        threads[0].start()
        started.wait()
        while not gate.changes:
            pass
        threads.append(threading.Thread(target=call))
        threads[1].start()
        order.append("first call")
    for thread in threads:
        thread.join()
    assert order == ["first call", "change", "call"]


# --- files and machines that do not fit --------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("torch", "99.1.0", "torch here is .*; it needs 99.1.0 or newer"),
        ("system", "Plan9", "it needs Plan9"),
        ("machine", "m68k", "m68k"),
        ("instructions", ["avx9"], "the processor here lacks avx9"),
    ],
)
def test_a_machine_that_does_not_fit(language_model, tmp_path, key, value, message):
    path = edited(language_model.path, tmp_path, lambda about: about["environment"].update({key: value}))
    with pytest.raises(ArtifactError, match=message):
        load(path)


def test_all_that_does_not_fit_is_named(language_model, tmp_path):
    def change(about):
        about["environment"] |= {"torch": "99.0", "device": "cuda", "architecture": "sm_999", "gpu": "Z1"}

    with pytest.raises(ArtifactError, match=r"99\.0.*sm_999"):
        load(edited(language_model.path, tmp_path, change))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda about: about.update(format=99), "has the format 99"),
        (lambda about: about["ops"].update(int4_linear=9), "no op int4_linear"),
        (lambda about: about["graphs"]["forward"].update(outside=["int2_linear"]), "no op int2_linear"),
        (lambda about: about["graphs"].update(more=about["graphs"]["forward"]), "code for the graphs"),
        (lambda about: about.pop("graphs"), "cannot be read"),
    ],
)
def test_metadata_that_does_not_fit(language_model, tmp_path, change, message):
    with pytest.raises(ArtifactError, match=message):
        load(edited(language_model.path, tmp_path, change))


def test_another_device(language_model):
    with pytest.raises(ArtifactError, match="compiled for cpu, not for cuda"):
        load(language_model.path, device="cuda")


def test_damage_is_found_before_any_code_runs(language_model, tmp_path):
    whole = language_model.path.read_bytes()
    contents = archive.Archive(language_model.path)
    code = next(n for n in contents.records if n.endswith(".so"))
    for name in (archive.ABOUT, archive.INDEX, code, "weights/3", archive.TOKENIZER + "tokenizer.json"):
        offset, size, _ = contents.records[name]
        broken = bytearray(whole)
        broken[offset + size // 2] ^= 0x10
        (tmp_path / "broken.pt2").write_bytes(broken)
        with pytest.raises(ArtifactError, match=name):
            load(tmp_path / "broken.pt2")


def test_unchecked_weights(language_model, tmp_path):
    offset, size, _ = archive.Archive(language_model.path).records["weights/3"]
    broken = bytearray(language_model.path.read_bytes())
    broken[offset + size - 1] ^= 1
    (tmp_path / "broken.pt2").write_bytes(broken)
    assert load(tmp_path / "broken.pt2", check=False).graphs.keys() == {"forward", "prefill", "decode"}


def test_a_planted_pickle_is_not_opened(few_tokens, tmp_path):
    """Wherever torch keeps pickles in archives of its own."""
    trap = tmp_path / "sprung"
    pickle = f"cbuiltins\neval\n(Vopen({str(trap)!r}, 'w')\ntR.".encode()
    contents = archive.Archive(few_tokens.path)
    files = {name: contents.read(name) for name in contents.records if name.split("/")[0] in ("data", "extra")}
    for name in ("data.pkl", "data/constants/model.pt", "data/weights/weight_0", "data/sample_inputs/model.pt"):
        files[name] = pickle
    tensors = {entry.record: contents.tensor(entry) for entry in contents.index}
    archive.write(tmp_path / "planted.pt2", files, tensors)
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    assert torch.equal(load(tmp_path / "planted.pt2")(x), load(few_tokens.path)(x))
    assert not trap.exists()


def test_writes_to_mapped_weights_stay_in_the_process(few_tokens, tmp_path):
    path = shutil.copy(few_tokens.path, tmp_path / "copy.pt2")
    before = path.read_bytes()
    artifact = load(path)
    for tensor in artifact._tensors.values():
        tensor.zero_()
    assert path.read_bytes() == before


def test_the_environment_is_that_of_this_machine(artifact):
    assert artifact.environment == environment.describe(torch.device("cpu"))
    assert "[[rule]]" in artifact.recipe and artifact.report["rows"]
    assert len(artifact.about["recipe_sha256"]) == 64


def test_a_cache_of_the_caller_is_what_models_see():
    layers = [[torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4, 3)]]
    keys, values = StaticRows(layers, torch.tensor([[2, 3]])).update(torch.ones(1, 2, 2, 3), torch.ones(1, 2, 2, 3), 0)
    assert keys is layers[0][0] and values[0, 0, :, 0].tolist() == [0, 0, 1, 1]
