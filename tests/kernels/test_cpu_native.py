"""The CPU kernels against float64, their determinism, and what happens where they cannot be built."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from aograph.kernels import cpu_native

PORTABLE = ("-std=c++17", "-O1", "-fopenmp", "-shared", "-fPIC", "-w")  # no instruction set beyond the baseline
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of the norm: y's own rounding
ROWS = (1, 2, 5, 16, 33, 130)

built = pytest.mark.skipif(cpu_native.available() is not True, reason=str(cpu_native.available()))


@pytest.fixture
def fresh():
    """The next call looks for a compiler anew; the library that the other tests share comes back after."""
    kept = cpu_native._library()
    cpu_native._library.cache_clear()
    yield
    cpu_native._library.cache_clear()
    if isinstance(kept, ctypes.CDLL):
        cpu_native._library()


def int8_case(m, n, k, dtype, group=None, scale_dtype=None):
    x, q = torch.randn(m, k).to(dtype), torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale, bias = torch.rand(n, k // group if group else 1).to(scale_dtype or dtype), torch.randn(n).to(dtype)
    expected = x.double() @ (q.double() * scale.double().repeat_interleave(group or k, 1)).T + bias.double()
    return (x, q, scale if group else scale.squeeze(1), bias), expected


def int4_case(m, n, k, group, dtype, scale_dtype):
    codes, panels = torch.randint(0, 16, (n, k), dtype=torch.uint8), -(-n // 64)
    padded = torch.full((panels * 64, k), 15, dtype=torch.uint8)
    padded[:n] = codes
    low, high = padded.view(panels, 2, 32, k).unbind(1)
    q = (low | high << 4).transpose(1, 2).contiguous()
    scale_zero = torch.randn(k // group, panels * 64, 2).to(scale_dtype)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    scale, zero = scale_zero[:, :n].double().repeat_interleave(group, 0).unbind(-1)
    expected = x.double() @ ((codes.T.double() - 8) * scale + zero) + bias.double()
    return (x, q, scale_zero, group, n, bias), expected


def scaled_case(m, n, k, dtype, shared=False, zeros=True):
    """Codes of x from end to end; one scale and zero for each row, or for all."""
    x, q = torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.randint(-127, 128, (n, k), dtype=torch.int8)
    size = (1,) if shared else (m, 1)
    x_scale, x_zero = torch.rand(size) / 1000, torch.randint(-128, 128, size, dtype=torch.int32) if zeros else None
    scale, bias = torch.rand(n).to(dtype), torch.randn(n).to(dtype)
    exact = (x.double() - (x_zero if zeros else 0)) @ q.double().T
    expected = exact * x_scale * scale.double() + bias.double()
    return (x, x_scale, x_zero, q, scale, q.sum(1, dtype=torch.int32) if zeros else None, bias, dtype), expected


def error(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


@built
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m", ROWS)
def test_int8_agrees_with_float64(m, dtype):
    for n, k in ((1, 64), (3, 7), (17, 130), (64, 1), (130, 515), (200, 1024)):
        arguments, expected = int8_case(m, n, k, dtype)
        y = cpu_native.int8_linear(*arguments)
        assert y.dtype == dtype and y.shape == (m, n)
        assert error(y, expected) < TOLERANCE[dtype], (n, k)
        without = cpu_native.int8_linear(*arguments[:3])
        assert error(without, expected - arguments[3].double()) < TOLERANCE[dtype], (n, k)


@built
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m", ROWS)
def test_int8_in_groups_agrees_with_float64(m, dtype):
    for n, k, group, scale_dtype in (
        (1, 32, 32, torch.float32),
        (3, 1152, 64, torch.bfloat16),
        (67, 640, 128, torch.float16),
        (130, 1280, 256, dtype),
    ):
        arguments, expected = int8_case(m, n, k, dtype, group, scale_dtype)
        y = cpu_native.int8_linear(*arguments)
        assert y.dtype == dtype and y.shape == (m, n)
        assert error(y, expected) < TOLERANCE[dtype], (n, k, group)


@built
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m", ROWS)
def test_int4_agrees_with_float64(m, dtype):
    for n, k, group, scale_dtype in (
        (1, 32, 32, torch.float32),
        (3, 1152, 64, torch.bfloat16),
        (64, 640, 128, torch.float16),
        (130, 1280, 256, dtype),
    ):
        arguments, expected = int4_case(m, n, k, group, dtype, scale_dtype)
        y = cpu_native.int4_linear(*arguments)
        assert y.dtype == dtype and y.shape == (m, n)
        assert error(y, expected) < TOLERANCE[dtype], (n, k, group)


@built
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m", ROWS)
def test_int8_on_int8_agrees_with_float64(m, dtype):
    for n, k in ((1, 64), (3, 7), (17, 130), (64, 1), (130, 515), (200, 2500)):
        for shared, zeros in ((False, True), (True, True), (False, False)):
            arguments, expected = scaled_case(m, n, k, dtype, shared, zeros)
            y = cpu_native.int8_scaled_linear(*arguments)
            assert y.dtype == dtype and y.shape == (m, n)
            assert error(y, expected) < TOLERANCE[dtype], (n, k, shared, zeros)


@built
def test_int8_on_int8_is_summed_exactly():
    k = 60_000  # what is added up on the way does not fit
    x, q = torch.full((7, k), -128, dtype=torch.int8), torch.full((70, k), -127, dtype=torch.int8)
    one = torch.ones(1)
    y = cpu_native.int8_scaled_linear(x, one, None, q, torch.ones(70), None, None, torch.float32)
    assert y.eq(torch.tensor(128.0 * 127 * k)).all()
    zero, sums = torch.tensor([127], dtype=torch.int32), q.sum(1, dtype=torch.int32)
    y = cpu_native.int8_scaled_linear(x, one, zero, q, torch.ones(70), sums, None, torch.float32)
    assert y.eq(torch.tensor(255.0 * 127 * k)).all()


@built
def test_many_rows_are_cut_into_tasks():
    arguments, expected = int8_case(801, 70, 96, torch.bfloat16)
    assert error(cpu_native.int8_linear(*arguments), expected) < TOLERANCE[torch.bfloat16]
    arguments, expected = int4_case(801, 70, 96, 32, torch.float32, torch.float32)
    assert error(cpu_native.int4_linear(*arguments), expected) < TOLERANCE[torch.float32]
    arguments, expected = scaled_case(801, 70, 96, torch.float32)
    assert error(cpu_native.int8_scaled_linear(*arguments), expected) < TOLERANCE[torch.float32]


@built
def test_nothing_to_sum_gives_the_bias():
    q, scale, bias = torch.ones(3, 5, dtype=torch.int8), torch.ones(3), torch.randn(3)
    assert cpu_native.int8_linear(torch.ones(0, 5), q, scale, bias).shape == (0, 3)
    assert torch.equal(cpu_native.int8_linear(torch.ones(2, 0), q[:, :0].contiguous(), scale, bias), bias.expand(2, 3))
    arguments, _ = int4_case(0, 70, 64, 32, torch.bfloat16, torch.float32)
    assert cpu_native.int4_linear(*arguments).shape == (0, 70)


@built
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m", (2, 5, 16))
@pytest.mark.parametrize("poison", (float("nan"), float("inf")))
def test_a_poisoned_row_leaves_the_others_alone(m, dtype, poison):
    for arguments, expected, kernel in (
        (*int8_case(m, 70, 67, dtype), cpu_native.int8_linear),
        (*int8_case(m, 70, 64, dtype, 32), cpu_native.int8_linear),
        (*int4_case(m, 70, 64, 32, dtype, dtype), cpu_native.int4_linear),
    ):
        arguments[0][1] = poison
        y = kernel(*arguments)
        others = torch.arange(m) != 1
        assert not y[1].isfinite().any()
        assert error(y[others], expected[others]) < TOLERANCE[dtype]
    arguments, expected = scaled_case(m, 70, 67, dtype)
    arguments[1][1] = float("nan")
    y = cpu_native.int8_scaled_linear(*arguments)
    assert y[1].isnan().all() and error(y[others], expected[others]) < TOLERANCE[dtype]


@built
@pytest.mark.parametrize("m", (1, 5, 33))
def test_the_same_bits_whatever_the_threads(m):
    threads = torch.get_num_threads()
    for dtype in TOLERANCE:
        eight, four = int8_case(m, 200, 700, dtype)[0], int4_case(m, 200, 768, 64, dtype, dtype)[0]
        grouped, scaled = int8_case(m, 200, 768, dtype, 64)[0], scaled_case(m, 200, 700, dtype)[0]
        found = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append([cpu_native.int8_linear(*each) for each in (eight, grouped)])
            found[-1] += [cpu_native.int4_linear(*four), cpu_native.int8_scaled_linear(*scaled)]
        torch.set_num_threads(threads)
        for again in found[1:]:
            assert all(torch.equal(y, first) for y, first in zip(again, found[0], strict=True))


@built
def test_wrong_arguments_are_refused():
    (x, q, scale, bias), _ = int8_case(2, 4, 64, torch.float32)
    for arguments in (
        (x[0], q, scale),
        (x.double(), q, scale),
        (x.T.contiguous().T, q, scale),
        (x, q[:, 1:], scale),
        (x, q.to(torch.uint8), scale),
        (x, q, scale[1:]),
        (x, q, scale[0]),
        (x, q, scale[:, None].expand(4, 3).contiguous()),
        (x, q, scale[:, None].expand(4, 4).contiguous()),
        (x, q, scale[:, None].expand(4, 2)),
        (x, q, scale, bias[1:]),
    ):
        with pytest.raises(ValueError):
            cpu_native.int8_linear(*arguments)
    (x, q, scale_zero, group, n, _), _ = int4_case(2, 70, 64, 32, torch.float32, torch.float32)
    for arguments in (
        (x, q, scale_zero, 16, n),
        (x, q, scale_zero, 128, n),
        (x, q, scale_zero, 64, n),
        (x, q, scale_zero, group, n + 64),
        (x, q[:, :, 1:], scale_zero, group, n),
    ):
        with pytest.raises(ValueError):
            cpu_native.int4_linear(*arguments)


@built
def test_the_portable_build_agrees_in_an_unwritable_cache(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("AOGRAPH_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(cpu_native, "FLAGS", PORTABLE)
    assert cpu_native.available() is True
    for m in (1, 7):
        for dtype, tolerance in TOLERANCE.items():
            arguments, expected = int8_case(m, 70, 67, dtype)
            assert error(cpu_native.int8_linear(*arguments), expected) < tolerance
            arguments, expected = int8_case(m, 70, 128, dtype, 64)
            assert error(cpu_native.int8_linear(*arguments), expected) < tolerance
            arguments, expected = int4_case(m, 70, 128, 64, dtype, dtype)
            assert error(cpu_native.int4_linear(*arguments), expected) < tolerance
            arguments, expected = scaled_case(m, 70, 67, dtype)
            assert error(cpu_native.int8_scaled_linear(*arguments), expected) < tolerance


@built
def test_processes_that_build_at_once_leave_one_whole_file(monkeypatch, tmp_path):
    source, path = tmp_path / "small.cpp", tmp_path / "cache" / "small.so"
    names = "int8_linear", "int4_linear", "int8_scaled_linear"
    source.write_text("".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in names))
    monkeypatch.setattr(cpu_native, "SOURCES", [source])
    path.parent.mkdir()
    path.write_bytes(b"cut short")  # a broken build is made again
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(cpu_native._load, cpu_native._compiler(), path) for _ in range(4)]
    assert all(isinstance(load.result(), ctypes.CDLL) for load in loads)
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_compiler_is_a_reason(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("AOGRAPH_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in cpu_native.available()
    cpu_native._library.cache_clear()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in cpu_native.available()
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        cpu_native.int8_linear(torch.ones(1, 2), torch.ones(3, 2, dtype=torch.int8), torch.ones(3))


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ('[ "$1" = --version ] || { echo "x.cpp:1: error: bad day" >&2; exit 1; }', "bad day"),
        ("exit 7", "exit 7"),
        ('[ "$1" = --version ] || { for last; do :; done; echo no library > "$last"; }', "could not be"),
    ],
    ids=["fails", "has no version", "writes nonsense"],
)
def test_a_broken_compiler_is_a_reason(fresh, monkeypatch, tmp_path, script, says):
    compiler: Path = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("AOGRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    reason = cpu_native.available()
    assert isinstance(reason, str) and says in reason and "\n" not in reason
