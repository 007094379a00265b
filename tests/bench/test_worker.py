import argparse

import pytest
import torch
from torch import nn

from bench import worker
from bench.worker import Worker, distance

OPTIONS = argparse.Namespace(device="cpu", autotune=[])


def test_a_name_says_how_a_model_is_compiled(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **settings: asked.append(settings))
    monkeypatch.setattr(Worker, "recipes", {"int4wo": "int4wo(group_size=32)"})
    for name in ("bf16", "int4wo", "*.proj:none"):
        found = Worker(name, argparse.Namespace(device="cpu", autotune=["bf16"]))
        found.cuda = True  # as far as settings go
        found.compiled(nn.Linear(4, 4))
    plain, int4, other = (settings["options"] for settings in asked)
    assert plain["max_autotune"] and plain["triton.cudagraphs"]
    assert "backend" not in asked[0] and asked[1]["backend"] == "aograph"
    assert (int4["recipe"], other["recipe"]) == ("int4wo(group_size=32)", "*.proj:none")
    assert int4["triton.cudagraphs"] and int4["release"] and "max_autotune" not in int4


@torch.no_grad()
def test_a_recipe_is_carried_out_and_reported(monkeypatch):
    compile = torch.compile

    def eager(model, *, options, **rest):
        return compile(model, options={**options, "compile": False}, **rest)

    monkeypatch.setattr(torch, "compile", eager)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)), torch.randn(3, 64)
    expected = model(x)
    found = Worker("int8wo", OPTIONS)
    run = found.compiled(model)
    assert found.linear_bytes == 2 * 64 * 32 * 4
    row = found.first(lambda: run(x), lambda y: distance(y, expected))
    assert 0 < row["error"] < 0.02
    assert sum(row["kernels"].values()) == 2
    assert found.linear_bytes == 2 * 64 * 32 + 4 * (64 + 32)


def test_a_median_is_of_as_many_runs_as_there_is_time_for(monkeypatch):
    monkeypatch.setattr(worker, "timed", lambda run, device: (run(), lambda: 0.1)[1])
    runs = []
    seconds, steps = Worker("bf16", OPTIONS).median(lambda: runs.append(1))
    assert (seconds, steps, len(runs)) == (0.1, 30, 33)


def test_distance_is_relative():
    a = torch.tensor([3.0, 4.0])
    assert distance(a * 1.5, a) == pytest.approx(0.5)
