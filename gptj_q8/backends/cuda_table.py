"""Which backend serves a call on a CUDA (or ROCm) device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def preference(op: str, args: Sequence[Any]) -> tuple[str, ...]:
    """Backends for `op` in order of preference, before `reference`."""
    return ()
