"""The parts of a stored 8-bit weight: their names, old and new, and what values they may have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptj_q8 import checks
from gptj_q8.codebooks import check_levels

HIVEMIND_NAMES = {"codes": "weight", "absmax": "absmax", "codebook": "code"}
"""Our names and those of the hivemind/gpt-j-6B-8bit family."""
HIVEMIND_BLOCK_SIZE = 4096


def rename_old_parts(state_dict: dict[str, Any], prefix: str) -> None:
    """Gives the parts of an old checkpoint their names here, and sorts its levels."""
    for ours, theirs in HIVEMIND_NAMES.items():
        if prefix + theirs in state_dict:
            state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
    codes, codebook = (state_dict.get(prefix + part) for part in ("codes", "codebook"))
    if codes is not None and codebook is not None and codes.dtype == torch.uint8:
        codes, codebook = sort_levels(codes, codebook)
        # In a pickle one table may serve all layers, and what shares memory is not saved.
        state_dict[prefix + "codes"], state_dict[prefix + "codebook"] = codes, codebook.clone()


def sort_levels(codes: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both with the levels in ascending order; every weight decodes to the same bits.

    codes: uint8, any shape. codebook: float [256], of an old checkpoint, whose table nothing
    forces to be sorted. What is sorted already, or has no data (meta), comes back as it is.
    """
    if codes.is_meta or codebook.is_meta or codebook.shape != (256,):
        return codes, codebook
    order = codebook.argsort(stable=True)
    if torch.equal(codebook[order], codebook):
        return codes, codebook
    place = torch.empty(256, dtype=torch.uint8, device=codebook.device)
    place[order] = torch.arange(256, dtype=torch.uint8, device=codebook.device)
    # PyTorch indexes with int64 only, so in slabs.
    slabs = [place[slab.long()] for slab in codes.flatten().split(1 << 20)]
    return torch.cat(slabs).view(codes.shape), codebook[order]


def check_stored_parts(name: str, tensors: dict[str, Any], prefix: str) -> None:
    """Checks the values of a stored weight's parts, those of them that are there.

    TypeError for codes that are not uint8; ValueError for a NaN, Inf or negative scale and for a
    codebook that is not 256 sorted values in [-1, 1]. The sentences begin with `name`. Tensors
    without data (meta) pass.
    """
    codes, absmax, codebook = (tensors.get(prefix + part) for part in HIVEMIND_NAMES)
    if codes is not None:
        checks.one_of_dtypes(name, "codes", codes.dtype, torch.uint8)
    if absmax is not None and not absmax.is_meta:
        checks.finite(name, "absmax", absmax)
        if absmax.numel() and absmax.min() < 0:
            raise ValueError(f"{name}: absmax must not be negative, got {float(absmax.min())}")
    if codebook is not None and not codebook.is_meta:
        check_levels(codebook.float(), name)
