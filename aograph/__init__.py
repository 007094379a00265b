"""aograph: a compiler that makes PyTorch models smaller and faster by rewriting their graphs."""

from .artifact import Artifact, load
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
from .schemes import Float8Dynamic, Float8WeightOnly, Int4WeightOnly, Int8Dynamic, Int8WeightOnly, Keep, Scheme

__version__ = "0.1.0"

__all__ = [
    "optimize", "load_pretrained", "explain", "refresh", "load", "OptimizedModule", "Artifact", "LoadingReport",
    "Recipe", "Rule", "Scheme", "Float8Dynamic", "Float8WeightOnly", "Int4WeightOnly", "Int8Dynamic", "Int8WeightOnly",
    "Keep", "Report", "Row", "AographError", "ArtifactError", "CaptureError", "CompileError", "InputError", "PassError",
    "RecipeError", "WeightError",
]  # fmt: skip
