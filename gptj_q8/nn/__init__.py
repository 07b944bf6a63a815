"""Modules with 8-bit weights that stand in for PyTorch's."""

from gptj_q8.nn.conv1d import Q8Conv1D
from gptj_q8.nn.embedding import Q8Embedding
from gptj_q8.nn.linear import Q8Linear

__all__ = ["Q8Conv1D", "Q8Embedding", "Q8Linear"]
