"""The float weight that a quantized module shows to code that looks for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# What PyTorch serves without its dispatcher, on the decoded tensor.
_READS = {"__array__", "__deepcopy__", "__dlpack__", "__reduce_ex__", "numpy", "tolist"}
# What would let others write past this guard.
_WRITES = {"__delete__", "__setitem__", "data_ptr", "storage", "untyped_storage"}
_DETACH = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class LazyWeight(Tensor):
    """A read-only tensor that is decoded from 8-bit codes when first used in arithmetic.

    Shape, dtype, device and requires_grad (always False) are answered without decoding. What
    computes with it gets the decoded tensor; views of it are read-only too. Every change raises
    RuntimeError: the codes are the weight, and a change to a decoded copy would be lost.
    """

    _decode: Callable[[], Tensor]
    _value: Tensor | None
    # Transformers' models initialize the weights of their parts, except those marked so.
    _is_hf_initialized = True

    @staticmethod
    def __new__(
        cls,
        decode: Callable[[], Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        strides: tuple[int, ...] | None = None,
    ) -> LazyWeight:
        """decode: returns the tensor of that shape, dtype, device and strides (else row-major)."""
        self: LazyWeight = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device, requires_grad=False
        )
        self._decode, self._value = decode, None
        return self

    @classmethod
    def read_only(cls, value: Tensor) -> LazyWeight:
        """Guards a tensor that is decoded already, such as a view."""
        return cls(lambda: value, value.shape, value.dtype, value.device, value.stride())

    def decoded(self) -> Tensor:
        """The plain tensor."""
        if self._value is None:
            self._value = self._decode()
        return self._value

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], LazyWeight):
            weight = args[0]
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if name == "detach_" or (name == "__get__" and attribute == "data"):
                return weight
            if name in ("__set__", "requires_grad_"):
                wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
                if wanted is False or wanted is None:
                    return weight
                _refuse(f".{attribute} =" if attribute else name)
            if name in _WRITES or (name.endswith("_") and not name.endswith("__")):
                _refuse(name)
            if name in _READS:
                result = func(weight.decoded(), *args[1:], **kwargs)
                if isinstance(result, np.ndarray):
                    result.flags.writeable = False
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DETACH:
            return args[0].shallow_copy()
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and _holds_lazy(value):
                _refuse(func.__name__)
        args, kwargs = tree_map_only(LazyWeight, LazyWeight.decoded, (args, kwargs))
        result = func(*args, **kwargs)
        if any(returned.alias_info is not None for returned in func._schema.returns):
            return tree_map_only(Tensor, LazyWeight.read_only, result)
        return result

    def shallow_copy(self) -> LazyWeight:
        """Another tensor object for the same weight, decoded at most once between them."""
        return LazyWeight(self.decoded, self.shape, self.dtype, self.device, self.stride())


def _holds_lazy(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_lazy(each) for each in value)
    return isinstance(value, LazyWeight)


def _refuse(what: str) -> None:
    # A RuntimeError too; PEFT, which compares addresses of tied weights, expects this one.
    raise NotImplementedError(
        f"{what}: the weight of a quantized module is read-only, since it is decoded from 8-bit "
        "codes and a change would be lost; change module.dequantize() and build a new module of it"
    )
