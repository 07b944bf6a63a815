"""`AdamW8bit` and `Adam8bit`: Adam with its moments in 8 bits, 2.03 bytes a parameter instead of 8.

After Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861): each
moment is kept as 8-bit codes with a float32 scale for every 256 of them, the first with the
`dynamic` codebook and the second with `dynamic_unsigned`. A step is one call of
`gptj_q8::adam_step_` for each tensor: decode, update in float32, encode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from gptj_q8 import checks, codebooks, ops
from gptj_q8.backends import reference

BLOCK_SIZE = 256

# PyTorch's options that nothing here corresponds to. Values that ask for nothing may pass, so that
# arguments and groups written for torch.optim.AdamW serve.
_REFUSED = ("amsgrad", "foreach", "capturable", "differentiable", "fused")


class _Numbers(TypedDict):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class AdamW8bit(Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) with both moments in 8 bits; stands in for PyTorch's.

    params: parameters or groups of them, float32, bfloat16 or float16, of any shape and layout.
    lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW; lr is a float or a tensor of
        one element, as schedulers may want, and decay is decoupled, by `lr * weight_decay`.
    min_8bit_size: tensors of fewer elements keep their moments in float32. This is read when a
        tensor takes its first step. `float("inf")` keeps a group in float32 altogether.

    Every argument but params may be set for a group of its own, and changed there at any time.
    All arithmetic is in float32, whatever the dtype of parameters and gradients.

    A gradient's element that is NaN or infinite, or whose square is infinite, leaves its parameter
    and its moments as they are: one bad value would else spoil the scale of its whole block. It
    still counts as a step. Who wants the whole step skipped does that before, as GradScaler does.

    ValueError for numbers out of range, TypeError for dtypes, RuntimeError for sparse gradients,
    NotImplementedError for sharded parameters (DTensor): all before any parameter has changed.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        min_8bit_size: float = 4096,
        **refused: Any,
    ) -> None:
        for name in refused:
            if name not in _REFUSED:
                raise TypeError(f"{type(self).__name__}: unexpected keyword argument {name!r}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "min_8bit_size": min_8bit_size,
        }
        self._numbers({**defaults, **refused})
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch.optim.Optimizer does. ValueError for numbers out of range."""
        if isinstance(param_group, dict):
            self._numbers({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        closure: computes the loss anew; the step returns what it returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbers = [self._numbers(group) for group in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._check_tensors(p, p.grad)
        for group, settings in zip(self.param_groups, numbers, strict=True):
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state.update(_new_state(p, p.numel() >= group["min_8bit_size"]))
                    state["step"] += 1
                    _update(p, -p.grad if group["maximize"] else p.grad, state, settings)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state that state_dict() gave, as copies, each tensor in its own dtype.

        ValueError or TypeError where it does not fit the parameters; then nothing has changed.
        """
        # PyTorch would cast codes and scales to the parameter's dtype. This hook is the last to
        # run, so that it sees what the user's own hooks have made of the state.
        handle = self.register_load_state_dict_pre_hook(_check_and_wrap)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        for p, value in state["state"].items():
            if isinstance(value, _Wrapped):
                state["state"][p] = value.copy_to(p.device)
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _numbers(self, group: dict[str, Any]) -> _Numbers:
        """The numbers that a step needs, as floats. ValueError for those out of range."""
        who = type(self).__name__
        for name in _REFUSED:
            if group.get(name):
                raise ValueError(f"{who}: {name} is not supported, got {name}={group[name]}")
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"{who}: lr must have 1 element, got {group['lr'].numel()}")
        if len(group["betas"]) != 2:
            raise ValueError(f"{who}: betas must be two numbers, got {group['betas']}")
        beta1, beta2 = group["betas"]
        numbers = _Numbers(
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
        )
        checks.adam_numbers(who, **numbers)
        if not group["min_8bit_size"] >= 0:
            raise ValueError(
                f"{who}: min_8bit_size must not be negative, got {group['min_8bit_size']}"
            )
        return numbers

    def _check_tensors(self, p: Tensor, grad: Tensor) -> None:
        who = type(self).__name__
        if grad.is_sparse:
            raise RuntimeError(
                f"{who}: sparse gradients are not supported, got one of shape {list(grad.shape)}"
            )
        if hasattr(p, "device_mesh"):  # without importing DTensor, which not every PyTorch has
            raise NotImplementedError(
                f"{who}: sharded parameters are not supported, got a DTensor of shape"
                f" {list(p.shape)}"
            )
        checks.float_dtype(who, p.dtype, "the parameter")
        checks.float_dtype(who, grad.dtype, "the gradient")


class Adam8bit(AdamW8bit):
    """`AdamW8bit` with no decay unless asked for: bitsandbytes' Adam8bit, argument for argument.

    Decay is decoupled here too, as in bitsandbytes (0.26 to 0.50, on every device), and not added
    to the gradient as torch.optim.Adam does: there too Adam8bit and AdamW8bit differ by the
    default of `weight_decay` alone.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)


def _layout(p: Tensor, in_8_bits: bool) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of the tensors in a parameter's state, which has its count `step` besides."""
    if not in_8_bits:
        return {"m": (p.shape, torch.float32), "v": (p.shape, torch.float32)}
    codes = p.shape, torch.uint8
    scales = torch.Size([-(-p.numel() // BLOCK_SIZE)]), torch.float32
    return {"m_codes": codes, "m_absmax": scales, "v_codes": codes, "v_absmax": scales}


def _new_state(p: Tensor, in_8_bits: bool) -> dict[str, Any]:
    """The state before the first step. Beside a scale of 0 any code is a 0."""
    layout = _layout(p, in_8_bits)
    zeros = {name: torch.zeros(s, dtype=d, device=p.device) for name, (s, d) in layout.items()}
    return {"step": 0, **zeros}


def _update(p: Tensor, grad: Tensor, state: dict[str, Any], numbers: _Numbers) -> None:
    """Moves a parameter and its moments in place; state["step"] counts this step already."""
    step = state["step"]
    if "m_codes" in state:
        m_codes, m_absmax, v_codes, v_absmax = (state[name] for name in _layout(p, True))
        ops.adam_step_(
            p, grad, m_codes, m_absmax, v_codes, v_absmax, *_tables(p.device), **numbers,
            step=step, block_size=BLOCK_SIZE,
        )  # fmt: skip
    else:
        m, v = state["m"], state["v"]
        new = reference.adamw(p.float(), grad.float(), m, v, **numbers, step=step)
        for old, value in zip((p, m, v), new, strict=True):
            old.copy_(value)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The codebooks of the first and of the second moment."""
    return codebooks.dynamic().to(device), codebooks.dynamic_unsigned().to(device)


class _Wrapped:
    """A parameter's state on its way past Optimizer.load_state_dict, which casts what it knows."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def copy_to(self, device: torch.device) -> dict[str, Any]:
        return {
            name: value.to(device, copy=True) if isinstance(value, Tensor) else value
            for name, value in self._state.items()
        }


def _check_and_wrap(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook before loading: checks all that is to be loaded, then hides it from casts."""
    assert isinstance(optimizer, AdamW8bit)
    for group in state_dict["param_groups"]:
        optimizer._numbers({**optimizer.defaults, **group})
    groups = optimizer.param_groups, state_dict["param_groups"]
    params, indices = ([i for group in each for i in group["params"]] for each in groups)
    # Where the counts differ, PyTorch refuses to load.
    param_of = dict(zip(indices, params, strict=False))
    state = dict(state_dict["state"])
    for index in state.keys() & param_of.keys():
        _check_state(type(optimizer).__name__, index, state[index], param_of[index])
        state[index] = _Wrapped(state[index])
    return {**state_dict, "state": state}


def _check_state(who: str, index: int, state: dict[str, Any], p: Tensor) -> None:
    layout = _layout(p, "m_codes" in state)
    if state.keys() != {"step", *layout}:
        raise ValueError(
            f"{who}: the state of parameter {index} must hold step, {', '.join(layout)},"
            f" got {', '.join(state)}"
        )
    if not isinstance(state["step"], int) or state["step"] < 1:
        raise ValueError(f"{who}: step of parameter {index} must count from 1, got {state['step']}")
    for name, (shape, dtype) in layout.items():
        checks.one_of_dtypes(who, f"{name} of parameter {index}", state[name].dtype, dtype)
        if state[name].shape != shape:
            raise ValueError(
                f"{who}: {name} of parameter {index} must have shape {list(shape)},"
                f" got {list(state[name].shape)}"
            )
