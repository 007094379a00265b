"""What a compiled graph takes and gives, as data: checked before a call, since compiled code checks nothing."""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import InputError

ALIGNMENT = 16  # bytes; what compiled code may expect of the address of an input
LEAF = "*"


@dataclass(frozen=True)
class Value:
    """One input or output. A tensor has a dtype, the kind of its device, and sizes, which are numbers or expressions of
    symbols as text; anything else is a constant: `value`, which a call must give as it was at save. `within`: the least
    and the largest number that a tensor of indices may hold: code that is given another one ends the process."""

    name: str
    dtype: str | None = None
    device: str | None = None
    sizes: tuple[int | str, ...] = ()
    value: Any = None
    written: bool = False  # in place, by the graph
    within: tuple[int, int] | None = None

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.sizes))
        return f"{self.name}: {self.dtype}[{sizes}]" if self.dtype else f"{self.name} = {self.value!r}"


@dataclass(frozen=True)
class Signature:
    """The calling convention of a graph.

    inputs, outputs: flat, in order. ranges: of the symbols, inclusive, None: no end. guards: relations between sizes
    that the code relies on. takes, gives: the containers of the inputs and outputs, as `tree` writes them.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    ranges: Mapping[str, tuple[int, int | None]]
    guards: tuple[str, ...]
    takes: Any
    gives: Any

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Signature:
        """From the JSON of `dataclasses.asdict`."""

        def value(each: Mapping[str, Any]) -> Value:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in each.items()}
            return Value(**fields)

        inputs, outputs = (tuple(map(value, data[key])) for key in ("inputs", "outputs"))
        ranges = {symbol: (low, high) for symbol, (low, high) in data["ranges"].items()}
        return cls(inputs, outputs, ranges, tuple(data["guards"]), data["takes"], data["gives"])

    def check(self, given: Sequence[Any], device: torch.device, contents: bool = True) -> list[Tensor]:
        """The tensors of a call's flat inputs, as the code expects them. Raises `InputError` for what does not fit.

        contents: look at indices, too, which waits for a GPU.
        """
        tensors = []
        sizes: dict[str, int] = {}
        for like, value in zip(self.inputs, given, strict=True):
            if like.dtype is not None:
                tensors.append(fitting(like, value, device, sizes))
            elif isinstance(value, Tensor) or value != like.value:
                raise InputError(f"{like.name} is {describe(value)}: it was {like.value!r} when the graph was saved")
        for like, tensor in zip((i for i in self.inputs if i.dtype), tensors, strict=True):
            for i, (size, actual) in enumerate(zip(like.sizes, tensor.shape, strict=True)):
                if (expected := evaluate(size, sizes)) != actual:
                    raise InputError(
                        f"{like.name}.shape[{i}] is {actual}; it must be {size} = {expected}, as for {like}"
                    )
            if contents and like.within and tensor.numel():
                check_within(like, tensor)
        for symbol, (low, high) in self.ranges.items():
            if symbol in sizes and not low <= sizes[symbol] <= (sizes[symbol] if high is None else high):
                where = next(str(i) for i in self.inputs if symbol in i.sizes)
                wanted = f"{low} to {'any' if high is None else high}"
                raise InputError(f"{symbol} is {sizes[symbol]}; the graph was compiled for {wanted} (in {where})")
        for guard in self.guards:
            if not evaluate(guard, sizes):
                raise InputError(f"the graph was compiled for sizes with {guard}; they are {sizes}")
        return tensors

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """The outputs in their containers."""
        found = iter(tensors)
        return assemble(self.gives, iter([next(found) if out.dtype else out.value for out in self.outputs]))


def fitting(like: Value, value: Any, device: torch.device, sizes: dict[str, int]) -> Tensor:
    """A tensor as the code expects it; notes the sizes that stand for symbols."""
    if not isinstance(value, Tensor):
        raise InputError(f"{like.name} is {describe(value)}; the graph takes {like}")
    place = device if like.device == device.type else torch.device(like.device or "cpu")
    wrong = str(value.dtype) != f"torch.{like.dtype}" or value.ndim != len(like.sizes) or value.device != place
    if wrong or value.layout is not torch.strided:
        raise InputError(f"{like.name} is {describe(value)}; the graph takes {like} on {place}")
    for size, actual in zip(like.sizes, value.shape, strict=True):
        if isinstance(size, str):
            solve(size, actual, sizes)
    dense = value.is_contiguous() and not value.data_ptr() % ALIGNMENT
    if not dense and like.written:
        raise InputError(
            f"{like.name} is written in place: it must be contiguous, at an address divisible by {ALIGNMENT}"
        )
    return value.detach() if dense else value.detach().clone(memory_format=torch.contiguous_format)


def check_within(like: Value, tensor: Tensor) -> None:
    assert like.within is not None
    low, high = like.within
    least, largest = (int(bound) for bound in tensor.aminmax())
    if least < low or largest > high:
        wrong = least if least < low else largest
        raise InputError(f"{like.name} holds {wrong}; the graph takes {low} to {high}")


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return f"{value!r}" if isinstance(value, (bool, int, float, str, type(None))) else f"a {type(value).__name__}"


# --- containers --------------------------------------------------------------------------------------------


class Record(dict):
    """A dict whose values are attributes too: how outputs of other classes come, and named tuples."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


