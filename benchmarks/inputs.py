"""Random inputs, the same in every run.

From generators of our own: PyTorch's default one refuses to work after a CUDA graph failed to
capture, which a benchmark survives.
"""

import torch
from torch import Tensor

from benchmarks.shapes import Shape


def random_generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def random_weight(shape: Shape, device: torch.device) -> Tensor:
    """float32 [N, K], normal with the standard deviation that GPT-J is initialized with."""
    generator = random_generator(device)
    return torch.randn(shape.n, shape.k, generator=generator, device=device).mul_(0.02)
