"""What the tests of the old API share: which of a model's modules and parameters are its own."""

from __future__ import annotations

from torch import nn

from gptj_q8.hivemind import FrozenBNBEmbedding, FrozenBNBLinear


def frozen_modules(model) -> dict[str, nn.Module]:
    kinds = (FrozenBNBLinear, FrozenBNBEmbedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def adapters_of(model) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".adapter." in name}