PLAIN = {dict: "dict", list: "list", tuple: "tuple"}


def tree(spec: pytree.TreeSpec) -> Any:
    """The containers of a pytree as JSON: "*" for a leaf, else the kind, the keys (None: numbered) and the parts."""
    if spec.is_leaf():
        return LEAF
    fields: Any = getattr(spec.context, "_fields", spec.context)  # of a named tuple
    parts = spec.children()
    named = isinstance(fields, (list, tuple)) and len(fields) == len(parts) and all(isinstance(f, str) for f in fields)
    kind = PLAIN.get(spec.type, f"{spec.type.__module__}.{spec.type.__qualname__}")
    return {"kind": kind, "keys": list(fields) if named else None, "parts": [tree(part) for part in parts]}


def assemble(container: Any, leaves: Iterator[Any]) -> Any:
    """The value of a tree: dicts, lists and tuples as they were, other classes as a `Record` or a tuple."""
    if container == LEAF:
        return next(leaves)
    parts = [assemble(part, leaves) for part in container["parts"]]
    if container["kind"] == "list":
        return parts
    if container["keys"] is None:
        return tuple(parts)
    made = dict if container["kind"] == "dict" else Record
    return made(zip(container["keys"], parts, strict=True))


def outline(container: Any, names: Iterator[str]) -> str:
    """A tree for a reader: `(input_ids, mask), {use_cache}`."""
    if container == LEAF:
        return next(names)
    parts = [outline(part, names) for part in container["parts"]]
    if container["keys"] is not None:
        parts = [f"{key}={part}" if key != part else key for key, part in zip(container["keys"], parts, strict=True)]
    start, end = {"list": ("[", "]"), "dict": ("{", "}")}.get(container["kind"], ("(", ")"))
    return f"{start}{', '.join(parts)}{end}"


# --- expressions of sizes ----------------------------------------------------------------------------------

OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.USub: operator.neg, ast.Invert: operator.not_,
}  # fmt: skip
FUNCTIONS: dict[str, Any] = {
    "Eq": operator.eq, "Ne": operator.ne, "Mod": operator.mod, "PythonMod": operator.mod, "Max": max, "Min": min,
    "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "IntTrueDiv": operator.truediv, "ToFloat": float,
    "FloatTrueDiv": operator.truediv, "TruncToInt": int,
}  # fmt: skip


@lru_cache
def parsed(text: str) -> ast.AST:
    """The tree of an expression. Raises `ValueError`."""
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        raise ValueError(f"{text!r} is no expression") from None


@lru_cache
def symbols_of(text: str) -> tuple[str, ...]:
    """The symbols of an expression of sizes."""
    names = [node.id for node in ast.walk(parsed(text)) if isinstance(node, ast.Name)]
    return tuple(name for name in dict.fromkeys(names) if name not in FUNCTIONS)


def solve(text: str, value: int, sizes: dict[str, int]) -> None:
    """Adds to `sizes` the one symbol of an expression a·s + b = value that is not in it yet, rounded down."""
    unknown = [symbol for symbol in symbols_of(text) if symbol not in sizes]
    if len(unknown) == 1:
        b, end = (evaluate(text, {**sizes, unknown[0]: s}) for s in (0, 1))
        if end != b:
            sizes[unknown[0]] = (value - b) // (end - b)


def evaluate(text: str | int, sizes: Mapping[str, int]) -> Any:
    """The value of an expression of sizes, as sympy prints it. Nothing in it is executed.

    Raises `ValueError` for what is none, and for symbols that are not in `sizes`.
    """

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name) if name in sizes:
                return sizes[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(operand))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                return FUNCTIONS[name](*map(value, args))
        raise ValueError(f"{text!r} is no expression of {', '.join(sizes) or 'numbers'}")

    return text if isinstance(text, int) else value(parsed(text))
