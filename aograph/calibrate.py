"""`calibrate`: from a model, a recipe and batches of inputs to a recipe that knows what goes into the linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree
from tqdm import tqdm

from . import huggingface
from .capture import Capture
from .errors import CaptureError, InputError
from .expression import Expression
from .optimize import OptimizedModule, call_of, check_model, resolve, takes
from .passes import PASSES, Stage
from .passes.find_sites import FLOATS
from .patterns.language import written
from .program import Program
from .recipe import Recipe
from .report import Report
from .statistics import LinearStatistics

ROWS = 512  # tokens whose squares are summed at a time: their copy in float64 stays small


def calibrate(
    model: nn.Module,
    recipe: Any,
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Recipe:
    """The recipe with statistics of what goes into the model's linears, for schemes that need to know.

    `optimize` and `torch.compile(backend="aograph")` take the result as they take any recipe; `Recipe.save` writes it.
    The model runs on each batch, in eval mode and without gradients, on the graphs that `optimize` rewrites, so that
    all that becomes a linear there is covered, whatever rule it is under: rules may be changed afterwards with
    `dataclasses.replace(calibrated, rules=…)`. Statistics that the recipe had are replaced. The model stays as it is;
    buffers that it writes change from batch to batch in a copy.

    recipe: as for `optimize`.
    batches: an iterable of what the model is called with: a tensor, a tuple of positional inputs, a dict of keyword
        inputs, or a pair (tuple, dict) of both. Shapes may differ; tensors are moved to the device. All tokens count
        alike, those that are padding, too: leave padding out, or calibrate on whole sequences.
    device: where to run, with a copy of the weights if the model is elsewhere. None: where the model is.
    progress: show a bar, on a terminal.

    The statistics are in `calibrated.statistics`, a `LinearStatistics` for each weight by its qualified name: over all
    uses of a weight (those that read the same x are one), and under all names of a tied one. Sums are in float64, in a
    fixed order.

    Raises `InputError` where there is no batch or no token, for a batch that is no call of the model, and for NaN and
    inf in what goes into a linear, `CaptureError` for models that cannot be captured whole, and what `optimize` raises.
    """
    check_model(model)
    parsed, target = Recipe.of(recipe), resolve(device, model)
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise InputError(
            f"batches is a {type(batches).__name__}: give an iterable of calls, such as a list of input tensors"
        )
    huggingface.register_pytrees()
    watched = Watched(model, parsed, target)
    bar = tqdm(batches, "calibrating", unit="batch", disable=None if progress else True, leave=False)
    with torch.no_grad():
        for number, batch in enumerate(bar):
            args, kwargs = call_of(batch, name=f"batch {number}")
            if not takes(model, args, kwargs):
                raise InputError(f"batch {number} is no call of {type(model).__name__}: it does not fit its forward")
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(target), (args, kwargs))
            watched(*args, **kwargs)
            watched.close(number)
    if watched.batches == 0:
        raise InputError("batches is empty: there is nothing to calibrate on (a generator is used up after one loop)")
    found = watched.statistics()
    if not found:
        raise InputError("nothing went into a linear: the batches hold no token, or the model's graph has no linear")
    return replace(parsed, statistics=found)


@dataclass
class Seen:
    """What has gone into linears so far, on the device: bounds [2] and sums of squares [K], in float64."""

    bounds: Tensor
    squares: Tensor
    tokens: int

    @classmethod
    def of(cls, x: Tensor) -> Seen:
        """Of x [..., K], which has elements."""
        rows = x.reshape(-1, x.shape[-1])
        squares = torch.zeros(rows.shape[1], dtype=torch.float64, device=x.device)
        for part in rows.split(ROWS):
            squares += part.double().square().sum(0)
        return cls(torch.stack(torch.aminmax(rows)).double(), squares, len(rows))

    def __add__(self, other: Seen) -> Seen:
        low, high = torch.stack([self.bounds, other.bounds]).unbind(1)
        same = len(self.squares) == len(other.squares)
        squares = self.squares + other.squares if same else self.squares[:0]
        return Seen(torch.stack([low.amin(), high.amax()]), squares, self.tokens + other.tokens)

    def statistics(self) -> LinearStatistics:
        low, high = self.bounds.tolist()
        return LinearStatistics(low, high, self.squares.sqrt().float().cpu(), self.tokens)


class Watched(OptimizedModule):
    """A model that computes what it did, on graphs in normal form, and keeps what goes into linears by weight."""

    _passes = tuple(each for each in PASSES if each.stage <= Stage.DECIDE)

    def __init__(self, model: nn.Module, recipe: Recipe, device: torch.device):
        super().__init__(
            model, recipe, device=device, dynamic_shapes=None, hand_over=False, compile=False, compile_options={},
            strict=False, disable=(), dump=None, max_captures=8, progress=False,
        )  # fmt: skip
        self.batches = 0
        self._seen: dict[str, Seen] = {}
        self._batch: list[tuple[str, Tensor]] = []  # names and bounds
        self._aliases: dict[str, str] = {}

    def capture_or_split(self, args: tuple, kwargs: dict) -> tuple[Capture, Callable]:
        try:
            return self.add_capture(args, kwargs)
        except CaptureError as error:
            raise CaptureError(f"calibration needs the whole model in one graph: {error}") from error

    def _runner(self, program: Program, report: Report) -> Callable:
        self._store.materialize(program, self._progress)
        self._aliases |= program.aliases
        return Taps(program, self.see).run

    def see(self, names: list[str], x: Tensor) -> None:
        seen = Seen.of(x)
        self._batch.append((names[0], seen.bounds))
        for name in names:
            self._seen[name] = self._seen[name] + seen if name in self._seen else seen

    def close(self, number: int) -> None:
        """Ends a batch. Raises `InputError` if NaN or inf went into a linear; the device is waited for once."""
        bounds = [bounds.to(self.device) for _, bounds in self._batch]
        if bounds and not (finite := torch.stack(bounds).isfinite().all(1)).all():
            name, _ = self._batch[finite.tolist().index(False)]
            raise InputError(
                f"NaN or inf goes into the linear {name.removesuffix('.weight')} in batch {number}, the first "
                "to get any: look at that batch, or at the dtype of the model (float16 ends at 65504)"
            )
        self._batch.clear()
        self.batches += 1

    def statistics(self) -> dict[str, LinearStatistics]:
        found = {name: seen.statistics() for name, seen in self._seen.items()}
        return found | {alias: found[name] for alias, name in self._aliases.items() if name in found}


class Taps(Interpreter):
    """Runs a program, and calls `see(names of weights, x)` for each x that goes into linears and has elements."""

    def __init__(self, program: Program, see: Callable[[list[str], Tensor], None]):
        super().__init__(program.graph_module)
        self.see = see
        self.readers: dict[Node, tuple[Node, list[str]]] = {}  # siblings count as one: the first, with all weights
        first: dict[Node, Node] = {}
        for site in program.sites:
            if site.x.meta["val"].dtype in FLOATS:
                reader = site.node if written(site.x) is not None else first.setdefault(site.x, site.node)
                self.readers.setdefault(reader, (site.x, []))[1].extend(Expression.of(site.weight).leaves)

    def run_node(self, node: Node) -> Any:
        if node in self.readers:
            x, names = self.readers[node]
            if self.env[x].numel():
                self.see(list(dict.fromkeys(names)), self.env[x])
        return super().run_node(node)
