"""Which backend serves an op: the claim rule, and `use` to force one.

A backend is a module here with plain functions named as the ops (it may lack some) and
`unavailable() -> str | None`; `gptj_q8.backends.reference`, in plain PyTorch, is the specification.
`<device>_table.py` lists, for a call, the backends in order of preference; the first that is usable
and has the op serves it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from gptj_q8.backends import cpu_table, cuda_table

NAMES = ("cpu", "cuda", "triton", "slabs", "reference")
"""Every backend there is."""

__all__ = ["NAMES", "call", "load", "preferred", "serving", "unavailable", "use"]

_TABLES = {"cpu": cpu_table, "cuda": cuda_table}

# A plain global, not a context variable: backward passes on a GPU run in threads of their own.
_forced: str | None = None


@functools.cache
def load(name: str) -> ModuleType:
    """Imports the backend called `name`. Raises ValueError if there is none of that name."""
    if name not in NAMES:
        raise ValueError(f"backends: no backend {name!r}, there are {', '.join(NAMES)}")
    return importlib.import_module(f"gptj_q8.backends.{name}")


@functools.cache
def unavailable(name: str) -> str | None:
    """Why the backend called `name` cannot be used here, in one sentence; None if it can."""
    reason: str | None = load(name).unavailable()
    return reason


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Forces one backend for every `torch.ops.gptj_q8.*` call on every device, process-wide.

    For tests and kernel work. Raises ValueError if there is none of that name, RuntimeError if it
    is unavailable, and NotImplementedError at the call of an op that it lacks.
    """
    global _forced
    if reason := unavailable(name):
        raise RuntimeError(f"backends: {name} is unavailable: {reason}")
    outer, _forced = _forced, name
    try:
        yield
    finally:
        _forced = outer


def serving(op: str, device_type: str, args: Sequence[Any] = ()) -> str:
    """The name of the backend that serves `op` with these arguments on `device_type`."""
    if _forced is not None:
        if not hasattr(load(_forced), op):
            raise NotImplementedError(f"{op}: the backend {_forced} lacks it")
        return _forced
    return preferred(op, device_type, args)


def preferred(op: str, device_type: str, args: Sequence[Any] = ()) -> str:
    """The name of the backend that the device's table chooses, whatever `use` forces."""
    table = _TABLES.get(device_type)
    for name in table.preference(op, args) if table else ():
        if unavailable(name) is None and hasattr(load(name), op):
            return name
    _say_slow(device_type)
    return "reference"


def call(op: str, device_type: str, args: Sequence[Any]) -> Any:
    """Runs `op` in the backend that serves it."""
    function: Callable[..., Any] = getattr(load(serving(op, device_type, args)), op)
    return function(*args)


@functools.cache
def _say_slow(device_type: str) -> None:
    """Says, once for each device type, that the slow reference runs and why."""
    table = _TABLES.get(device_type)
    names = table.preference("linear", ()) if table else ()
    reasons = [f"{name}: {unavailable(name)}" for name in names if unavailable(name)]
    why = "; ".join(reasons) or f"no kernel of ours serves {device_type} devices yet"
    warnings.warn(f"gptj_q8 runs in plain PyTorch on {device_type}, slowly ({why})", stacklevel=2)
