"""The Triton kernels compiled for GPUs that are not here, and a lint of their machine code.

Exactly the configurations that the tables give for GPT-J's shapes. Where the interpreter is on
nothing compiles, so this needs a process without it.
"""

from __future__ import annotations

import re

import pytest
import torch
import triton
from cases import triton_is_interpreted
from packaging.version import Version

from benchmarks.shapes import GPTJ

if triton_is_interpreted():
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

from benchmarks.gpu_code import (
    AMD,
    NVIDIA,
    TARGETS,
    TENSOR_CORE,
    TURING,
    TYPES,
    Target,
    compile_kernel,
    histogram,
    product_code,
    product_launch,
    take_apart,
)
from benchmarks.triton_budget import GPUS, budget
from gptj_q8.backends.triton import format as triton_format
from gptj_q8.backends.triton.adam_step import adam_step_kernel
from gptj_q8.backends.triton.configs import ADAM, ELEMENTWISE
from gptj_q8.backends.triton.dequantize import dequantize_kernel
from gptj_q8.backends.triton.embedding import embedding_kernel
from gptj_q8.backends.triton.histogram import absmax_kernel, histogram_kernel
from gptj_q8.backends.triton.linear_gemv import linear_gemv_kernel
from gptj_q8.backends.triton.quantize import quantize_kernel
from gptj_q8.backends.triton.splits import Launch

BLOCK_SIZE = 256
M_BUCKETS = {"linear": (1, 2, 16, 32, 64, 128), "linear_grad_input": (16, 64, 128)}

# Whole mnemonics: an instruction of another shape or input would be another kernel.
INTENDED = {
    ("sm_80", torch.float16): r"HMMA\.16816\.F32$",
    ("sm_80", torch.bfloat16): r"HMMA\.16816\.F32\.BF16$",
    ("sm_90", torch.float16): r"HGMMA\.64x\d+x16\.F32$",
    ("sm_90", torch.bfloat16): r"HGMMA\.64x\d+x16\.F32\.BF16$",
    ("sm_100", torch.float16): r"UTCHMMA",
    ("sm_100", torch.bfloat16): r"UTCHMMA",
    ("gfx942", torch.float16): r"v_mfma_f32_(32x32x8|16x16x16)_f16",
    ("gfx942", torch.bfloat16): r"v_mfma_f32_(32x32x8|16x16x16)_bf16",
    ("gfx1100", torch.float16): r"v_wmma_f32_16x16x16_f16",
    ("gfx1100", torch.bfloat16): r"v_wmma_f32_16x16x16_bf16",
}
# Thread instructions for each weight in the loop (with the multiply-adds, where the kernel for a
# few rows serves), for the M in M_BUCKETS: what was reached, rounded up, so that a compiler or an
# edit that loses some is seen. Above, a product of many rows, the decoding is no longer what
# costs. On Hopper the aim was 5.5 to 32 rows and 6.5 above. With Triton 3.7.
#
# What keeps it from that: at 1 row, Triton adds the table's address for every lookup and stores the
# table anew in every step (the CUDA kernel takes 6.1). At 128 rows, a multiply-add for each weight
# scales the sums; steps of 256 columns would halve those (5.6), but spill with two stages, and with
# one nothing is on its way meanwhile. The path to shared memory is the narrower one there anyhow.
CEILINGS = {
    ("linear", "sm80"): {1: 8.2, 2: 9.1, 16: 5.0, 32: 5.5, 64: 7.4},
    ("linear", "sm86"): {1: 8.4, 2: 9.2, 16: 5.6, 32: 6.5, 64: 7.3},
    ("linear", "sm90"): {1: 7.8, 2: 9.2, 16: 5.1, 32: 5.3, 64: 6.2, 128: 7.0},
    ("linear", "sm100"): {1: 8.2, 2: 8.0, 16: 4.9, 32: 5.0, 64: 5.2, 128: 7.8},
    ("linear_grad_input", "sm80"): {16: 6.0, 64: 7.2},
    ("linear_grad_input", "sm86"): {16: 6.9, 64: 7.9},
    ("linear_grad_input", "sm90"): {64: 7.2, 128: 8.8},
    ("linear_grad_input", "sm100"): {64: 9.7},
}

