import json
import math

import pytest
import torch
from safetensors.torch import save_file

from aograph import RecipeError
from aograph.statistics import LinearStatistics, digest, read, write


def statistics(low=-3.0, high=2.0, norms=(1.0, 2.0), tokens=5):
    return LinearStatistics(low, high, torch.tensor(norms), tokens)


def test_absmax_is_the_greatest_magnitude():
    assert statistics(-3.0, 2.0).absmax == 3.0
    assert statistics(-1.0, 2.0).absmax == 2.0
    assert statistics(0.0, 0.0).absmax == 0.0


@pytest.mark.parametrize("change", [{"low": -4.0}, {"high": 3.0}, {"norms": (1.0, 3.0)}, {"norms": ()}, {"tokens": 6}])
def test_equality(change):
    one, same, other = statistics(), statistics(), statistics(**change)
    assert one == same and hash(one) == hash(same) and digest({"a": one}) == digest({"a": same})
    assert one != other and digest({"a": one}) != digest({"a": other})
    assert one != "statistics"


def test_the_digest_tells_names_apart_and_not_their_order():
    a, b = statistics(), statistics(tokens=6)
    assert digest({"a": a, "b": b}) == digest({"b": b, "a": a}) != digest({"a": b, "b": a})


def test_round_trip(tmp_path):
    shared = torch.rand(64)
    written = {
        "a.weight": LinearStatistics(-math.pi, math.e, shared, 3),
        "tied.weight": LinearStatistics(-math.pi, math.e, shared, 3),
        "two.widths": statistics(norms=()),
    }
    write(tmp_path / "s.safetensors", written)
    found = read(tmp_path / "s.safetensors")
    assert found == written and digest(found) == digest(written)
    assert found["two.widths"].norms.shape == (0,)


def test_files_that_hold_no_statistics(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(RecipeError, match=r"s.safetensors cannot be read: No such file .* calibrate again"):
        read(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(RecipeError, match="holds no statistics of aograph"):
        read(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(RecipeError, match="holds no statistics of aograph"):
        read(path)
    save_file({"a": torch.zeros(1)}, path, {"aograph": json.dumps({"format": 2, "linears": {}})})
    with pytest.raises(RecipeError, match="of format 2; this aograph reads format 1"):
        read(path)
    save_file({"a": torch.zeros(1)}, path, {"aograph": json.dumps({"format": 1, "linears": {"b": [0.0, 1.0, 3]}})})
    with pytest.raises(RecipeError, match="holds no statistics of aograph"):
        read(path)


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(RecipeError, match="cannot be written"):
        write(tmp_path / "none" / "s.safetensors", {"a": statistics()})
