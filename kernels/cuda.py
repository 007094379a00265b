"""Kernels in CUDA C++, launched by the driver on torch's own streams.

A kernel is compiled at first use (``nvrtc.py``) for the device at hand and for the defines that are given, as a
template would be. Sources declare kernels as ``extern "C" __global__``, with pointers and ints as parameters.

A launch neither waits nor allocates, so that CUDA graphs can capture it. First use compiles and loads the kernel: do
that in a warm-up call. A capture allows it, but nothing else of the program runs meanwhile.

A kernel launched as `dependent` may start before the work ahead of it on the stream has ended: it must execute
griddepcontrol.wait before it reads what that work writes, or writes what that work reads.
"""

import contextlib
import functools
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import nvrtc, op
from .nvrtc import compile

with contextlib.suppress(ImportError):  # of which `nvrtc.version` tells
    from cuda.bindings import driver

__all__ = ["Kernel", "available", "boxes", "compile", "kernel"]

OLDEST_DRIVER = 12, 4  # from 12.3 on graphs hold dependent launches, from 12.4 on a kernel tells its parameters
LARGEST_CLUSTER = 8  # blocks: what every device that has clusters can do
POINTER, NUMBER, BOXES = 8, 4, 128  # bytes of a parameter
INTS = range(-(1 << 31), 1 << 31)
ITEMS = {1: "UINT8", 2: "UINT16", 4: "UINT32", 8: "UINT64"}  # of a matrix, by their bytes


