"""The command line: `aograph optimize`, `explain`, `calibrate`, `export`, `inspect`, `serve`, `tune`, `env` …"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from . import artifact, export, huggingface, reproducer, tune
from .calibrate import calibrate
from .errors import AographError, InputError
from .kernels import cache, cuda, nvrtc, plans
from .kernels.int4_linear import GROUP_SIZES
from .kernels.op import OPS
from .optimize import OptimizedModule, explain, optimize, rewrite
from .recipe import SHIPPED, Recipe
from .schemes import PRESETS

MODEL_HELP = """a Hugging Face folder, or module:factory, where the factory returns (model, example inputs)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0, or 1 after an error, which is printed in one piece."""
    options = parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        return options.run(options) or 0
    except AographError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="aograph", description="Make PyTorch models smaller and faster.")
    commands = top.add_subparsers(required=True, metavar="command")

    def command(run: Any, name: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=inspect.getdoc(run), description=inspect.getdoc(run))
        added.set_defaults(run=run)
        return added

    for run, name in ((run_optimize, "optimize"), (run_explain, "explain"), (run_export, "export")):
        added = command(run, name)
        added.add_argument("model", help=MODEL_HELP)
        added.add_argument(
            "--recipe", default="int4wo", help="presets, as in 'int4wo + lm_head:int8wo', or a .toml file"
        )
        added.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        added.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: the model's own")
        added.add_argument("--tokens", type=int, default=32, help="length of the example input of a language model")
        added.add_argument("--json", action="store_true", help="print the report as JSON")
        if name == "optimize":
            added.add_argument(
                "--output", type=Path, help="a folder for packed.safetensors, recipe.toml and report.json"
            )
            added.add_argument("--strict", action="store_true", help="a recipe that rewrites nothing is an error")
        if name == "export":
            added.add_argument("--output", type=Path, required=True, help="the .pt2 file to write")
            added.add_argument("--max-length", type=int, help="tokens of the static cache of a language model")
            added.add_argument("--batch-size", type=int, default=1, help="rows that decode computes at a time")
            added.add_argument("--tokenizer", type=Path, help="a folder; default: the model's, if it has a tokenizer")
    added = command(run_calibrate, "calibrate")
    added.add_argument("model", type=Path, help="a Hugging Face folder")
    added.add_argument("text", type=Path, help="a file with text such as the model will read")
    added.add_argument("--recipe", required=True, help="presets, or a .toml file")
    added.add_argument("--output", type=Path, required=True, help="the .toml file to write; statistics go beside it")
    added.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    added.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: the model's own")
    added.add_argument("--tokens", type=int, default=512, help="of the text that the model reads at a time")
    added.add_argument("--calls", type=int, default=128, help="how often it reads, at most")
    added = command(run_inspect, "inspect")
    added.add_argument("file", type=Path, help="a .pt2 file that export wrote")
    added.add_argument("--json", action="store_true", help="print all that the file says, as JSON")
    added = command(run_serve, "serve")
    added.add_argument("file", type=Path, help="a .pt2 file that export wrote from a language model")
    added.add_argument("--host", default="127.0.0.1")
    added.add_argument("--port", type=int, default=8000, help="0: any that is free")
    added.add_argument("--queue", type=int, default=64, help="requests that may wait; more are answered with 429")
    added.add_argument("--max-new-tokens", type=int, default=256, help="for one request, at most and by default")
    added.add_argument("--grace", type=float, default=30, help="seconds to complete answers after SIGTERM or ctrl-C")
    added = command(run_tune, "tune")
    added.add_argument("model", nargs="?", help=f"{MODEL_HELP}; its linears are measured")
    added.add_argument("--shapes", nargs="+", default=[], metavar="NxK", help="out and in features, as in 6144x4096")
    added.add_argument("--schemes", nargs="+", choices=tune.KINDS, default=["int4wo", "int8wo"], metavar="SCHEME",
                       help=f"of the linears: {', '.join(tune.KINDS)}; default: the first two")  # fmt: skip
    added.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=64, help="of weights under int4wo")
    added.add_argument("--recipe", nargs="+", help="for the model, each as for optimize; default: those of --schemes")
    added.add_argument("--device", default="cuda", help="the GPU to measure on")
    added.add_argument("--output", type=Path, help="a file for the plans; default: where they are looked for")
    added.set_defaults(dtype=None, tokens=32)
    command(run_recipes, "recipes")
    command(run_env, "env")
    command(run_reproduce, "reproduce").add_argument("folder", type=Path)
    return top


def run_optimize(options: argparse.Namespace) -> None:
    """Optimize a model, print the report, write the packed state."""
    recipe = Recipe.of(options.recipe)
    if options.output is not None:
        check_writable(options.output)
    model, inputs = load(options)
    optimized = optimize(
        model, recipe, inputs, device=options.device, hand_over=True, compile=False, strict=options.strict
    )
    print_report(optimized.report, options)
    if options.output is not None:
        save(optimized, options.output)
        print(f"wrote {options.output}")


def run_explain(options: argparse.Namespace) -> None:
    """Show what optimize would do and what each candidate costs, without packing anything."""
    recipe = Recipe.of(options.recipe)
    model, inputs = load(options)
    report = explain(model, recipe, inputs, device=options.device)
    print_report(report, options)
    if not options.json:
        print(f"\n{report.costs()}")


def run_export(options: argparse.Namespace) -> None:
    """Optimize a model and compile it ahead of time, into one file for serving."""
    recipe = Recipe.of(options.recipe)
    export.check_path(options.output)
    model, inputs = load(options)
    optimized = optimize(model, recipe, inputs, device=options.device, hand_over=True, compile=False)
    tokenizer = options.tokenizer
    if tokenizer is None and Path(options.model, "tokenizer_config.json").is_file():
        tokenizer = options.model
    optimized.save(options.output, max_length=options.max_length, batch_size=options.batch_size, tokenizer=tokenizer)
    print_report(optimized.report, options)
    if not options.json:
        print(f"wrote {options.output}")


def run_calibrate(options: argparse.Namespace) -> None:
    """Run a language model on a text, and write the recipe with statistics of what goes into its linears."""
    recipe = Recipe.of(options.recipe)
    if options.output.suffix != ".toml":
        raise InputError(f"a recipe is a .toml file, not {options.output}")
    check_writable(options.output.parent)
    try:
        text = options.text.read_text()
    except (OSError, UnicodeError) as error:
        raise InputError(f"the text {options.text} cannot be read: {error}") from None
    if not options.model.is_dir():
        raise InputError(f"{options.model} is no Hugging Face folder: use aograph.calibrate from Python")
    model, _ = load(options)
    calls = huggingface.calls_on_text(model, options.model, text, options.tokens)[: options.calls]
    calibrate(model, recipe, calls, device=options.device).save(options.output)
    print(f"wrote {options.output}, calibrated on {len(calls) * options.tokens} tokens")


def run_inspect(options: argparse.Namespace) -> None:
    """Show what an artifact holds: graphs, sizes, recipe, and whether it fits this machine."""
    about = artifact.inspect(options.file)
    print(json.dumps(about, indent=1) if options.json else artifact.summary(about))


def run_serve(options: argparse.Namespace) -> None:
    """Serve an artifact over HTTP: POST /generate, with streamed tokens if wanted, and GET /health."""
    try:
        from .serve import serve
    except ImportError as error:
        raise InputError(f"serving needs {error.name}: pip install 'aograph[serve]'") from error

    serve(options.file, options.host, options.port, options.queue, options.max_new_tokens, options.grace)


def run_tune(options: argparse.Namespace) -> int:
    """Measure on a GPU which plan of the CUDA C++ kernels is fastest for a model's linears, or for shapes; keep it."""
    device, path = tune.gpu(options.device), options.output or plans.tuned()
    tune.check_plans(path)
    check_writable(path.parent)
    if options.recipe and not options.model:
        raise InputError("--recipe says what becomes of the linears of a model: give one, or --schemes for --shapes")
    presets = [f"int4wo(group_size={options.group_size})" if each == "int4wo" else each for each in options.schemes]
    recipes = [Recipe.of(each) for each in options.recipe or presets]
    linears = tune.of_shapes(options.shapes, options.schemes, options.group_size)
    if options.model:
        model, inputs = load(options)
        linears += [linear for recipe in recipes for linear in tune.of_model(model, inputs, recipe, device)]
    if not linears:
        raise InputError("there is no linear to measure: give a model that has some, --shapes, or both")
    rows, failures = tune.tune(linears, device, path)
    if rows:
        headers = ["shape", "scheme", "M", "plan", "µs", "against", "µs"]
        print(f"{tabulate(rows, headers, floatfmt='.1f')}\nwrote {path}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(failures))


def run_recipes(options: argparse.Namespace) -> None:
    """List the presets, their parameters and defaults."""
    rows = []
    for name, scheme in PRESETS.items():
        settings = ", ".join(f"{k}={v}" for k, v in scheme().settings(changed_only=False).items())
        rows.append([name, settings, (inspect.getdoc(scheme) or "").partition("\n")[0]])
    for name, rules in SHIPPED.items():
        rows.append([name, "", " + ".join(f"{rule.name}:{rule.scheme}" for rule in rules)])
    print(tabulate(rows, ["preset", "parameters", "what it does"], maxcolwidths=[None, None, 80]))


def run_env(options: argparse.Namespace) -> None:
    """Show versions, devices, and which kernels are available on each, or why not."""
    from . import __version__

    compiler, usable = nvrtc.version(), cuda.available()
    versions = [["aograph", __version__], *reproducer.versions().items()]
    versions += [
        ["NVRTC", "not available" if isinstance(compiler, str) else "{}.{}".format(*compiler)],
        ["CUDA C++ kernels", "yes" if usable is True else f"no: {usable}"],
        ["kernels are kept in", str(cache.folder())],
    ]
    print(tabulate(versions, tablefmt="plain", disable_numparse=True))
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    rows = []
    for device in devices:
        name = torch.cuda.get_device_name(device) if device != "cpu" else torch.backends.cpu.get_cpu_capability()
        for op in OPS.values():
            for kernel, answer in op.availability(device):
                rows.append([f"{device} ({name})", op.name, kernel, "yes" if answer is True else f"no: {answer}"])
    print(tabulate(rows, ["device", "op", "kernel", "available"], maxcolwidths=[None, None, None, 70]))


def run_reproduce(options: argparse.Namespace) -> None:
    """Run the passes again on the graph of a reproducer folder."""
    model, inputs, shapes, recipe, how = reproducer.load(options.folder)
    _, report = rewrite(model, recipe, inputs, {}, shapes, torch.device("meta"), **how)
    print(report.passes())
    print(report.summary())


def print_report(report: Any, options: argparse.Namespace) -> None:
    print(json.dumps(report.as_dict(), indent=1) if options.json else report)


def load(options: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The model of the command line and example inputs for it."""
    dtype = getattr(torch, options.dtype) if options.dtype else None
    if Path(options.model).is_dir():
        return huggingface.load(Path(options.model), dtype, options.tokens)
    module, colon, factory = options.model.partition(":")
    if not colon:
        raise InputError(f"{options.model!r} is neither a folder nor module:factory")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise InputError(f"{options.model!r} cannot be imported: {error}") from error
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if inputs is None:
        raise InputError(f"{options.model!r} gives no example inputs: return (model, example_inputs)")
    return model.to(dtype) if dtype else model, inputs


def check_writable(folder: Path) -> None:
    """Raises `InputError` for a folder that cannot be written, before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"the output folder {folder} cannot be written: {error.strerror}; give another one") from error


def save(optimized: OptimizedModule, folder: Path) -> None:
    """Writes the packed state, the recipe and the report."""
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in optimized.state_dict().items()}
    save_file(state, folder / "packed.safetensors", metadata={"recipe": optimized.recipe.to_toml()})
    optimized.recipe.save(folder / "recipe.toml")
    assert optimized.report is not None, "captured with example inputs"
    (folder / "report.json").write_text(json.dumps(optimized.report.as_dict(), indent=1) + "\n")
