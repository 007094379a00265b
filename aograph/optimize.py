"""`optimize` and `explain`: from a model to an optimized module, or to what one would be."""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import export, huggingface, pipeline
from .capture import Capture, capture, flatten, handed_over, on_meta, retarget
from .cost import roofline
from .errors import CaptureError, CompileError, InputError, RecipeError
from .parts import in_parts
from .passes import PASSES, Pass
from .program import Program
from .recipe import Recipe
from .report import Report
from .weights import Source, WeightStore


class OptimizedModule(nn.Module):
    """A model whose graph was rewritten by a recipe; call it as the model. For inference only.

    `report` is that of the first capture (None before the first call, if there were no example inputs). A call whose
    shapes fit no capture so far makes another one; at most `max_captures` are kept, the least recently used goes
    first. All share their packed weights, which `state_dict()` gives by name.
    """

    _passes: Sequence[Pass] = PASSES

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        device: torch.device,
        dynamic_shapes: Any,
        hand_over: bool,
        compile: bool,
        compile_options: Mapping[str, Any],
        strict: bool,
        disable: Collection[str],
        dump: str | os.PathLike | None,
        max_captures: int,
        progress: bool,
        source: Source | None = None,
    ):
        super().__init__()
        self.recipe, self.device, self.dynamic_shapes = recipe, device, dynamic_shapes
        self.report: Report | None = None
        self._model = [model]  # in a list: not a submodule
        self._moved = device_of(model) != device
        self._store = WeightStore(model, device, hand_over, source)
        self._compile_options = {"fullgraph": True, **compile_options} if compile else None
        self._strict, self._disable, self._dump, self._progress = strict, disable, dump, progress
        self._captures: OrderedDict[int, tuple[Any, Capture, Callable]] = OrderedDict()
        self._count, self._max_captures = 0, max_captures
        self._parts: Callable | None = None
        self._lock = threading.RLock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat, spec = flatten(args, kwargs)
        if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in flat):
            raise InputError(
                "an optimized module is for inference: call it under torch.no_grad(), or detach the inputs"
            )
        found = self._program_for(args, kwargs, flat, spec)
        if found is None:
            assert self._parts is not None
            return self._parts(*args, **kwargs)
        captured, run = found
        with torch.no_grad():
            try:
                outputs = run(*flat)
            except Exception as error:
                if no_compiler(error):
                    raise CompileError(
                        "Inductor found no working compiler on this machine: install a C++ compiler such as g++ (or "
                        "set CXX), for a GPU Triton too; or give compile=False to run eagerly"
                    ) from error
                raise
        return pytree.tree_unflatten(outputs, captured.out_spec)

    def _program_for(
        self, args: tuple, kwargs: dict, flat: Sequence[Any], spec: pytree.TreeSpec
    ) -> tuple[Capture, Callable] | None:
        with self._lock:
            mine, reason = self._kinds(flat, spec), None
            for key, (known, captured, run) in reversed(self._captures.items()):
                if known == mine:
                    reason = captured.accepts(flat)
                    if reason is None:
                        self._captures.move_to_end(key)
                        return captured, run
            if self.dynamic_shapes is not None and reason is not None:
                raise InputError(f"the inputs do not fit the dynamic_shapes that were given: {reason}")
            return self.capture_or_split(args, kwargs)

    def capture_or_split(self, args: tuple, kwargs: dict) -> tuple[Capture, Callable] | None:
        """A new capture; None where the model cannot be captured whole, and runs in parts from now on."""
        if self._parts is not None:
            return None
        try:
            return self.add_capture(args, kwargs)
        except CaptureError as error:
            model = self._model[0]
            moved = self._moved or handed_over(model)
            if self.dynamic_shapes is not None or moved or not takes(model, args, kwargs):
                raise
            self.report = self.report or Report()
            self._parts = in_parts(
                model, self.recipe, str(error).partition("\n")[0], self.report, self._store.model is not None,
                self._compile_options, disable=self._disable, dump=self._dump,
            )  # fmt: skip
            return None

    def _kinds(self, flat: Sequence[Any], spec: pytree.TreeSpec) -> tuple:
        """What must be equal for a call to use a capture: structure, dtypes, devices, ranks, plain values.

        Where the program was moved to another device than the model's, so were its example inputs.
        """
        leaves = [
            (v.dtype, self.device if self._moved else v.device, v.ndim) if isinstance(v, Tensor) else (type(v), v)
            for v in flat
        ]
        return spec, tuple(leaves)

    def add_capture(self, args: tuple, kwargs: dict) -> tuple[Capture, Callable]:
        """Captures the model for these inputs, rewrites the graph, packs what is not packed yet."""
        flat, spec = flatten(args, kwargs)
        captured, report = rewrite(
            self._model[0], self.recipe, args, kwargs, self.dynamic_shapes, self.device,
            disable=self._disable, dump=self._dump, passes=self._passes,
        )  # fmt: skip
        run = self._runner(captured.program, report)
        self.report = self.report or report
        self._captures[self._count] = self._kinds(flat, spec), captured, run
        self._count += 1
        if len(self._captures) > self._max_captures:
            self._captures.popitem(last=False)
        return captured, run

    def _runner(self, program: Program, report: Report) -> Callable:
        """What computes the flat outputs of a rewritten program from its flat inputs."""
        check_matches(report, self.recipe, self._strict)
        self._store.materialize(program, self._progress)
        program.graph_module.recompile()
        if self._compile_options is None:
            return program.graph_module
        from .backend import joined, needed, suited  # it imports Inductor, which takes a while

        return torch.compile(program.graph_module, **joined(self._compile_options, suited(report), needed(program)))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """All tensors that the captures run on, packed and not, by name."""
        if args or kwargs:
            raise InputError("the state of an optimized module has no prefix and no destination: call state_dict()")
        return dict(self._store.names)

    save = export.save  # writes an artifact

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        raise InputError("an optimized module cannot load weights: load them into the model and optimize it again")

    def _apply(self, *_: Any, **__: Any) -> Any:
        raise InputError(
            f"an optimized module stays on {self.device} in its dtype: move or cast the model before optimizing it, "
            "or give device= to optimize"
        )

    def train(self, mode: bool = True) -> OptimizedModule:
        if mode:
            raise InputError("an optimized module is for inference: train the model, and optimize it again")
        return super().train(False)

    def extra_repr(self) -> str:
        return f"recipe={str(self.recipe)!r}, {self.report.summary() if self.report else 'captured at the first call'}"


