"""The CUDA C++ kernel of kv_attention against the reference; what is chosen needs no GPU."""

import itertools
from dataclasses import replace

import pytest
import torch
from aograph.kernels import cuda, cuda_kv_attention, nvrtc
from aograph.kernels.cuda_kv_attention import BARRIERS, LEAST, MANY, UNIT, Sizes, blocks_of
from aograph.kernels.cuda_linear import CAPABILITIES, SHARED
from aograph.kernels.kv_attention import kv_attention
from aograph.kernels.kv_cache import FLOATS, FP8, INT4, INT4_CHANNEL, INT8, CacheCase, KVFormat
from aograph.kernels.kv_update import kv_update

BY_TOKEN = [INT8, FP8, INT4, KVFormat("int4", 4, 64)]
FORMATS = [*BY_TOKEN, INT4_CHANNEL]  # of keys
HEADS = [64, 80, 128, 256]
TOLERANCE = 1e-2  # of the norm: both products are of bf16
each = pytest.mark.parametrize("form", FORMATS, ids=lambda form: named(form))
CASE = CacheCase(
    "cuda", torch.bfloat16, 1, 128, 128, None, (9, 0), rows=1, heads=8, queries=4, length=4096,
    keys=KVFormat("int8", 8, 128), values=KVFormat("int8", 8, 128),
)  # fmt: skip


def named(form: KVFormat) -> str:
    return f"{form.name}-{'channel' if form.block else form.group_size}"


def of_values(form: KVFormat) -> KVFormat:
    """The format of values beside keys in this one."""
    return INT4 if form.block else form


@pytest.fixture
def gpu():
    if torch.cuda.get_device_capability() not in CAPABILITIES:
        pytest.skip("the kernels are for another architecture")


@pytest.fixture
def there(monkeypatch):
    """As where kernels can be compiled and launched."""
    monkeypatch.setattr(cuda, "available", lambda capability=None: True)


