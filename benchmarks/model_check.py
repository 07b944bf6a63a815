"""Checks a model's quantized products before anything of it is timed."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.bench_linear import FLOAT32_BOUND, TIMES_TORCH
from benchmarks.harness import relative_error
from benchmarks.inputs import random_generator

ROWS, COLUMNS = 3, 64


@torch.no_grad()
def check_products(model: nn.Module) -> None:
    """One layer of each shape against a float64 product of its decoded weights, on some columns.

    RuntimeError names the layer that is wrong.
    """
    from gptj_q8 import Q8Linear

    layers = {
        tuple(layer.codes.shape): (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, Q8Linear)
    }
    for (n, k), (name, layer) in layers.items():
        count = min(COLUMNS, n)
        blocks = layer.absmax[: -(-count * k // layer.block_size)]  # a check stays small in memory
        scales = blocks.repeat_interleave(layer.block_size)[: count * k].view(count, k)
        decoded = layer.codebook[layer.codes[:count].long()] * scales
        generator = random_generator(layer.codes.device)
        x = torch.randn(ROWS, k, generator=generator, device=layer.codes.device).to(layer.dtype)
        bias = None if layer.bias is None else layer.bias[:count]
        exact = F.linear(x.double(), decoded.double(), None if bias is None else bias.double())
        plain = F.linear(x, decoded.to(x.dtype), bias)
        error = relative_error(layer(x)[:, :count], exact)
        bound = (
            FLOAT32_BOUND
            if x.dtype == torch.float32
            else TIMES_TORCH * relative_error(plain, exact)
        )
        if not error <= bound:  # so written, a NaN does not pass
            raise RuntimeError(
                f"{name} [{n}, {k}] computes wrongly: error {error:.2g}, at most {bound:.2g}"
            )
