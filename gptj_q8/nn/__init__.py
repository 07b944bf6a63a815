"""Modules with 8-bit weights that stand in for PyTorch's.

`Q8Linear` and `Q8Embedding` have their own forward pass; their weight, and how it is made, is
`QuantizedWeight`'s. `gptj_q8.quantize_` puts them in a model's float layers' place.
"""

from gptj_q8.nn.conv1d import Q8Conv1D
from gptj_q8.nn.embedding import Q8Embedding
from gptj_q8.nn.linear import Q8Linear
from gptj_q8.nn.quantized import QuantizedWeight

__all__ = ["Q8Conv1D", "Q8Embedding", "Q8Linear", "QuantizedWeight"]
