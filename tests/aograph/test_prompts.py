"""Long prompts through packed caches: in chunks, and without a mask of all tokens by all positions."""

import pytest
import torch
from aograph.kernels import kv_attention as attention_module
from aograph.kernels.kv_attention import kv_attention
from aograph.kernels.op import OPS
from torch.utils._python_dispatch import TorchDispatchMode

from aograph import InputError, optimize
from tests.models.zoo import build, ids

transformers = pytest.importorskip("transformers")
from aograph.generation import ROOM  # noqa: E402
from aograph.packed_cache import PackedCache  # noqa: E402

T = 40
CLOSE = 1e-4  # of logits, in fp32: products of other shapes add up in another order, and a code may tip;
CLOSE_BY_CHANNEL = 0.05  # and tokens of a chunk see their block of 64 keys as it is, before it is quantized


@pytest.fixture(scope="module")
def mini():
    return build("llama_with_cache", layers=1)[0]


@pytest.fixture(scope="module", params=["kv8", "kv4"])
def fast(mini, request):
    return optimize(mini, request.param, compile=False)


@pytest.fixture
def rounded(monkeypatch):
    """All tokens read themselves back from the cache, so that chunks of any size see the same."""
    monkeypatch.setattr(attention_module, "FEW", ROOM)


def prompts(padded, length=T):
    tokens = ids(2, length, 4096)
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :11] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def generated(model, **options):
    """(tokens, logits [steps, B, V]) of a greedy generate."""
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "disable_compile": True}
    found = model.generate(**how | options, return_dict_in_generate=True, output_logits=True)
    return found.sequences, torch.stack(found.logits)


def assert_same(found, expected, tolerance=CLOSE):
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).norm() <= tolerance * expected[1].norm()


def calls(model, monkeypatch):
    """How many tokens each forward takes, as they happen."""
    found, forward = [], type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, **given: found.append(given["input_ids"].shape[1]) or forward(self, **given),
    )
    return found


@pytest.mark.parametrize(
    "chunk, parts, padded",
    [(16, [16, 16, 8], False), (13, [13, 13, 12, 2], True), (39, [38, 2], True), (1, [1] * T, False)],
)
def test_chunks_give_what_the_whole_gives(mini, fast, padded, chunk, parts, rounded, monkeypatch):
    expected = generated(fast, **prompts(padded))
    plain = generated(mini, **prompts(padded))[1]
    assert 0 < (expected[1][0] - plain[0]).norm() < 0.1 * plain[0].norm()
    lengths = calls(fast, monkeypatch)
    assert_same(generated(fast, **prompts(padded), prefill_chunk_size=chunk), expected)
    assert lengths == parts + [1] * 3
    assert fast._count <= 4  # with a mask and without, for a prompt and for one token


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_of_a_chunk_are_not_rounded_to_each_other(mini, padded, monkeypatch):
    """A whole prompt is as without a packed cache; chunks are nearer to that than if all tokens were rounded."""
    fast = optimize(mini, "kv4(keys=token)", compile=False)
    (plain, *_), error = generated(mini, **prompts(padded), max_new_tokens=1)[1], {}
    for few in (attention_module.FEW, ROOM):
        monkeypatch.setattr(attention_module, "FEW", few)
        for chunk in (T, 20):
            (logits, *_) = generated(fast, **prompts(padded), max_new_tokens=1, prefill_chunk_size=chunk)[1]
            error[few, chunk] = (logits - plain).norm() / plain.norm()
    assert error[16, T] < CLOSE < error[16, 20] < 0.9 * error[ROOM, 20]


def test_a_step_of_one_token_knows_nothing_of_it(fast):
    generated(fast, **prompts(False))
    given = {}
    for _, capture, _ in fast._captures.values():
        for node in capture.program.graph.find_nodes(op="call_function", target=kv_attention.overload):
            single = str(node.args[0].meta["val"].shape[2]) == "1"
            given.setdefault(single, []).append(node.args[14:])
    assert given[True] and not any(given[True])
    assert given[False] and all(len(fresh) == 3 and None not in fresh for fresh in given[False])


