"""aograph: a compiler that makes PyTorch models smaller and faster by rewriting their graphs."""

from typing import TYPE_CHECKING, Any

from .artifact import Artifact, load
from .calibrate import calibrate
from .errors import (
    AographError,
    ArtifactError,
    CaptureError,
    CompileError,
    InputError,
    PassError,
    RecipeError,
    WeightError,
)
from .frozen import refresh
from .optimize import OptimizedModule, explain, optimize
from .pretrained import LoadingReport, load_pretrained
from .recipe import Recipe, Rule
from .report import Report, Row
from .schemes import (
    KV4,
    KV8,
    KVFP8,
    Float8Dynamic,
    Float8DynamicSparse24,
    Float8WeightOnly,
    Int4WeightOnly,
    Int8Dynamic,
    Int8DynamicSparse24,
    Int8WeightOnly,
    Keep,
    Scheme,
    Sparse24,
)
from .statistics import LinearStatistics

if TYPE_CHECKING:
    from .packed_cache import PackedCache

__version__ = "0.1.0"

__all__ = [
    "optimize", "load_pretrained", "explain", "calibrate", "refresh", "load", "OptimizedModule", "PackedCache",
    "Artifact",
    "LoadingReport", "LinearStatistics", "Recipe", "Rule", "Scheme", "Float8Dynamic", "Float8DynamicSparse24",
    "Float8WeightOnly", "Int4WeightOnly", "Int8Dynamic", "Int8DynamicSparse24", "Int8WeightOnly", "KV8", "KV4",
    "KVFP8", "Keep", "Sparse24", "Report", "Row", "AographError", "ArtifactError", "CaptureError", "CompileError",
    "InputError", "PassError", "RecipeError", "WeightError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`PackedCache` is imported when it is asked for, as transformers is."""
    if name == "PackedCache":
        from .packed_cache import PackedCache

        return PackedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
