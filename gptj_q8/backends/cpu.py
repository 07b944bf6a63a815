"""Our compiled CPU kernels."""

from __future__ import annotations


def unavailable() -> str | None:
    """Why the compiled library cannot be used."""
    return "the compiled library is not built"