def test_who_says_how_long_a_chunk_is(fast, monkeypatch):
    lengths = calls(fast, monkeypatch)
    generated(fast, **prompts(False), max_new_tokens=1)
    config = transformers.GenerationConfig(prefill_chunk_size=32)
    generated(fast, **prompts(False), max_new_tokens=1, generation_config=config)
    assert config.prefill_chunk_size == 32
    monkeypatch.setattr("aograph.prompts.CHUNK", 20)
    generated(fast, **prompts(False), max_new_tokens=1)
    generated(fast, **prompts(False, 20), max_new_tokens=1)
    assert lengths == [T, 32, 8, 20, 20, 20]
    with pytest.raises(InputError, match="prefill_chunk_size is 0: it must be at least 1"):
        generated(fast, **prompts(False), prefill_chunk_size=0)


def test_what_is_asked_for_of_all_tokens_is_not_cut(fast, monkeypatch):
    lengths = calls(fast, monkeypatch)
    found = fast.generate(
        **prompts(False), prefill_chunk_size=16, max_new_tokens=2, output_hidden_states=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert lengths == [T, 1] and found.hidden_states[0][-1].shape[1] == T


@pytest.mark.parametrize("padded", [False, True])
def test_a_text_that_goes_on(fast, padded, rounded, monkeypatch):
    """Over several calls, each with the whole text so far; what is new is a prompt in chunks again."""
    texts = prompts(padded, 2 * T)

    def conversation(**options):
        cache, found = PackedCache(fast, batch_size=2, max_cache_len=ROOM), []
        text, mask = (texts[name][:, :T] for name in ("input_ids", "attention_mask"))
        for turn in (1, 2):
            found.append(generated(fast, input_ids=text, attention_mask=mask, past_key_values=cache, **options))
            more = texts["input_ids"][:, T * turn : T * turn + 25]
            text = torch.cat([found[-1][0], more], 1)
            mask = torch.cat([mask, mask.new_ones(2, text.shape[1] - mask.shape[1])], 1)
        return found

    expected = conversation()
    lengths = calls(fast, monkeypatch)
    for found, wanted in zip(conversation(prefill_chunk_size=16), expected, strict=True):
        by_channel = fast.report.caches[0].scheme == "kv4"
        assert_same(found, wanted, CLOSE_BY_CHANNEL if by_channel else CLOSE)
    assert lengths == [16, 16, 8, 1, 1, 1, 16, 10, 1, 1, 1]


class Sizes(TorchDispatchMode):
    """The most elements that an operator gives, those within our own included, and the lengths of activations."""

    def __init__(self):
        super().__init__()
        self.lengths, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aograph":
            with self:
                return OPS[function._schema.name.split("::")[1]].run(*args, **kwargs or {})
        found = function(*args, **kwargs or {})
        for each in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(each, torch.Tensor) and not function.is_view:
                self.largest = max(self.largest, each.numel())
                if each.ndim == 3 and each.is_floating_point() and each.numel():
                    self.lengths.add(each.shape[1])
        return found


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_is_as_large_as_tokens_by_positions(mini, padded):
    """Nor is any activation as long as the prompt, as those of the whole at once are."""
    length, room = 600, 768
    found = optimize(mini, "kv8", compile=False)
    found._longest = room
    options = prompts(padded, length) | {"max_new_tokens": 2, "eos_token_id": None, "pad_token_id": 0}
    found.generate(**options)  # captures
    with torch.no_grad(), Sizes() as chunks:
        found.generate(**options, prefill_chunk_size=64)
    assert chunks.largest < length * room and length not in chunks.lengths and 64 in chunks.lengths
    with torch.no_grad(), Sizes() as whole:
        found.generate(**options)
    assert whole.largest > length * room and length in whole.lengths
