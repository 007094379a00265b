"""The layout: what may import what, which file has its test, and how files are not named."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "patterns": "aograph.patterns",
    "kernels": "aograph.kernels",
    "passes": "aograph.passes",
    "aograph": "aograph",
}
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
PRIVATE = ("torch._inductor", "torch._dynamo", "torch._functorch", "torch._higher_order_ops")
IR = {f"aograph.{name}" for name in ("program", "expression", "report", "schemes", "predicate", "weights")}
SERVER = {"starlette", "uvicorn", "tokenizers"}
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")


def imports(path: Path) -> set[str]:
    """The modules that a file imports, absolute, those under TYPE_CHECKING left out."""
    package = FOLDERS[path.parent.name]
    tree = ast.parse(path.read_text())
    only_types = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in only_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")
            base = ".".join(parent[: len(parent) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            inside = module in FOLDERS.values() or not node.module  # `from . import linear` names a file
            found |= {f"{module}.{alias.name}" for alias in node.names} if inside else {module}
    return found


def others(path: Path) -> set[str]:
    """What a file imports besides the standard library."""
    return {name for name in imports(path) if name.partition(".")[0] not in sys.stdlib_module_names}


def allowed(name: str, prefixes) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def test_the_reader_of_imports_sees_what_is_there():
    assert {"torch.fx", "aograph.patterns.language"} <= imports(ROOT / "patterns" / "linear.py")
    assert {"aograph.patterns.language", "aograph.program"} <= imports(ROOT / "passes" / "to_linear.py")


@each_source
def test_the_direction_of_imports(path):
    may = {
        "patterns": {"torch", "aograph.patterns"},
        "kernels": {"torch", "triton", "cuda", "aograph.kernels"},
        "passes": {"torch", "aograph.patterns", "aograph.kernels", "aograph.passes", *IR},
        "aograph": {"torch", "aograph", "sympy", "tabulate", "tqdm", "safetensors", "transformers", *SERVER},
    }[path.parent.name]
    wrong = {name for name in others(path) if not allowed(name, may)}
    assert not wrong


@each_source
def test_no_other_file_needs_transformers(path):
    assert path.name in ("huggingface.py", "packed_cache.py", "pretrained.py", "reproducer.py") or not any(
        allowed(n, ["transformers"]) for n in imports(path)
    )


@each_source
def test_no_other_file_needs_the_server(path):
    assert path.name == "serve.py" or not any(allowed(name, SERVER) for name in imports(path))


def test_private_modules_of_torch_are_imported_by_one_adapter_at_most():
    users = {path.name for path in SOURCES if any(allowed(name, PRIVATE) for name in imports(path))}
    assert len(users) <= 1


@each_source
def test_every_file_has_its_test(path):
    exempt = {"__init__.py", "__main__.py", "base.py", "errors.py"}
    if path.name not in exempt:
        assert (ROOT / "tests" / path.parent.name / f"test_{path.name}").is_file()


def test_every_test_has_its_file():
    for folder in FOLDERS:
        for path in (ROOT / "tests" / folder).glob("test_*.py"):
            assert (ROOT / folder / path.name.removeprefix("test_")).is_file(), path


def test_no_file_is_named_for_nothing():
    folders = [ROOT / name for name in (*FOLDERS, "tests", "bench")]
    names = {path.stem.removeprefix("test_") for folder in folders for path in folder.rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}


@each_source
def test_every_file_says_what_it_holds(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
