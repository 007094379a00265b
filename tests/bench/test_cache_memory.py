import argparse
import json

import pytest
import torch

from bench import cache_memory
from bench.cache_memory import PLAIN, MemoryWorker

OPTIONS = argparse.Namespace(device="cpu", layers=1, width=512, new=3, compile=False)
TOKEN = 2 * 128  # elements of keys and values


@torch.no_grad()
@pytest.mark.parametrize("name, token", [*((name, 2 * TOKEN) for name in PLAIN), ("int4wo + kv8", TOKEN + 8)])
def test_a_contender_at_two_contexts(name, token, monkeypatch):
    forwards, masks = [], []
    worker = MemoryWorker(name, OPTIONS)
    forward = type(worker.model).forward

    def counted(self, *args, **given):
        forwards.append(given["input_ids"].shape[1])
        masks.append(given.get("attention_mask"))
        return forward(self, *args, **given)

    monkeypatch.setattr(type(worker.model), "forward", counted)
    monkeypatch.setattr("aograph.prompts.CHUNK", 40)
    monkeypatch.setitem(PLAIN, "bf16 in chunks", {"prefill_chunk_size": 40})
    for context in (64,) if name in PLAIN else (64, 128):
        forwards.clear(), masks.clear()
        row = worker.measure(context)
        at_once = name in ("bf16", "bf16 masked")
        chunks = [40] * ((context - 3) // 40) + [(context - 3) % 40]
        assert forwards == [4, 1] + ([context - 3] if at_once else chunks) + [1, 1]
        assert row["cache GB"] == round(context * token / 1e9, 3) and row["prefill s"] > 0 and row["decode ms"] > 0
        assert row["prefill tokens/s"] == pytest.approx((context - 3) / row["prefill s"], rel=0.2)
        assert (name == "bf16 masked") == (masks[2] is not None and masks[2].numel() == (context - 3) * context)


def test_rows_as_they_come_and_what_fails(tmp_path, capsys):
    out = tmp_path / "rows.json"
    sizes = ["--device", "cpu", "--layers", "1", "--width", "512", "--contexts", "32", "16", "--new", "2"]
    cache_memory.main([*sizes, "--json", str(out), "--contenders", "bf16", "no recipe"])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["context"], row["what"]) for row in rows] == [(n, w) for w in ("bf16", "no recipe") for n in (16, 32)]
    assert all(row["prefill tokens/s"] > 0 for row in rows[:2])
    assert all(row["failure"].startswith("RecipeError") for row in rows[2:])
    assert "prefill tokens/s" in capsys.readouterr().out.splitlines()[-6]
