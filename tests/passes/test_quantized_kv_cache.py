import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels.kv_cache import INT8
from aograph.passes import Stage
from torch import nn

import aograph
from aograph import KV4, InputError, WeightError, pipeline
from aograph.recipe import Recipe
from tests.programs import apply, find, operators, program_of, up_to

B, H, S, D = 2, 2, 32, 16


def index_copy(cache, new, positions):
    cache.index_copy_(2, positions, new)


def index_put(cache, new, positions):
    cache[:, :, positions] = new


def at_rows(cache, new, positions):
    rows = torch.arange(new.shape[0])[:, None]
    cache[rows, :, positions[None].expand(new.shape[0], -1)] = new.transpose(1, 2)


def scatter(cache, new, positions):
    cache.scatter_(2, positions[None, None, :, None].expand_as(new), new)


def from_item(copy):
    def update(cache, new, positions):
        start = positions[0].item()
        torch._check(start >= 0)
        torch._check(start + new.shape[2] <= cache.shape[2])
        copy(cache, start, new)

    return update


def into_slice(cache, start, new):
    cache[:, :, start : start + new.shape[2]] = new


UPDATES = {
    "index_copy_": index_copy,
    "index_put_": index_put,
    "rows": at_rows,
    "scatter_": scatter,
    "slice": from_item(into_slice),
    "narrow": from_item(lambda cache, start, new: cache.narrow(2, start, new.shape[2]).copy_(new)),
}


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask)


def repeat_kv(x, n):
    rows, heads, length, size = x.shape
    return x[:, :, None].expand(rows, heads, n, length, size).reshape(rows, heads * n, length, size)


def grouped(attention, repeat):
    return lambda q, k, v, mask: attention(q, *(repeat(x, q.shape[1] // x.shape[1]) for x in (k, v)), mask)


def by_softmax(masked, softcap=None, dtype=None):
    def attention(q, k, v, mask):
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        return masked(scores, mask).softmax(-1, dtype).to(q.dtype) @ v

    return attention


def added(scores, mask):
    return scores + torch.where(mask, 0.0, -torch.inf).to(scores.dtype)


MASKED = {
    "masked_fill": lambda scores, mask: scores.masked_fill(~mask, -torch.inf),
    "masked_fill of zeros": lambda scores, mask: scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min),
    "where": lambda scores, mask: torch.where(mask, scores, -torch.inf),
    "added": added,
}
SHIFTS = {
    "as they are": lambda logits: logits,
    "without the largest": lambda logits: logits - logits.max(-1, keepdim=True).values,
    "without amax": lambda logits: logits - logits.amax(-1, keepdim=True),
}


def with_sinks(shift):
    """As eager attention of GPT-OSS in transformers."""

    def attention(q, k, v, mask):
        sinks = torch.linspace(-2, 3, q.shape[1]).reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        scores = added(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, mask)
        logits = shift(torch.cat([scores, sinks.to(q.dtype)], -1))
        return F.dropout(logits.softmax(-1, logits.dtype)[..., :-1], 0.1, training=False).to(v.dtype) @ v

    return attention


ATTENTIONS = {
    "sdpa, enable_gqa": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
    "sdpa, scale": grouped(lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, scale=0.1), repeat_kv),
    "sdpa, repeat_kv": grouped(sdpa, repeat_kv),
    "sdpa, repeat_interleave": grouped(sdpa, lambda x, n: x.repeat_interleave(n, 1)),
    "softmax in fp32": grouped(by_softmax(MASKED["where"], dtype=torch.float32), repeat_kv),
    "softcap": grouped(by_softmax(MASKED["where"], softcap=2.0), repeat_kv),
    **{f"sinks, {name}": grouped(with_sinks(shift), repeat_kv) for name, shift in SHIFTS.items()},
    **{f"softmax, {name}": grouped(by_softmax(masked), repeat_kv) for name, masked in MASKED.items()},
}


class Attention(nn.Module):
    """A layer with a cache of its own; `update(cache, new, positions)`, `attention(q, keys, values, mask)`."""

    def __init__(self, update=index_copy, attention=sdpa, heads=H, size=D, rows=B, dtype=torch.float32):
        super().__init__()
        self.update, self.attention, self.heads, self.size = update, attention, heads, size
        self.q, self.k, self.v = (nn.Linear(64, n * size, dtype=dtype) for n in (heads, H, H))
        self.o = nn.Linear(heads * size, 64, dtype=dtype)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(rows, H, S, size, dtype=dtype))
        nn.init.normal_(self.v.weight)

    def mask(self, positions):
        return torch.arange(S, device=positions.device) <= positions[:, None]

    def forward(self, x, positions):
        rows, tokens, _ = x.shape
        q, k, v = (
            f(x).view(rows, tokens, n, self.size).transpose(1, 2)
            for f, n in ((self.q, self.heads), (self.k, H), (self.v, H))
        )
        self.update(self.keys, k, positions)
        self.update(self.values, v, positions)
        y = self.attention(q, self.keys, self.values, self.mask(positions))
        return self.o(y.transpose(1, 2).reshape(rows, tokens, -1))


