"""Linear layers on int8 and int4 weights on the CPU, compiled at first use by the machine's own C++ compiler.

The sources are ``cpu_native.cpp``, for x in its own precision, and ``cpu_scaled.cpp`` and ``cpu_dots.cpp``, for many
and few rows of x in int8. Their build is kept in the folder of ``cache.py``, named by the sources, the flags, the
compiler and the processor, so that a folder shared by several machines serves each its own build. A machine without a
compiler is no error: ``available()`` then says why, in one sentence.
"""

import contextlib
import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from . import cache

__all__ = ["available", "int8_linear", "int4_linear", "int8_scaled_linear"]

SOURCES = [Path(__file__).with_name(name) for name in ("cpu_native.cpp", "cpu_scaled.cpp", "cpu_dots.cpp")]
HEADERS = [Path(__file__).with_name(name) for name in ("cpu_native.h", "cpu_scaled.h")]
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GROUPS = (32, 64, 128, 256)
PANEL = 64  # columns of an int4 panel
TIMEOUT = 300  # seconds a compiler may take


def available() -> bool | str:
    """True where the kernels can run (compiling them if need be), else the reason in one sentence."""
    library = _library()
    return library if isinstance(library, str) else True


def int8_linear(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ (q * scale).T + bias``, accumulated in fp32.

    Args:
        x: [M, K] in fp32, bf16 or fp16; any M and K.
        q: int8 [N, K]; any N.
        scale: [N], or [N, K / g] where each g = 32, 64, 128 or 256 codes along K have their own, in fp32, bf16 or fp16.
        bias: [N], or None.

    Returns:
        [M, N] in x's dtype. NaN and infinity in a row of x stay in that row.

    Raises:
        ValueError: a tensor has another shape, dtype, device or is not contiguous, or the groups are none of these.
        RuntimeError: the kernels are not available here.
    """
    _check(x, "x", (None, None), DTYPES)
    m, k = x.shape
    n = q.shape[0]
    _check(q, "q", (n, k), (torch.int8,))
    groups = scale.shape[1] if scale.dim() == 2 else 1
    _check(scale, "scale", (n, groups) if scale.dim() == 2 else (n,), DTYPES)
    if scale.dim() == 2 and k not in (groups * g for g in GROUPS):
        raise ValueError(f"{groups} scales for K = {k} codes: a group must be one of {GROUPS}")
    weight = q.data_ptr(), scale.data_ptr(), DTYPES[scale.dtype], groups
    return _run("int8_linear", x, x.new_empty(m, n), k, bias, *weight)


def int4_linear(
    x: torch.Tensor,
    q: torch.Tensor,
    scale_zero: torch.Tensor,
    group_size: int,
    out_features: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ w.T + bias`` with ``w = (code - 8) * scale + zero``, accumulated in fp32.

    Under more than 32 rows of bf16 x, where the processor multiplies bf16, w is first rounded to bf16.

    Args:
        x: [M, K] in fp32, bf16 or fp16; any M.
        q: uint8 [ceil(N / 64), K, 32]: byte [b, k, j] holds column 64b + j in its low half and 64b + 32 + j in
            its high half.
        scale_zero: [K / group_size, ceil(N / 64) * 64, 2], the pairs (scale, zero) in fp32, bf16 or fp16.
        group_size: 32, 64, 128 or 256, a divisor of K.
        out_features: N.
        bias: [N], or None.

    Returns:
        [M, N] in x's dtype. NaN and infinity in a row of x stay in that row; where x holds an infinity the row
        may come out NaN, as the zeros meet the sums of x rather than each weight.

    Raises:
        ValueError: a tensor has another shape, dtype, device or is not contiguous, or the group is none of these.
        RuntimeError: the kernels are not available here.
    """
    _check(x, "x", (None, None), DTYPES)
    m, k = x.shape
    if group_size not in GROUPS or k % group_size:
        raise ValueError(f"group_size must be one of {GROUPS} and divide K = {k}, not {group_size}")
    panels = -(-out_features // PANEL)
    _check(q, "q", (panels, k, PANEL // 2), (torch.uint8,))
    _check(scale_zero, "scale_zero", (k // group_size, panels * PANEL, 2), DTYPES)
    weight = q.data_ptr(), scale_zero.data_ptr(), DTYPES[scale_zero.dtype], group_size
    return _run("int4_linear", x, x.new_empty(m, out_features), k, bias, *weight)


def int8_scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    q: torch.Tensor,
    scale: torch.Tensor,
    sums: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``((x - x_zero) @ q.T) * x_scale * scale + bias``, summed exactly in int32, then in fp32.

    Args:
        x: int8 [M, K]; any M and K.
        x_scale: fp32, [M, 1], or one element for all rows.
        x_zero: int32, as x_scale, or None for 0.
        q: int8 [N, K]; any N.
        scale: [N] in fp32, bf16 or fp16.
        sums: int32 [N], of the rows of q; needed where there is an x_zero.
        bias: [N], or None.
        dtype: of the result: fp32, bf16 or fp16.

    Returns:
        [M, N] in dtype. A row whose x_scale is NaN is NaN.

    Raises:
        ValueError: a tensor has another shape, dtype, device or is not contiguous.
        RuntimeError: the kernels are not available here.
    """
    _check(x, "x", (None, None), (torch.int8,))
    m, k = x.shape
    n = q.shape[0]
    _check(q, "q", (n, k), (torch.int8,))
    _check(scale, "scale", (n,), DTYPES)
    for part, name, of in ((x_scale, "x_scale", torch.float32), (x_zero, "x_zero", torch.int32)):
        if part is not None:
            _check(part.view(-1), name, (m if part.dim() == 2 else 1,), (of,))
    if x_zero is not None:
        _check(sums, "sums", (n,), (torch.int32,))
    wide = _wide(bias, n)
    y = x.new_empty(m, n, dtype=dtype)
    if y.numel():
        strides = [int(part is not None and part.dim() == 2) for part in (x_scale, x_zero)]
        each = _pointer(x_scale), strides[0], _pointer(x_zero), strides[1]
        weight = q.data_ptr(), scale.data_ptr(), DTYPES[scale.dtype], _pointer(sums)
        _call("int8_scaled_linear", x.data_ptr(), m, n, k, *each, *weight, _pointer(wide), y.data_ptr(), DTYPES[dtype])
    return y


def _run(name: str, x: torch.Tensor, y: torch.Tensor, k: int, bias: torch.Tensor | None, *weight: int) -> torch.Tensor:
    """Calls the kernel that fills y [M, N]; ``weight`` is what its signature names between k and bias."""
    m, n = y.shape
    bias = _wide(bias, n)
    if not y.numel() or not k:
        return y.zero_() if bias is None else y.copy_(bias.expand(m, n))
    _call(name, x.data_ptr(), DTYPES[x.dtype], m, n, k, *weight, _pointer(bias), y.data_ptr())
    return y


def _wide(bias: torch.Tensor | None, n: int) -> torch.Tensor | None:
    """A bias [n] in fp32."""
    if bias is None:
        return None
    _check(bias, "bias", (n,), DTYPES)
    return bias.float()


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(name: str, *arguments: int | None) -> None:
    """Runs a kernel on all threads that torch uses."""
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    if getattr(library, name)(*arguments, torch.get_num_threads()):
        raise MemoryError(f"{name} found no memory for its workspace")


def _check(tensor: torch.Tensor, name: str, shape: tuple[int | None, ...], dtypes: object) -> None:
    """Raises ValueError unless the tensor may be read through a raw pointer under these assumptions."""
    fits = len(tensor.shape) == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if not (fits and tensor.dtype in dtypes and tensor.is_contiguous() and tensor.device.type == "cpu"):
        wanted = f"contiguous on the CPU, {list(shape)} in {[str(d) for d in dtypes]}"
        found = f"{list(tensor.shape)} in {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name} must be {wanted}; it is {found}")


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded kernels, or the reason why there are none."""
    compiler = _compiler()
    if isinstance(compiler, str):
        return compiler
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=TIMEOUT, check=True).stdout
        sources = [each.read_bytes() for each in (*SOURCES, *HEADERS)]
        path = cache.entry("cpu_native.so", *sources, compiler, FLAGS, version, _processor())
        with contextlib.suppress(OSError):  # not writable, or mounted so that nothing there may be loaded
            return _load(compiler, path)
        with tempfile.TemporaryDirectory(prefix="aograph-") as folder:  # a loaded library outlives its file
            return _load(compiler, Path(folder) / path.name)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() if error.stderr else []
        cause = next((line for line in said if "error" in line), said[0] if said else f"exit {error.returncode}")
        return f"the C++ compiler {compiler[0]} failed: {cause}"
    except subprocess.TimeoutExpired:
        return f"the C++ compiler {compiler[0]} took over {TIMEOUT} s"
    except OSError as error:
        return f"the C++ kernels could not be built or loaded: {error}"


def _compiler() -> list[str] | str:
    """The command of ``$CXX``, else of g++ or clang++ on PATH, or the reason why there is none."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named if shutil.which(named[0]) else f"there is no C++ compiler: CXX names {named[0]}, not found"
    found = shutil.which("g++") or shutil.which("clang++")
    return [found] if found else "there is no C++ compiler: neither CXX nor g++ or clang++ on PATH"


def _processor() -> list[str]:
    """What ``-march=native`` looks at: the model and the instruction sets of this machine's processor."""
    try:
        first = Path("/proc/cpuinfo").read_text().strip().split("\n\n")[0]
    except OSError:
        return [platform.machine(), platform.processor()]
    marks = ("vendor", "model", "cpu family", "flags", "features", "cpu part", "cpu implementer", "isa")
    return [line for line in first.splitlines() if line.lower().startswith(marks)]


def _load(compiler: list[str], path: Path) -> ctypes.CDLL:
    """Loads the build at ``path``, which is compiled where it is missing or broken."""
    try:
        return _declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):
        with cache.written_whole(path) as partial:
            command = [*compiler, *FLAGS, *map(str, SOURCES), "-o", str(partial)]
            subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=True)
    return _declare(ctypes.CDLL(str(path)))


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_long
    head, tail = [pointer, *[number] * 4], [pointer, pointer, ctypes.c_int]
    for function in (library.int8_linear, library.int4_linear):
        function.argtypes = [*head, pointer, pointer, number, number, *tail]
    scales = [pointer, number, pointer, number]
    rest = [pointer, pointer, number, pointer, pointer, pointer, number, ctypes.c_int]
    library.int8_scaled_linear.argtypes = [pointer, number, number, number, *scales, *rest]
    return library
