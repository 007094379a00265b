import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from aograph.kernels import cuda
from aograph.passes import PASSES, Pass, Stage
from torch import nn

from aograph import PassError, Recipe, RecipeError, explain, optimize, pipeline
from aograph.cli import main
from aograph.pipeline import order, run
from aograph.reproducer import load
from aograph.statistics import LinearStatistics
from tests.programs import operators, program_of
from tests.small_models import MLP

aten = torch.ops.aten
X = torch.randn(3, 64)
INT8 = Recipe.of("int8wo")


@pytest.fixture(autouse=True)
def reproducers_go_here(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def named(name, stage, after=(), work=lambda program, context: 0):
    """A pass."""
    body = {"name": name, "stage": stage, "after": after, "run": lambda self, p, c: work(p, c)}
    return type(name, (Pass,), body)()


# --- order -------------------------------------------------------------------------------------------------


def test_by_stage_then_after_then_name():
    a, b = named("a", Stage.QUANTIZE), named("b", Stage.NORMALIZE)
    c, d = named("c", Stage.NORMALIZE, after=("d",)), named("d", Stage.NORMALIZE)
    for given in ([a, b, c, d], [d, c, b, a]):
        assert [p.name for p in order(given)] == ["b", "d", "c", "a"]


def test_after_a_pass_that_is_left_out():
    assert [p.name for p in order([named("c", Stage.NORMALIZE, after=("gone",))])] == ["c"]


def test_passes_that_wait_for_each_other():
    with pytest.raises(PassError, match=r"wait for each other: \['a', 'b'\]"):
        order([named("a", Stage.FUSE, after=("b",)), named("b", Stage.FUSE, after=("a",))])


def test_the_order_of_all_passes():
    names = [p.name for p in order(PASSES)]
    assert len(set(names)) == len(names)
    wanted = ["inline_subgraphs", "remove_noops", "to_linear", "find_sites", "merge_linears", "int8_weight_only",
              "eliminate_dead_code"]  # fmt: skip
    assert [name for name in names if name in wanted] == wanted
    assert all(any(p.name == other for p in PASSES) for each in PASSES for other in each.after)


# --- a run -------------------------------------------------------------------------------------------------


def test_passes_see_the_statistics_of_the_recipe():
    seen = []
    look = named("look", Stage.QUANTIZE, work=lambda _, context: seen.append(context.statistics.get("up.weight")) or 0)
    found = LinearStatistics(-1.0, 1.0, torch.ones(64), 3)
    run(program_of(MLP(), X), replace(INT8, statistics={"up.weight": found}), passes=[look])
    run(program_of(MLP(), X), INT8, passes=[look])
    assert seen == [found, None]


def test_history():
    report = run(program_of(MLP(), X), INT8)
    assert [h.name for h in report.history] == [p.name for p in order(PASSES)]
    history = {h.name: h for h in report.history}
    assert (history["int8_weight_only"].matches, history["int8_weight_only"].changed) == (2, True)
    assert (history["int4_weight_only"].matches, history["int4_weight_only"].changed) == (0, False)
    assert history["find_sites"].stage == "decide" and not history["find_sites"].changed
    assert all(h.seconds >= 0 and h.verify_seconds >= 0 for h in report.history)


def test_disabled_passes_do_not_run():
    program = program_of(MLP(), X)
    report = run(program, INT8, disable=["int8_weight_only", "merge_linears"])
    assert not {"int8_weight_only", "merge_linears"} & {h.name for h in report.history}
    assert operators(program)["aten.linear"] == 2


def test_an_unknown_pass():
    with pytest.raises(PassError, match="no pass 'int8_weight' to disable; did you mean 'int8_weight_only'"):
        run(program_of(MLP(), X), INT8, disable=["int8_weight"])


def test_errors_of_the_recipe_are_the_users_own():
    with pytest.raises(RecipeError, match="matches nothing"):
        run(program_of(MLP(), X), Recipe.of("none.such:int8wo"))


# --- dumps and logs ----------------------------------------------------------------------------------------


def dumped(folder: Path):
    return sorted(path.name.split("_", 1)[1] for path in folder.iterdir())


def test_a_dump_for_each_pass_that_changes_the_graph(tmp_path):
    folder = tmp_path / "a" / "b"
    report = run(program_of(MLP(), X), INT8, dump=folder)
    assert dumped(folder) == sorted(f"{h.name}.diff" for h in report.history if h.changed)
    (path,) = folder.glob("*int8_weight_only.diff")
    text = path.read_text()
    assert "-%linear = aten.linear.default" in text and "aograph.int8_linear.default" in text
    assert text.startswith("--- before\n+++ after\n")


def test_the_folder_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("AOGRAPH_DUMP", str(tmp_path))
    run(program_of(MLP(), X), INT8)
    assert "int8_weight_only.diff" in dumped(tmp_path)


PROGRAM = """
import torch, aograph
from tests.small_models import MLP
aograph.optimize(MLP().eval(), "int8wo", torch.randn(3, 64), compile=False)
"""


@pytest.mark.parametrize("level, expected", [("+aograph", True), ("aograph", True), (None, False)])
def test_torch_logs(level, expected):
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), **({"TORCH_LOGS": level} if level else {})}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("int8_weight_only: 2 matches in " in done.stderr) == expected
    assert ("after int8_weight_only:" in done.stderr) == (level == "+aograph")
    assert ("aograph.int8_linear.default(" in done.stderr) == (level == "+aograph")


