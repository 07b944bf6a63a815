"""Q8Embedding: nn.Embedding with an 8-bit table."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from gptj_q8 import ops
from gptj_q8.nn.quantized import QuantizedWeight


class Q8Embedding(QuantizedWeight, nn.Embedding):
    """rows[..., K] = w[ids[...]] in its dtype, decoding only the rows asked for.

    The table is frozen, so scale_grad_by_freq and sparse have nothing to act on; they are kept for
    code that reads them. ValueError for max_norm, which changes the table. A fresh module is an
    empty shell for loading; `gptj_q8.nn.QuantizedWeight.from_float` quantizes one of PyTorch's.
    """

    float_class: type[nn.Module] = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        block_size: int = 256,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty shell. dtype: of its rows, None for PyTorch's default."""
        _refuse_max_norm(max_norm)
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self._make_parts((num_embeddings, embedding_dim), block_size, dtype, device)

    @classmethod
    def like(cls, module: nn.Module, block_size: int = 256) -> Self:
        shell = super().like(module, block_size)
        _refuse_max_norm(shell.max_norm)
        return shell

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 or int32 [...] -> rows [..., embedding_dim]. IndexError out of range."""
        return ops.embedding(
            ids, self.codes, self.absmax, self.codebook, self.block_size, self.dtype
        )

    def extra_repr(self) -> str:
        """nn.Embedding's, with block_size and dtype."""
        return f"{nn.Embedding.extra_repr(self)}, block_size={self.block_size}, dtype={self.dtype}"


def _refuse_max_norm(max_norm: object) -> None:
    if max_norm is not None:
        raise ValueError(
            f"Q8Embedding: max_norm changes the table and is not supported, got {max_norm}"
        )
