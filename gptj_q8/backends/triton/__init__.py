"""The `triton` backend: the ops as Triton kernels, one file each.

They compile for the GPU at hand at first use (NVIDIA from compute capability 8.0, AMD). Without a
GPU, TRITON_INTERPRET=1 in the environment runs them in Python on CPU tensors, very slowly: for
tests and kernel work.
"""

from __future__ import annotations

import torch

try:
    import triton

    _not_importable: str | None = None
except ImportError as error:
    _not_importable = f"Triton is not installed ({error}); `pip install triton` on Linux"
else:
    from gptj_q8.backends.triton.adam_step import adam_step_
    from gptj_q8.backends.triton.dequantize import dequantize
    from gptj_q8.backends.triton.embedding import embedding
    from gptj_q8.backends.triton.histogram import histogram
    from gptj_q8.backends.triton.linear import linear, linear_with
    from gptj_q8.backends.triton.linear_grad_input import linear_grad_input
    from gptj_q8.backends.triton.quantize import quantize

    __all__ = [
        "adam_step_",
        "dequantize",
        "embedding",
        "histogram",
        "linear",
        "linear_grad_input",
        "linear_with",
        "quantize",
    ]


OLDEST = (7, 5)
"""The compute capability from which on these kernels are compiled by the tests: T4's."""


def interpreted() -> bool:
    """Whether the kernels run in Python, on CPU tensors: TRITON_INTERPRET=1 at import."""
    return _not_importable is None and triton.knobs.runtime.interpret


def unavailable() -> str | None:
    """None when usable, else why not and what to do."""
    if _not_importable is not None or interpreted():
        return _not_importable
    if not torch.cuda.is_available():
        return (
            "PyTorch sees no GPU here; TRITON_INTERPRET=1 in the environment runs the kernels"
            " on the CPU, slowly"
        )
    if not torch.version.hip:
        gpus = range(torch.cuda.device_count())
        newest = max(torch.cuda.get_device_capability(gpu) for gpu in gpus)
        if newest < OLDEST:
            return (
                f"Triton does not compile for compute capability {newest[0]}.{newest[1]}, only for"
                f" {OLDEST[0]}.{OLDEST[1]} and newer; plain PyTorch serves there"
            )
    return None