# --- failures ----------------------------------------------------------------------------------------------


def divide(program, context):
    return 1 // 0


def spoil(program, context):
    relu = next(n for n in program.graph.nodes if n.target is aten.relu.default)
    relu.target = aten.sum.default
    return 1


def misuse(program, context):
    raise PassError("the pass says no")


FAILURES = [
    (divide, "ZeroDivisionError"),
    (spoil, "PassError: .*is said to be"),
    (misuse, "PassError: the pass says no"),
]


@pytest.mark.parametrize("work, message", FAILURES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_failing_pass_leaves_a_reproducer(work, message, dynamic):
    program = program_of(MLP(), X, dynamic=dynamic)
    before = program.canonical()
    failing = named("failing", Stage.FUSE, work=work)
    with pytest.raises(PassError, match=rf"pass failing failed: {message}") as caught:
        run(program, Recipe.of("int4wo(group_size=32)"), disable=["merge_linears"], passes=[*PASSES, failing])
    assert "disable=['failing']" in str(caught.value)
    folder = Path(str(caught.value).rpartition("aograph reproduce ")[2])
    module, inputs, shapes, recipe, how = load(folder)
    assert recipe == Recipe.of("int4wo(group_size=32)") and how["disable"] == ["merge_linears"]
    again = pipeline_input(module, inputs, shapes)
    assert again.canonical().count("\n") == before.count("\n")  # the graph before any pass
    with pytest.raises(PassError, match=message):
        run(again, recipe, disable=how["disable"], passes=[*PASSES, failing])


def pipeline_input(module, inputs, shapes):
    from aograph.capture import capture

    return capture(module, inputs, {}, shapes).program


def test_the_command_runs_a_reproducer(capsys):
    failing = named("failing", Stage.FUSE, work=divide)
    with pytest.raises(PassError) as caught:
        run(program_of(MLP(), X), INT8, passes=[*PASSES, failing])
    assert main(["reproduce", str(caught.value).rpartition("aograph reproduce ")[2]]) == 0
    printed = capsys.readouterr().out
    assert "int8_weight_only" in printed and "2 rewritten" in printed


def test_the_context_is_the_recipe():
    seen = []
    run(program_of(MLP(), X), INT8, passes=[named("look", Stage.FUSE, work=lambda p, c: seen.append(c.recipe) or 0)])
    assert seen == [INT8] and pipeline.Context(INT8).recipe is INT8


def test_a_scheme_whose_pass_is_disabled_says_so():
    with pytest.warns(UserWarning, match="no pass carried out int8wo"):
        optimized = optimize(MLP(), "int8wo", torch.randn(3, 64), compile=False, disable=["int8_weight_only"])
    assert all(row.bytes_after == row.bytes_before for row in optimized.report.rows)


# --- what this machine lacks ---------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(monkeypatch):
    """Makes packed linears look as if on a GPU of some capability, where CUDA C++ kernels cannot run."""

    def make(capability, reason="there is no compiler"):
        def there(program):
            return [(op, replace(case, device="cuda", capability=capability)) for op, case in packed_linears(program)]

        packed_linears = pipeline.packed_linears
        monkeypatch.setattr(pipeline, "packed_linears", there)
        monkeypatch.setattr(cuda, "available", lambda capability=None: reason)

    return make


def wide(dtype=torch.bfloat16):
    """Linears of shapes that the CUDA C++ kernels take, and an input."""
    return nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256)).to(dtype).eval(), torch.randn(3, 256, dtype=dtype)


