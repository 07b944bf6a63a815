"""A forked child has none of its parent's threads, and whoever waits for them hangs.

PyTorch's pool (OpenMP) does not notice. Our ops run on one thread there, and so does what they ask
of PyTorch itself.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])
_forked = False


def _note() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_note)


def on_one_thread_if_forked(function: _Function) -> _Function:
    """In a forked child, `function` runs with one of PyTorch's threads; elsewhere, as ever."""

    @functools.wraps(function)
    def guarded(*args: Any) -> Any:
        if not _forked:
            return function(*args)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(threads)

    return guarded  # type: ignore[return-value]
