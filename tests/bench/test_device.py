import json

import pytest
import torch

from bench import device
from bench.device import Ceilings

CPU = torch.device("cpu")


def test_the_roofline_is_the_larger_time():
    limits = Ceilings(read=100.0, matmul=10.0)
    assert limits.seconds(200, 5) == 2
    assert limits.seconds(200, 50) == 5


def test_ceilings_of_this_machine_are_plausible():
    found = device.ceilings(CPU)
    assert 1e8 < found.read < 1e13
    assert 1e8 < found.matmul < 1e15


def test_runs_take_turns_and_slow_ones_have_fewer(monkeypatch):
    turns = []
    times = {"quick": 0.001, "slow": 0.1}
    monkeypatch.setattr(device, "timed", lambda run, where: (turns.append(run()), lambda: times[turns[-1]])[1])
    runs = {name: lambda name=name: name for name in times}
    found = device.medians(runs, CPU)
    assert found.keys() == times.keys()
    assert turns[:2] == turns[2:4] == ["quick", "slow"]
    assert turns.count("quick") == 1 + device.REPLAYS
    assert turns.count("slow") == 1 + device.FEWEST


def test_a_recorded_sequence_is_made_again():
    made = []
    run = device.record([lambda: made.append(1), lambda: made.append(2)], CPU)
    assert made == []
    run()
    run()
    assert made == [1, 2, 1, 2]


def test_what_is_timed_takes_its_time():
    ran = []
    assert device.timed(lambda: ran.append(1), CPU)() >= 0
    assert ran == [1]


def test_figures_are_written_whole(tmp_path):
    path = tmp_path / "out.json"
    device.write(path, {"device": "d"}, Ceilings(1.0, 2.0), [{"M": 1}])
    found = json.loads(path.read_text())
    assert found == {"machine": {"device": "d"}, "ceilings": {"read": 1.0, "matmul": 2.0}, "rows": [{"M": 1}]}
    device.write(None, {}, Ceilings(1.0, 2.0), [])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_kernel_reads_all():
    from bench.read_kernel import read

    source = torch.randint(-(2**20), 2**20, (1 << 20,), dtype=torch.int32, device="cuda")
    sums = torch.empty(1 << 8, dtype=torch.int32, device="cuda")
    read(source, sums)
    assert torch.equal(sums, source.view(1 << 8, -1).sum(1, dtype=torch.int32))
