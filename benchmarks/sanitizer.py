"""The CUDA kernels on the GPU under compute-sanitizer: out-of-bounds accesses and races.

    python -m benchmarks.sanitizer

Builds tests/cuda_driver.cpp (tiny products, every op, no PyTorch) for the GPU at hand and runs it
under memcheck and racecheck. Exit status 77, and the reason, where something for that is missing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.parts import ROOT, SKIPPED

TOOLS = ("memcheck", "racecheck")
FAILED = 3


def main() -> int:
    nvcc, sanitizer = _find("nvcc"), _find("compute-sanitizer")
    missing = [
        name for name, path in (("nvcc", nvcc), ("compute-sanitizer", sanitizer)) if path is None
    ]
    if nvcc is None or sanitizer is None:
        print(f"not found: {' and '.join(missing)}")
        return SKIPPED
    with tempfile.TemporaryDirectory() as folder:
        driver = build(nvcc, _arch(), Path(folder))
        if subprocess.run([driver], check=False).returncode:
            print("the results are wrong even without a sanitizer")
            return 1
        for tool in TOOLS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", str(FAILED), driver]
            done = subprocess.run(command, text=True, capture_output=True, check=False)
            print(done.stdout + done.stderr, flush=True)
            if "Device not supported" in done.stdout + done.stderr:
                print(f"compute-sanitizer does not support this device with {tool}")
                return SKIPPED
            if done.returncode:
                print(f"{tool} found something; its report stands above")
                return 1
    print(f"{' and '.join(TOOLS)} found nothing")
    return 0


def build(nvcc: str, arch: str, folder: Path) -> str:
    """The driver, compiled for an architecture such as "sm_90" or for the "native" one."""
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        flags = ["-std=c++17", "-O3", "-lineinfo", f"-arch={arch}", f"-I{ROOT / 'csrc'}"]
        subprocess.run([nvcc, *flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*kernels, ROOT / "tests" / "cuda_driver.cpp"]))
    driver = str(folder / "cuda_driver")
    subprocess.run([nvcc, f"-arch={arch}", *objects, "-o", driver], check=True)
    return driver


def _arch() -> str:
    """Of the GPU at hand, on Hopper with wgmma."""
    if not torch.cuda.is_available():
        return "native"
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return "sm_90a" if arch == "sm_90" else arch


def _find(tool: str) -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(tool) or shutil.which(tool, path=f"{home}/bin")


if __name__ == "__main__":
    sys.exit(main())
