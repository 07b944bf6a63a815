"""Parameters to optimize with the same gradients by our optimizers and PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGE, SMALL = (70, 100), (33,)  # on either side of min_8bit_size


def parameters(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], *steps: int) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters, and the state of each in the order of its names."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in params]
    moments = [s[k] for s in states for k in sorted(s) if isinstance(s[k], Tensor)]
    return [*(p.detach() for p in params), *moments]


def same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
