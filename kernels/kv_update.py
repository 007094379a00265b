"""kv_update: new keys or values, quantized, into a packed cache at their positions, in place.

codes and scales: a packed cache [B, H, S, D] (`kv_cache.py`), of any strides; new [B, H, T, D] fp32, bf16 or fp16;
positions [B, T] int64, or [T], the same for all rows; those of a row differ. A position outside of 0 … S - 1 is an
error, and nothing is written; on a GPU it stops the device, as indexing does.

window and held: of a cache by channel; None where each token is by itself. There the positions of a row count up by
one, anything else is an error, too. After the call the window holds the block of the last of them; the block that it
held before is quantized, and so are those that the tokens went through. Where the new block was quantized before, as
after a step back or a new beginning, the window gets what its codes stand for, overwritten with what is new. So tokens
are exact while a row stays within a block, however often they are written; of an earlier block that a row comes back
to, the tokens that are not written again are rounded a second time when it leaves.
"""

import torch
from torch import Tensor

from . import cuda_kv_update
from .kv_cache import FLOATS, CacheCase, CodesOp, KVFormat
from .op import capability

kv_update = CodesOp(
    "kv_update(Tensor(a!) codes, Tensor(b!) scales, Tensor new, Tensor positions, Tensor(c!)? window=None, "
    "Tensor(d!)? held=None) -> ()"
)


@kv_update.fake
def _(codes, scales, new, positions, window=None, held=None):
    kv_update.case_of(codes, scales, new, positions, window, held)


@kv_update.case
def _(codes: Tensor, scales: Tensor, new: Tensor, positions: Tensor, window=None, held=None) -> CacheCase:
    form, D = kv_update.fit(codes, scales, window, held)
    B, H, S, _ = codes.shape
    kv_update.check("new", new, codes.device, FLOATS, (B, H, None, D))
    T = new.shape[2]
    kv_update.check("positions", positions, codes.device, (torch.int64,), (B, T), (T,))
    device = codes.device
    return CacheCase(
        device.type, new.dtype, T, D, D, None, capability(device), rows=B, heads=H, length=S, keys=form, values=form
    )


@kv_update.reference
def _(codes, scales, new, positions, window=None, held=None):
    B, _, S, _ = codes.shape
    positions = positions.expand(B, -1)
    torch._assert_async(
        ((positions >= 0) & (positions < S)).all(),
        f"kv_update: a position is outside of the cache, which holds 0 … {S - 1}: make it longer, or begin anew",
    )
    form: KVFormat = kv_update.format_of(codes, scales, window)
    if window is None:
        write((codes, scales), positions, form.quantize(new))
    else:
        by_channel(form, codes, scales, new, positions, window, held)


def write(caches: tuple[Tensor, ...], places: Tensor, values: tuple[Tensor, ...]) -> None:
    """Into each cache [B, H, n, …], at places [B, k] along n, its values [B, H, k, …]."""
    B, H = caches[0].shape[:2]
    rows = torch.arange(B, device=places.device)[:, None, None]
    heads = torch.arange(H, device=places.device)[:, None]
    for cache, value in zip(caches, values, strict=True):
        if value.dtype.itemsize == 1:  # there is no index_put_ of float8
            cache, value = cache.view(torch.uint8), value.view(torch.uint8)
        cache.index_put_((rows, heads, places[:, None]), value)


def by_channel(form, codes, scales, new, positions, window, held):
    """Quantizes the block in the window, then takes the tokens into what the blocks that they touch hold: the last of
    these goes into the window, the others into the codes."""
    (B, _, T, _), W, blocks = new.shape, form.block, scales.shape[2]
    rows, new = torch.arange(B, device=new.device), new.to(window.dtype)
    if isinstance(T, int) and T == 0:
        return
    torch._assert_async(
        (positions == positions[:, :1] + torch.arange(T, device=new.device)).all(),
        "kv_update: the positions of a row do not count up by one, as those of a cache by channel have to: keep each "
        "token by itself, kv4(keys=token)",
    )
    first, last = positions[:, 0] // W, positions[:, -1] // W
    asks = positions.device.type == "cpu" and not torch.compiler.is_exporting()  # waits for no GPU
    if asks and bool(((first == held) & (last == held)).all()):
        write((window,), positions % W, (new,))
        return
    caches = codes.unflatten(2, (blocks, W)), scales
    write(caches, held[:, None], quantized(form, window[:, :, None]))
    count = min((T + W - 2) // W + 1, blocks) if isinstance(T, int) else blocks  # in a graph T may be symbolic
    start = first.clamp(max=blocks - count)
    touched = start[:, None] + torch.arange(count, device=new.device)
    old = [cache[rows[:, None], :, touched].transpose(1, 2) for cache in caches]
    area = form.dequantize(old[0].flatten(2, 3), old[1], torch.float32).to(window.dtype)
    area = torch.where(chosen(touched == held[:, None]), window[:, :, None], area.unflatten(2, (count, W)))
    write((area.flatten(2, 3),), positions - start[:, None] * W, (new,))
    if not (isinstance(T, int) and T == 1):  # one token leaves no block behind it
        passed = chosen((touched >= first[:, None]) & (touched < last[:, None]))
        made = zip(quantized(form, area), old, strict=True)
        write(caches, touched, tuple(torch.where(passed, new, before) for new, before in made))
    window.copy_(area[rows, :, last - start])
    held.copy_(last)


def quantized(form: KVFormat, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, H, n, W, D/2] and scales [B, H, n, D, 2] of blocks [B, H, n, W, D]."""
    codes, scales = form.quantize(blocks.flatten(2, 3))
    return codes.unflatten(2, blocks.shape[2:4]), scales


def chosen(blocks: Tensor) -> Tensor:
    """Which blocks of each row [B, n], for tensors [B, H, n, …] of five dimensions."""
    return blocks[:, None, :, None, None]


@kv_update.implementation("cuda", supports=cuda_kv_update.supports)
def _(codes, scales, new, positions, window=None, held=None):
    caches = codes, scales, *(each for each in (window, held) if each is not None)
    if all(each.is_contiguous() for each in caches):
        form = kv_update.format_of(codes, scales, window)
        cuda_kv_update.update(codes, scales, new, positions, window, held, form)
    else:
        kv_update.oracle.function(codes, scales, new, positions, window, held)
