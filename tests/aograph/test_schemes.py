import dataclasses

import pytest

from aograph import Int4WeightOnly, Int8DynamicSparse24, Int8WeightOnly, Keep, RecipeError, Sparse24
from aograph.schemes import PRESETS, nearest


def test_presets():
    known = {"none": Keep, "int8wo": Int8WeightOnly, "sparse24": Sparse24, "int8dq-sparse24": Int8DynamicSparse24}
    assert known.items() <= PRESETS.items() and all(name == scheme.preset for name, scheme in PRESETS.items())


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
        (Int8WeightOnly(group_size=64), "int8wo(group_size=64)"),
        (Sparse24("wanda"), "sparse24(method=wanda)"),
        (Int8DynamicSparse24(algorithm="mse", method="wanda"), "int8dq-sparse24(algorithm=mse, method=wanda)"),
    ],
)
def test_text(scheme, text):
    assert str(scheme) == text and scheme != type(scheme)()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Int4WeightOnly(group_size=48), "int4wo: group_size=48 is unknown; "),
        (lambda: Int4WeightOnly(algorithm="msee"), "int4wo: algorithm='msee' is unknown; did you mean 'mse'"),
        (lambda: Int8WeightOnly(group_size=48), "int8wo: group_size=48 is unknown; "),
        (lambda: Int8WeightOnly(group_size="None"), "int8wo: group_size='None' is unknown; "),
        (lambda: Sparse24("wander"), "sparse24: method='wander' is unknown; did you mean 'wanda'"),
        (lambda: Int8DynamicSparse24(method="wander"), "int8dq-sparse24: method='wander' is unknown"),
        (lambda: Int8DynamicSparse24(mapping="both"), "int8dq-sparse24: mapping='both' is unknown"),
        (lambda: Int8WeightOnly(algorithm=3), "int8wo: algorithm=3 is unknown; valid: "),
    ],
)
def test_parameters_are_checked(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


@pytest.mark.parametrize("scheme", [Int4WeightOnly, Int8WeightOnly])
def test_groups_that_do_not_divide_are_refused_with_what_would(scheme):
    assert scheme(group_size=64).refuse(5, 192) is None
    assert scheme(group_size=128).refuse(5, 192) == "K = 192 is not divisible by the group size 128 (64 would be)"
    assert scheme(group_size=32).refuse(5, 33) == "K = 33 is not divisible by the group size 32"


def test_whole_channels_refuse_nothing():
    assert Int8WeightOnly().refuse(5, 33) is None and Keep().refuse(5, 33) is None


def test_groups_of_four():
    for scheme in (Sparse24(), Int8DynamicSparse24()):
        assert scheme.refuse(5, 12) is None and scheme.refuse(5, 10) == "K = 10 is not a multiple of 4"


def test_what_needs_statistics():
    assert not Sparse24().calibrated and not Int8DynamicSparse24().calibrated
    assert Sparse24("wanda").calibrated and Int8DynamicSparse24(method="wanda").calibrated
    assert Int8DynamicSparse24(activation="static").calibrated
    assert Sparse24().differentiable and not Int8DynamicSparse24().differentiable


def test_nearest():
    assert nearest("int4w", PRESETS) == "did you mean 'int4wo'?"
    assert nearest("xyz", ["a", "b"]) == "valid: a, b"
    assert nearest("xyz", [f"layer{i}" for i in range(100)]).endswith("… (100 in all)")