def caches(keys, values, B, H, S, D, dtype=torch.bfloat16):
    """k, its scales, v, its scales; by channel also a window, of any block of each row, and which it is."""
    x = [torch.randn(B, H, S, D, device="cuda") * torch.rand(B, H, S, 1, device="cuda") for _ in range(2)]
    k, k_scales, *window = keys.pack(x[0])
    if window:
        held = torch.randint(k.shape[2] // keys.block, (B,), device="cuda")
        window = [torch.randn(B, H, keys.block, D, device="cuda", dtype=dtype), held]
    return [each.contiguous() for each in (k, k_scales, *values.pack(x[1]), *window)]


def check(q, packed, positions, start=None, mask=None, softcap=0.0, window=0, sinks=None):
    seen = positions, start, mask, q.shape[3] ** -0.5, softcap, window
    windows = packed[4:] or (None, None)
    arguments = q, *packed[:4], *seen, *windows, sinks
    assert kv_attention["cuda"].supports(kv_attention.case_of(*arguments)) is True
    y, again = (kv_attention.run(*arguments, implementation="cuda") for _ in range(2))
    expected = kv_attention.run(q.float(), *arguments[1:], implementation="reference").double()
    assert y.dtype is q.dtype and y.shape == q.shape and y.view(torch.int16).equal(again.view(torch.int16))
    assert y.isnan().equal(expected.isnan())
    y, expected = y.double().nan_to_num(), expected.nan_to_num()
    assert (y - expected).norm() <= TOLERANCE * expected.norm()
    assert (y[(expected == 0).all(-1)] == 0).all()


@pytest.mark.cuda
@each
@pytest.mark.parametrize("D", HEADS)
@pytest.mark.parametrize("G, T", [(1, 1), (4, 1), (8, 1), (1, 3), (4, 3), (1, 16)])
def test_ragged_lengths(form, D, G, T, gpu):
    """One token, few, many and a full cache; a row of which nothing is seen."""
    if D % (form.group_size or 1) or (form.block and D % 32):
        pytest.skip("no whole groups")
    B, H, S = 5, 2, 5000
    ends = torch.tensor([-1, T - 1, 200, 3333, S - 1], device="cuda")
    positions = ends[:, None] - torch.arange(T, device="cuda").flip(0)
    q = torch.randn(B, G * H, T, D, device="cuda", dtype=torch.bfloat16)
    check(q, caches(form, of_values(form), B, H, S, D), positions)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "keys, values",
    [pair for pair in itertools.product(FORMATS, FORMATS[:3]) if pair[0] is not pair[1] and pair[0] is not FORMATS[3]],
    ids=named,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keys_and_values_in_formats_of_their_own(keys, values, dtype, gpu):
    q = torch.randn(3, 8, 2, 64, device="cuda", dtype=dtype)
    positions = torch.tensor([[4, 5], [299, 300], [1000, 1001]], device="cuda")
    check(q, caches(keys, values, 3, 2, 1200, 64), positions)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("D", [32, 64, 96, 128, 160, 256])
def test_the_block_in_the_window_is_not_read_from_the_codes(dtype, D, gpu):
    packed = caches(INT4_CHANNEL, INT8, 4, 2, 300, D, dtype)
    k_scales, held = packed[1], packed[5]
    held.copy_(torch.tensor([0, 1, 4, 2]))  # all, with tokens after; the newest, not full; one that is not seen
    k_scales[torch.arange(4, device="cuda"), :, held] = torch.nan
    q = torch.randn(4, 8, 1, D, device="cuda", dtype=torch.bfloat16)
    check(q, packed, torch.tensor([[3], [250], [270], [100]], device="cuda"))


@pytest.mark.cuda
@each
@pytest.mark.parametrize("window, softcap", [(0, 0.0), (1, 0.0), (37, 2.0), (1000, 0.0), (0, 30.0)])
def test_padding_windows_and_softcap(form, window, softcap, gpu):
    start = torch.tensor([0, 170, 1001], device="cuda")
    positions = torch.tensor([[3, 4, 5], [180, 250, 200], [997, 1100, 1199]], device="cuda")
    q = torch.randn(3, 8, 3, 64, device="cuda", dtype=torch.bfloat16) * 3
    check(q, caches(form, of_values(form), 3, 2, 1200, 64), positions, start, softcap=softcap, window=window)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, heads", [(2, 4), (1, 1), (2, 1)])
def test_masks(dtype, rows, heads, gpu):
    mask = torch.rand(rows, heads, 3, 800, device="cuda") > 0.3
    mask[:, :, 1] = False
    if dtype is not torch.bool:
        mask = torch.randn(mask.shape, device="cuda").masked_fill(~mask, -torch.inf).to(dtype)
    q = torch.randn(2, 4, 3, 128, device="cuda", dtype=torch.bfloat16)
    positions = torch.tensor([[0, 1, 2], [790, 798, 799]], device="cuda")
    check(q, caches(INT8, INT4, 2, 2, 800, 128), positions, mask=mask)


@pytest.mark.cuda
@each
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("S", [96, 2000])
def test_sinks(form, dtype, S, gpu):
    """Of a cache that one block reads, and of one that many do; a row of which nothing is seen, and NaN."""
    logits = torch.tensor([0.5, 3.0, 200.0, -200.0, -torch.inf, 0.0, torch.nan, 7.0], device="cuda").to(dtype)
    q = torch.randn(3, 8, 2, 64, device="cuda", dtype=torch.bfloat16) * 3
    positions = torch.tensor([[-1, -1], [3, 4], [S - 2, S - 1]], device="cuda")
    check(q, caches(form, of_values(form), 3, 2, S, 64), positions, sinks=logits)


@pytest.mark.cuda
@pytest.mark.parametrize("form", BY_TOKEN, ids=named)
def test_what_no_token_sees_does_not_matter(form, gpu):
    packed = caches(form, form, 2, 2, 600, 64)
    q = torch.randn(2, 8, 2, 64, device="cuda", dtype=torch.bfloat16)
    positions = torch.tensor([[17, 18], [333, 500]], device="cuda")
    start = torch.tensor([5, 100], device="cuda")
    for scales in packed[1::2]:
        scales[0, :, :5], scales[0, :, 19:] = torch.nan, torch.inf
        scales[1, :, :100], scales[1, :, 334:491], scales[1, :, 501:] = torch.inf, torch.nan, torch.nan
    check(q, packed, positions, start, window=10)


@pytest.mark.cuda
@each
@pytest.mark.parametrize("B, S", [(66, 3200), (33, 6400)])
def test_long_caches_of_many_rows(form, B, S, gpu):
    """Of which a block takes many units, in one block for each head, and in two."""
    blocks = blocks_of(2 * B, S, torch.cuda.get_device_properties("cuda").multi_processor_count)
    assert S // (blocks * UNIT) >= MANY
    q = torch.randn(B, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    positions = torch.randint(S, (B, 1), device="cuda")
    check(q, caches(form, of_values(form), B, 2, S, 64), positions)


LATE = """
extern "C" __global__ void late(long long* positions, const long long* of, int count) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  for (long long from = clock64(); clock64() - from < 200000;) {}
  if (threadIdx.x < count) positions[threadIdx.x] = of[threadIdx.x];
}
"""


@pytest.mark.cuda
@each
def test_positions_that_are_written_at_the_last_moment(form, gpu, tmp_path):
    """By a grid that has let the next one start: what that one copies for positions as they were is not used."""
    (tmp_path / "late.cu").write_text(LATE)
    device = torch.device("cuda", torch.cuda.current_device())
    late = cuda.kernel(tmp_path / "late.cu", "late", device)
    before = torch.tensor([-1, 2000, 1999, 3, 700, 0, 1500], device=device)[:, None]
    after = torch.tensor([1500, -1, 3, 1999, 700, 1 << 40, 1400], device=device)[:, None]
    packed = caches(form, of_values(form), 7, 2, 2000, 64)
    q = torch.randn(7, 8, 1, 64, device=device, dtype=torch.bfloat16)
    arguments = None, None, 0.125, 0.0, 0, *(packed[4:] or (None, None))
    expected = kv_attention.run(q, *packed[:4], after, *arguments, implementation="cuda")
    for _ in range(3):
        positions = before.clone()
        torch.cuda.synchronize()
        late((1, 1, 1), 32, (positions, after, 7))
        y = kv_attention.run(q, *packed[:4], positions, *arguments, implementation="cuda")
        assert y.view(torch.int16).equal(expected.view(torch.int16))


@pytest.mark.cuda
@each
def test_in_a_cuda_graph_positions_move_on(form, gpu):
    forms = form, of_values(form)
    packed = [each.empty(1, 2, 400, 64, "cuda", torch.bfloat16) for each in forms]
    q, new = (
        torch.empty(1, 8, 1, 64, device="cuda", dtype=torch.bfloat16),
        torch.empty(2, 1, 2, 1, 64, device="cuda", dtype=torch.bfloat16),
    )
    position = torch.zeros(1, 1, device="cuda", dtype=torch.int64)
    (k, k_scales, *window), values = packed
    arguments = k, k_scales, *values, position, None, None, 0.125, 0.0, 0, *window

    def step():
        for (codes, scales, *rest), tensor in zip(packed, new, strict=True):
            kv_update(codes, scales, tensor, position, *rest)
        return kv_attention(q, *arguments)

    q.zero_(), new.zero_()
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for at in range(300):
        position.fill_(at), q.normal_(), new.normal_()
        graph.replay()
    assert not window or window[1].tolist() == [299 // 64]
    expected = kv_attention.run(q.float(), *arguments, implementation="reference")
    assert (y.double() - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize("form", [*FORMATS[:3], INT4_CHANNEL], ids=named)
@pytest.mark.parametrize("D", [16, 64, 80, 96, 128, 160, 256])
def test_what_is_supported_fits(form, D, there):
    if form.asymmetric and D % 32:
        D = 32
    form = form if form.block else KVFormat(form.name, form.bits, form.group_size or D)
    values = of_values(form)
    for G, T in itertools.product((1, 4, 8), (1, 3, 16)):
        case = replace(CASE, M=T, N=D, K=D, queries=G, keys=form, values=values)
        if cuda_kv_attention.supports(case) is True:
            for long in (False, True):
                sizes = Sizes(D, -(-G * T // 8), form, values, torch.float32 if form.block else None, long)
                assert sizes.stages >= 2 and sizes.shared <= SHARED and sizes.stages * sizes.warps * 8 < BARRIERS
        else:
            assert G * T > 16


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"device": "cpu"}, "CUDA only"),
        ({"capability": (8, 0)}, "compute capability 9.0"),
        ({"keys": KVFormat("int4", 4, block=48)}, "multiples of 32 tokens"),
        ({"keys": INT4_CHANNEL, "K": 80, "N": 80}, "by channel"),
        ({"keys": KVFormat("int4", 4, block=160)}, "more than 16,384 elements"),
        ({"keys": INT4_CHANNEL, "values": KVFormat("int4", 4, 16)}, "groups of int4"),
        ({"dtype": torch.float32}, "bf16 and fp16"),
        ({"M": None}, "T is unknown"),
        ({"M": 16}, "few query rows of a KV head only, not 64"),
        ({"M": 5, "K": 256, "N": 256, "keys": INT4, "values": INT4}, "few query rows"),
        ({"N": 64}, "different sizes"),
        ({"K": 512, "N": 512}, "head size"),
        ({"values": KVFormat("int8", 8, 32)}, "one scale for a head"),
        ({"keys": KVFormat("int4", 4, 16)}, "multiples of 32"),
        ({"keys": KVFormat("int4", 4, 32), "values": KVFormat("int4", 4, 64)}, "differ"),
        ({"length": 30}, "multiple of 4"),
        ({"mask": torch.float16}, "another dtype"),
        ({"M": 17, "queries": 1, "fresh": True}, "reads all tokens from the cache"),
    ],
)
def test_what_is_not_supported_has_a_reason(change, reason, there):
    assert cuda_kv_attention.supports(CASE) is True
    assert reason in cuda_kv_attention.supports(replace(CASE, **change))


def test_few_tokens_are_taken_whatever_is_known_of_them(there):
    assert cuda_kv_attention.supports(replace(CASE, M=16, queries=1, fresh=True)) is True
    assert cuda_kv_attention.supports(replace(CASE, M=17, queries=1)) is True


@pytest.mark.parametrize("values", [INT4, KVFormat("int4", 4, 128), KVFormat("int8", 8, 128)], ids=named)
def test_keys_by_channel_leave_the_groups_to_values(values, there):
    assert cuda_kv_attention.supports(replace(CASE, keys=INT4_CHANNEL, values=values)) is True
    sizes = Sizes(128, 1, INT4_CHANNEL, values, torch.float32)
    defines = sizes.defines(torch.bfloat16)
    assert (defines["BLOCK"], defines["WINDOW"]) == (64, 2)
    assert defines["GROUP"] == (values.group_size if values.asymmetric else 32)
    assert sizes.stage == UNIT * (64 + 128 * values.bits // 8 + values.groups(128) * 4) + 128 * 4


def test_blocks_fill_the_multiprocessors():
    assert blocks_of(8, 131072, 132) == 16 and blocks_of(64, 131072, 132) == 2
    for pairs in (1, 8, 24, 48, 64, 96, 200, 1000):
        blocks = pairs * blocks_of(pairs, 131072, 132)
        waves = -(-blocks // 132)
        assert blocks / (waves * 132) > 0.85, pairs
    assert blocks_of(8, UNIT * LEAST, 132) == 1
    assert blocks_of(8, 1000, 132) == 8


@pytest.mark.skipif(isinstance(nvrtc.version(), str), reason=str(nvrtc.version()))
@each
def test_it_compiles(form):
    source = (nvrtc.FOLDER / "kv_attention.cu").read_text(encoding="utf-8")
    for dtype, mask in ((torch.bfloat16, None), (torch.float16, torch.float32)):
        sizes = Sizes(128, 1, form, of_values(form), dtype if form.block else None, True)
        defines = sizes.defines(dtype, mask, mask)
        cubin = nvrtc.compile(source, "kv_attention.cu", "sm_90a", defines)
        assert b".text.kv_attend\0" in cubin and b".text.kv_combine\0" in cubin
