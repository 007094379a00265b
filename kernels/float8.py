"""float8: rounding a weight to e4m3 (4 bits of exponent, 3 of mantissa, ±448, NaN, no infinity), and the way back.

Micikevicius et al., FP8 Formats for Deep Learning, 2022. Weights must be finite.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .rounding import chunks, is_fake, storable

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max  # 448
MOVES = {  # a dtype of 16 bits to make values in, how far left of e4m3's its exponent is, and how far off its bias
    torch.bfloat16: (torch.bfloat16, 4, 2.0**120),
    torch.float16: (torch.float16, 7, 2.0**8),
    torch.float32: (torch.float16, 7, 2.0**8),
}


def pack(weight: Tensor, tile: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> q [N, K] e4m3 and scale [ceil(N / rows), K / columns] in `dtype`, with w ≈ q * scale.

    tile: the rows and columns of weights that share a scale. Each tile spans the whole range; codes meet the scale as
    stored, are rounded to nearest even, and saturate. ValueError where K is not a multiple of the columns.
    """
    weight = weight.detach()
    (N, K), (rows, columns) = weight.shape, tile
    if K % columns:
        raise ValueError(f"a weight of {N} × {K} has no whole tiles of {columns} inputs: K must be a multiple of it")
    q = weight.new_empty(N, K, dtype=FLOAT8)
    largest = weight.new_empty(N, K // columns, dtype=torch.float32)
    parts = [] if is_fake(weight) else chunks(weight)
    for part in parts:
        largest[part] = weight[part].abs().unflatten(1, (-1, columns)).amax(2)
    of_tiles = F.pad(largest, (0, 0, 0, -N % rows)).unflatten(0, (-1, rows)).amax(1)
    scale = storable(of_tiles / FLOAT8_MAX, dtype)
    of_rows = scale.repeat_interleave(rows, 0)[:N, :, None]
    for part in parts:
        codes = weight[part].float().unflatten(1, (-1, columns)) / of_rows[part]
        q[part] = codes.clamp_(-FLOAT8_MAX, FLOAT8_MAX).flatten(1).to(FLOAT8)  # older casts do not saturate
    return q, scale.to(dtype)


def widen(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes, e4m3 or whole numbers, in a dtype that holds them; on CPU no e4m3 may be NaN.

    On CPU the bits are moved to where dtype has them, in a sixth of the time that the conversion of ATen takes.
    """
    if codes.dtype is not FLOAT8 or codes.device.type != "cpu" or dtype not in MOVES:
        return codes.to(dtype)
    small, shift, bias = MOVES[dtype]
    bits = codes.view(torch.int8).to(torch.int16)  # the sign is where it belongs
    value = (bits & 0x7F).bitwise_left_shift_(shift).bitwise_or_(bits.bitwise_and_(torch.iinfo(torch.int16).min))
    return value.view(small).to(dtype).mul_(bias)
