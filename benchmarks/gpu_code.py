"""Triton kernels compiled for GPUs that are not here, and their machine code taken apart.

Triton's wheel brings the assemblers, `cuobjdump` and `nvdisasm`; no GPU and no driver is needed.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptj_q8.backends.triton.configs import family
from gptj_q8.backends.triton.linear import plan_linear, table_tile
from gptj_q8.backends.triton.linear_grad_input import plan_linear_grad_input
from gptj_q8.backends.triton.splits import Launch

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TENSOR_CORE = "HMMA|HGMMA|UTCHMMA|v_mfma|v_wmma"
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Target:
    """shared: bytes of shared memory that one program may use."""

    name: str
    gpu: GPUTarget
    shared: int

    def __str__(self) -> str:
        return self.name

    @property
    def family(self) -> str:
        return family(self.gpu.backend, self.gpu.arch)


NVIDIA = tuple(
    Target(f"sm_{arch}", GPUTarget("cuda", arch, 32), shared * 1024)
    for arch, shared in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))
)
AMD = (
    Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024),
    Target("gfx1100", GPUTarget("hip", "gfx1100", 32), 64 * 1024),
)
# Triton has no tensor cores here, so only the kernels that use none are for it.
TURING = Target("sm_75", GPUTarget("cuda", 75, 32), 64 * 1024)
TARGETS = {target.name: target for target in (TURING, *NVIDIA, *AMD)}


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel.

    loop: the mnemonics of the loop that `inside` matched, or of everything where nothing loops.
    """

    ops: list[str]
    loop: list[str]
    shared: int
    registers: int
    local: int
    threads: int

    def count(self, pattern: str, ops: list[str] | None = None) -> int:
        """How many instructions' mnemonics match from their start."""
        return sum(bool(re.match(pattern, op)) for op in (self.ops if ops is None else ops))

    def per_weight(self, weights: int) -> float:
        """Thread instructions of the loop for each of the weights that it decodes in a turn."""
        return len(self.loop) * self.threads / weights


def compile_kernel(
    kernel: Any,
    target: Target,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Any:
    """What Triton gives for a kernel's parameters: types such as "*fp16", the rest constants.

    All pointers and integers but M count as multiples of 16, as Triton finds them in use.
    """
    names = kernel.arg_names
    where = {name: (names.index(name),) for name in names}
    sixteen = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {where[name]: value for name, value in constants.items()},
        {where[n]: sixteen for n, t in types.items() if n != "M" and (t[0] == "*" or t[0] == "i")},
    )
    return triton.compile(source, target=target.gpu, options=dict(options))


def take_apart(compiled: Any, target: Target, inside: str = "") -> Code:
    """The machine code. `inside`: what a mnemonic of the loop that is wanted looks like."""
    threads = compiled.metadata.num_warps * target.gpu.warp_size
    if target.gpu.backend == "hip":
        text = compiled.asm["amdgcn"]
        ops = re.findall(r"^\s+([a-z]\w+)(?:\s|$)", text, re.M)
        local = int(find(r"\.private_segment_fixed_size:\s*(\d+)", text))
        registers = int(find(r"\.vgpr_count:\s*(\d+)", text))
        return Code(ops, ops, compiled.metadata.shared, registers, local, threads)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = run_tool("nvdisasm", "-c", file.name)
        usage = run_tool("cuobjdump", "-res-usage", file.name)
    ops, jumps = parse(text)
    loop = _loop(ops, jumps, inside)
    local = int(find(r"STACK:(\d+)", usage)) + int(find(r"LOCAL:(\d+)", usage))
    registers = int(find(r"REG:(\d+)", usage))
    return Code(ops, loop, compiled.metadata.shared, registers, local, threads)


def histogram(ops: list[str], most: int = 12) -> str:
    """The most frequent instructions in words, for messages and tables."""
    return ", ".join(f"{n} {op}" for op, n in Counter(ops).most_common(most))


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);")


def parse(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Mnemonics of nvdisasm's text in order, and (from, to) of every jump back."""
    ops: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"^\s*(\.L\w+):", line):
            labels[label[1]] = len(ops)
        elif found := _INSTRUCTION.match(line):
            if found[1].startswith("BRA") and (to := re.search(r"\((\.L\w+)\)", found[2])):
                jumps.append((len(ops), to[1]))
            ops.append(found[1])
    return ops, [(here, labels[to]) for here, to in jumps if labels.get(to, here) < here]


def _loop(ops: list[str], jumps: list[tuple[int, int]], inside: str) -> list[str]:
    """The longest loop that has an instruction like `inside`; all instructions if there is none."""
    bodies = [ops[to : here + 1] for here, to in jumps]
    fitting = [body for body in bodies if any(re.match(inside, op) for op in body)]
    return max(fitting, key=len, default=ops)


def find(pattern: str, text: str) -> str:
    """What the pattern's group matches. Raises ValueError if nothing does."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in {text[:200]!r}")
    return found[1]


def run_tool(tool: str, *arguments: str) -> str:
    """What one of the tools in Triton's wheel prints."""
    command = [str(_TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Twice the multiprocessors of A100, RTX 3090, L40S, H100, B200, RTX PRO 6000, MI300X, RX 7900 XTX.
PROGRAMS = {
    "sm_75": 80,
    "sm_80": 216,
    "sm_86": 164,
    "sm_89": 284,
    "sm_90": 264,
    "sm_100": 296,
    "sm_120": 376,
    "gfx942": 608,
    "gfx1100": 192,
}


def product_launch(
    op: str, target: Target, dtype: torch.dtype, M: int, N: int, K: int, block_size: int
) -> Launch:
    """How the backend launches `linear` or `linear_grad_input` on a GPU like the target."""
    wanted = PROGRAMS[target.name]
    if op == "linear_grad_input":
        return plan_linear_grad_input(dtype, M, N, K, block_size, target.family, wanted)
    tile = table_tile(dtype, target.family, M, K, block_size)
    return plan_linear(tile, M, N, K, block_size, wanted)


def product_code(launch: Launch, target: Target, dtype: torch.dtype) -> Code:
    """The machine code of a product's kernel, its tensors and bias of one dtype."""
    constants, options = tuple(launch.constants.items()), tuple(launch.options.items())
    return _product_code(launch.kernel, target, dtype, constants, options)


def compile_product(launch: Launch, target: Target, dtype: torch.dtype) -> Any:
    """The same as Triton gives it."""
    return _compile_product(launch.kernel, target, dtype, launch.constants, launch.options)


@functools.cache
def _product_code(kernel: Any, target: Target, dtype: torch.dtype, *settings: Any) -> Code:
    compiled = _compile_product(kernel, target, dtype, *map(dict, settings))
    few_rows = "words" in kernel.arg_names
    return take_apart(compiled, target, "LDS" if few_rows else TENSOR_CORE + "|FFMA")


def _compile_product(
    kernel: Any,
    target: Target,
    dtype: torch.dtype,
    constants: Mapping[str, int],
    options: Mapping[str, int],
) -> Any:
    ours = f"*{TYPES[dtype]}"
    types = dict.fromkeys(("x", "dy", "bias"), ours)
    types |= dict.fromkeys(("y", "dx"), "*fp32" if constants["SPLITS"] > 1 else ours)
    types |= {"codes": "*u8", "words": "*i32", "absmax": "*fp32", "codebook": "*fp32"}
    types |= dict.fromkeys("MNK", "i32")
    mine = {name: types[name] for name in kernel.arg_names if name in types}
    return compile_kernel(kernel, target, mine, constants, options)
