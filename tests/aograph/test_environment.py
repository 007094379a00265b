import re

import pytest
import torch

from aograph.environment import INSTRUCTIONS, describe, instructions, misfits, release

CPU = torch.device("cpu")


def test_the_machine_that_built_fits():
    assert misfits(describe(CPU)) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"torch": "99.2.0+cu130"}, "it needs 99.2.0"),
        ({"machine": "sparc64"}, "on sparc64"),
        ({"system": "Windows"}, "it needs Windows"),
        ({"instructions": ["avx512f", "avx9000"], "processor": "AVX9000"}, "lacks avx9000; it needs one with AVX9000"),
        ({"device": "cuda", "architecture": "sm_1", "gpu": "A GPU"}, r"sm_1 \(A GPU\)"),
    ],
)
def test_what_does_not_fit_is_named_with_what_would(change, message, monkeypatch):
    monkeypatch.setattr("aograph.environment.instructions", lambda: ["avx512f"])
    built = {**describe(CPU), "instructions": ["avx512f"], **change}
    (found,) = misfits(built)
    assert re.search(message, found), found


def test_an_older_build_fits():
    assert misfits({**describe(CPU), "torch": "2.0.1"}) == []


def test_releases():
    assert release("2.13.0+cpu") == (2, 13) == release("2.13.1")
    assert release("2.9.1") < release("2.11.0")


def test_instructions():
    assert all(INSTRUCTIONS.match(word) for word in ("avx512_bf16", "amx_tile", "ssse3", "sse4_2", "asimddp", "sve2"))
    assert not any(INSTRUCTIONS.match(word) for word in ("hypervisor", "constant_tsc", "syscall", "ht"))
    assert instructions() == sorted(set(instructions()))


@pytest.mark.cuda
def test_the_gpu_is_described():
    about = describe(torch.device("cuda", 0))
    assert about["architecture"].startswith("sm_") and misfits(about) == []
    assert "needs sm_1 " in misfits({**about, "architecture": "sm_1"})[0]
