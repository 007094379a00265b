import dataclasses

import pytest

from aograph import Int4WeightOnly, Int8WeightOnly, Keep, RecipeError
from aograph.schemes import PRESETS, nearest


def test_presets():
    assert {"none": Keep, "int8wo": Int8WeightOnly, "int4wo": Int4WeightOnly} == PRESETS


@pytest.mark.parametrize("scheme", PRESETS.values(), ids=PRESETS.keys())
def test_a_scheme_is_a_documented_frozen_value(scheme):
    one = scheme()
    assert one == scheme() and hash(one) == hash(scheme()) and str(one) == scheme.preset
    assert all(f"{name}:" in scheme.__doc__ for name in scheme.parameters())
    assert set(one.settings(changed_only=False)) == set(scheme.parameters()) and one.settings() == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.preset = "other"


@pytest.mark.parametrize(
    "scheme, text",
    [
        (Int4WeightOnly(128), "int4wo(group_size=128)"),
        (Int4WeightOnly(128, "minmax"), "int4wo(group_size=128, algorithm=minmax)"),
        (Int8WeightOnly("mse"), "int8wo(algorithm=mse)"),
    ],
)
def test_text(scheme, text):
    assert str(scheme) == text and scheme != type(scheme)()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Int4WeightOnly(group_size=48), "int4wo: group_size=48 is unknown; "),
        (lambda: Int4WeightOnly(algorithm="msee"), "int4wo: algorithm='msee' is unknown; did you mean 'mse'"),
        (lambda: Int8WeightOnly(algorithm=3), "int8wo: algorithm=3 is unknown; valid: "),
    ],
)
def test_parameters_are_checked(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_nearest():
    assert nearest("int4w", PRESETS) == "did you mean 'int4wo'?"
    assert nearest("xyz", ["a", "b"]) == "valid: a, b"
    assert nearest("xyz", [f"layer{i}" for i in range(100)]).endswith("… (100 in all)")
