"""The modules of hivemind/gpt-j-6B-8bit under their old names; `gptj_q8.hivemind` offers them.

Their tensors are named and laid out as in the old checkpoints, so any loader that goes by names can
fill them. `Q8Linear` and `Q8Embedding` are the modules for new code.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from gptj_q8 import checks, codebooks, ops
from gptj_q8.nn.parts import HIVEMIND_BLOCK_SIZE, check_stored_parts
from gptj_q8.nn.quantized import keep_dtypes

ADAPTER_DROPOUT = 0.1
"""What the variant with dropout in its adapters had; nothing of it is stored."""


class DequantizeAndLinear:
    """y = input @ W.T + bias, decoding W inside the product; has gradients for input and bias."""

    @staticmethod
    def apply(
        input: Tensor, weights_quantized: Tensor, absmax: Tensor, code: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Returns y, float [..., out].

        input: float [..., in]. weights_quantized: uint8 [out, in]. absmax: float32, one for each
            4096 weights. code: float32 [256]. bias: float [out] or None.
        """
        return ops.linear(input, weights_quantized, absmax, code, bias, HIVEMIND_BLOCK_SIZE)


class FrozenWeight(nn.Module):
    """An 8-bit weight and a place for an adapter: what both modules below share.

    weight: uint8 [rows, columns]; absmax: float32, one for each 4096 weights; code: float32 [256].
    They are buffers, and keep their dtypes through `.half()` and the like.
    """

    weight: Tensor
    absmax: Tensor
    code: Tensor
    adapter: Any

    def __init__(self, weight: Tensor, absmax: Tensor, code: Tensor) -> None:
        """ValueError or TypeError unless the three fit each other."""
        super().__init__()
        checks.dequantize(weight, absmax, code, HIVEMIND_BLOCK_SIZE, torch.float32)
        for name, part in (("weight", weight), ("absmax", absmax), ("code", code)):
            self.register_buffer(name, part)
        self.register_module("adapter", None)

    def add_adapter(self, rank: int, dropout: float = 0.0) -> None:
        """Makes an adapter that changes nothing yet. dropout: its probability; 0 for no module."""
        first, outputs = self._new_first(rank)
        second = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(second.weight)
        between = [nn.Dropout(dropout)] if dropout else []
        adapter = nn.Sequential(first, *between, second).train(self.training)
        self.adapter = adapter.to(self.weight.device)

    def _new_first(self, rank: int) -> tuple[nn.Module, int]:
        """Returns an adapter's first part and the width of what its second one gives."""
        raise NotImplementedError

    def _adapted(self, output: Tensor, input: Tensor) -> Tensor:
        """Returns `output` with what the adapter, in its own dtype, makes of `input`."""
        if self.adapter is None:
            return output
        if input.is_floating_point():
            input = input.to(next(self.adapter.parameters()).dtype)
        return output + self.adapter(input).to(output.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_dtypes(fn, self.weight, self.absmax, self.code), recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Also makes the adapter that the state dict holds, and refuses what cannot be right."""
        parts = {part: state_dict.get(f"{prefix}{part}") for part in ("weight", "absmax", "code")}
        try:
            check_values(prefix.rstrip("."), **parts)
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))
            return
        for part in ("absmax", "code"):
            if (tensor := parts[part]) is not None:
                # They may be float16, and one table may serve all modules; if it is assigned and
                # not copied, the model could not be saved.
                state_dict[f"{prefix}{part}"] = tensor.to(torch.float32, copy=True)
        for place, dropout in ((1, 0.0), (2, ADAPTER_DROPOUT)):
            second = state_dict.get(f"{prefix}adapter.{place}.weight")
            if self.adapter is None and second is not None and second.dim() == 2:
                self.add_adapter(second.shape[1], dropout)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def check_values(
    name: str, weight: Tensor | None, absmax: Tensor | None, code: Tensor | None
) -> None:
    """TypeError for codes that are not uint8, ValueError for scales or a table that cannot be.

    To decode, the table need not be sorted.
    """
    levels = code.float().sort().values if code is not None else None
    check_stored_parts(name, {"codes": weight, "absmax": absmax, "codebook": levels}, "")


class FrozenBNBLinear(FrozenWeight):
    """y = x @ W.T + bias, and the adapter's part if there is one. The weight is frozen."""

    bias: nn.Parameter | None

    def __init__(
        self, weight: Tensor, absmax: Tensor, code: Tensor, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__(weight, absmax, code)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Quantizes an nn.Linear; keeps its bias. ValueError for NaN or Inf."""
        weight, state = quantize_blockise_lowmemory(linear.weight)
        return cls(weight, *state, linear.bias).train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """input: float [..., in_features] -> [..., out_features]."""
        output = DequantizeAndLinear.apply(input, self.weight, self.absmax, self.code, self.bias)
        return self._adapted(output, input)

    def _new_first(self, rank: int) -> tuple[nn.Module, int]:
        return nn.Linear(self.in_features, rank, bias=False), self.out_features

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_features}, {self.out_features})"


class FrozenBNBEmbedding(FrozenWeight):
    """rows = W[ids], and the adapter's part if there is one. The table is frozen.

    dtype: of the rows; follows `.half()` and the like.
    """

    def __init__(
        self,
        weight: Tensor,
        absmax: Tensor,
        code: Tensor,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, absmax, code)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype or torch.get_default_dtype()

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Self:
        """Quantizes an nn.Embedding. ValueError for NaN, Inf, and max_norm."""
        if embedding.max_norm is not None:
            raise ValueError(f"{cls.__name__}: max_norm changes the table and is not supported")
        weight, state = quantize_blockise_lowmemory(embedding.weight)
        made = cls(weight, *state, dtype=embedding.weight.dtype)
        return made.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """input: int64 or int32 [...] -> [..., embedding_dim]. IndexError for ids out of range."""
        parts = self.weight, self.absmax, self.code
        rows = ops.embedding(input, *parts, HIVEMIND_BLOCK_SIZE, self.dtype)
        return self._adapted(rows, input)

    def _new_first(self, rank: int) -> tuple[nn.Module, int]:
        return nn.Embedding(self.num_embeddings, rank), self.embedding_dim

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        checks.float_dtype(type(self).__name__, dtype)
        super()._apply(fn, recurse)
        self.dtype = dtype
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_embeddings}, {self.embedding_dim})"


def quantize_blockise_lowmemory(
    matrix: Tensor, chunk_size: int = 2**20
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Quantizes with the dynamic map in blocks of 4096: returns codes and (absmax, code).

    matrix: float, any shape. chunk_size: as in the old code a multiple of 4096, of no other use:
    nothing is copied. ValueError for NaN or Inf.
    """
    if chunk_size <= 0 or chunk_size % HIVEMIND_BLOCK_SIZE:
        raise ValueError(
            f"chunk_size must be a multiple of {HIVEMIND_BLOCK_SIZE}, got {chunk_size}"
        )
    matrix = matrix.detach()
    code = codebooks.dynamic().to(matrix.device)
    codes, absmax = ops.quantize(matrix, code, HIVEMIND_BLOCK_SIZE)
    return codes, (absmax, code)