def optimize(
    model: nn.Module,
    recipe: Any = "int4wo",
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    device: torch.device | str | None = None,
    hand_over: bool = False,
    compile: bool = True,
    compile_options: Mapping[str, Any] | None = None,
    strict: bool = False,
    disable: Collection[str] = (),
    dump: str | os.PathLike | None = None,
    max_captures: int = 8,
    progress: bool = True,
) -> OptimizedModule:
    """A smaller, faster module that is called as `model` is.

    recipe: a preset string ("int4wo", "int8wo", "int4wo + lm_head:int8wo"), a `Recipe`, a scheme, a list of rules or
        a `.toml` file.
    example_inputs: a tensor, a tuple of positional inputs, a dict of keyword inputs, or a pair (tuple, dict) of both;
        the model is captured with them at once. None: at the first call.
    dynamic_shapes: as in `torch.export.export`. None: dimensions are dynamic where the model allows it, and calls with
        shapes that do not fit are captured again.
    device: where to run; packing happens there, one weight at a time. None: where the model is.
    hand_over: the model is given away: each original weight is released (moved to meta) as it is packed. Otherwise
        the model is left as it was.
    compile, compile_options: compile with Inductor (`torch.compile` takes the options); False runs the rewritten graph
        eagerly.
    strict: a recipe that rewrites nothing is an error, not a warning.
    disable, dump: names of passes to leave out; a folder for a diff after each pass that changes the graph.
    max_captures: how many captures are kept. progress: show a bar while packing, on a terminal.

    A model that cannot be captured whole runs in parts, as behind `torch.compile(backend="aograph")`; a warning and the
    report say so, where it failed and what it costs. That takes no `dynamic_shapes` and no other `device`.

    Raises `AographError`: `RecipeError`, `CaptureError`, `InputError`, `WeightError`, `CompileError`, `PassError`.
    """
    check_model(model)
    parsed = Recipe.of(recipe)
    target = resolve(device, model)
    huggingface.register_pytrees()
    kind = OptimizedModule
    if huggingface.is_pretrained(model):
        from .generation import OptimizedPreTrained as kind  # it builds on this file
    optimized = kind(
        model, parsed, device=target, dynamic_shapes=dynamic_shapes, hand_over=hand_over, compile=compile,
        compile_options=compile_options or {}, strict=strict, disable=disable, dump=dump, max_captures=max_captures,
        progress=progress,
    )  # fmt: skip
    optimized.eval()
    if example_inputs is not None:
        optimized.capture_or_split(*call_of(example_inputs))
    return optimized


