"""The CUDA kernels compiled by nvcc for GPUs that are not here, and their machine code."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.gpu_code import Code, find, parse, run_tool

ROOT = Path(__file__).parent.parent
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def missing_tools() -> str | None:
    """What compiling for a GPU lacks here, in one sentence; None if it lacks nothing."""
    absent = [tool for tool in ("nvcc", "c++filt") if shutil.which(tool) is None]
    return f"{' and '.join(absent)} not found" if absent else None


@functools.cache
def kernels(op: str, arch: str) -> Mapping[str, Code]:
    """The kernels of csrc/cuda/<op>.cu for an architecture, by name and template arguments.

    Names are such as "linear_few_rows_kernel<f16, 1>". `loop` is the innermost loop that looks a
    level up; threads is 1, so that per_weight counts a lane's instructions and weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / f"{op}.cubin")
        command = ["nvcc", "-std=c++17", "-O3", "-Icsrc", f"-arch={arch}", "-cubin", "-o", cubin]
        subprocess.run([*command, f"csrc/cuda/{op}.cu"], cwd=ROOT, check=True)
        text = run_tool("nvdisasm", "-c", cubin)
        usage = run_tool("cuobjdump", "-res-usage", cubin)
    found = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]:
        mangled = find(r"^(\w+)", section)
        mine = find(rf"Function {mangled}:\s*(.*)", usage)
        ops, jumps = parse(section)
        local = int(find(r"STACK:(\d+)", mine)) + int(find(r"LOCAL:(\d+)", mine))
        registers = int(find(r"REG:(\d+)", mine))
        found[_name(mangled)] = Code(ops, _inner_loop(ops, jumps), 0, registers, local, 1)
    return found


def _name(mangled: str) -> str:
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    return re.sub(r"^void |gptj_q8::(cuda::)?|\(.*", "", plain.strip())


def _inner_loop(ops: list[str], jumps: list[tuple[int, int]]) -> list[str]:
    """The shortest loop with at least 32 lookups of 4 bytes; all instructions if there is none."""
    bodies = [ops[to : here + 1] for here, to in jumps]
    fitting = [b for b in bodies if sum(op == "LDS" or op == "LDS.U" for op in b) >= 32]
    return min(fitting, key=len, default=ops)
