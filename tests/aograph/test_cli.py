import contextlib
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from aograph.kernels import cuda, cuda_linear, cuda_scaled_linear, plans, tuning
from aograph.kernels.cuda_linear import TOKENS, Plan
from aograph.kernels.cuda_scaled_linear import ScaledPlan
from safetensors.torch import load_file

import aograph
from aograph import Recipe, tune
from aograph.cli import main
from aograph.recipe import SHIPPED
from aograph.schemes import PRESETS
from tests.models.zoo import MINI
from tests.small_models import MLP


def factory():
    """(model, example inputs), as the command line takes them."""
    torch.manual_seed(0)
    return MLP().eval(), torch.randn(3, 64)


def siblings():
    """What one linear is after merging, and one that the CUDA kernels do not take."""
    return Siblings().eval(), torch.randn(3, 128)


class Siblings(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = torch.nn.Linear(128, 64), torch.nn.Linear(128, 192)
        self.last = torch.nn.Linear(64, 40)

    def forward(self, x):
        return self.last(self.left(x) * self.right(x)[:, 128:])


def without_inputs():
    return MLP()


HERE = f"{__name__}:factory"


@pytest.fixture(autouse=True)
def same_process(monkeypatch):
    """The command line prints warnings in its own way, and looks for modules in the working folder."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_explain(capsys):
    assert main(["explain", HERE, "--recipe", "int8wo", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "2 candidates: 2 rewritten" in printed and "roofline of" in printed


def test_optimize_writes_what_it_packed(capsys, tmp_path):
    output = tmp_path / "a" / "b"
    given = ["optimize", HERE, "--recipe", "int8wo+up:none", "--device", "cpu", "--output", str(output)]
    assert main(given) == 0
    assert "1 rewritten, 1 excluded" in capsys.readouterr().out
    state = load_file(output / "packed.safetensors")
    assert state["down.weight_q"].dtype == torch.int8 and state["up.weight"].shape == (128, 64)
    assert Recipe.of(output / "recipe.toml") == Recipe.of("int8wo+up:none")
    report = json.loads((output / "report.json").read_text())
    assert [row["outcome"] for row in report["rows"]] == ["excluded", "rewritten"]


def test_json(capsys):
    assert main(["explain", HERE, "--recipe", "int8wo", "--device", "cpu", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2


def test_a_dtype(capsys):
    assert main(["explain", HERE, "--recipe", "int8wo", "--device", "cpu", "--json", "--dtype", "bfloat16"]) == 0
    assert {row["dtype"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"bfloat16"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["explain", "no/such/folder"], "neither a folder nor module:factory"),
        (["explain", "no_such_module:make"], "cannot be imported"),
        (["explain", f"{__name__}:no_such_factory"], "cannot be imported"),
        (["explain", f"{__name__}:without_inputs"], "gives no example inputs"),
        (["explain", HERE, "--recipe", "int9wo"], "unknown scheme 'int9wo'"),
        (["explain", HERE, "--recipe", "a.toml"], "cannot be read"),
        (["reproduce", "no/such/folder"], "is no reproducer"),
        (["optimize", HERE, "--output", "/dev/null/folder"], "cannot be written"),
        (["optimize", HERE, "--recipe", "int4wo+up:none+down:none", "--strict"], "rewrote nothing"),
        (["explain", HERE, "--device", "no_such_device"], "no_such_device"),
        (["inspect", "no/such.pt2"], "cannot be read"),
        (["export", HERE, "--recipe", "int8wo", "--output", "model.zip"], "an artifact is a .pt2 file"),
        (["export", HERE, "--recipe", "int8wo", "--output", "/no/such/model.pt2"], "cannot be written"),
    ],
)
def test_errors_are_one_line_and_a_status(arguments, message, capsys):
    if arguments[0] not in ("reproduce", "inspect") and "--device" not in arguments:
        arguments = [*arguments, "--device", "cpu"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and "Traceback" not in captured.err


def test_inspect(capsys, language_model):
    assert main(["inspect", str(language_model.path)]) == 0
    printed = capsys.readouterr().out
    for text in ("fits this machine  yes", "graph decode", "input_ids: int64[2, 1]", "key_0: float32[2, 2, 48, 64] …",
                 "int4_linear by dequantize", "[[rule]]"):  # fmt: skip
        assert text in printed, text


def test_inspect_as_json(capsys, few_tokens):
    assert main(["inspect", str(few_tokens.path), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["misfits"] == [] and about["graphs"].keys() == {"forward"}
    assert about["bytes"]["file"] == few_tokens.path.stat().st_size


def test_export(capsys, tmp_path):
    output = tmp_path / "exported.pt2"
    given = ["export", HERE, "--recipe", "int8wo+up:none", "--device", "cpu", "--output", str(output)]
    assert main(given) == 0
    assert "1 rewritten, 1 excluded" in capsys.readouterr().out
    model, x = factory()
    torch.testing.assert_close(aograph.load(output)(x), model(x), rtol=0.1, atol=0.05)


def test_recipes(capsys):
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*PRESETS, *SHIPPED]) and "group_size=64" in printed


def test_env(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("AOGRAPH_CACHE", str(tmp_path))
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and "int8_linear" in printed and "dequantize" in printed
    usable = cuda.available()
    answer = "yes" if usable is True else f"no: {usable}"
    for name, shown in (("CUDA C++ kernels", answer), ("kernels are kept in", str(tmp_path))):
        assert any(line.startswith(name) and line.endswith(shown) for line in printed.splitlines()), name


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "aograph", "recipes"], capture_output=True, text=True)
    assert done.returncode == 0 and "int4wo" in done.stdout, done.stderr


def test_no_command():
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


def test_a_hugging_face_folder(capsys):
    pytest.importorskip("transformers")
    assert main(["explain", str(MINI), "--recipe", "int8wo", "--device", "cpu", "--json", "--tokens", "5"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 43 and {row["outcome"] for row in rows} == {"rewritten"}


# --- calibrate ---------------------------------------------------------------------------------------------


def test_calibrate_writes_a_recipe_with_statistics(capsys, tmp_path):
    pytest.importorskip("transformers")
    text, output = tmp_path / "text.txt", tmp_path / "out" / "recipe.toml"
    text.write_text("The for statement is used to iterate over the elements of a sequence. " * 20)
    given = ["calibrate", str(MINI), str(text), "--recipe", "int8wo", "--device", "cpu", "--tokens", "16"]
    assert main([*given, "--calls", "3", "--output", str(output)]) == 0
    assert "recipe.toml, calibrated on 48 tokens" in capsys.readouterr().out
    recipe = Recipe.of(output)
    assert recipe.rules == Recipe.of("int8wo").rules
    assert len(recipe.statistics) == 44 and {each.tokens for each in recipe.statistics.values()} == {48}
    assert main(["optimize", str(MINI), "--recipe", str(output), "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert Recipe.of(tmp_path / "recipe.toml") == recipe


@pytest.mark.parametrize(
    "model, text, more, message",
    [
        (MINI, "text", ["--output", "recipe.json"], "a recipe is a .toml file, not recipe.json"),
        (MINI, "text", ["--recipe", "int9wo"], "unknown scheme 'int9wo'"),
        (MINI, None, [], "cannot be read"),
        (MINI, "text", [], "the text has 1 tokens, less than one window of 512"),
        ("nowhere", "text", [], "nowhere is no Hugging Face folder"),
    ],
)
def test_what_cannot_be_calibrated(capsys, tmp_path, model, text, more, message):
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_text(text)
    output = tmp_path / "recipe.toml"
    given = ["calibrate", str(model), str(path), "--recipe", "int8wo", "--output", str(output), "--device", "cpu"]
    assert main([*given, *more]) == 1
    assert message in capsys.readouterr().err and not output.exists()


# --- tune ----------------------------------------------------------------------------------------------------------


SMALL, SCALED = Plan("small", 2, 2, 64, 8, 4), ScaledPlan(1, 2, 4, 1, 128, 256, 8)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What was measured, on a GPU that is not there: a plan is faster than what stands against it for few tokens only.

    Where nothing stands against it, it is taken for any number.
    """
    calls = []

    def fastest(name, kind, N, K, *group_size, each):
        calls.append((name, N, K, *group_size))
        plan = SMALL if kind.plan is Plan else SCALED
        if N == 1000:
            raise RuntimeError(f"{plan!r} is wrong by 1.0e+00")
        for M in kind.tokens:
            if kind.rival:
                each(M, 20.0 + M, 1e-3, None)
            each(M, 10.0 + 2 * M, 1e-3, plan)
        return [plan if 10 + 2 * M < 20 + M or not kind.rival else None for M in kind.tokens]

    monkeypatch.setenv("AOGRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "available", lambda device: True)
    for name, kind in tune.KINDS.items():
        monkeypatch.setitem(tune.KINDS, name, replace(kind, fastest=partial(fastest, name, kind)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    cached = plans.table, cuda_linear.plan, cuda_scaled_linear.plan
    for each in cached:
        each.cache_clear()
    yield calls
    monkeypatch.undo()
    for each in cached:
        each.cache_clear()


def test_tune_shapes(capsys, measured):
    assert cuda_linear.plan(4, 1, 6144, 4096, 128) != SMALL
    assert main(["tune", "--shapes", "6144x4096", "512x1024", "--schemes", "int4wo", "--group-size", "128"]) == 0
    assert measured == [("int4wo", 6144, 4096, 128), ("int4wo", 512, 1024, 128)]
    printed = capsys.readouterr().out
    row = "6144x4096 int4wo in groups of 128 1 small, 64 channels × 8 tokens, 2 blocks share K 12.0 dequantize 21.0"
    assert row in " ".join(printed.split())
    assert f"wrote {plans.tuned()}" in printed
    assert cuda_linear.plan(4, 1, 6144, 4096, 128) == SMALL  # in this process
    (found,) = json.loads(plans.tuned().read_text())["measured"].values()
    assert found["6144x4096"]["gpu"] == "a GPU"


def test_tune_quantized_activations_and_sparse_weights(capsys, measured):
    assert cuda_scaled_linear.plan(torch.int8, False, 1, 6144, 4096) != SCALED
    given = ["tune", "--shapes", "6144x4096", "--schemes", "int8dq-sparse24", "sparse24", "int8dq", "float8dq"]
    assert main(given) == 0
    kinds = ["int8dq", "float8dq", "sparse24", "int8dq-sparse24"]  # dense codes first
    assert measured == [(kind, 6144, 4096) for kind in kinds]
    printed = " ".join(capsys.readouterr().out.split())
    scaled = "128 channels × 256 tokens, 2 blocks share x"
    for row in (
        f"int8dq 1 {scaled} 12.0 6144x4096",
        f"float8dq 1 {scaled} 12.0 cuBLASLt 21.0",
        "float8dq 2048 cuBLASLt 2068.0 cuBLASLt 2068.0",
        f"int8dq-sparse24 1 {scaled} 12.0 dense 21.0",
    ):
        assert f"6144x4096 {row}" in printed, row
    assert cuda_scaled_linear.plan(torch.int8, False, 1, 6144, 4096) == SCALED  # in this process
    assert cuda_scaled_linear.plan(torch.float16, True, 1, 6144, 4096) == SCALED
    assert "others were faster" in cuda_scaled_linear.plan(torch.float8_e4m3fn, False, 2048, 6144, 4096)


def test_tune_keeps_what_is_there(tmp_path, measured):
    file, old = tmp_path / "plans.json", [None] * len(TOKENS)
    for kind, shape in (("int4wo", (64, 128)), ("int4wo", (512, 1024)), ("int8wo", (64, 128)), ("int8dq", (64, 128))):
        plans.add(file, kind, shape, old, {"gpu": "another"})
    given = ["tune", "--shapes", "512x1024", "--schemes", "int4wo", "int8dq", "--output", str(file)]
    assert main(given) == 0
    found = plans.read(file, "int4wo", Plan)
    assert found.keys() == {(64, 128), (512, 1024)} and plans.read(file, "int8wo", Plan) == {(64, 128): old}
    assert found[64, 128] == old and found[512, 1024][0] == SMALL
    scaled = [SCALED] * len(cuda_scaled_linear.TOKENS)
    assert plans.read(file, "int8dq", ScaledPlan) == {(64, 128): old, (512, 1024): scaled}
    shapes = json.loads(file.read_text())["measured"]["int4wo"]
    assert [shapes[shape]["gpu"] for shape in ("64x128", "512x1024")] == ["another", "a GPU"]
    assert not plans.tuned().exists()


def test_tune_the_merged_linears_of_a_model(capsys, measured):
    assert main(["tune", f"{__name__}:siblings", "--shapes", "256x128", "--device", "cpu"]) == 0
    assert measured == [("int4wo", 256, 128, 64), ("int8wo", 256, 128)]
    warned = capsys.readouterr().err.splitlines()
    kinds = ["int4wo in groups of 64", "int8wo"]
    assert warned == [f"warning: 40x64 under {kind} is not measured: K is not a multiple of 128" for kind in kinds]


def test_tune_what_recipes_leave_of_a_model(measured):
    recipes = ["int8dq + last:float8dq", "int4wo(group_size=32) + last:none"]
    assert main(["tune", f"{__name__}:siblings", "--recipe", *recipes, "--device", "cpu"]) == 0
    assert measured == [("int4wo", 256, 128, 32), ("int8dq", 256, 128), ("float8dq", 40, 64)]


def test_tune_goes_on_behind_a_kernel_that_is_wrong(capsys, measured):
    assert main(["tune", "--shapes", "1000x1024", "512x1024", "--schemes", "int8dq"]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: nothing is kept for 1000x1024 under int8dq: {SCALED!r} is wrong by 1.0e+00\n"
    assert "512x1024" in captured.out
    assert plans.read(plans.tuned(), "int8dq", ScaledPlan).keys() == {(512, 1024)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "there is no linear to measure"),
        (["--shapes", "4096"], "'4096' is no shape"),
        (["--shapes", "0x4096"], "'0x4096' is no shape"),
        (["--shapes", "4096x4096", "4096x4000"], "4096x4000 under int4wo in groups of 64: K is not a multiple of 128"),
        (["--shapes", "4100x4096"], "4100x4096 under int4wo in groups of 64: N is not a multiple of 8"),
        (["--shapes", "4096x128", "--group-size", "256"], "K is not a multiple of the group size 256"),
        (["--shapes", "64x4000", "--schemes", "int8dq", "sparse24"], "64x4000 under sparse24: K is not a multiple of"),
        (["--shapes", "512x1024", "--output", "/dev/null/plans.json"], "cannot be written"),
        (["--shapes", "512x1024", "--output", __file__], "is no file of plans, and is left as it is"),
        (["--shapes", "512x1024", "--device", "no_such_device"], "none that torch knows"),
        (["--shapes", "512x1024", "--recipe", "int8dq"], "give one, or --schemes for --shapes"),
        ([HERE, "--recipe", "int9wo"], "unknown scheme 'int9wo'"),
        ([HERE, "--recipe", "float8wo", "--device", "cpu"], "there is no linear to measure"),
    ],
)
def test_what_cannot_be_tuned(arguments, message, capsys, measured):
    assert main(["tune", *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1] and "Traceback" not in "".join(lines)
    assert not measured


def test_tune_needs_a_gpu_that_fits(capsys):
    assert main(["tune", "--shapes", "512x1024", "--device", "cpu"]) == 1
    assert "nothing can be measured on 'cpu': the kernels run on CUDA only" in capsys.readouterr().err
