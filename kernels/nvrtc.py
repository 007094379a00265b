"""CUDA C++ to machine code at run time, by NVRTC: neither a toolkit nor a GPU is needed.

NVRTC and the bindings to it come with torch's CUDA builds (the package cuda-bindings). A source may include ``.cuh``
files of this folder, and those of CUDA's headers that NVRTC can read, such as cuda_bf16.h, where they are installed.
"""

import contextlib
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from . import cache

try:
    from cuda.bindings import nvrtc
except ImportError as error:
    nvrtc = None
    MISSING = f"the package cuda-bindings, which torch's CUDA builds bring, cannot be imported: {error}"

__all__ = ["FOLDER", "architecture", "architectures", "compile", "version"]

FOLDER = Path(__file__).parent  # of the sources


@functools.cache
def version() -> tuple[int, int] | str:
    """The version of NVRTC, or the reason in one sentence why there is none."""
    if nvrtc is None:
        return MISSING
    try:
        return _checked(nvrtc.nvrtcVersion())
    except RuntimeError as error:
        return f"NVRTC, the run-time compiler of CUDA C++, cannot be loaded: {str(error).partition('. ')[0]}"


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for: (8, 6) is "sm_86", (9, 0) is "sm_90a", with the features that no other generation has."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def architectures() -> set[str]:
    """What NVRTC, which must be there, compiles for."""
    return {architecture(divmod(number, 10)) for number in _checked(nvrtc.nvrtcGetSupportedArchs())}


def compile(source: str, name: str, architecture: str, defines: Mapping[str, int | str]) -> bytes:
    """The machine code (cubin) of a source; from the cache, if it is there and whole.

    Args:
        source: CUDA C++.
        name: of the source's file, for errors and for the cache.
        architecture: "sm_80", "sm_90a" …
        defines: macros and what stands for them in the source.

    Raises:
        RuntimeError: it does not compile (with NVRTC's log), or there is no NVRTC.
    """
    found = version()
    if isinstance(found, str):
        raise RuntimeError(found)
    macros = [f"-D{key}={value}" for key, value in sorted(defines.items())]
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *macros, *_include()]
    headers = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.cuh"))}
    path = cache.entry(f"{Path(name).stem}.cubin", source, headers, name, options, found)
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        if _with_digest(kept[:-32]) == kept:
            return kept[:-32]
    cubin = _compile(source, name, options, headers)
    with contextlib.suppress(OSError), cache.written_whole(path) as partial:  # else each process compiles for itself
        partial.write_bytes(_with_digest(cubin))
    return cubin


def _compile(source: str, name: str, options: list[str], headers: dict[str, str]) -> bytes:
    texts, names = ([text.encode() for text in each] for each in (headers.values(), headers))
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), len(headers), texts, names))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status:
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            said = log.decode(errors="replace").strip("\0\n") or status.name
            raise RuntimeError(f"{name} does not compile with {' '.join(options)}:\n{said}")
        cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _with_digest(cubin: bytes) -> bytes:
    """What is kept of a cubin; readers of ELF files ignore what follows the last section."""
    return cubin + hashlib.sha256(cubin).digest()


@functools.cache
def _include() -> list[str]:
    """The option that names the folder of CUDA's headers; none where there is no such folder."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError:
        return []
    folder = find_nvidia_header_directory("cudart")
    return [f"--include-path={folder}"] if folder else []


def _checked(answer: tuple):
    """What a call of NVRTC returns besides its status; RuntimeError where that is an error."""
    status, *values = answer
    if status:
        raise RuntimeError(f"{status.name}: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if len(values) == 1 else tuple(values)