@pytest.mark.parametrize("recipe", ["int8wo", "int4wo", "int4wo + 0:int8wo"])
def test_a_note_says_once_that_cuda_kernels_are_missing_and_why(recipe, on_cuda):
    on_cuda((9, 0))
    model, x = wide()
    report = explain(model, recipe, x)
    (note,) = report.notes
    assert "CUDA C++ kernels cannot run here" in note and "there is no compiler" in note and "aograph env" in note
    assert note in str(report) and report.as_dict()["notes"] == [note]


def test_the_note_comes_through_the_other_door_and_in_parts(on_cuda, fresh_compiler):
    on_cuda((9, 0))
    (model, x), reports = wide(), []
    options = {"recipe": "int8wo", "report": reports.append, "compile": False}
    with torch.no_grad():
        torch.compile(model, backend="aograph", options=options)(x)
    assert "there is no compiler" in reports[0].notes[0]
    with pytest.warns(UserWarning, match="runs in parts"):
        parts = optimize(Stopping(), "int8wo", x, compile=False)
    parts(x)
    assert len(parts.report.rewritten) == 2
    assert sum("there is no compiler" in note for note in parts.report.notes) == 1


class Stopping(nn.Module):
    """Two linears, each in a graph of its own."""

    def __init__(self):
        super().__init__()
        (self.up, self.down), _ = wide()

    def forward(self, x):
        y = self.up(x)
        if y.sum() == 0:
            return y
        return self.down(y)


@pytest.mark.parametrize(
    "capability, reason, made",
    [
        ((8, 0), "there is no compiler", {}),
        ((9, 0), True, {}),
        ((9, 0), "there is no compiler", {"dtype": torch.float32}),
    ],
    ids=["another GPU", "nothing is missing", "a dtype that they do not take"],
)
def test_no_note_where_the_kernels_would_not_run_anyway(capability, reason, made, on_cuda):
    on_cuda(capability, reason)
    model, x = wide(**made)
    assert not explain(model, "int8wo", x).notes


def test_no_note_for_what_is_not_rewritten_or_not_on_a_gpu(on_cuda, monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda capability=None: "there is no compiler")
    model, x = wide()
    assert not explain(model, "int8wo", x).notes
    on_cuda((9, 0))
    assert not explain(model, "int8wo + *:none", x).notes


def test_packed_linears():
    program = program_of(*wide())
    run(program, Recipe.of("int4wo(group_size=32) + 1:int8wo"))
    found = [(op.name, case.M, case.N, case.K, case.group_size) for op, case in pipeline.packed_linears(program)]
    assert found == [("int4_linear", 1, 512, 256, 32), ("int8_linear", 1, 256, 512, None)]
