import json
import subprocess
import sys
import warnings

import pytest
import torch
from aograph.kernels import cuda
from safetensors.torch import load_file

import aograph
from aograph import Recipe
from aograph.cli import main
from aograph.schemes import PRESETS
from tests.models.zoo import MINI
from tests.small_models import MLP


def factory():
    """(model, example inputs), as the command line takes them."""
    torch.manual_seed(0)
    return MLP().eval(), torch.randn(3, 64)


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
    assert all(name in printed for name in PRESETS) and "group_size=64" in printed


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
