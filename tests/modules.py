"""A linear layer and an embedding with their 8-bit forms, and a count of what is decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gptj_q8 import Q8Embedding, Q8Linear, backends


def linear(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Q8Linear]:
    torch.manual_seed(0)
    float_module = nn.Linear(100, 70, dtype=dtype)
    return float_module, Q8Linear.from_float(float_module, "dynamic", 64)


def embedding(dtype: torch.dtype = torch.float32) -> tuple[nn.Embedding, Q8Embedding]:
    torch.manual_seed(0)
    float_module = nn.Embedding(50, 40, padding_idx=3, dtype=dtype)
    return float_module, Q8Embedding.from_float(float_module, "dynamic", 32)


@contextlib.contextmanager
def decodes() -> Iterator[list[str]]:
    """The calls of `dequantize` that reach a backend, wherever they come from."""
    calls: list[str] = []

    def spy(op: str, *rest: Any) -> Any:
        if op == "dequantize":
            calls.append(op)
        return original(op, *rest)

    original, backends.call = backends.call, spy
    try:
        yield calls
    finally:
        backends.call = original
