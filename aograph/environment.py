"""The machine that an artifact was compiled for, and whether another one can run it."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

INSTRUCTIONS = re.compile(
    "s?sse|avx|amx|fma|f16c|bmi|abm|popcnt|movbe|adx|v?aes|v?pclmul|gfni|sha"  # x86
    "|asimd|sve|i8mm|bf16|fphp"  # ARM
)


def describe(device: torch.device) -> dict[str, Any]:
    """What decides where code that is compiled here for `device` can run; `python` and `processor` only inform."""
    about: dict[str, Any] = {
        "device": device.type,
        "torch": torch.__version__,
        "system": platform.system(),
        "machine": platform.machine(),
        "instructions": instructions(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        about |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name(device), "architecture": gpu(device)}
    return about


def gpu(device: torch.device) -> str:
    """The architecture of a GPU, such as sm_90."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def instructions() -> list[str]:
    """The extensions of the instruction set that the processor has and a compiler may use, as Linux names them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return sorted({word for word in found[1].split() if INSTRUCTIONS.match(word)}) if found else []


def misfits(built: Mapping[str, Any], device: torch.device | None = None) -> list[str]:
    """What of this machine does not fit code that was built for another, each with what would; empty if it runs.

    device: the GPU that is to run it, by default the current one.
    """
    wrong = []
    if release(torch.__version__) < release(built["torch"]):
        wrong.append(f"torch here is {torch.__version__}; it needs {built['torch']} or newer")
    if (platform.system(), platform.machine()) != (built["system"], built["machine"]):
        here = f"{platform.system()} on {platform.machine()}"
        wrong.append(f"the system here is {here}; it needs {built['system']} on {built['machine']}")
    elif missing := set(built["instructions"]) - set(instructions()):
        needs = f"it needs one with {built['processor']} and these, or a save on this machine"
        wrong.append(f"the processor here lacks {', '.join(sorted(missing))}; {needs}")
    if built["device"] != "cuda":
        return wrong
    if not torch.cuda.is_available():
        return [*wrong, f"torch sees no CUDA device here; it needs a GPU of {built['architecture']} ({built['gpu']})"]
    here = gpu(device or torch.device("cuda", torch.cuda.current_device()))
    if here != built["architecture"]:
        wrong.append(f"the GPU here is of {here}; it needs {built['architecture']} ({built['gpu']})")
    return wrong


def release(version: str) -> tuple[int, ...]:
    """2.13.0+cu130 → (2, 13)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
