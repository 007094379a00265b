"""Schemes: what a rule of a recipe asks for. One frozen dataclass for each technique.

`preset` is the name under which recipes know it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from .errors import RecipeError
from .kernels.kv_cache import FP8, INT4, INT4_CHANNEL, INT8, KVFormat
from .kernels.prune24 import METHODS
from .kernels.quantized_activation import BLOCK
from .kernels.rounding import ALGORITHMS, GROUP_SIZES

LINEAR, CACHE = "linear", "cache"  # kinds of candidates


def nearest(word: Any, valid: Iterable[str]) -> str:
    """`did you mean …?` for the nearest valid word, or the list of all if none is near."""
    valid = [str(v) for v in valid]
    near = difflib.get_close_matches(str(word), valid, n=1, cutoff=0.5)
    listed = ", ".join(valid[:12]) + (f" … ({len(valid)} in all)" if len(valid) > 12 else "")
    return f"did you mean {near[0]!r}?" if near else f"valid: {listed}"


@dataclass(frozen=True)
class Scheme:
    """The base of schemes; equal parameters make equal schemes.

    kind: what the scheme is for: linears, caches of keys and values, or anything (None).
    differentiable: whether gradients for x flow through what the scheme makes of a linear.
    """

    preset: ClassVar[str]
    kind: ClassVar[str | None] = LINEAR
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises `RecipeError` for parameters with values that they cannot have."""

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(cls))

    def settings(self, changed_only: bool = True) -> dict[str, Any]:
        """The parameters and their values; by default only those that differ from the defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if not changed_only or getattr(self, f.name) != f.default
        }

    def __str__(self) -> str:
        settings = ", ".join(f"{k}={v}" for k, v in self.settings().items())
        return f"{self.preset}({settings})" if settings else self.preset

    def refuse(self, N: int, K: int) -> str | None:
        """Why a linear with a weight [N, K] cannot take the scheme; None if it can."""
        return None

    def unsupported(self, capability: tuple[int, int] | None) -> str | None:
        """Why a GPU of that CUDA compute capability cannot carry out the scheme; None if it can, or is no GPU."""
        return None

    @property
    def calibrated(self) -> bool:
        """Whether the scheme needs statistics of the activations."""
        return False

    def check(self, parameter: str, valid: Iterable[Any]) -> None:
        value, valid = getattr(self, parameter), tuple(valid)
        if value not in valid:
            raise RecipeError(f"{self.preset}: {parameter}={value!r} is unknown; {nearest(value, valid)}")


@dataclass(frozen=True)
class Keep(Scheme):
    """Leaves what it matches as it is."""

    preset: ClassVar[str] = "none"
    kind: ClassVar[str | None] = None


@dataclass(frozen=True)
class Int8WeightOnly(Scheme):
    """Weights in 8 bits, symmetric, one scale per channel or group of inputs; activations and arithmetic as they were.

    algorithm: how the range of a channel is found: "minmax" (no clipping), "mse" (the clip that minimises the
        squared error).
    group_size: how many inputs of a channel share a scale: 32, 64, 128 or 256, which must divide K; None: all.
    """

    preset: ClassVar[str] = "int8wo"
    algorithm: str = "minmax"
    group_size: int | None = None

    def __post_init__(self) -> None:
        self.check("algorithm", ALGORITHMS)
        if self.group_size is not None:
            self.check("group_size", GROUP_SIZES)

    def refuse(self, N: int, K: int) -> str | None:
        return None if self.group_size is None else indivisible(K, self.group_size)


@dataclass(frozen=True)
class Int4WeightOnly(Scheme):
    """Weights in 4 bits, asymmetric, one scale and zero point per group of `group_size` inputs of a channel.

    group_size: 32, 64, 128 or 256 inputs; must divide K.
    algorithm: "mse" or "minmax", as for int8wo; clipping pays at 4 bits.
    """

    preset: ClassVar[str] = "int4wo"
    group_size: int = 64
    algorithm: str = "mse"

    def __post_init__(self) -> None:
        self.check("group_size", GROUP_SIZES)
        self.check("algorithm", ALGORITHMS)

    def refuse(self, N: int, K: int) -> str | None:
        return indivisible(K, self.group_size)


@dataclass(frozen=True)
class Float8WeightOnly(Scheme):
    """Weights in 8-bit floating point (e4m3), one scale per channel; activations and arithmetic as they were."""

    preset: ClassVar[str] = "float8wo"


@dataclass(frozen=True)
class Int8Dynamic(Scheme):
    """Weights in 8 bits, one scale per channel, activations too, one scale per token; products of integers.

    algorithm: as for int8wo, of the weights.
    mapping: of activations: "symmetric", or "asymmetric", with a zero point, for those of mostly one sign.
    activation: "dynamic", or "static": one scale for all tokens, from the range that `aograph.calibrate` saw; what is
        outside of it saturates.
    """

    preset: ClassVar[str] = "int8dq"
    differentiable: ClassVar[bool] = False
    algorithm: str = "minmax"
    mapping: str = "symmetric"
    activation: str = "dynamic"

    def __post_init__(self) -> None:
        self.check("algorithm", ALGORITHMS)
        self.check("mapping", ("symmetric", "asymmetric"))
        self.check("activation", ("dynamic", "static"))

    @property
    def calibrated(self) -> bool:
        return self.activation == "static"


@dataclass(frozen=True)
class Float8Dynamic(Scheme):
    """Weights and activations in 8-bit floating point (e4m3), which products take as they are.

    On CUDA from compute capability 8.9 on; on CPU by dequantization, which saves memory, not time.

    granularity: what shares a scale: "row", a token and an output channel each; "tensor", all; "block", 128 inputs of
        a token, and 128 × 128 weights (DeepSeek-V3, 2024), where K must be a multiple of 128.
    activation: "dynamic", or "static": one scale for all tokens, from what `aograph.calibrate` saw; what is beyond it
        saturates. Not with blocks.
    """

    preset: ClassVar[str] = "float8dq"
    differentiable: ClassVar[bool] = False
    granularity: str = "row"
    activation: str = "dynamic"

    def __post_init__(self) -> None:
        self.check("granularity", ("row", "tensor", "block"))
        self.check("activation", ("dynamic", "static"))
        if self.granularity == "block" and self.activation == "static":
            raise RecipeError(f"{self.preset}: blocks have no static scale: give activation=dynamic or granularity=row")

    @property
    def calibrated(self) -> bool:
        return self.activation == "static"

    def refuse(self, N: int, K: int) -> str | None:
        halved = self.granularity == "block" and K % BLOCK
        return f"K = {K} is not divisible by the block size {BLOCK}" if halved else None

    def unsupported(self, capability: tuple[int, int] | None) -> str | None:
        if capability is None or capability >= (8, 9):
            return None
        here = "{}.{}".format(*capability)
        return f"products of float8 need compute capability 8.9; this GPU has {here}: float8wo or int8dq run on it"


@dataclass(frozen=True)
class Sparse(Scheme):
    """What schemes have in common whose weights are 2:4: two of each 4 consecutive inputs of a channel keep theirs.

    method: which two: see `Sparse24`. A scheme that also quantizes has the class of the other scheme behind this one.
    """

    method: str = "magnitude"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("method", METHODS)

    def refuse(self, N: int, K: int) -> str | None:
        return f"K = {K} is not a multiple of 4" if K % 4 else super().refuse(N, K)

    @property
    def calibrated(self) -> bool:
        return self.method == "wanda" or super().calibrated


@dataclass(frozen=True)
class Sparse24(Sparse):
    """Weights that are 2:4, in their own precision; linears that sparse products do not make faster stay dense.

    method: which two of four weights stay: "magnitude", the largest; "wanda", those with the largest product of weight
        and norm of the input, which needs calibrated statistics (`aograph.calibrate`).
    """

    preset: ClassVar[str] = "sparse24"


@dataclass(frozen=True)
class Int8DynamicSparse24(Sparse, Int8Dynamic):
    """int8dq on weights that are 2:4.

    method: as for sparse24.
    algorithm: as for int8dq; mapping: as for int8dq; activation: as for int8dq.
    """

    preset: ClassVar[str] = "int8dq-sparse24"


@dataclass(frozen=True)
class Float8DynamicSparse24(Sparse, Float8Dynamic):
    """float8dq on weights that are 2:4.

    method: as for sparse24.
    granularity: as for float8dq; with "block", products stay dense. activation: as for float8dq.
    """

    preset: ClassVar[str] = "float8dq-sparse24"


@dataclass(frozen=True)
class KVCache(Scheme):
    """What schemes have in common that quantize caches of keys and values as tokens are stored.

    format: how, but for what the parameters of a scheme say.
    """

    kind: ClassVar[str | None] = CACHE
    differentiable: ClassVar[bool] = False
    format: ClassVar[KVFormat]

    def packed_format(self, keys: bool) -> KVFormat:
        """How a cache is packed; keys: whether it holds keys alone."""
        return self.format

    def refuse_head(self, D: int, keys: bool) -> str | None:
        """Why a cache with heads of D cannot take the scheme; None if it can."""
        try:
            self.packed_format(keys).groups(D)
        except ValueError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class KV8(KVCache):
    """Caches of keys and values in 8 bits, symmetric, one scale for each token and head."""

    preset: ClassVar[str] = "kv8"
    format: ClassVar[KVFormat] = INT8


@dataclass(frozen=True)
class KVFP8(KVCache):
    """Caches of keys and values in 8-bit floating point (e4m3), one scale for each token and head."""

    preset: ClassVar[str] = "kvfp8"
    format: ClassVar[KVFormat] = FP8


@dataclass(frozen=True)
class KV4(KVCache):
    """Caches of keys and values in 4 bits, asymmetric, with a scale and a minimum for what is quantized together.

    group_size: how many neighbours along the head of a token: 16, 32, 64 or 128, which must divide the head size.
    keys: "channel": keys instead by channel, 64 tokens of each, as some channels have outliers at all tokens (Liu et
        al., KIVI, 2024); the newest 64 or fewer tokens stay as they are; tokens must come in order. "token": as values.
    """

    preset: ClassVar[str] = "kv4"
    format: ClassVar[KVFormat] = INT4
    group_size: int = 32
    keys: str = "channel"

    def __post_init__(self) -> None:
        self.check("group_size", (16, 32, 64, 128))
        self.check("keys", ("channel", "token"))

    def packed_format(self, keys: bool) -> KVFormat:
        if keys and self.keys == "channel":
            return INT4_CHANNEL
        return dataclasses.replace(self.format, group_size=self.group_size)


def indivisible(K: int, group_size: int) -> str | None:
    """Why K inputs have no whole groups of that size, with the largest size that would fit; None if they have."""
    if K % group_size == 0:
        return None
    fits = [g for g in GROUP_SIZES if K % g == 0]
    return f"K = {K} is not divisible by the group size {group_size}" + (f" ({fits[-1]} would be)" if fits else "")


def subclasses(cls: type[Scheme]) -> list[type[Scheme]]:
    return [s for c in cls.__subclasses__() for s in (c, *subclasses(c))]


PRESETS: dict[str, type[Scheme]] = {cls.preset: cls for cls in subclasses(Scheme) if "preset" in vars(cls)}


def preset_of(form: KVFormat) -> str:
    """The preset of the scheme that packs a cache so."""
    return next(n for n, kind in PRESETS.items() if issubclass(kind, KVCache) and kind.format.name == form.name)
