"""The CUDA kernels compiled for every architecture, and a lint of their machine code."""

from __future__ import annotations

import re

import pytest
from cuda_emulation import emulator
from test_cuda_emulated import reach_every_kernel

from benchmarks.cuda_budget import GPUS, budget, kernel_for
from benchmarks.cuda_code import ARCHS, OPS, kernels, missing_tools, most_threads, plain_name
from benchmarks.gpu_code import Code, histogram

PRODUCTS = ("linear", "linear_grad_input")

if reason := missing_tools():
    pytest.skip(f"compiling for GPUs: {reason}", allow_module_level=True)

TENSOR = "HMMA|HGMMA"


def intended(name: str, arch: str) -> str | None:
    """The tensor-core instruction of a kernel, as a whole mnemonic; None: it has none."""
    if "wgmma" in name:
        return (
            r"HGMMA\.64x64x16\.F32" + (r"\.BF16$" if "bf16" in name else "$")
            if arch == "sm_90a"
            else None
        )
    if "tensor" not in name or (arch == "sm_75" and "true" not in name):
        return None  # not launched there: sm_75 lacks the wider one
    if "true" in name:
        return r"HMMA\.1688\.F32$"
    return r"HMMA\.16816\.F32\.BF16$" if "bf16" in name else r"HMMA\.16816\.F32$"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", PRODUCTS)
def test_products_are_the_code_that_was_meant(op: str, arch: str) -> None:
    for name, code in kernels(op, arch).items():
        what = f"{name}: {histogram(code.loop)}"
        assert code.local == 0, f"local memory in {what}"
        assert code.count("LDL|STL") == 0, f"spills in {what}"
        assert code.count("RED|ATOM") == 0, f"atomics in {what}"
        assert not any("TF32" in each for each in code.ops), what
        meant = intended(name, arch)
        assert code.count(TENSOR) == (code.count(meant) if meant else 0), what
        if name.startswith("linear_wgmma"):
            # Elsewhere than on sm_90a it does nothing.
            assert meant or len(code.ops) < 20, what
            assert not meant or code.count(r"LDGSTS\.E\..*128", code.loop) == 4, what
            assert not meant or code.count("WARPGROUP.DEPBAR", code.loop) == 2, what
        elif meant:
            assert code.count(TENSOR, code.loop) >= 8, what
            copy, wide = (
                ("LDG", r"LDG\.E.*\.128") if arch == "sm_75" else ("LDGSTS", r"LDGSTS\.E\..*128")
            )
            assert code.count(wide, code.loop) > 0, f"no wide loads in {what}"
            # All but the scales, which sm_75 loads by the same name.
            narrow = code.count(copy, code.loop) - code.count(wide, code.loop)
            assert narrow <= (8 if arch == "sm_75" else 0), what
        elif name.startswith("linear_few_rows"):
            assert code.count(r"LDG\.E.*\.128", code.loop) == 4, what
            assert code.count(r"LDS(\.U)?$", code.loop) >= 64, what
            assert code.count("FFMA", code.loop) >= 64, what


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", sorted(set(OPS) - set(PRODUCTS)))
def test_other_kernels_neither_spill_nor_divide_inexactly(op: str, arch: str) -> None:
    for name, code in kernels(op, arch).items():
        what = f"{name}: {histogram(code.ops)}"
        assert code.local == 0, f"local memory in {what}"
        assert code.count("LDL|STL") == 0, f"spills in {what}"
        assert code.count(r"LDG\.E.*\.128") > 0, f"no wide loads in {what}"
        assert (code.count("RED|ATOM") > 0) == (op == "histogram"), f"atomics in {what}"
        # The check of an exact division, one for each of a run of 16 elements.
        divides = name.startswith(("quantize", "histogram", "adam"))
        assert code.count("FCHK") >= 16 if divides else code.count("FCHK") == 0, what
        if op == "adam_step":  # two encodings, m / (sqrt(v) + eps)
            assert code.count("FCHK") >= 48, what
        elif not divides:
            assert code.count("FFMA") == 0, f"a product and a sum rounded once in {what}"


def test_every_compiled_kernel_runs_on_the_cpu() -> None:
    reach_every_kernel()
    compiled = {name for op in OPS for arch in ("sm_75", "sm_90a") for name in kernels(op, arch)}
    assert compiled == {plain_name(name) for name in emulator().kernels()}


# Instructions of a lane for each weight: what was reached, rounded up.
CEILINGS = {
    "linear_few_rows_kernel<f16, 1>": 6.5,
    "linear_few_rows_kernel<bf16, 1>": 6.5,
    "linear_few_rows_kernel<float, 1>": 6.5,
    "linear_few_rows_kernel<f16, 2>": 8.0,
    "linear_tensor_kernel<f16, 1, false>": 7.4,
    "linear_tensor_kernel<f16, 2, false>": 7.4,
    "linear_tensor_kernel<f16, 4, false>": 7.8,
    "linear_tensor_kernel<f16, 8, false>": 8.8,
}


@pytest.mark.parametrize(("rows", "ceiling"), [(1, 7.4), (2, 8.2)])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_instructions_for_each_weight_with_wgmma(dtype: str, rows: int, ceiling: float) -> None:
    code = kernels("linear", "sm_90a")[f"linear_wgmma_kernel<{dtype}, {rows}>"]
    assert code.count("HGMMA", code.loop) == 8 * rows
    assert code.per_weight(64) <= ceiling, histogram(code.loop)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_instructions_for_each_weight(arch: str) -> None:
    for name, ceiling in CEILINGS.items():
        code: Code = kernels("linear", arch)[name]
        assert code.per_weight(64) <= ceiling, f"{name}: {histogram(code.loop)}"


# The part of the memory's bandwidth that a kernel must leave; above, tensor cores or the path to
# shared memory are the limit.
@pytest.mark.parametrize("gpu", GPUS)
def test_few_rows_leave_the_memory_as_the_limit(gpu: str) -> None:
    for m in range(1, 33):
        kernel = kernel_for("linear", gpu, m)
        assert budget(kernel, gpu, m).reach > 0.99, f"{m} rows: {budget(kernel, gpu, m)}"


@pytest.mark.parametrize("arch", ARCHS)
def test_launch_bounds_tell_where_wgmma_is(arch: str) -> None:
    """The host asks for them before it plans with it: has_wgmma."""
    bounds = most_threads("linear", arch)
    assert {n for name, n in bounds.items() if "wgmma" in name} == {256 if arch == "sm_90a" else 32}
    assert {n for name, n in bounds.items() if "linear_tensor" in name} == {256}


def test_names_are_taken_apart() -> None:
    names = kernels("linear", "sm_90")
    assert all(re.fullmatch(r"\w+_kernel<[\w, ]+>", name) for name in names), list(names)
    assert len(names) == 9 + 10 + 4 + 6 + 3