def explain(
    model: nn.Module,
    recipe: Any = "int4wo",
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    device: torch.device | str | None = None,
    disable: Collection[str] = (),
) -> Report:
    """The report of what `optimize` would do; no weight is read (the model may be on meta).

    `report.costs()` gives costs in the graph's symbols and roofline times. Parameters as for `optimize`.
    """
    check_model(model)
    if example_inputs is None:
        raise InputError("explain needs example_inputs to capture the model with")
    target = resolve(device, model)
    _, report = rewrite(model, Recipe.of(recipe), *call_of(example_inputs), dynamic_shapes, target, disable=disable)
    return report


def rewrite(
    model: nn.Module,
    recipe: Recipe,
    args: tuple,
    kwargs: dict,
    dynamic_shapes: Any,
    device: torch.device,
    disable: Collection[str] = (),
    dump: str | os.PathLike | None = None,
    passes: Sequence[Pass] = PASSES,
    private: Collection[str] = (),
) -> tuple[Capture, Report]:
    """A capture whose program the pipeline has rewritten, before any weight is touched.

    private: names of inputs whose form passes may change.
    """
    kwargs = dict(sorted(kwargs.items()))
    source = device_of(model)
    if handed_over(model) and source.type != "meta":
        model, source = on_meta(model), torch.device("meta")
    if source != device:  # inputs come as the optimized module takes them
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(source), (args, kwargs))
    captured = capture(model, args, kwargs, dynamic_shapes)
    captured.program.private = frozenset(private)
    if source != device and device.type != "meta":
        retarget(captured.program, source, device)
    report = pipeline.run(captured.program, recipe, disable=disable, dump=dump, passes=passes)
    report.roofline = roofline(str(device))
    return captured, report


def call_of(example_inputs: Any, name: str = "example_inputs") -> tuple[tuple, dict]:
    """Positional and keyword inputs from what users write, which errors call by that name."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        match example_inputs:
            case [[*args], Mapping() as kwargs]:
                return tuple(args), dict(kwargs)
        return tuple(example_inputs), {}
    raise InputError(
        f"{name} is a {type(example_inputs).__name__}: give a tensor, a tuple of positional inputs, a dict of "
        "keyword inputs, or (tuple, dict)"
    )


def resolve(device: torch.device | str | None, model: nn.Module) -> torch.device:
    """The device that the caller means, a GPU with its index."""
    if device is None:
        return device_of(model)
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is none that torch knows: {error}") from None
    if found.type != "cuda":
        return found
    if not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but torch sees no CUDA device here")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def device_of(model: nn.Module) -> torch.device:
    """Where most of the model's bytes are (the meta device counts least)."""
    sizes: dict[torch.device, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        sizes[tensor.device] = sizes.get(tensor.device, 0) + (0 if tensor.is_meta else tensor.nbytes)
    return max(sizes, key=lambda d: sizes[d], default=torch.device("cpu"))


def takes(model: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a call fits the signature of the model."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"optimize takes an nn.Module, not a {type(model).__name__}")
    if any(isinstance(m, OptimizedModule) for m in model.modules()):
        raise InputError("the model is optimized already: give the original to try another recipe")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise InputError("the model is compiled already: give the module that was given to torch.compile")


def check_matches(report: Report, recipe: Recipe, strict: bool) -> None:
    if report.rewritten:
        return
    reasons = "; ".join(dict.fromkeys(n for r in report.rows for n in r.notes[:1])) or "the graph has no candidate"
    message = f"the recipe {str(recipe)!r} rewrote nothing: {reasons}"
    if strict:
        raise RecipeError(message)
    warnings.warn(message, stacklevel=5)


def no_compiler(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, says that the compiler of generated code is missing."""
    while error is not None:
        if type(error).__name__ in ("InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton"):
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return False
