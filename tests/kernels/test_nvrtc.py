"""The run-time compiler: no GPU is needed, only the libraries that CUDA builds of torch bring."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from aograph.kernels import nvrtc

SOURCE = 'extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= FACTOR; }'
HEADER = '#include "factor.cuh"\n' + SOURCE
BF16 = '#include "cuda_bf16.h"\nextern "C" __global__ void one(__nv_bfloat16* x) { *x = __float2bfloat16(1); }'

found = pytest.mark.skipif(isinstance(nvrtc.version(), str), reason=str(nvrtc.version()))
build = partial(nvrtc.compile, SOURCE, "scale.cu", "sm_90a", {"FACTOR": 3})


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """An empty cache."""
    monkeypatch.setenv("AOGRAPH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch):
    """The names of what NVRTC was called for."""
    names, compile = [], nvrtc._compile
    monkeypatch.setattr(
        nvrtc, "_compile", lambda source, name, *rest: names.append(name) or compile(source, name, *rest)
    )
    return names


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a")]
)
def test_architectures(capability, name):
    assert nvrtc.architecture(capability) == name


@found
def test_it_knows_the_architectures_of_today():
    assert {"sm_80", "sm_89", "sm_90a"} <= nvrtc.architectures() and "sm_35" not in nvrtc.architectures()


@found
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_machine_code(architecture):
    cubin = nvrtc.compile(SOURCE, "scale.cu", architecture, {"FACTOR": 3})
    assert cubin.startswith(b"\x7fELF") and b".text.scale\0" in cubin


@found
def test_the_second_time_it_is_read(compilations, folder):
    first = build()
    assert build() == first and compilations == ["scale.cu"]
    (kept,) = folder.iterdir()
    assert kept.name.startswith("scale-") and kept.suffix == ".cubin"


@found
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:]])
def test_what_is_damaged_is_compiled_again(compilations, folder, damage):
    first = build()
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert build() == first and len(compilations) == 2
    assert kept.read_bytes() == whole


@found
def test_the_key_covers_all_that_decides(compilations, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "FOLDER", tmp_path)
    for factor in ("2", "4"):
        (tmp_path / "factor.cuh").write_text(f"#define FACTOR {factor}")
        nvrtc.compile(HEADER, "scale.cu", "sm_90a", {})
    for source in (SOURCE, SOURCE + "// more"):
        for architecture in ("sm_80", "sm_90a"):
            for factor in (2, "x[0]"):
                nvrtc.compile(source, "scale.cu", architecture, {"FACTOR": factor})
    assert len(compilations) == len(list(folder.iterdir())) == 10
    monkeypatch.setattr(nvrtc, "version", lambda: (1, 0))
    nvrtc.compile(HEADER, "scale.cu", "sm_90a", {})
    assert len(compilations) == 11


@found
def test_the_order_of_defines_does_not_matter(compilations):
    for defines in ({"FACTOR": 3, "OTHER": 1}, {"OTHER": 1, "FACTOR": 3}):
        nvrtc.compile(SOURCE, "scale.cu", "sm_90a", defines)
    assert len(compilations) == 1


@found
def test_an_error_tells_where_and_with_what():
    with pytest.raises(RuntimeError) as caught:
        nvrtc.compile(SOURCE, "scale.cu", "sm_90a", {"FACTOR": "nothing"})
    for text in ("scale.cu does not compile", "sm_90a", "-DFACTOR=nothing", 'identifier "nothing" is undefined'):
        assert text in str(caught.value)
    assert "\0" not in str(caught.value)
    with pytest.raises(RuntimeError, match="sm_1"):
        nvrtc.compile(SOURCE, "scale.cu", "sm_1", {"FACTOR": 3})


@found
@pytest.mark.skipif(not nvrtc._include(), reason="CUDA's headers are not installed")
def test_headers_of_cuda():
    assert b".text.one\0" in nvrtc.compile(BF16, "one.cu", "sm_80", {})


@found
def test_a_cache_that_cannot_be_written(folder):
    folder.touch()  # no folder
    assert build().startswith(b"\x7fELF")


@found
def test_several_at_once_leave_one_whole_file(folder):
    with ThreadPoolExecutor(4) as pool:
        cubins = {task.result() for task in [pool.submit(build) for _ in range(4)]}
    assert len(cubins) == 1 and len(os.listdir(folder)) == 1


def test_without_the_bindings_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(nvrtc, "nvrtc", None)
    monkeypatch.setattr(nvrtc, "MISSING", "there are no bindings", raising=False)
    nvrtc.version.cache_clear()
    try:
        assert nvrtc.version() == "there are no bindings"
        with pytest.raises(RuntimeError, match="no bindings"):
            build()
    finally:
        nvrtc.version.cache_clear()


def test_without_the_library_there_is_a_reason(monkeypatch):
    class Bindings:
        @staticmethod
        def nvrtcVersion():
            raise RuntimeError("libnvrtc.so was not found. Much more text")

    monkeypatch.setattr(nvrtc, "nvrtc", Bindings)
    nvrtc.version.cache_clear()
    try:
        assert nvrtc.version().endswith("cannot be loaded: libnvrtc.so was not found")
    finally:
        nvrtc.version.cache_clear()
