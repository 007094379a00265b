import dataclasses

import pytest
from aograph.kernels.kv_cache import KVFormat

from aograph import (
    KV4,
    KV8,
    KVFP8,
    Float8Dynamic,
    Float8DynamicSparse24,
    Float8WeightOnly,
    Int4WeightOnly,
    Int8Dynamic,
    Int8DynamicSparse24,
    Int8WeightOnly,
    Keep,
    RecipeError,
    Sparse24,
)
from aograph.schemes import PRESETS, nearest


def test_presets():
    weight_only = {"int8wo": Int8WeightOnly, "int4wo": Int4WeightOnly, "float8wo": Float8WeightOnly}
    dynamic = {"int8dq": Int8Dynamic, "float8dq": Float8Dynamic}
    sparse = {
        "sparse24": Sparse24,
        "int8dq-sparse24": Int8DynamicSparse24,
        "float8dq-sparse24": Float8DynamicSparse24,
    }
    caches = {"kv8": KV8, "kv4": KV4, "kvfp8": KVFP8}
    assert {"none": Keep, **weight_only, **dynamic, **sparse, **caches} == PRESETS


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
        (Int8Dynamic(mapping="asymmetric", activation="static"), "int8dq(mapping=asymmetric, activation=static)"),
        (Sparse24("wanda"), "sparse24(method=wanda)"),
        (Int8DynamicSparse24(algorithm="mse", method="wanda"), "int8dq-sparse24(algorithm=mse, method=wanda)"),
        (Float8Dynamic("block"), "float8dq(granularity=block)"),
        (Float8Dynamic(activation="static"), "float8dq(activation=static)"),
        (KV4(keys="token"), "kv4(keys=token)"),
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
        (lambda: Int8Dynamic(mapping="symetric"), "int8dq: mapping='symetric' is unknown; did you mean 'symmetric'"),
        (lambda: Int8Dynamic(activation="dynamics"), "int8dq: activation='dynamics' is unknown"),
        (lambda: Float8Dynamic("rows"), "float8dq: granularity='rows' is unknown; did you mean 'row'"),
        (lambda: Float8Dynamic(activation="statics"), "float8dq: activation='statics' is unknown"),
        (lambda: KV4(48), "kv4: group_size=48 is unknown; "),
        (lambda: KV4(keys="tokens"), "kv4: keys='tokens' is unknown; did you mean 'token'"),
        (lambda: Float8Dynamic("block", "static"), "float8dq: blocks have no static scale"),
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
    for scheme in (Sparse24(), Int8DynamicSparse24(), Float8DynamicSparse24()):
        assert scheme.refuse(5, 12) is None and scheme.refuse(5, 10) == "K = 10 is not a multiple of 4"


def test_what_needs_statistics():
    assert not Sparse24().calibrated and not Int8DynamicSparse24().calibrated
    assert Sparse24("wanda").calibrated and Int8DynamicSparse24(method="wanda").calibrated
    assert Int8DynamicSparse24(activation="static").calibrated
    assert Float8DynamicSparse24(activation="static").calibrated
    assert Sparse24().differentiable and not Int8DynamicSparse24().differentiable


def test_blocks_that_do_not_divide_are_refused():
    assert Float8Dynamic("block").refuse(5, 256) is None and Float8Dynamic().refuse(5, 33) is None
    for scheme in (Float8Dynamic("block"), Float8DynamicSparse24("block")):
        assert scheme.refuse(5, 192) == "K = 192 is not divisible by the block size 128"


def test_old_gpus_multiply_no_float8():
    assert "need compute capability 8.9; this GPU has 8.6" in Float8Dynamic().unsupported((8, 6))
    for capability in (None, (8, 9), (9, 0), (12, 0)):
        assert Float8Dynamic().unsupported(capability) is None
    assert Float8WeightOnly().unsupported((7, 5)) is None


def test_nearest():
    assert nearest("int4w", PRESETS) == "did you mean 'int4wo'?"
    assert nearest("xyz", ["a", "b"]) == "valid: a, b"
    assert nearest("xyz", [f"layer{i}" for i in range(100)]).endswith("… (100 in all)")


def test_keys_are_packed_by_channel_and_values_by_token():
    assert KV4(64).packed_format(keys=True) == KVFormat("int4", 4, block=64)
    for form in (KV4(64).packed_format(keys=False), KV4(64, "token").packed_format(keys=True)):
        assert form == KVFormat("int4", 4, 64)
    assert KV8().packed_format(keys=True) == KV8().packed_format(keys=False)
    assert KV4().refuse_head(48, keys=True) is None and "a head of 48" in KV4().refuse_head(48, keys=False)
