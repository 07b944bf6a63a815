"""Which backend serves a call on a CUDA (or ROCm) device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

# Up to so many rows of x a product decodes w inside, above it decodes slabs for cuBLAS first, for
# each family of GPUs in the tables of the Triton backend.
#
# Estimates, not yet measured. Time for each weight, with the lookups for each clock that
# `python -m benchmarks.triton_budget` finds, the clocks and bandwidths of A100 and H100, and 70 %
# of their peak for a large product:
#   fused, H100: 0.5 ps to decode for every 128 rows; slabs: 1.0 ps to read codes, write and read
#   16-bit weights (read again from L2) + 2 M / 700e12. Equal at 512 to 1024 rows, if the fused
#   kernel hid all else. A100, in tiles of 64 rows: equal near 512. If it hid nothing, decoding
#   first would win at 256 rows on A100, and for the gradient on H100 (tests/test_cuda_table.py).
# Blackwell's product is faster and our decoding is not. Triton has no tensor cores on T4: only its
# few-rows kernel, which uses none, serves there.
FUSED_ROWS = {
    "linear": {"sm75": 4, "sm80": 128, "sm86": 128, "sm90": 256, "sm100": 128},
    "linear_grad_input": {"sm75": 0, "sm80": 128, "sm86": 128, "sm90": 128, "sm100": 64},
}
# PyTorch multiplies 16-bit tensors into float32 only with cuBLAS.
AMD_FUSED_ROWS = 1 << 62


# Up to so many rows our CUDA C++ comes before Triton (which has no tensor cores on sm75).
#
# Estimates, not yet measured: up to here `python -m benchmarks.cuda_budget` leaves the memory of
# A100 and H100 as the limit, or nearly (64 rows: at least 0.78 of its bandwidth). Its table has a
# copy for each lane, where Triton's one copy takes 2.3 turns of shared memory for a lookup. On T4,
# 0.26 of the bandwidth at 128 rows (0.56 for the gradient) is still as fast as decoding to memory
# and reading that again.
# Of other GPUs there is no budget; they get A100's number.
CUDA_ROWS = {
    "linear": {"sm75": 128, "sm80": 64, "sm86": 64, "sm90": 64, "sm100": 64},
    "linear_grad_input": {"sm75": 128, "sm80": 64, "sm86": 64, "sm90": 64, "sm100": 64},
}
# The same for `linear` on an H100 where the library is compiled for sm_90a and so has wgmma. An
# estimate: at 128 rows `python -m benchmarks.cuda_budget` leaves 0.70 of the memory's bandwidth,
# without wgmma 0.39.
WGMMA_ROWS = 128
# Rows in dtypes for which there are no tensor cores: float32, and bfloat16 on sm75. An estimate:
# the kernel for a few rows (csrc/cuda/linear.cu) goes over the codes once for every 4.
CUDA_ROWS_ALONE = 8


def preference(op: str, args: Sequence[Any] = ()) -> tuple[str, ...]:
    """Backends for `op` in order of preference, before `reference`."""
    if op not in FUSED_ROWS or not args:
        return ("cuda", "triton")
    x, codes = args[:2]
    rows, family = x.numel() // x.shape[-1], _family(x.device)
    has_tensor_cores = x.dtype != torch.float32 and (family, x.dtype) != ("sm75", torch.bfloat16)
    most = CUDA_ROWS[op].get(family, 0)
    if op == "linear" and family == "sm90" and codes.shape[-1] % 128 == 0 and _has_wgmma(x.device):
        most = WGMMA_ROWS
    if not has_tensor_cores:
        most = CUDA_ROWS_ALONE if op == "linear" else 0
    # The fast CUDA kernels load 16 codes of a row at a time.
    ours_first = rows <= most and codes.shape[-1] % 16 == 0
    fused = ("cuda", "triton") if ours_first else ("triton", "cuda")
    if x.dtype == torch.float32:  # cuBLAS may multiply it in TF32
        return fused
    if rows <= FUSED_ROWS[op].get(family, AMD_FUSED_ROWS):
        return (*fused, "slabs")
    if ours_first:  # where it is not built, Triton is no substitute for so many rows
        return ("cuda", "slabs", "triton")
    return ("slabs", *fused)


@functools.cache
def _family(device: torch.device) -> str:
    """As `family_of` in the Triton backend's tables, which may be missing."""
    if torch.version.hip:
        return "amd"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm80" if minor == 0 else "sm86"
    return {7: "sm75", 9: "sm90", 10: "sm100"}.get(major, "sm86")


def _has_wgmma(device: torch.device) -> bool:
    from gptj_q8.backends import cuda

    return cuda.has_wgmma(device)
