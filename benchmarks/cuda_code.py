"""The CUDA kernels compiled by nvcc for GPUs that are not here, and their machine code.

Each file of csrc/cuda is compiled alone, once for each state of the sources, into build/cuda_code.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu_code import Code, find, parse, run_tool

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
OPS = sorted(path.stem for path in CUDA.glob("*.cu"))
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
_COMPILE = ("nvcc", "-std=c++17", "-O3", "-Icsrc", "-Werror", "all-warnings", "-cubin")


def missing_tools() -> str | None:
    """What compiling for a GPU lacks here, in one sentence; None if it lacks nothing."""
    absent = [tool for tool in ("nvcc", "c++filt") if shutil.which(tool) is None]
    return f"{' and '.join(absent)} not found" if absent else None


@functools.cache
def compile_all() -> Mapping[tuple[str, str], Path]:
    """The compiled file of each op and architecture. CalledProcessError where one fails."""
    state = hashlib.sha256(" ".join(_COMPILE).encode())
    state.update(subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout)
    for file in sorted([*CUDA.iterdir(), *(ROOT / "csrc" / "common").iterdir()]):
        state.update(file.name.encode() + file.read_bytes())
    folder = ROOT / "build" / "cuda_code" / state.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    cubins = {(op, arch): folder / f"{op}.{arch}.cubin" for op in OPS for arch in ARCHS}

    def compile_one(which: tuple[str, str]) -> None:
        op, arch = which
        part = str(folder / f"{op}.{arch}.part")
        command = [*_COMPILE, f"-arch={arch}", "-o", part, f"csrc/cuda/{op}.cu"]
        subprocess.run(command, cwd=ROOT, check=True)
        os.replace(part, cubins[which])

    missing = [which for which, cubin in cubins.items() if not cubin.exists()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, missing))
    return cubins


@functools.cache
def kernels(op: str, arch: str) -> Mapping[str, Code]:
    """The kernels of csrc/cuda/<op>.cu for an architecture, by name and template arguments.

    Names are such as "linear_few_rows_kernel<f16, 1>". `loop` is the innermost loop that looks a
    level up; threads is 1, so that per_weight counts a lane's instructions and weights.
    """
    cubin = str(compile_all()[op, arch])
    text = run_tool("nvdisasm", "-c", cubin)
    usage = run_tool("cuobjdump", "-res-usage", cubin)
    found = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]:
        mangled = find(r"^(\w+)", section)
        mine = find(rf"Function {mangled}:\s*(.*)", usage)
        ops, jumps = parse(section)
        local = int(find(r"STACK:(\d+)", mine)) + int(find(r"LOCAL:(\d+)", mine))
        registers = int(find(r"REG:(\d+)", mine))
        found[plain_name(mangled)] = Code(ops, _inner_loop(ops, jumps), 0, registers, local, 1)
    return found


def most_threads(op: str, arch: str) -> Mapping[str, int]:
    """By kernel as above, how many threads of a block it may be launched with."""
    text = run_tool("cuobjdump", "-elf", str(compile_all()[op, arch]))
    sections = re.split(r"^\.nv\.info\.", text, flags=re.M)[1:]
    bounds = r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(0x[0-9a-f]+)"
    return {plain_name(find(r"(\w+)", s)): int(find(bounds, s), 16) for s in sections}


def plain_name(mangled: str) -> str:
    """A mangled name as above."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    return re.sub(r"^void |gptj_q8::(cuda::)?|\(.*", "", plain.strip())


def _inner_loop(ops: list[str], jumps: list[tuple[int, int]]) -> list[str]:
    """The shortest loop with at least 32 lookups of 4 bytes; all instructions if there is none."""
    bodies = [ops[to : here + 1] for here, to in jumps]
    fitting = [b for b in bodies if sum(op == "LDS" or op == "LDS.U" for op in b) >= 32]
    return min(fitting, key=len, default=ops)
