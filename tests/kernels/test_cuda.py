"""Launching: by whom, with what, in graphs and threads; and what is said where nothing can be launched."""

import threading
from types import SimpleNamespace

import pytest
import torch
from aograph.kernels import cuda, nvrtc

SOURCE = r"""
__device__ void wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
extern "C" __global__ void axpy(const float* x, float* y, int n) {
  wait();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) y[i] += A * (x ? x[i] : 1);
}
extern "C" __global__ void backwards(const float* x, float* y, int n) {
  extern __shared__ float kept[];
  wait();
  for (int i = threadIdx.x; i < n; i += blockDim.x) kept[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = A * kept[n - 1 - i];
}
#if __CUDA_ARCH__ >= 900
extern "C" __global__ void neighbours(int* y) {
  int rank, size;
  asm volatile("mov.u32 %0, %%cluster_ctarank; mov.u32 %1, %%cluster_nctaid.x;" : "=r"(rank), "=r"(size));
  wait();
  y[blockIdx.x] = size * 100 + rank;
}
#endif
extern "C" __global__ void odd(float* y, char c) { *y = c; }
extern "C" __global__ void standing(float* y) {
  __shared__ float kept[256];
  kept[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = kept[255 - threadIdx.x];
}
"""
SHARED = 100 * 1024


@pytest.fixture(autouse=True)
def forget(monkeypatch, tmp_path):
    """An empty cache, and answers that the test itself has caused."""
    monkeypatch.setenv("AOGRAPH_CACHE", str(tmp_path / "cache"))
    cuda.available.cache_clear()
    yield
    cuda.available.cache_clear()


@pytest.fixture
def kernel(tmp_path):
    """A kernel of SOURCE by its name, on device 0."""
    path = tmp_path / "source.cu"
    path.write_text(SOURCE)
    return lambda name, A=2, device=0: cuda.kernel(path, name, torch.device("cuda", device), A=A)


@pytest.fixture
def x():
    return torch.randn(1000, device="cuda")