def texts(tokens, rows=B, dtype=torch.float32):
    return torch.randn(rows, tokens, 64, dtype=dtype)


@torch.no_grad()
def decode(model, x, prefill=1):
    """The outputs [B, T, 64] of the first tokens at once and of the others one by one."""
    cuts = [0, *range(prefill, x.shape[1] + 1)]
    steps = [(x[:, a:b], torch.arange(a, b)) for a, b in itertools.pairwise(cuts)]
    return torch.cat([model(*step) for step in steps], 1)


def error(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def optimized(model, recipe="kv8", tokens=3, **more):
    dtype = model.keys.dtype
    example = texts(tokens, model.keys.shape[0], dtype), torch.arange(tokens)
    return aograph.optimize(model, recipe, example, compile=False, **more)


def check(model, recipe="kv8", largest=0.02, prefill=1, tokens=20):
    fast = optimized(model, recipe)
    assert [row.outcome for row in fast.report.caches] == ["rewritten", "rewritten"], fast.report
    x = texts(tokens, model.keys.shape[0], model.keys.dtype)
    found, expected = decode(fast, x, prefill), decode(model, x, prefill)
    assert 0 < error(found, expected) < largest
    return fast


# --- what is rewritten -------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES.keys())
def test_updates(update):
    fast = check(Attention(update), prefill=3)
    assert all(row.notes == ["the mask is a length"] for row in fast.report.caches)


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_attentions(attention):
    check(Attention(attention=attention, heads=4 * H), prefill=5, tokens=10)


@pytest.mark.parametrize("name", ["sdpa, enable_gqa", "sdpa, repeat_kv", "sdpa, repeat_interleave", "softmax, where"])
def test_attentions_of_as_many_heads(name):
    check(Attention(attention=ATTENTIONS[name]), prefill=5, tokens=10)


@pytest.mark.parametrize("recipe, largest", [("kv8", 0.02), ("kvfp8", 0.06), ("kv4", 0.2), ("kv4(keys=token)", 0.2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formats(recipe, largest, dtype):
    check(Attention(size=32, dtype=dtype, heads=8, attention=ATTENTIONS["sdpa, enable_gqa"]), recipe, largest)


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES.keys())
def test_updates_of_one_row(update):
    """Item assignment takes leading sizes of 1 away."""
    check(Attention(update, rows=1), prefill=3)


@pytest.mark.parametrize("tokens", [1, 4])
def test_rows_of_one(tokens):
    model = Attention(at_rows, rows=1)
    example = texts(tokens, 1), torch.arange(tokens)
    fast = aograph.optimize(model, "kv8", example, dynamic_shapes={}, compile=False)
    assert len(fast.report.rewritten) == 2, fast.report
    with torch.no_grad():
        assert 0 < error(fast(*example), model(*example)) < 0.02


def test_one_row_and_another_head_size():
    check(Attention(rows=1, size=48, heads=6, attention=ATTENTIONS["sdpa, repeat_kv"]), prefill=7)


# --- many tokens as they were before they were stored ------------------------------------------------------


def fresh(program):
    """What the attention of a program knows of its own tokens."""
    return find(program, "aograph.kv_attention").args[14:]


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES.keys())
def test_many_tokens_attend_to_themselves_as_they_are(update):
    model = Attention(update)
    fast = optimized(model, "kv4(group_size=16, keys=token)")
    program = fast._captures[0][1].program
    assert len(fresh(program)) == 3 and None not in fresh(program)
    x = texts(28)
    with torch.no_grad():
        for part, rounded in ((slice(0, 20), False), (slice(20, 28), True)):
            step = x[:, part], torch.arange(28)[part]
            assert (error(fast(*step), model(*step)) > 1e-3) == rounded


@pytest.mark.parametrize("tokens, known", [(1, False), (16, False), (17, True)])
def test_few_tokens_are_told_nothing(tokens, known):
    fast = optimized(Attention(), tokens=tokens, dynamic_shapes={})
    assert bool(fresh(fast._captures[0][1].program)) == known
    assert all(row.notes == ["the mask is a length"] for row in fast.report.caches)


class Storing(Attention):
    """`attend(module, q, k, v, positions)` stores keys and values and attends to them."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.register_buffer("at", torch.arange(20))

    def forward(self, x, positions):
        q, k, v = (f(x).view(B, -1, H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(self.attend(self, q, k, v, positions).transpose(1, 2).flatten(2))


def overwritten(m, q, k, v, positions):
    index_copy(m.keys, k, positions), index_copy(m.values, v, positions)
    k.zero_(), v.zero_()
    return sdpa(q, m.keys, m.values, m.mask(positions))


def ahead(m, q, k, v, positions):
    y = sdpa(q, m.keys, m.values, m.mask(positions))
    index_copy(m.keys, k, positions), index_copy(m.values, v, positions)
    return y


def without_the_first_token(m, q, k, v, positions):
    index_copy(m.keys, k, positions), index_copy(m.values, v, positions)
    return sdpa(q[:, :, 1:], m.keys, m.values, m.mask(positions[1:]))


def elsewhere(m, q, k, v, positions):
    index_copy(m.keys, k, positions), index_copy(m.values, v, positions.flip(0))
    return sdpa(q, m.keys, m.values, m.mask(positions))


def counted_on(m, q, k, v, positions):
    index_copy(m.keys, k, m.at), index_copy(m.values, v, m.at)
    m.at += 1
    return sdpa(q, m.keys, m.values, m.mask(positions))


ROUNDED = {
    ahead: "the graph does not store them ahead of the attention",
    without_the_first_token: "are stored",
    elsewhere: "keys and values may not be stored at the same positions",
    counted_on: "keys and values may not be stored at the same positions",
}


def test_tokens_that_are_written_once_they_are_stored():
    model, example = Storing(overwritten), (texts(20), torch.arange(20))
    fast = optimized(model, "kv4(group_size=16, keys=token)")
    with torch.no_grad():
        assert error(fast(*example), model(*example)) < 1e-3


@pytest.mark.parametrize("attend, why", ROUNDED.items(), ids=[each.__name__ for each in ROUNDED])
def test_what_is_not_known_of_tokens_is_said(attend, why):
    model, example = Storing(attend), (texts(20), torch.arange(20))
    fast = optimized(model, tokens=20, dynamic_shapes={})
    notes = {note for row in fast.report.caches for note in row.notes}
    assert any(note.startswith("tokens are read back rounded: ") and why in note for note in notes), notes
    with torch.no_grad():
        assert 1e-3 < error(fast(*example), model(*example)) < 0.02 or attend is ahead


class ByPositionOfRows(Attention):
    """Rows at positions of their own, one token at a time."""

    def forward(self, x, positions):
        q, k, v = (f(x).view(B, 1, H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        rows = torch.arange(B)
        self.keys[rows, :, positions] = k[:, :, 0]
        self.values[rows, :, positions] = v[:, :, 0]
        mask = (torch.arange(S) <= positions[:, None])[:, None, None]
        return self.o(sdpa(q, self.keys, self.values, mask).transpose(1, 2).reshape(B, 1, -1))


def test_rows_at_positions_of_their_own():
    model, steps = ByPositionOfRows(), [torch.tensor(p) for p in ([0, 5], [1, 6], [2, 7])]
    fast = aograph.optimize(model, "kv8", (texts(1), steps[0]), compile=False)
    assert [row.notes for row in fast.report.caches] == [["the mask is a length"]] * 2
    with torch.no_grad():
        for step in steps:
            x = texts(1)
            assert 0 < error(fast(x, step), model(x, step)) < 0.02


class ByIndex(Attention):
    """One position for all, as a number that the call computes."""

    def forward(self, x, positions):
        q, k, v = (f(x).view(B, 1, H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        at = positions.item()
        torch._check(at >= 0)
        torch._check(at < S)
        self.keys.select(2, at).copy_(k[:, :, 0])
        self.values.select(2, at).copy_(v[:, :, 0])
        y = sdpa(q, self.keys, self.values, torch.arange(S)[None] <= positions)
        return self.o(y.transpose(1, 2).reshape(B, 1, -1))


def test_one_position_for_all():
    model = ByIndex()
    fast = aograph.optimize(model, "kv8", (texts(1), torch.tensor([0])), compile=False)
    assert len(fast.report.rewritten) == 2, fast.report
    with torch.no_grad():
        for at in range(4):
            x = texts(1)
            assert 0 < error(fast(x, torch.tensor([at])), model(x, torch.tensor([at]))) < 0.02


class Causal(Attention):
    """All positions at once, causal; nothing but the update says that there are as many positions as tokens."""

    def forward(self, x, positions):
        q, k, v = (f(x).view(B, -1, H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        self.keys[:, :, positions], self.values[:, :, positions] = k, v
        y = F.scaled_dot_product_attention(q, self.keys, self.values, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(B, -1, H * D))


def test_causal_attention_from_the_first_position_on():
    model, example = Causal(), (texts(S), torch.arange(S))
    fast = aograph.optimize(model, "kv8", example, compile=False)
    assert all(row.notes == ["the mask is a length"] for row in fast.report.caches)
    with torch.no_grad():
        assert 0 < error(fast(*example), model(*example)) < 0.02


# --- reads of the first positions --------------------------------------------------------------------------


class Part(Attention):
    """Reads the positions that are filled, as gpt-fast and nanoGPT do: `until(positions)` of them."""

    def __init__(self, until, part=lambda cache, n: cache[:, :, :n], masked=True, **more):
        super().__init__(**more, heads=4)
        self.until, self.part, self.masked = until, part, masked

    def forward(self, x, positions):
        rows, tokens, _ = x.shape
        q, k, v = (
            f(x).view(rows, tokens, n, self.size).transpose(1, 2) for f, n in ((self.q, 4), (self.k, H), (self.v, H))
        )
        self.update(self.keys, k, positions)
        self.update(self.values, v, positions)
        n = self.until(x, positions)
        keys, values = (self.part(cache, n) for cache in (self.keys, self.values))
        mask = torch.arange(n) <= positions[:, None] if self.masked else None
        return self.o(self.attention(q, keys, values, mask).transpose(1, 2).reshape(rows, tokens, -1))


def newest(x, positions):
    n = positions[-1].item() + 1
    torch._check(n <= S)
    return n


def checked(x, positions):
    n = newest(x, positions)
    torch._check(n >= 0)
    return n


def constant(x, positions):
    return 24


def narrowed(cache, n):
    return cache.narrow(2, 0, n)


PARTS = {
    "a constant": Part(constant, attention=ATTENTIONS["sdpa, repeat_kv"]),
    "a constant, mask passed on": Part(constant, attention=ATTENTIONS["softmax, added"]),
    "a constant, narrowed": Part(constant, narrowed, attention=ATTENTIONS["sdpa, enable_gqa"]),
    "a number": Part(checked, attention=ATTENTIONS["softmax, where"]),
    "a number, narrowed": Part(checked, narrowed, attention=ATTENTIONS["softmax, masked_fill"]),
    "a number that nothing is known of": Part(newest, attention=ATTENTIONS["softmax, where"]),
    "a number, with sinks": Part(checked, attention=ATTENTIONS["sinks, as they are"]),
}


@pytest.mark.parametrize("model", PARTS.values(), ids=PARTS.keys())
def test_reads_of_the_first_positions(model):
    check(model, prefill=5, tokens=10)


def test_reads_of_the_first_positions_from_the_back_of_the_cache():
    check(Part(constant, lambda cache, n: cache[:, :, : n - S], attention=ATTENTIONS["sdpa, enable_gqa"]), prefill=5)


@pytest.mark.parametrize("recipe", ["kv8", "kv4"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_what_is_not_read_stays_unseen_without_a_mask(tokens, recipe):
    """nanoGPT, one token, and a text from its beginning: nothing but the part that is read says what is seen."""
    torch.manual_seed(0)
    model = Part(checked, masked=False, size=32, attention=grouped(by_softmax(lambda s, _: s), repeat_kv))
    model.keys.normal_(), model.values.normal_()
    example = texts(tokens), torch.arange(12 - tokens, 12)
    fast = optimized(model, recipe, tokens)
    assert all(row.outcome == "rewritten" for row in fast.report.caches), fast.report
    with torch.no_grad():
        assert 0 < error(fast(*example), model(*example)) < (0.02 if recipe == "kv8" else 0.2)


class FromTheBeginning(Part):
    """A text at once: as many positions as tokens, causal."""

    def __init__(self):
        super().__init__(lambda x, positions: x.shape[1], masked=False)
        self.attention = lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_reads_of_as_many_positions_as_there_are_tokens():
    model = FromTheBeginning()
    fast = optimized(model, tokens=5)
    assert all(row.outcome == "rewritten" for row in fast.report.caches), fast.report
    with torch.no_grad():
        for tokens in (5, 9):
            example = texts(tokens), torch.arange(tokens)
            assert 0 < error(fast(*example), model(*example)) < 0.02
    assert len(fast._captures) == 1


# --- masks -------------------------------------------------------------------------------------------------


class Masked(Attention):
    """A layer whose mask is computed from the positions by a function."""

    def __init__(self, how, **more):
        super().__init__(attention=ATTENTIONS["sdpa, enable_gqa"], **more)
        self.mask = how
        self.register_buffer("triangle", torch.ones(S, S, dtype=torch.bool).tril())


LENGTHS = {
    "arange <= positions": lambda p: torch.arange(S) <= p[:, None],
    "positions >= arange": lambda p: p[:, None] >= torch.arange(S)[None],
    "arange < positions + 1": lambda p: torch.arange(S) < (p + 1)[:, None],
    "not arange > positions": lambda p: ~(torch.arange(S) > p[:, None]),
    "to add": lambda p: torch.where(torch.arange(S) <= p[:, None], 0.0, -torch.inf),
    "four dimensions": lambda p: (torch.arange(S).view(1, -1) <= p.view(-1, 1))[None, None].expand(B, 1, -1, S),
}


@pytest.mark.parametrize("mask", LENGTHS.values(), ids=LENGTHS.keys())
def test_a_mask_that_is_a_length_is_not_passed_on(mask):
    program = check(Masked(mask), prefill=3, tokens=8)._captures[0][1].program
    attention = next(n for n in program.graph.nodes if n.target is torch.ops.aograph.kv_attention.default)
    assert attention.args[7] is None and not any("aten.le" in name or "aten.gt" in name for name in operators(program))


OTHERS = {
    "hidden tokens": lambda p: (torch.arange(S) <= p[:, None])[None, None] & (torch.arange(S) != 1),
    "not hidden": lambda p: ~((torch.arange(S) > p[:, None]) | (torch.arange(S) % 3 == 1)),
    "a slope": lambda p: torch.where(torch.arange(S) <= p[:, None], torch.arange(S) - p[:, None], -torch.inf),
    "a stride": lambda p: torch.arange(0, 2 * S, 2) <= p[:, None],
}


def sliding(p):
    return (torch.arange(S) <= p[:, None]) & (torch.arange(S) > p[:, None] - 5)


WINDOWS = {  # masks, and whether something is left of them
    "of booleans": (sliding, False),
    "to add, filled": (lambda p: torch.zeros(len(p), S).masked_fill(~sliding(p), -torch.inf), False),
    "to add, chosen": (lambda p: torch.where(sliding(p), 0.0, torch.finfo(torch.float32).min)[None, None], False),
    "to add, chosen the other way": (lambda p: torch.where(~sliding(p), -1e9, 0.0), False),
    "with more": (lambda p: sliding(p) & (torch.arange(S) != 3), True),
}


@pytest.mark.parametrize("mask, left", WINDOWS.values(), ids=WINDOWS.keys())
def test_windows(mask, left):
    """Told as a number of tokens: nothing of tokens by positions is left."""
    fast = check(Masked(mask, heads=4), prefill=3, tokens=12)
    (attention,) = fast._captures[0][1].program.graph.find_nodes(
        op="call_function", target=torch.ops.aograph.kv_attention.default
    )
    assert attention.args[10] == 5 and (attention.args[7] is not None) == left


def hidden_later(mask, value):
    """A mask in which a position is hidden in place."""

    def function(p):
        found = mask(p)
        found[:, 2] = value
        return found

    return function


LEFT_AS_THEY_ARE = {
    "an empty window": lambda p: (torch.arange(S) <= p[:, None]) & (torch.arange(S) > p[:, None] + 40) | sliding(p),
    "of two positions": lambda p: (torch.arange(S) <= p[:, None]) & (torch.arange(S) > (p * 1)[:, None] - 5),
    "to add, but not to hide": lambda p: torch.where(sliding(p), 0.0, -3.0),
    "of booleans, written": hidden_later(lambda p: sliding(p) & (torch.arange(S) != 3), False),
    "to add, written": hidden_later(lambda p: torch.where(sliding(p), 0.0, -1e9), -1e9),
}


@pytest.mark.parametrize("mask", LEFT_AS_THEY_ARE.values(), ids=LEFT_AS_THEY_ARE.keys())
def test_no_windows(mask):
    fast = check(Masked(mask, heads=4), prefill=3, tokens=12)
    (attention,) = fast._captures[0][1].program.graph.find_nodes(
        op="call_function", target=torch.ops.aograph.kv_attention.default
    )
    assert attention.args[10] == 0 and attention.args[7] is not None


@pytest.mark.parametrize("mask", OTHERS.values(), ids=OTHERS.keys())
def test_other_masks_are_kept(mask):
    program = check(Masked(mask, heads=4), prefill=3, tokens=8)._captures[0][1].program
    attention = next(n for n in program.graph.nodes if n.target is torch.ops.aograph.kv_attention.default)
    assert attention.args[7] is not None


def test_a_triangle_that_is_a_buffer():
    model = Masked(None)
    model.mask = lambda p: model.triangle[p]
    fast = check(model, prefill=3, tokens=8)
    assert all(row.notes == ["its mask is passed on"] for row in fast.report.caches)


def test_positions_that_are_written_before_attention():
    class Counting(Attention):
        def __init__(self):
            super().__init__()
            self.register_buffer("at", torch.zeros(1, dtype=torch.int64))

        def forward(self, x, positions):
            q, k, v = (f(x).view(B, 1, H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
            self.keys[:, :, self.at], self.values[:, :, self.at] = k, v
            mask = torch.arange(S) <= self.at[:, None]
            self.at += 1
            return self.o(sdpa(q, self.keys, self.values, mask).transpose(1, 2).reshape(B, 1, -1))

    model = Counting()
    fast = aograph.optimize(model, "kv8", (texts(1), torch.arange(1)), compile=False)
    assert all(row.notes == ["the mask is a length"] for row in fast.report.caches)
    x = texts(6)
    assert 0 < error(decode(fast, x), decode(model, x)) < 0.02


# --- what stays --------------------------------------------------------------------------------------------


class Returned(Attention):
    def forward(self, x, positions):
        return super().forward(x, positions), self.keys * 2


class Read(Attention):
    def forward(self, x, positions):
        return super().forward(x, positions) + self.keys.sum()


class OtherWrite(Attention):
    def forward(self, x, positions):
        self.keys.mul_(0.9)
        return super().forward(x, positions)


class Flat(Attention):
    def __init__(self):
        super().__init__()
        self.keys, self.values = self.keys[0], self.values[0]
        self.update = lambda cache, new, positions: cache.index_copy_(1, positions, new[0])
        self.attention = lambda q, k, v, mask: sdpa(q, k[None], v[None], mask)


def sinks_of_scores(q, k, v, mask):
    scores = (q @ k.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    return torch.cat([scores, scores[..., :1]], -1).softmax(-1)[..., :-1] @ v


def without_the_first(q, k, v, mask):
    scores = (q @ k.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    return torch.cat([scores, torch.zeros(H, 1, 1).expand(B, -1, q.shape[2], -1)], -1).softmax(-1)[..., 1:] @ v


def along_heads(cache, new, positions):
    cache.index_copy_(3, torch.arange(D), F.pad(new, (0, 0, 0, S - new.shape[2])))


MISSES = {
    "read besides": (Read(), "read by sum"),
    "returned": (Returned(), "read by mul"),
    "written besides": (OtherWrite(), "written by mul_"),
    "sinks by token": (Attention(attention=sinks_of_scores), "are no logit for each query head"),
    "a part of what has sinks": (Attention(attention=without_the_first), "argument 1 where None is needed"),
    "a head size": (Attention(size=24), "multiple of 16"),
    "a dtype": (Attention(dtype=torch.float64), "unsupported dtype torch.float64"),
    "three dimensions": (Flat(), "3 dimensions"),
    "another dimension": (Attention(along_heads), "along dimension 3"),
    "other groups": (
        Attention(heads=2 * H, attention=grouped(sdpa, lambda x, n: x.repeat(1, n, 1, 1))), "read by repeat"),
    "a small fill": (Attention(attention=by_softmax(lambda s, mask: s.masked_fill(~mask, -5.0))), "filled with -5"),
    "a softmax of tokens": (Attention(attention=lambda q, k, v, mask: (q @ k.mT).softmax(2) @ v), "over dimension 2"),
    "a part": (
        Attention(attention=lambda q, k, v, mask: sdpa(q, k[:, :, 8:], v[:, :, 8:], mask[:, 8:])), "position 8 on"),
    "a part of heads": (
        Attention(attention=lambda q, k, v, mask: F.scaled_dot_product_attention(
            q, k[:, :1], v[:, :1], mask, enable_gqa=True)), "along dimension 1"),
    "a part of the values": (
        Attention(attention=lambda q, k, v, mask: sdpa(q, k[:, :, :8], v[:, :, :9], mask[:, :8])), "values [2, 2, 9,"),
}  # fmt: skip


@pytest.mark.parametrize("model, why", MISSES.values(), ids=MISSES.keys())
def test_misses(model, why):
    example = texts(3, dtype=model.keys.dtype), torch.arange(3)
    report = aograph.explain(model, "kv8", example)
    assert {row.name for row in report.caches} == {"keys", "values"}
    assert all(row.outcome == "near miss" and row.bytes_after == row.bytes_before for row in report.caches)
    assert any(why in note for row in report.caches for note in row.notes), report
    assert not any("kv_" in name for name in operators(captured(model, example)))


def captured(model, example, recipe="kv8"):
    program = program_of(model, *example)
    apply(program, *up_to(Stage.CACHE), recipe=recipe)
    return program


def test_the_other_cache_of_the_attention_says_so():
    rows = {row.name: row for row in aograph.explain(Read(), "kv8", (texts(3), torch.arange(3))).caches}
    assert rows["values"].notes == ["its attention reads keys too, which stays as it is"]


def test_written_while_it_is_read():
    class Late(Attention):
        def forward(self, x, positions):
            q, k, v = (f(x).view(B, -1, H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
            scores = (q @ self.keys.mT).softmax(-1)
            index_copy(self.keys, k, positions)
            index_copy(self.values, v, positions)
            return self.o((scores @ self.values).transpose(1, 2).reshape(B, -1, H * D))

    model = Late()
    report = aograph.explain(model, "kv8", (texts(3), torch.arange(3)))
    assert "it is written while an attention reads it" in report.caches[0].notes


class Given(nn.Module):
    def forward(self, q, keys, values, positions):
        index_copy(keys, q, positions)
        index_copy(values, q, positions)
        return sdpa(q, keys, values, torch.arange(S) <= positions[:, None])


GIVEN = torch.randn(B, H, 3, D), torch.zeros(B, H, S, D), torch.zeros(B, H, S, D), torch.arange(3)


@pytest.mark.parametrize("shapes", [{}, None])
def test_a_cache_of_the_caller(shapes):
    report = aograph.explain(Given(), "kv8", GIVEN, dynamic_shapes=shapes)
    assert report.cache_bytes == (2 * B * H * S * D * 4,) * 2 and report.caches[0].tokens == B * S
    assert [row.outcome for row in report.caches] == ["skipped"] * 2
    assert all("the caller's" in row.notes[0] for row in report.caches)
    assert "weights 0 B → 0 B" in report.summary()


def test_private_inputs():
    """Codes and scales take the place of a cache among the inputs."""
    program = program_of(Given(), *GIVEN)
    program.private = frozenset(["keys", "values"])
    report = pipeline.run(program, Recipe.of("kv8"))
    assert [row.outcome for row in report.caches] == ["rewritten"] * 2 and not program.packs and not program.mutated
    assert report.bytes_before == 2 * B * H * S * D * 4 and report.bytes_after == 2 * B * H * S * (D + 4)
    names = ["q", "keys_codes", "keys_scales", "values_codes", "values_scales", "positions"]
    assert [node.target for node in program.inputs] == names and program.private == set(names[1:5])
    program.graph_module.recompile()
    q, keys, values, positions = (each.clone() for each in GIVEN)
    packed = *INT8.quantize(keys), *INT8.quantize(values)
    (found,) = program.graph_module(q, *packed, positions)
    assert 0 < error(found, Given()(q, keys, values, positions)) < 0.02
    assert 0 < error(INT8.dequantize(*packed[:2], torch.float32), keys) < 0.02


def test_a_private_input_that_cannot_be_packed_stays():
    program = program_of(Given(), *GIVEN)
    program.private = frozenset(["keys"])
    report = pipeline.run(program, Recipe.of("kv8"))
    assert "its attention reads values too" in report.caches[0].notes[0]
    assert [node.target for node in program.inputs] == ["q", "keys", "values", "positions"]


def test_behind_torch_compile_the_buffers_stay(fresh_compiler):
    model, reports = Attention(), []
    options = {"recipe": "int8wo + kv8", "report": reports.append}
    fast = torch.compile(model, backend="aograph", options=options)
    with torch.no_grad():
        fast(texts(1), torch.arange(1))
    assert [row.outcome for row in reports[0].caches] == ["skipped"] * 2
    assert all("use aograph.optimize" in row.notes[0] for row in reports[0].caches)
    assert model.keys[:, :, 0].any() and len(reports[0].rewritten) == 4


# --- state -------------------------------------------------------------------------------------------------


def test_what_is_in_the_cache_is_packed_and_the_model_stays():
    model, x = Attention(), texts(12)
    decode(model, x[:, :8], 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = optimized(model)
    step = x[:, 8:9], torch.tensor([8])
    with torch.no_grad():
        found = fast(*step)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert 0 < error(found, model(*step)) < 0.02


def test_all_captures_share_the_cache():
    model, x = Attention(), texts(8)
    fast = aograph.optimize(model, "kv8", compile=False)
    found = decode(fast, x, 5)  # one capture for several tokens, one for one
    assert len(fast._captures) == 2 and 0 < error(found, decode(model, x, 5)) < 0.02
    assert {name for name in fast.state_dict() if "_" in name} == {
        f"{name}_{part}" for name in ("keys", "values") for part in ("codes", "scales")
    }


def test_a_cache_that_another_call_uses_otherwise_is_an_error():
    class Sometimes(Attention):
        def forward(self, x, positions):
            y = super().forward(x, positions)
            return y if x.shape[1] == 1 else y + self.keys.sum()

    fast = aograph.optimize(Sometimes(), "kv8", compile=False)
    with torch.no_grad():
        fast(texts(1), torch.arange(1))
        with pytest.raises(WeightError, match=r"the cache keys is quantized in the graph of one call.*keys:none"):
            fast(texts(3), torch.arange(3))


def test_handed_over():
    model, x = Attention(), texts(6)
    expected = decode(model, x)
    model.keys.zero_(), model.values.zero_()
    fast = optimized(model, hand_over=True)
    assert model.keys.is_meta and 0 < error(decode(fast, x), expected) < 0.02


def test_past_the_end_is_an_error():
    fast = optimized(Attention(), tokens=2)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"0 … 31"):
        fast(texts(2), torch.tensor([31, 32]))


def test_compiled(fresh_compiler):
    model, x = Attention(heads=4, attention=ATTENTIONS["sdpa, enable_gqa"]), texts(8)
    fast = aograph.optimize(model, "int8wo+kv8", (x[:, :1], torch.arange(1)))
    assert 0 < error(decode(fast, x), decode(model, x)) < 0.03


# --- keys by channel ---------------------------------------------------------------------------------------


class Long(Attention):
    """Room for 150 tokens: two blocks and a part of one."""

    def __init__(self, **more):
        super().__init__(**more, heads=8, size=32, attention=ATTENTIONS["sdpa, enable_gqa"])
        self.keys, self.values = (torch.zeros(B, H, 150, 32, dtype=self.keys.dtype) for _ in range(2))
        with torch.no_grad():
            self.k.bias[::7] += 20  # channels with outliers

    def mask(self, positions):
        return torch.arange(150) <= positions[:, None]


@torch.no_grad()
def test_outliers_of_channels_cost_less_by_channel():
    model, x = Long(), texts(150)
    expected = decode(model, x, 70)
    by_channel, by_token = (decode(optimized(model, recipe), x, 70) for recipe in ("kv4", "kv4(keys=token)"))
    values = decode(optimized(model, "kv4 + keys:kv8"), x, 70)  # of values alone
    assert error(by_channel, values) < 0.5 * error(by_token, values)
    assert error(by_channel, expected) < 0.15


@pytest.mark.parametrize("tokens", [64, 100])
def test_a_cache_that_holds_tokens_is_taken_over_with_its_newest_block(tokens):
    model, x = Long(), texts(140)
    decode(model, x[:, :tokens], tokens)
    fast = optimized(model, "kv4")
    state = fast.state_dict()
    assert state["keys_held"].tolist() == [(tokens - 1) // 64] * B
    first = (tokens - 1) // 64 * 64
    assert state["keys_window"][:, :, : tokens - first].equal(model.keys[:, :, first:tokens])
    with torch.no_grad():
        for t in range(tokens, 140):
            step = x[:, t : t + 1], torch.tensor([t])
            assert 0 < error(fast(*step), model(*step)) < 0.3


def test_what_a_cache_by_channel_is_made_of():
    model = Long(dtype=torch.bfloat16)
    fast = optimized(model, "kv4")
    found = {name: (each.dtype, list(each.shape)) for name, each in fast.state_dict().items() if "_" in name}
    assert found == {
        "keys_codes": (torch.uint8, [B, H, 192, 16]), "keys_scales": (torch.bfloat16, [B, H, 3, 32, 2]),
        "keys_window": (torch.bfloat16, [B, H, 64, 32]), "keys_held": (torch.int64, [B]),
        "values_codes": (torch.uint8, [B, H, 150, 16]), "values_scales": (torch.bfloat16, [B, H, 150, 1, 2]),
    }  # fmt: skip
    after = {row.name: row.bytes_after for row in fast.report.caches}
    for name in ("keys", "values"):
        assert after[name] == sum(v.nbytes for k, v in fast.state_dict().items() if k.startswith(f"{name}_"))


def test_a_cache_of_keys_and_values_is_kept_by_token():
    class Shared(Long):
        def forward(self, x, positions):
            q, k = (f(x).view(B, -1, n, 32).transpose(1, 2) for f, n in ((self.q, 8), (self.k, H)))
            self.update(self.keys, k, positions)
            y = self.attention(q, self.keys, self.keys, self.mask(positions))
            return self.o(y.transpose(1, 2).reshape(B, -1, 256))

    fast = optimized(Shared(), "kv4")
    assert len(fast.report.caches) == 1 and "keys_window" not in fast.state_dict()


def test_tokens_out_of_order_by_channel_are_an_error():
    fast = optimized(Long(), "kv4", tokens=2)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"count up by one.*kv4\(keys=token\)"):
        fast(texts(2), torch.tensor([5, 3]))


def test_compiled_by_channel(fresh_compiler):
    model, x = Long(), texts(80)
    fast = aograph.optimize(model, "int8wo+kv4", (x[:, :1], torch.arange(1)))
    assert 0 < error(decode(fast, x), decode(model, x)) < 0.2


# --- recipes and reports -----------------------------------------------------------------------------------


def test_composition():
    fast = check(Attention(), "int8wo+kv8", 0.03)
    assert len(fast.report.rewritten) == 6
    assert all(row.kernel for row in fast.report.caches)
    counts = operators(fast._captures[0][1].program)
    assert counts["aograph.kv_update"] == 2 and counts["aograph.kv_attention"] == 1
    assert counts["aograph.int8_linear"] and "aten.linear" not in counts


def test_keys_by_channel_or_by_token():
    example = texts(1), torch.arange(1)
    for recipe in ("kv4(group_size=16)", "kv4(group_size=16, keys=token)"):
        rows = aograph.explain(Attention(), recipe, example).caches
        assert [row.scheme for row in rows] == [recipe] * 2 and all(row.outcome == "rewritten" for row in rows)


def test_rules_by_name():
    model = nn.ModuleDict({"a": Attention(), "b": Attention()})
    model.forward = lambda x, p: model["b"](model["a"](x, p), p)
    example = texts(3), torch.arange(3)
    report = aograph.explain(model, "kv8 + a.values:kv4(group_size=16) + b.*:none", example)
    rows = {row.name: row for row in report.caches}
    assert [rows[f"a.{name}"].scheme for name in ("keys", "values")] == ["kv8", "kv4(group_size=16)"]
    assert all(rows[f"b.{name}"].outcome == "excluded" for name in ("keys", "values"))
    with pytest.raises(aograph.RecipeError, match="matches nothing"):
        aograph.explain(model, "kv8 + c.*:kv4", example)


def test_without_a_rule_for_caches_there_are_no_rows():
    assert not aograph.explain(Attention(), "int8wo", (texts(1), torch.arange(1))).caches


def test_bytes_of_a_token():
    model = Attention(size=128).to(torch.bfloat16)
    report = aograph.explain(model, "kv8", (texts(1, dtype=torch.bfloat16), torch.arange(1)))
    assert report.cache_token_bytes == (2 * H * 128 * 2, 2 * H * (128 + 4))
    assert report.cache_bytes == tuple(each * B * S for each in report.cache_token_bytes)
    assert "cache 1.02 KB → 528 B a token" in report.summary() and report.as_dict()["rows"][-1]["kind"] == "cache"


def test_a_disabled_pass():
    report = aograph.explain(Attention(), "kv8", (texts(1), torch.arange(1)), disable=["quantized_kv_cache"])
    assert all("no pass carried out kv8" in row.notes[0] for row in report.caches)


def test_heads_that_a_format_does_not_take():
    report = aograph.explain(Attention(), [aograph.Rule(KV4(32, "token"))], (texts(1), torch.arange(1)))
    assert all("a head of 16" in row.notes[0] for row in report.caches)


def test_an_artifact_is_refused(tmp_path):
    with pytest.raises(InputError, match="quantized cache"):
        optimized(Attention()).save(tmp_path / "model.pt2")
