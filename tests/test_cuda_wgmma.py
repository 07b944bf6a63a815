"""What the emulation cannot show of wgmma, since it was written with the kernel: that a descriptor
means to the hardware what it means here. Triton's compiler, which runs on H100s, gives the same one
for the same tile of x: rows of 64 values of 16 bits, K-major.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import triton_is_interpreted

if triton_is_interpreted():
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

from benchmarks.gpu_code import TARGETS, compile_product, product_launch

ROOT = Path(__file__).parent.parent
PRODUCT = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n64k16\.f32\.f16\.f16 *"
    r"\{[^}]*\}, *\{[^}]*\}, *(%rd\d+),[^,]*,(.*);"  # D, A, B's descriptor, whether to add D
)


def products(ptx: str) -> set[tuple[int, str]]:
    """For each m64n64k16 whose left operand is in registers: what stands in the descriptor beside
    the address of the tile, and the factors and layout behind it."""
    found = set()
    for entry in ptx.split(".entry")[1:]:
        for register, settings in PRODUCT.findall(entry):
            values = re.findall(rf"(?:or\.b64|add\.s64)\s+{register}, %rd\d+, (\d+);", entry)
            assert len(values) == 1, f"{register} comes from {values}"
            found.add((int(values[0]), settings.replace(" ", "")))
    return found


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_descriptor_is_the_one_that_triton_makes(tmp_path: Path) -> None:
    source, target = ROOT / "csrc" / "cuda" / "linear.cu", tmp_path / "linear.ptx"
    command = ["nvcc", "-std=c++17", "-O3", "-Icsrc", "-ptx", "-arch=sm_90a"]
    subprocess.run([*command, str(source), "-o", str(target)], cwd=ROOT, check=True)
    ours = products(target.read_text())
    launch = product_launch("linear", TARGETS["sm_90"], torch.float16, 64, 4096, 4096, 256)
    tritons = products(compile_product(launch, TARGETS["sm_90"], torch.float16).asm["ptx"])
    assert len(ours) == 8, "four products of 16 places, with 64 rows of x and 64 more"
    assert ours == tritons
