"""The program that compute-sanitizer watches on a GPU: it compiles, and finds wrong results."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import cuda_emulation
import pytest
import torch

from benchmarks import sanitizer
from benchmarks.parts import SKIPPED

DRIVER = Path(__file__).parent / "cuda_driver.cpp"


def test_the_driver_finds_every_op_right(tmp_path: Path) -> None:
    """With the kernels on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels for the CPU")
    library, driver = cuda_emulation.build(), str(tmp_path / "driver")
    torch_libraries = str(Path(torch.__file__).parent / "lib")
    include = f"-I{cuda_emulation.FOLDERS[-1]}"
    links = [str(library), f"-Wl,-rpath,{library.parent}", f"-Wl,-rpath-link,{torch_libraries}"]
    command = ["g++", *cuda_emulation.FLAGS.split(), include, str(DRIVER), *links, "-o", driver]
    subprocess.run(command, check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": torch_libraries}
    done = subprocess.run([driver], text=True, capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "every result is right\n"), done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_compiles_the_driver(tmp_path: Path) -> None:
    driver = sanitizer.build("nvcc", "sm_90", tmp_path)
    assert Path(driver).stat().st_size > 0


def test_what_is_missing_is_a_reason_to_skip(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert sanitizer.main() == SKIPPED
    assert capsys.readouterr().out == "not found: nvcc and compute-sanitizer\n"


# compute-sanitizer's part is played by a script.
@pytest.mark.parametrize(
    ("says", "status", "expected"),
    [
        ("ERROR SUMMARY: 0 errors", 0, 0),
        ("Invalid __global__ read", 3, 1),
        ("Device not supported", 1, SKIPPED),
    ],
)
def test_what_the_tools_find_is_reported(
    says: str, status: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer, "_find", lambda name: str(tool))
    monkeypatch.setattr(sanitizer, "build", lambda *arguments: "/bin/true")
    assert sanitizer.main() == expected
