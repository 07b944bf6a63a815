"""What a conversion reports: sizes, and the error of each kind of layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptj_q8 import ops

# Elements compared at a time: a multiple of every block size, 4 MB in float32. 2^18 and 2^22 took
# 1.2 to 4 times as long on two cores of an EPYC (4096 x 16384 weights, a busy machine).
_CHUNK = 1 << 20


@dataclass(frozen=True)
class LayerError:
    """How far the decoded weights of one kind of layer are from the original ones.

    kind: such as "attn.q_proj" or "lm_head". tensors, weights: how many.
    relative_rmse: root of (sum of squared errors / sum of squared weights).
    """

    kind: str
    tensors: int
    weights: int
    relative_rmse: float


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_checkpoint` did.

    block_size, codebook: of what was written.
    bytes_before, bytes_after: of the weight files. weights: how many were quantized, at
    bits_per_weight with scales and codebooks. layers: the error of each kind.
    kept: names of the Linear and Embedding modules left in float.
    rewritten: whether the source was in 8 bits already, which were kept. adapters: how many modules
    have an adapter, found there and written beside the model.
    """

    block_size: int
    codebook: str
    bytes_before: int
    bytes_after: int
    weights: int
    bits_per_weight: float
    layers: list[LayerError]
    kept: list[str]
    rewritten: bool = False
    adapters: int = 0


@dataclass
class _Sums:
    tensors: int = 0
    weights: int = 0
    error: float = 0.0
    square: float = 0.0


@dataclass
class Errors:
    """Adds up errors by kind of layer."""

    sums: dict[str, _Sums] = field(default_factory=dict)

    def add(
        self,
        kind: str,
        weight: Tensor,
        codes: Tensor,
        absmax: Tensor,
        codebook: Tensor,
        block_size: int,
    ) -> None:
        """Compares a weight with its decoded form, chunk by chunk."""
        sums = self.sums.setdefault(kind, _Sums())
        sums.tensors += 1
        sums.weights += weight.numel()
        flat, flat_codes = weight.flatten(), codes.flatten()
        for start in range(0, weight.numel(), _CHUNK):
            here = slice(start, start + _CHUNK)
            scales = absmax[start // block_size : (start + _CHUNK) // block_size]
            part = flat[here].float()
            error = ops.dequantize(flat_codes[here], scales, codebook, block_size, torch.float32)
            error -= part
            sums.error += float(torch.dot(error, error))
            sums.square += float(torch.dot(part, part))

    def by_kind(self, first: Sequence[str]) -> list[LayerError]:
        """Returns one entry per kind: those of `first` in that order, then the others by name."""
        kinds = [kind for kind in first if kind in self.sums]
        kinds += sorted(set(self.sums) - set(kinds))
        return [
            LayerError(kind, sums.tensors, sums.weights, _relative_rmse(sums))
            for kind, sums in ((kind, self.sums[kind]) for kind in kinds)
        ]


def _relative_rmse(sums: _Sums) -> float:
    return math.sqrt(sums.error / sums.square) if sums.square else 0.0


def kind(name: str) -> str:
    """Returns a module's name within its block, or its last component outside the blocks."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else parts[-1]