@functools.cache
def available(capability: tuple[int, int] | None = None) -> bool | str:
    """True where kernels can be compiled and launched (on devices of this capability, if given), else why not."""
    compiler = nvrtc.version()
    if isinstance(compiler, str):
        return compiler
    try:
        thousands, rest = divmod(_checked(driver.cuDriverGetVersion(), "the driver"), 1000)
    except RuntimeError as error:
        return f"there is no CUDA driver: {str(error).partition('. ')[0]}"
    needed = max(OLDEST_DRIVER, (compiler[0], 0))  # a driver cannot load what a later generation of NVRTC compiles
    if (found := (thousands, rest // 10)) < needed:
        return "the CUDA driver is for version {}.{}, at least {}.{} is needed".format(*found, *needed)
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    if capability and nvrtc.architecture(capability) not in nvrtc.architectures():
        return "NVRTC {}.{} does not compile for capability {}.{}".format(*compiler, *capability)
    return True


@functools.cache
def kernel(file: str | Path, name: str, device: torch.device, **defines: int | str) -> "Kernel":
    """A kernel of a file in this folder (of any file, by its absolute path), compiled and loaded once for a device.

    Raises:
        ValueError: the device is no CUDA device with an index.
        RuntimeError: no kernel can run here, this one does not compile, or the file has none of the name.
    """
    if device.type != "cuda" or device.index is None:
        raise ValueError(f"{name} needs a CUDA device with its index, not {str(device)!r}")
    if (here := available()) is not True:
        raise RuntimeError(f"{name} cannot run: {here}")
    path = nvrtc.FOLDER / file
    architecture = nvrtc.architecture(op.capability(device))
    cubin = compile(path.read_text(encoding="utf-8"), path.name, architecture, defines)
    title = " ".join([f"{name} of {path.name}", *(f"{key}={value}" for key, value in defines.items())])
    return Kernel(cubin, name, device, f"{title} on {device}")


@functools.lru_cache(maxsize=4096)
def boxes(
    address: int, shape: tuple[int, int], itemsize: int, box: tuple[int, int], swizzle: int = 0
) -> "driver.CUtensorMap":
    """How a kernel copies boxes of a matrix, as a `Matrix` of ptx.cuh.

    Args:
        address: of the matrix, a multiple of 16.
        shape: rows and columns of the matrix, which is contiguous; the bytes of a row are a multiple of 16.
        itemsize: bytes of an item: 1, 2, 4 or 8.
        box: rows and columns of a box, 256 at most.
        swizzle: bytes, 64 or 128, of a box's rows, which are swizzled in shared memory; 0: as they are.

    Raises:
        RuntimeError: the driver refuses.
    """
    (rows, columns), (box_rows, box_columns) = shape, box
    answer = driver.cuTensorMapEncodeTiled(
        getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{ITEMS[itemsize]}"),
        2,
        address,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(columns * itemsize)],
        [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)],
        [driver.cuuint32_t(1), driver.cuuint32_t(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{f'{swizzle}B' if swizzle else 'NONE'}"),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return _checked(answer, f"boxes {list(box)} of a matrix {list(shape)} of {ITEMS[itemsize].lower()}")


class Kernel:
    """A kernel on a device; a call launches it.

    registers and local_bytes (spilled registers among them) are of a thread, static_shared_bytes of a block.
    blocks_per_multiprocessor(threads, shared) is how many blocks of so many threads and bytes of dynamic shared memory
    a multiprocessor holds at once; clusters_at_once(threads, shared, cluster) how many clusters the whole device holds.
    """

    def __init__(self, cubin: bytes, name: str, device: torch.device, title: str):
        self.title, self.index = title, device.index
        self.clusters = op.capability(device) >= (9, 0)  # and dependent launches, which came with them
        with _context(device.index):
            module = _checked(driver.cuModuleLoadData(cubin), title)
            self.function = _checked(driver.cuModuleGetFunction(module, name.encode()), title)
            self.registers = self._attribute("NUM_REGS")
            self.local_bytes = self._attribute("LOCAL_SIZE_BYTES")
            self.static_shared_bytes = self._attribute("SHARED_SIZE_BYTES")
            memory = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES  # 48 KB, if not raised
            self.most_shared = _checked(driver.cuDeviceGetAttribute(memory, self.index), title)
            self.most_shared -= self.static_shared_bytes
            _checked(driver.cuFuncSetAttribute(self.function, limit, self.most_shared), title)
            self.sizes: list[int] = []  # of the parameters
            end = driver.CUresult.CUDA_ERROR_INVALID_VALUE
            while (answer := driver.cuFuncGetParamInfo(self.function, len(self.sizes)))[0] != end:
                self.sizes.append(_checked(answer, title)[1])
        if not {*self.sizes} <= {POINTER, NUMBER, BOXES}:
            raise RuntimeError(f"{title} has parameters of {self.sizes} bytes; known are pointers, numbers and boxes")
        self.blocks_per_multiprocessor = functools.cache(self._blocks_per_multiprocessor)
        self.clusters_at_once = functools.cache(self._clusters_at_once)
        self._configuration = functools.lru_cache(maxsize=4096)(self._configure)

    def __repr__(self) -> str:
        return f"Kernel({self.title})"

    def __call__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        arguments: tuple["Tensor | int | float | driver.CUtensorMap | None", ...],
        *,
        shared: int = 0,
        cluster: int = 1,
        dependent: bool = True,
    ) -> None:
        """Launch on torch's current stream of the device, which must be the current one.

        Args:
            grid: blocks along x, y, z.
            threads: of a block.
            arguments: for each pointer a tensor, or None for the null pointer; for each int an int; for each float a
                float; for each Matrix (of ptx.cuh) what `boxes` gives.
            shared: bytes of dynamic shared memory of a block.
            cluster: blocks along x that form a cluster, at most 8; more than 1 from capability 9.0 on.
            dependent: may start before the work ahead of it has ended (see the module); ignored before capability 9.0.

        Raises:
            ValueError: the kernel has other parameters, or the device cannot give what is asked for.
            RuntimeError: the driver refuses.
        """
        if len(arguments) != len(self.sizes):
            raise ValueError(f"{self.title} takes {len(self.sizes)} arguments, not {len(arguments)}")
        words = array("q", map(self._word, arguments, self.sizes))
        first = words.buffer_info()[0]
        pointers = array("Q", range(first, first + 8 * len(words), 8))
        for i, size in enumerate(self.sizes):
            if size == BOXES:
                pointers[i] = words[i]
        stream = torch.cuda.current_stream(self.index).cuda_stream
        config = self._configuration(grid, threads, shared, cluster, dependent, stream)
        launch = config, self.function, pointers.buffer_info()[0], 0
        answer = driver.cuLaunchKernelEx(*launch)
        if answer[0] == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # in this thread nothing has used CUDA yet
            with _context(self.index):
                answer = driver.cuLaunchKernelEx(*launch)
        if answer[0]:
            _checked(answer, f"{self.title}, grid {grid}, {threads} threads, {shared} bytes, clusters of {cluster}")

    def _word(self, argument: "Tensor | int | float | driver.CUtensorMap | None", size: int) -> int:
        """What the driver reads `size` bytes of; of boxes, where they are."""
        if size == POINTER:
            if argument is None:
                return 0
            if isinstance(argument, Tensor) and argument.get_device() == self.index:
                return argument.data_ptr()
        elif size == BOXES:
            if isinstance(argument, driver.CUtensorMap):
                return int(argument.getPtr())
        elif isinstance(argument, float):
            return int.from_bytes(struct.pack("<f", argument), "little")
        elif isinstance(argument, int) and argument in INTS:
            return argument
        found = f"a tensor on {argument.device}" if isinstance(argument, Tensor) else repr(argument)
        wanted = f"a tensor on cuda:{self.index} or None" if size == POINTER else "a number of 32 bits"
        raise ValueError(f"{self.title} takes {wanted}, not {found}")

    def _configure(self, grid, threads, shared, cluster, dependent, stream) -> "driver.CUlaunchConfig":
        """Made once for each case and never changed, as threads share it."""
        if not 0 <= shared <= self.most_shared:
            raise ValueError(f"{self.title} can have {self.most_shared} bytes of dynamic shared memory, not {shared}")
        if cluster != 1 and not (self.clusters and 1 < cluster <= LARGEST_CLUSTER and grid[0] % cluster == 0):
            most = LARGEST_CLUSTER if self.clusters else 1
            raise ValueError(f"{self.title} has clusters of at most {most} that divide the grid {grid}, not {cluster}")
        ids, attributes = driver.CUlaunchAttributeID, []
        if cluster > 1:
            attributes.append(attribute := driver.CUlaunchAttribute())
            attribute.id, size = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, attribute.value.clusterDim
            size.x, size.y, size.z = cluster, 1, 1
        if dependent and self.clusters:
            attributes.append(attribute := driver.CUlaunchAttribute())
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = shared, driver.CUstream(stream)
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config

    def _blocks_per_multiprocessor(self, threads: int, shared: int) -> int:
        with _context(self.index):
            answer = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self.function, threads, shared)
        return _checked(answer, f"{self.title}, {threads} threads, {shared} bytes")

    def _clusters_at_once(self, threads: int, shared: int, cluster: int) -> int:
        if cluster == 1:
            multiprocessors = torch.cuda.get_device_properties(self.index).multi_processor_count
            return multiprocessors * self.blocks_per_multiprocessor(threads, shared)
        config = self._configure((cluster, 1, 1), threads, shared, cluster, False, 0)
        with _context(self.index):
            answer = driver.cuOccupancyMaxActiveClusters(self.function, config)
        return _checked(answer, f"{self.title}, {threads} threads, {shared} bytes, clusters of {cluster}")

    def _attribute(self, name: str) -> int:
        which = getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
        return _checked(driver.cuFuncGetAttribute(which, self.function), self.title)


@contextlib.contextmanager
def _context(index: int) -> Iterator[None]:
    """Makes torch's context of the device current, and allows what a capture under way would forbid: to load code."""
    _checked(driver.cuInit(0), "CUDA")
    context = _checked(driver.cuDevicePrimaryCtxRetain(index), f"cuda:{index}")  # for good, as torch does
    _checked(driver.cuCtxPushCurrent(context), f"cuda:{index}")
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    mode = _checked(driver.cuThreadExchangeStreamCaptureMode(mode), f"cuda:{index}")
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(mode)
        driver.cuCtxPopCurrent()


def _checked(answer: tuple, what: str):
    """What a call of the driver returns besides its status; RuntimeError where that is an error."""
    status, *values = answer
    if status:
        raise RuntimeError(f"{what}: {status.name}: {driver.cuGetErrorString(status)[1].decode()}")
    return values[0] if len(values) == 1 else tuple(values)