def machine(monkeypatch, compiler, driver, gpu):
    """A machine with this NVRTC, this driver and this GPU."""
    monkeypatch.setattr(nvrtc, "version", lambda: compiler)
    monkeypatch.setattr(nvrtc, "architectures", lambda: {"sm_80", "sm_90a"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(cuda, "driver", SimpleNamespace(cuDriverGetVersion=driver), raising=False)


def no_driver():
    raise RuntimeError("libcuda.so was not found. Much more text")


@pytest.mark.parametrize(
    ("compiler", "driver", "gpu", "capability", "answer"),
    [
        ((12, 8), lambda: (0, 12040), True, None, True),
        ((12, 8), lambda: (0, 12040), True, (9, 0), True),
        ((12, 8), lambda: (0, 12040), True, (7, 0), "NVRTC 12.8 does not compile for capability 7.0"),
        ((12, 8), lambda: (0, 12020), True, None, "the CUDA driver is for version 12.2, at least 12.4 is needed"),
        ((13, 0), lambda: (0, 12080), True, None, "the CUDA driver is for version 12.8, at least 13.0 is needed"),
        ((13, 0), lambda: (0, 13010), False, None, "torch finds no CUDA GPU"),
        ((13, 0), no_driver, True, None, "there is no CUDA driver: libcuda.so was not found"),
        ("no compiler", no_driver, True, None, "no compiler"),
    ],
)
def test_available(monkeypatch, compiler, driver, gpu, capability, answer):
    machine(monkeypatch, compiler, driver, gpu)
    assert cuda.available(capability) == answer


def test_to_ask_does_not_start_cuda():
    before = torch.cuda.is_initialized()
    answer = cuda.available()
    assert torch.cuda.is_initialized() == before
    assert answer is True or (isinstance(answer, str) and "\n" not in answer)


def test_a_kernel_needs_a_device_with_an_index():
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=f"axpy needs a CUDA device with its index, not '{device}'"):
            cuda.kernel("source.cu", "axpy", torch.device(device))


def test_a_kernel_says_why_it_cannot_run(monkeypatch):
    machine(monkeypatch, (13, 0), no_driver, True)
    with pytest.raises(RuntimeError, match="axpy cannot run: there is no CUDA driver"):
        cuda.kernel("source.cu", "axpy", torch.device("cuda", 0))


@pytest.mark.skipif(isinstance(nvrtc.version(), str), reason=str(nvrtc.version()))
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_the_source_of_these_tests_compiles(architecture):
    assert b".text.axpy\0" in cuda.compile(SOURCE, "source.cu", architecture, {"A": 2})


@pytest.mark.cuda
def test_one_launch(kernel, x):
    y, axpy = torch.zeros_like(x), kernel("axpy")
    axpy((3, 1, 1), 128, (x, y, 1000))
    assert torch.equal(y, 2 * x)
    axpy((3, 1, 1), 128, (None, y, 10), dependent=False)
    assert torch.equal(y[:10], 2 * x[:10] + 2) and torch.equal(y[10:], 2 * x[10:])
    kernel("axpy", A=5)((1, 1, 1), 32, (x, y.zero_(), -1))
    assert not y.any()


@pytest.mark.cuda
def test_a_kernel_is_loaded_once(kernel):
    assert kernel("axpy") is kernel("axpy") and kernel("axpy") is not kernel("axpy", A=3)
    assert "axpy of source.cu A=2 on cuda:0" in repr(kernel("axpy"))


@pytest.mark.cuda
def test_what_the_driver_says_of_a_kernel(kernel):
    standing = kernel("standing")
    assert standing.registers > 0 and standing.local_bytes == 0 and standing.static_shared_bytes == 1024
    few, many = standing.blocks_per_multiprocessor(256, SHARED // 2), standing.blocks_per_multiprocessor(256, 0)
    assert 1 <= few < many <= 2048 // 256


@pytest.mark.cuda
def test_launches_in_their_order(kernel, x):
    y, axpy = torch.zeros_like(x), kernel("axpy")
    for _ in range(100):
        axpy((4, 1, 1), 64, (x, y, 1000))
        axpy((1, 1, 1), 256, (y, x, 0))
    expected = torch.zeros_like(x)
    for _ in range(100):
        expected += 2 * x
    assert torch.equal(y, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("warm", [True, False], ids=["after a call", "as the first use"])
def test_in_a_graph(kernel, x, warm):
    y = torch.zeros_like(x)
    if warm:
        kernel("axpy")((3, 1, 1), 128, (x, y, 0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel("axpy")((3, 1, 1), 128, (x, y, 1000))
        kernel("axpy")((8, 1, 1), 64, (x, y, 1000))
    assert not y.any()
    graph.replay()
    x.mul_(2)
    graph.replay()
    torch.testing.assert_close(y, 6 * x)


@pytest.mark.cuda
def test_on_another_stream(kernel, x):
    y, stream, axpy = torch.zeros_like(x), torch.cuda.Stream(), kernel("axpy")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        axpy((3, 1, 1), 128, (x, y, 1000))
        assert not stream.query()  # it waits behind the sleep
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, 2 * x)


@pytest.mark.cuda
def test_in_a_thread_that_has_not_used_cuda(kernel, x):
    y, axpy, raised = torch.zeros_like(x), kernel("axpy"), []
    torch.cuda.synchronize()

    def launch():
        try:
            axpy((3, 1, 1), 128, (x, y, 1000))
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not raised and torch.equal(y, 2 * x)


@pytest.mark.cuda
def test_a_hundred_kilobytes_of_shared_memory(kernel):
    x = torch.randn(SHARED // 4, device="cuda")
    y, backwards = torch.empty_like(x), kernel("backwards")
    backwards((1, 1, 1), 512, (x, y, x.numel()), shared=SHARED)
    assert torch.equal(y, 2 * x.flip(0))
    with pytest.raises(ValueError, match="bytes of dynamic shared memory, not 1048576"):
        backwards((1, 1, 1), 512, (x, y, 1), shared=1 << 20)


@pytest.mark.cuda
def test_clusters(kernel):
    if torch.cuda.get_device_capability() < (9, 0):
        with pytest.raises(ValueError, match="clusters of at most 1 "):
            kernel("axpy")((4, 1, 1), 32, (None, None, 0), cluster=2)
        return
    neighbours, y = kernel("neighbours"), torch.zeros(16, dtype=torch.int32, device="cuda")
    for size in (1, 2, 8):
        neighbours((16, 1, 1), 32, (y,), cluster=size)
        assert y.tolist() == [100 * size + i % size for i in range(16)]
    for grid, size in ((16, 16), (16, 3), (16, 0)):
        with pytest.raises(ValueError, match="clusters of at most 8 that divide"):
            neighbours((grid, 1, 1), 32, (y,), cluster=size)


@pytest.mark.cuda
def test_wrong_arguments_are_refused(kernel, x):
    axpy, y = kernel("axpy"), torch.zeros_like(x)
    for arguments, says in (
        ((x, y), "takes 3 arguments, not 2"),
        ((x, y, 1, 1), "takes 3 arguments, not 4"),
        ((x.cpu(), y, 1), "a tensor on cuda:0 or None, not a tensor on cpu"),
        ((1, y, 1), "a tensor on cuda:0 or None, not 1"),
        ((x, y, 1 << 31), "a number of 32 bits, not 2147483648"),
        ((x, y, None), "a number of 32 bits, not None"),
        ((x, y, "1"), "a number of 32 bits, not '1'"),
        ((x, y, x), "a number of 32 bits, not a tensor on cuda:0"),
    ):
        with pytest.raises(ValueError, match=says):
            axpy((1, 1, 1), 32, arguments)


@pytest.mark.cuda
def test_what_the_driver_refuses_is_told(kernel, x):
    with pytest.raises(RuntimeError, match=r"axpy of source.cu .* 4096 threads, .*: CUDA_ERROR_INVALID_VALUE: "):
        kernel("axpy")((1, 1, 1), 4096, (x, x, 1))
    with pytest.raises(RuntimeError, match=r"nobody of source.cu .*: CUDA_ERROR_NOT_FOUND: "):
        kernel("nobody")
    with pytest.raises(RuntimeError, match=r"odd of source.cu .* has parameters of \[8, 1\] bytes"):
        kernel("odd")
    with pytest.raises(RuntimeError, match=r"source.cu does not compile .*-DA=\?"):
        kernel("axpy", A="?")


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device(kernel):
    for index in (1, 0):
        x = torch.randn(1000, device=f"cuda:{index}")
        y = torch.zeros_like(x)
        with torch.cuda.device(index):
            kernel("axpy", device=index)((3, 1, 1), 128, (x, y, 1000))
        assert torch.equal(y, 2 * x)
    with pytest.raises(ValueError, match="a tensor on cuda:1 or None, not a tensor on cuda:0"):
        kernel("axpy", device=1)((3, 1, 1), 128, (x, y, 1000))
