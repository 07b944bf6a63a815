"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ against tests/cuda_on_cpu.

    from cuda_emulation import emulator
    emulator().force()              # a context: the backend `cuda` takes CPU tensors
    emulator().set_order(1)         # threads and blocks run backwards

The library is built when first asked for, into build/cuda_on_cpu, once for each state of the
sources.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gptj_q8 import backends
from gptj_q8.backends import cuda

ROOT = Path(__file__).parent.parent
FOLDERS = [ROOT / "csrc" / "common", ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda_on_cpu"]
FLAGS = (
    "-std=c++17 -O2 -fPIC -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas"
    " -DQ8_CUDA_ON_CPU -DTORCH_TARGET_VERSION=0x020a000000000000"
)
SANITIZERS = "-g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
SANITIZED = "CUDA_ON_CPU_SANITIZED"
"""Set in the environment of a process that has AddressSanitizer's library preloaded."""


class Emulator:
    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))
        for name in ("sites", "kernels", "make_mistake"):
            getattr(self._library, f"cuda_on_cpu_{name}").restype = ctypes.c_char_p

    @contextlib.contextmanager
    def force(self) -> Iterator[None]:
        """Within it the backend `cuda` is this emulation, for CPU tensors."""
        library = cuda._library
        before = library.ops, library.unavailable
        library.ops, library.unavailable = torch.ops.gptj_q8_cuda_on_cpu, None
        backends.unavailable.cache_clear()
        try:
            yield
        finally:
            library.ops, library.unavailable = before
            backends.unavailable.cache_clear()

    def set_order(self, order: int) -> None:
        """In which threads and blocks run: 0 as numbered, 1 backwards, more is a random seed."""
        self._library.cuda_on_cpu_set_order(order)

    @contextlib.contextmanager
    def on(self, processors: int, shared_kb: int, capability: int) -> Iterator[None]:
        """Within it the launches believe in such a GPU; a kernel that needs more fails."""
        self._library.cuda_on_cpu_set_gpu(processors, shared_kb * 1024, capability)
        try:
            yield
        finally:
            self._library.cuda_on_cpu_set_gpu(4, 227 * 1024, 90)

    @contextlib.contextmanager
    def last_block_only(self) -> Iterator[None]:
        """Within it launches run their last block and no other: for sizes that take too long."""
        self._library.cuda_on_cpu_set_last_block_only(1)
        try:
            yield
        finally:
            self._library.cuda_on_cpu_set_last_block_only(0)

    @contextlib.contextmanager
    def without(self, site: str) -> Iterator[None]:
        """Within it the barrier or wait at "file:line" does nothing."""
        file, line = site.split(":")
        self._library.cuda_on_cpu_leave_out(file.encode(), int(line))
        try:
            yield
        finally:
            self._library.cuda_on_cpu_leave_out(b"", 0)

    def sites(self) -> set[str]:
        """Every barrier and wait reached so far, as "file:line"."""
        return set(self._library.cuda_on_cpu_sites().decode().split())

    def kernels(self) -> set[str]:
        """The kernels run so far, by their mangled names."""
        return set(self._library.cuda_on_cpu_kernels().decode().split())

    def make_mistake(self, name: str) -> str:
        """What is said of a kernel of mistakes.cpp, which is wrong on purpose."""
        return self._library.cuda_on_cpu_make_mistake(name.encode()).decode()


def emulator() -> Emulator:
    """The emulator, built if need be. Skips the test where it cannot be built."""
    if shutil.which("g++") is None:
        pytest.skip("the CUDA kernels run on the CPU when g++ has compiled them; there is no g++")
    return _emulator(bool(os.environ.get(SANITIZED)))


@functools.cache
def _emulator(sanitized: bool) -> Emulator:
    return Emulator(build(sanitized))


def build(sanitized: bool = False) -> Path:
    """The library, compiled if the sources are new."""
    flags = f"{FLAGS} {SANITIZERS if sanitized else ''}"
    files = sorted(f for folder in FOLDERS for f in folder.iterdir() if f.is_file())
    state = hashlib.sha256(flags.encode())
    for file in files:
        state.update(str(file).encode() + file.read_bytes())
    folder = ROOT / "build" / "cuda_on_cpu" / state.hexdigest()[:16]
    library = folder / "cuda_on_cpu.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    include = Path(torch.__file__).parent / "include"

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        command = ["g++", *flags.split(), "-isystem", str(include), f"-I{FOLDERS[-1]}", "-x", "c++"]
        subprocess.run([*command, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = [f for f in files if f.suffix in (".cu", ".cpp")]
        objects = list(pool.map(compile_one, sources))
    partial = folder / "partial.so"
    torch_libraries = include.parent / "lib"
    command = ["g++", "-shared", *flags.split(), *objects, f"-L{torch_libraries}", "-ltorch_cpu"]
    subprocess.run([*command, "-ldl", "-o", str(partial)], check=True)
    partial.rename(library)
    return library
