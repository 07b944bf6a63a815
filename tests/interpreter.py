"""Triton's interpreter made right for bfloat16, and Triton 3.6's for today's NumPy.

In Triton 3.6 and 3.7 it holds bfloat16 as uint16, truncates where the hardware rounds to nearest,
and multiplies matrices of bfloat16 as if they were integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Changes the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = _cast
    builder.create_dot = _dot
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # Triton 3.6 has int(array), which NumPy refuses for an array of one dimension.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    data, dst = _numbers(src), dst_type.scalar
    if dst == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(data, np.float32)).to(torch.bfloat16)
        data = rounded.view(torch.uint16).numpy()
    else:
        data = data.astype(interpreter._get_np_dtype(dst_type))
    return interpreter.TensorHandle(data, dst)


def _dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    """a @ b + d in float32: products of 16-bit numbers are exact, as in tensor cores."""
    product = np.matmul(_numbers(a).astype(np.float32), _numbers(b).astype(np.float32))
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _numbers(handle: Any) -> np.ndarray:
    """The handle's values in a dtype that NumPy can calculate with."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)
