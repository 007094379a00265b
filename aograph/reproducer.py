"""Reproducers: a folder that holds a captured graph, its recipe and the versions, no weights, to run again.

`graph.py` is the graph as a module whose tensors are on the meta device; `recipe.toml` and `run.json` are the rest. If
the recipe was calibrated, its statistics lie beside it.
"""

from __future__ import annotations

import json
import platform
import pprint
import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule

from .errors import InputError, RecipeError
from .program import Program, expression, set_attribute
from .recipe import Recipe

HEADER = '''"""A captured graph. Run it again with `aograph reproduce FOLDER`."""

import operator

import torch
from torch import inf, nan

NoneType = type(None)


def device(*_, **__):
    """Whatever device the graph was captured on: it runs again on meta."""
    return torch.device("meta")
'''


def versions() -> dict[str, str]:
    """Of what decides how a graph looks."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}
    for name in ("triton", "transformers"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = "not installed"
    return found


def snapshot(program: Program) -> str:
    """The graph of a program as the source of `graph.py`."""
    modules = [(n, m) for n, m in program.graph_module.named_modules() if isinstance(m, GraphModule)]
    classes = []
    for name, module in modules:
        code = module.graph.python_code("self").src.strip("\n")
        code = re.sub(r"^", "    ", code, flags=re.MULTILINE)
        classes.append(f"class {class_name(name)}(torch.nn.Module):\n{code}\n")
    inputs = [described(node.meta.get("val")) for node in program.inputs]
    constants = {name: described(tensor) for name, tensor in program.constants.items()}
    lines = [HEADER, "", "\n\n".join(classes), ""]
    lines += [f"SUBGRAPHS = {{{', '.join(f'{n!r}: {class_name(n)}' for n, _ in modules if n)}}}"]
    lines += ["# dtype, sizes (a pair is a dynamic size: its value at capture and its symbol); or a plain value"]
    lines += [f"INPUTS = {inputs!r}"]
    lines += [f"PRIVATE = {sorted(program.private)!r}"]
    lines += [f"CONSTANTS = {pprint.pformat(constants, width=110)}", ""]
    return "\n".join(lines)


def class_name(path: str) -> str:
    return "Graph_" + re.sub(r"\W", "_", path) if path else "Graph"


def described(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value if isinstance(value, (int, float, str, bool)) else None
    sizes = [[s.node.hint, str(expression(s))] if isinstance(s, torch.SymInt) else s for s in value.shape]
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": sizes}


def write(source: str, recipe: Recipe, disable: Collection[str] = (), folder: Path | None = None) -> Path:
    """Writes a reproducer into `folder`, or a new one in the folder for temporary files."""
    folder = Path(tempfile.mkdtemp(prefix="aograph-")) if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph.py").write_text(source)
    try:
        recipe.save(folder / "recipe.toml")
    except RecipeError as error:
        (folder / "recipe.toml").write_text(f"# {error}\n")
    (folder / "run.json").write_text(json.dumps({"disable": sorted(disable), "versions": versions()}, indent=2))
    return folder


def load(folder: Path) -> tuple[torch.nn.Module, tuple, Any, Recipe, dict[str, Any]]:
    """The module on meta, its inputs, their dynamic shapes, the recipe and the options of `rewrite` of a reproducer."""
    missing = [f for f in ("graph.py", "recipe.toml", "run.json") if not (folder / f).is_file()]
    if missing:
        raise InputError(f"{folder} is no reproducer: it has no {' and no '.join(missing)}")
    scope: dict[str, Any] = {}
    exec(compile((folder / "graph.py").read_text(), str(folder / "graph.py"), "exec"), scope)
    module = scope["Graph"]()
    for name, subgraph in scope["SUBGRAPHS"].items():
        module.add_module(name, subgraph())
    for name, like in scope["CONSTANTS"].items():
        set_attribute(module, name, torch.empty(like["shape"], dtype=getattr(torch, like["dtype"]), device="meta"))
    args: list[Any] = []
    shapes: list[Any] = []
    for like in scope["INPUTS"]:
        if not isinstance(like, dict):
            args.append(like)
            shapes.append(None)
            continue
        sizes = [s[0] if isinstance(s, list) else s for s in like["shape"]]
        args.append(torch.empty(sizes, dtype=getattr(torch, like["dtype"]), device="meta"))
        shapes.append({i: Dim.AUTO for i, s in enumerate(like["shape"]) if isinstance(s, list)})
    run = json.loads((folder / "run.json").read_text())
    how = {"disable": run["disable"], "private": scope.get("PRIVATE", [])}
    return module, tuple(args), tuple(shapes), Recipe.of(folder / "recipe.toml"), how
