"""What suits a device: its dtype, how many rows at once, whether activations are kept."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from gptj_q8.doctor.machine import host_memory
from gptj_q8.memory import estimate_loaded, knows

# Tokens that go through the model together; a batch of more is done in parts.
TOKENS_AT_ONCE = 2048
# Of the device's memory a run may take this much before it computes activations again: others may
# need some, too. A choice, not measured.
SHARE = 0.5


def best_dtype(device: torch.device) -> torch.dtype:
    """What to load a model in that is to be fine-tuned.

    bfloat16 where the processor has instructions for it: half of float32's memory, and quicker
    (the demo's fine-tuning took 26 s instead of 31, to the same held-out loss; two cores of an AMD
    EPYC, Zen 5, 2026-11-24). Else float16 on a GPU, with a loss scaler, and float32 on a CPU.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    has = torch.cpu.get_capabilities()
    with_bfloat16 = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if with_bfloat16 else torch.float32


def rows_at_once(length: int, batch_size: int) -> int:
    """Rows of `length` tokens that go through the model together: a divisor of the batch."""
    most = max(1, TOKENS_AT_ONCE // length)
    return max(n for n in range(1, batch_size + 1) if batch_size % n == 0 and n <= most)


def recomputes(model: Any, length: int, rows: int) -> bool:
    """Whether to keep the blocks' inputs alone and compute the rest again in the backward pass.

    That is a third more work, so only where all of it is too much for the device, or unknown. Warns
    where even so a step takes more than the device has.
    """
    has = _device_memory(model.device)
    if not knows(model.config) or has is None:
        return True
    if estimate_loaded(model, length, rows, checkpointing=False).total <= SHARE * has:
        return False
    least = estimate_loaded(model, length, rows, checkpointing=True).total
    if least > has:
        warnings.warn(
            f"a step takes about {least / 1e9:.2f} GB, and {model.device} has {has / 1e9:.2f} GB; "
            "shorter sequences take less",
            stacklevel=2,
        )
    return True


def _device_memory(device: torch.device) -> int | None:
    """Bytes that a device has in all; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_memory() if device.type == "cpu" else None
