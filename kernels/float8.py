"""float8: rounding a weight to e4m3 (4 bits of exponent, 3 of mantissa, ±448, NaN, no infinity), and the way back.

Micikevicius et al., FP8 Formats for Deep Learning, 2022. Weights must be finite.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .rounding import chunks, is_fake, storable

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max  # 448
ALGORITHMS = {"minmax": [], "mse": [2 ** (i / 16) for i in range(16)]}  # what each tries, in scales that span all
MOVES = {  # a dtype's integers of the same size, how far left of e4m3's its exponent is, and how far off its bias
    torch.bfloat16: (torch.int16, 4, 2.0**120),
    torch.float16: (torch.int16, 7, 2.0**8),
    torch.float32: (torch.int32, 20, 2.0**120),
}


def pack(weight: Tensor, tile: tuple[int, int], dtype: torch.dtype, algorithm: str = "minmax") -> tuple[Tensor, Tensor]:
    """weight [N, K] -> q [N, K] e4m3 and scale [ceil(N / rows), K / columns] in `dtype`, with w ≈ q * scale.

    tile: the rows and columns of weights that share a scale. Codes meet the scale as stored, are rounded to nearest
    even, and saturate. algorithm: "minmax" lets each tile span the whole range; "mse" that or less, down to half of it,
    whichever has the least squared error: the steps between codes double with each power of two.
    ValueError for any other, and where K is not a multiple of the columns.
    """
    weight = weight.detach()
    (N, K), (rows, columns) = weight.shape, tile
    if algorithm not in ALGORITHMS:
        raise ValueError(f"no float8 rounding algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}")
    if K % columns:
        raise ValueError(f"a weight of {N} × {K} has no whole tiles of {columns} inputs: K must be a multiple of it")
    q = weight.new_empty(N, K, dtype=FLOAT8)
    of_rows = weight.new_empty(N, K // columns, dtype=torch.float32)
    parts = [] if is_fake(weight) else chunks(weight)

    def of_tiles() -> Tensor:
        return F.pad(of_rows, (0, 0, 0, -N % rows)).unflatten(0, (-1, rows))

    def rounded(part: slice, scale: Tensor) -> tuple[Tensor, Tensor]:
        """A part of the weight in units of the scale, and its codes: [n, K / columns, columns]."""
        tiles = torch.arange(part.start, part.stop, device=scale.device) // rows
        exact = weight[part].float().unflatten(1, (-1, columns)) / scale[tiles, :, None]
        return exact, exact.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)  # older casts do not saturate

    for part in parts:
        of_rows[part] = weight[part].abs().unflatten(1, (-1, columns)).amax(2)
    spanning = of_tiles().amax(1) / FLOAT8_MAX
    best, least = storable(spanning, dtype), torch.full_like(spanning, torch.inf)
    for ratio in ALGORITHMS[algorithm]:
        scale = storable(spanning * ratio, dtype)
        for part in parts:
            exact, codes = rounded(part, scale)
            of_rows[part] = exact.sub_(widen(codes, torch.float32)).square_().sum(2)
        error = of_tiles().sum(1) * scale.square()
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    for part in parts:
        q[part] = rounded(part, best)[1].flatten(1)
    return q, best.to(dtype)


def widen(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes, e4m3 or whole numbers, in a dtype that holds them; on CPU no e4m3 may be NaN.

    On CPU the bits are moved to where dtype has them, in a sixth of the time that the conversion of ATen takes.
    """
    if codes.dtype is not FLOAT8 or codes.device.type != "cpu" or dtype not in MOVES:
        return codes.to(dtype)
    integer, shift, bias = MOVES[dtype]
    bits = codes.view(torch.int8).to(integer)  # the sign is where it belongs
    value = (bits & 0x7F).bitwise_left_shift_(shift).bitwise_or_(bits.bitwise_and_(torch.iinfo(integer).min))
    return value.view(dtype).mul_(bias)