# Triton 3.6 spends up to a sixth more.
NEW = Version(triton.__version__) >= Version("3.7")
SLACK = 1 if NEW else 1.17


def intended(target: Target, dtype: torch.dtype) -> str:
    same_as = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_120": "sm_80"}
    return INTENDED[same_as.get(target.name, target.name), dtype]


def launches(op: str, target: Target, dtype: torch.dtype) -> dict[str, tuple[int, Launch]]:
    """M and launch of every configuration that GPT-J's shapes use, each once."""
    found = {}
    for m in M_BUCKETS[op]:
        for shape in GPTJ:
            launch = product_launch(op, target, dtype, m, shape.n, shape.k, BLOCK_SIZE)
            splits = "" if launch.splits == 1 else "split "
            key = {name: n for name, n in launch.constants.items() if name != "SPLITS"}
            found.setdefault(f"{op} M={m} {splits}{key}", (m, launch))
    return found


# bfloat16 and float16 take the same path but for the name of an instruction.
PAIRS = [(target, torch.bfloat16) for target in NVIDIA + AMD]
PAIRS += [(TARGETS[name], torch.float16) for name in ("sm_80", "sm_90", "gfx942")]


@pytest.mark.parametrize(("target", "dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("op", M_BUCKETS)
def test_products_are_the_code_that_was_meant(op: str, target: Target, dtype: torch.dtype) -> None:
    for name, (m, launch) in launches(op, target, dtype).items():
        code = product_code(launch, target, dtype)
        what = f"{name}: {histogram(code.loop)}"
        few_rows = launch.kernel is linear_gemv_kernel
        assert code.local == 0, f"local memory in {what}"
        assert code.count("LDL|STL|scratch_") == 0, f"spills in {what}"
        assert code.shared <= target.shared, f"{code.shared} bytes of shared memory in {what}"
        assert not any("TF32" in op for op in code.ops), what
        if few_rows:
            assert code.count(TENSOR_CORE) == 0, what
        else:
            assert code.count(intended(target, dtype)) == code.count(TENSOR_CORE) > 0, what
        if target in AMD:
            continue
        wide = r"LDG\.E\.64" if few_rows else r"LDGSTS\.E\.BYPASS\.128"
        assert code.count(wide, code.loop) > 0, f"no wide loads in {what}"
        ceiling = CEILINGS[op, target.family].get(m)
        if ceiling is not None:
            weights = launch.constants["TILE_N"] * launch.constants["TILE_K"]
            assert code.per_weight(weights) <= ceiling * SLACK, (
                f"{code.per_weight(weights)} in {what}"
            )


@pytest.mark.parametrize("target", NVIDIA, ids=lambda target: target.name)
def test_float32_products_use_no_tensor_core(target: Target) -> None:
    for op, m in (("linear", 1), ("linear", 4), ("linear", 32), ("linear_grad_input", 32)):
        launch = product_launch(op, target, torch.float32, m, 4096, 4096, BLOCK_SIZE)
        code = product_code(launch, target, torch.float32)
        assert code.count(TENSOR_CORE) == 0
        assert code.count("FFMA") > 0
        assert code.local == 0
        assert code.count("LDL|STL") == 0


POINTERS = {"codes": "*u8", "absmax": "*fp32", "codebook": "*fp32", "numel": "i32"}
SCALARS = ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "decay", "rate", "eps")
ADAM_TYPES = {
    **dict.fromkeys(("m_codes", "v_codes"), "*u8"),
    **dict.fromkeys(("m_absmax", "v_absmax", "m_codebook", "v_codebook"), "*fp32"),
    **dict.fromkeys(SCALARS, "fp32"),
    "numel": "i32",
}
EXACT = triton_format.EXACT


def blocks(block_size: int, tile: int = ELEMENTWISE.tile) -> dict[str, int]:
    count = triton_format.blocks_per_tile(block_size, tile)
    return {"BLOCK_SIZE": block_size, "BLOCKS": count}


OTHERS = [pair for pair in PAIRS if pair[1] == torch.bfloat16] + [(TARGETS["sm_90"], torch.float32)]


@pytest.mark.parametrize(("target", "dtype"), OTHERS, ids=str)
def test_other_kernels_neither_spill_nor_divide_inexactly(
    target: Target, dtype: torch.dtype
) -> None:
    float_type = f"*{TYPES[dtype]}"
    exact = {"num_warps": ELEMENTWISE.num_warps, **EXACT}
    plain = {"num_warps": ELEMENTWISE.num_warps}
    weight = {**POINTERS, "weight": float_type}
    rows = {**POINTERS, "ids": "*i64", "rows": float_type, "N": "i32", "K": "i32"}
    counts = {**weight, "largest": "*fp32", "counts": "*i64", "bins": "i32"}
    adam = {**ADAM_TYPES, "param": float_type, "grad": float_type}
    asserting = {**plain, "debug": True, "sanitize_overflow": False}
    cases = [
        (dequantize_kernel, weight, blocks(256), plain, 0),
        (embedding_kernel, rows, {"BLOCK_SIZE": 256, "TILE": 4096}, asserting, 0),
        (quantize_kernel, weight, blocks(256), exact, 1),
        (quantize_kernel, weight, blocks(4096), exact, 1),
        (absmax_kernel, weight, blocks(256), exact, 0),
        (histogram_kernel, counts, blocks(256), exact, 2),
        (adam_step_kernel, adam, blocks(256, ADAM.tile), {**exact, "num_warps": ADAM.num_warps}, 3),
    ]
    for kernel, types, constants, options, divisions in cases:
        mine = {name: type_ for name, type_ in types.items() if name in kernel.arg_names}
        compiled = compile_kernel(kernel, target, mine, constants, options)
        code = take_apart(compiled, target)
        name = f"{kernel.__name__} {constants}"
        assert code.local == 0, name
        assert code.count("LDL|STL|scratch_") == 0, name
        if target in AMD:
            assert bool(code.count("v_div_fixup_f32")) == bool(divisions), name
            continue
        assert bool(code.count("FCHK")) == bool(divisions), (
            f"{name}: the check of an exact division"
        )
        assert code.count(r"REDG?\.|ATOM") == 0 or kernel is histogram_kernel, name
        ptx = compiled.asm["ptx"]
        assert not re.search(r"div\.(full|approx)|sqrt\.approx|\.ftz", ptx), name
        if options is exact:
            assert not re.search(r"\bfma\.", ptx), f"{name}: a product and a sum rounded once"


@pytest.mark.skipif(not NEW, reason="the header tells of Triton 3.7, this is an older one")
def test_the_written_budget_is_the_codes() -> None:
    """The table in the few-rows kernel's header, with the machine code that it speaks of."""
    for name, gpu in GPUS.items():
        for shape in GPTJ:
            launch = product_launch("linear", gpu.target, torch.float16, 1, shape.n, shape.k, 256)
            found = budget(gpu, launch, torch.float16)
            row = re.search(rf"^ +{name} +([\d.]+) +([\d.]+) +([\d.]+)$", header(), re.M)
            assert row, f"no row for {name} in the header"
            numbers = [round(number, 1) for number in (found.needed, found.issue, found.shared)]
            assert [float(number) for number in row.groups()] == pytest.approx(numbers, rel=0.04)
            assert found.reach == 1, f"{name} {shape.name} is not bound by its memory"
            assert found.resident == (1 if name == "T4" else 2)


def header() -> str:
    return linear_gemv_kernel.src


@pytest.mark.parametrize("m", [1, 2, 4])
def test_turing_has_the_kernel_for_a_few_rows(m: int) -> None:
    launch = product_launch("linear", TURING, torch.float16, m, 4096, 4096, BLOCK_SIZE)
    assert launch.kernel is linear_gemv_kernel
    code = product_code(launch, TURING, torch.float16)
    assert code.local == 0
    assert code.count("LDL|STL") == 0
