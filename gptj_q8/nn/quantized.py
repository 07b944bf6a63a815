"""What Q8Linear and Q8Embedding share: the parts of a quantized weight and their care."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from gptj_q8 import checks, ops
from gptj_q8.codebooks import CODEBOOKS, check_name
from gptj_q8.nn.parts import check_stored_parts, rename_old_parts
from gptj_q8.nn.weight import LazyWeight


class FrozenCodes(nn.Parameter):
    """A uint8 Parameter that stays frozen: requires_grad cannot be switched on.

    So `model.requires_grad_(True)`, which PyTorch refuses for integers, reaches the others.
    """

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass

    def requires_grad_(self, requires_grad: bool = True) -> FrozenCodes:
        return self


class QuantizedWeight(nn.Module):
    """A module's weight as codes, absmax and codebook; mixed in before the PyTorch module.

    codes: frozen uint8 Parameter [N, K]. absmax: float32 buffer [ceil(N * K / block_size)].
    codebook: float32 buffer [256]. dtype: what `weight` decodes to; `.to(dtype)`, `.half()` and
        the like change it, and leave codes and scales alone.
    """

    codes: FrozenCodes
    absmax: Tensor
    codebook: Tensor
    block_size: int
    dtype: torch.dtype
    float_class: type[nn.Module]
    """What this stands in for, and to_float gives back."""
    _tied: list[QuantizedWeight]
    """The layers that share this one's weight, itself too; one list for all. Empty if alone."""

    @classmethod
    def like(cls, module: nn.Module, block_size: int = 256) -> Self:
        """An empty shell on the meta device that stands in for `module`.

        All but the weight is that of `module`: its bias (the very Parameter), options and hooks.
        TypeError for a module of another kind, or whose weight is no Parameter [N, K].
        """
        weight = module._parameters.get("weight")
        if not isinstance(module, cls.float_class) or weight is None or weight.dim() != 2:
            raise TypeError(
                f"{cls.__name__}: must be made of an nn.{cls.float_class.__name__} whose weight is "
                f"a Parameter of 2 dimensions, got a {type(module).__name__}"
            )
        shell = cls.__new__(cls)
        _take_over(module, shell)
        others = shell._parameters.copy()
        del others["weight"]
        shell._parameters.clear()
        shell.float_class = type(module)
        with torch.device("meta"):
            shape = cls.turn(torch.empty(weight.shape)).shape
        shell._make_parts(shape, block_size, weight.dtype, "meta")
        shell._parameters.update(others)
        return shell

    @classmethod
    def from_float(cls, module: nn.Module, codebook: str = "fitted", block_size: int = 256) -> Self:
        """Quantizes a module; all but its weight is kept (see `like`).

        Raises ValueError for NaN or Inf in the weight, TypeError for another dtype, and as `like`.
        """
        made = cls.like(module, block_size)
        made._quantize_parts(cls.turn(module.get_parameter("weight").detach()), codebook)
        return made

    def to_float(self, weight: nn.Parameter) -> nn.Module:
        """Returns the float module that this stands in for, with weight, in that one's layout."""
        made = self.float_class.__new__(self.float_class)
        _take_over(self, made)
        others = made._parameters.copy()
        del others["codes"], made._buffers["absmax"], made._buffers["codebook"]
        made._parameters.clear()
        made._parameters.update(weight=weight, **others)
        for name in ("block_size", "dtype", "float_class", "_tied"):
            vars(made).pop(name, None)
        return made

    def tie(self, other: QuantizedWeight) -> None:
        """Gives this layer the weight of `other`, and does so again when it is given its codes.

        Loaders tie parameters, which is to say codes; the scales must follow them.
        """
        if self not in other._tied:
            other._tied = self._tied = [*(other._tied or [other]), self]
            for layer in other._tied:
                layer._tied = self._tied
        self.codes = other.codes

    def untie(self) -> None:
        """Forgets the layers that this one was tied to."""
        if self._tied:
            self._tied.remove(self)
        self._tied = []

    @staticmethod
    def turn(weight: Tensor) -> Tensor:
        """Brings a weight from the float module's layout to that of codes, and back."""
        return weight

    def _make_parts(
        self,
        shape: tuple[int, ...],
        block_size: int,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        """An empty shell, to be filled by loading. Raises ValueError or TypeError."""
        name = type(self).__name__
        checks.block_size_is_valid(name, block_size)
        self.block_size, self.dtype = block_size, dtype or torch.get_default_dtype()
        checks.float_dtype(name, self.dtype)
        self._tied = []
        blocks = -(-math.prod(shape) // block_size)
        self.codes = FrozenCodes(
            torch.zeros(shape, dtype=torch.uint8, device=device), requires_grad=False
        )
        self.register_buffer("absmax", torch.zeros(blocks, dtype=torch.float32, device=device))
        self.register_buffer("codebook", torch.zeros(256, dtype=torch.float32, device=device))

    def _quantize_parts(self, weight: Tensor, codebook: str) -> None:
        """Fills the parts from a float weight. Raises ValueError for NaN, Inf, an unknown name."""
        check_name(type(self).__name__, codebook)
        table = CODEBOOKS[codebook](weight, self.block_size)
        codes, absmax = ops.quantize(weight, table, self.block_size)
        self.codes = FrozenCodes(codes, requires_grad=False)
        self.absmax, self.codebook = absmax, table

    @property
    def weight(self) -> Tensor:
        """The float weight, read-only, decoded when first computed with (`gptj_q8.nn.weight`)."""
        if torch.compiler.is_compiling():  # the compiler traces plain tensors
            return self.dequantize()
        return LazyWeight(self.dequantize, self.codes.shape, self.dtype, self.codes.device)

    @weight.setter
    def weight(self, value: Any) -> None:
        self._refuse_a_weight()

    def _refuse_a_weight(self) -> NoReturn:
        raise AttributeError(
            f"{type(self).__name__}.weight is read-only; build a new module with from_float instead"
        )

    def dequantize(self) -> Tensor:
        """The weight as a plain tensor of `self.dtype`, in the shape of codes."""
        return ops.dequantize(self.codes, self.absmax, self.codebook, self.block_size, self.dtype)

    def reset_parameters(self) -> None:
        """RuntimeError always: 8-bit weights cannot be initialized."""
        raise RuntimeError(f"{type(self).__name__} cannot be initialized, only loaded or quantized")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Keeps codes frozen for those who rebuild parameters, as loaders and pickle do."""
        if name == "weight":
            self._refuse_a_weight()
        if name == "codes" and type(param) is nn.Parameter:
            # No new object: it may have a loader's marks, and tied layers that were pickled have
            # one in common.
            param.__class__ = FrozenCodes
        replaced = name == "codes" and self._parameters.get(name) is not param
        super().register_parameter(name, param)
        for layer in self._tied if replaced else ():
            if layer is not self and layer.codes is param:
                self.absmax, self.codebook = layer.absmax, layer.codebook

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.register_parameter("codes", self._parameters["codes"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves like any module, but codes and scales keep their dtypes, and `dtype` follows."""
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        checks.float_dtype(type(self).__name__, dtype)
        super()._apply(keep_dtypes(fn, self.codes, self.absmax, self.codebook), recurse)
        self.register_parameter("codes", self._parameters["codes"])  # PyTorch may have rebuilt it
        self.dtype = dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Also takes the seed's names, and refuses values that cannot be right."""
        name = prefix.rstrip(".") or type(self).__name__
        weight = state_dict.get(prefix + "weight")
        if prefix + "codes" not in state_dict and weight is not None:
            if weight.is_floating_point():
                error_msgs.append(
                    f"{name}: weight is {str(weight.dtype).removeprefix('torch.')} and this layer "
                    "is in 8 bits; load it into the float model and quantize_ that"
                )
                return
            rename_old_parts(state_dict, prefix)
        elif weight is not None and weight.numel() == 0:
            del state_dict[prefix + "weight"]  # stored to warn those who do not know codes
        try:
            check_stored_parts(name, state_dict, prefix)
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))
            return
        for part in ("absmax", "codebook"):  # the seed's may be float16
            if prefix + part in state_dict:
                state_dict[prefix + part] = state_dict[prefix + part].float()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def keep_dtypes(fn: Callable[[Tensor], Tensor], *parts: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns `fn`, as `nn.Module._apply` takes it, but that it only moves `parts`."""

    def kept(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if result.dtype != tensor.dtype and any(tensor is part for part in parts):
            return tensor.to(result.device)
        return result

    return kept


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Gives `new` what `old` has, in tables of its own; hooks keep theirs, so handles stay good."""
    own = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
    state = {name: value.copy() if name in own else value for name, value in vars(old).items()}
    vars(new).update(state)
