"""The C++ client: built with the machine's compiler against libtorch, it prints what Python computes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from aograph.artifact import load
from tests.models.zoo import ids

SOURCE = Path(__file__).with_name("client.cpp")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("cpp") / "client"
    libraries = [flag for folder in library_paths() for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    command = [
        compiler, "-std=c++20", "-O0", "-w", str(SOURCE), "-o", str(program),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{folder}" for folder in include_paths()), *libraries,
        "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return program


def run(client, *arguments):
    return subprocess.run([client, *map(str, arguments)], capture_output=True, text=True)


def test_it_prints_the_logits_of_python(client, language_model):
    tokens = ids(2, 9)
    done = run(client, language_model.path, *(",".join(map(str, row)) for row in tokens.tolist()))
    assert done.returncode == 0, done.stderr
    expected = load(language_model.path)(input_ids=tokens, use_cache=False).logits
    found = torch.tensor([float(line) for line in done.stdout.split()]).view_as(expected)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_errors(client, tmp_path):
    (tmp_path / "empty.pt2").touch()
    done = run(client, tmp_path / "empty.pt2", "1,2", "3,4")
    assert done.returncode == 1 and done.stderr.startswith("error: ")
