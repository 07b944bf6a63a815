"""The backends of the ops: which are usable here, and which serves which op."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from gptj_q8 import backends, ops

ROWS = (1, 16, 128, 1024)
"""Rows of x for which a product is looked up: a token, some, a short prompt, a long one."""

_PRODUCTS = ("linear", "linear_grad_input")


@dataclass(frozen=True)
class Backend:
    """A backend, usable here or not.

    reason: why it cannot be used and what to do, None where it can.
    instruction_sets: of the CPU, best first; the first serves.
    """

    name: str
    reason: str | None
    instruction_sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Served:
    """Which backend serves an op on a device.

    rows: of x, None where it serves all.
    """

    op: str
    device: str
    rows: int | None
    backend: str


def describe_backends() -> list[Backend]:
    """Every backend of gptj_q8, usable or not."""
    return [
        Backend(
            name,
            reason := backends.unavailable(name),
            tuple(backends.load(name).instruction_sets()) if name == "cpu" and not reason else (),
        )
        for name in backends.NAMES
    ]


def served_on(device: str) -> list[Served]:
    """Who serves each op on "cpu" or "cuda", in float16 on a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that plain PyTorch serves is in the answer
        found = []
        for op in ops.SCHEMAS:
            each = [
                Served(op, device, rows, backends.preferred(op, device, _arguments(device, rows)))
                for rows in (ROWS if op in _PRODUCTS else (None,))
            ]
            alike = len({served.backend for served in each}) == 1
            found += [Served(op, device, None, each[0].backend)] if alike else each
        return found


def _arguments(device: str, rows: int | None) -> list[Any]:
    """As far as the devices' tables look at a call's arguments: x and the codes' shape."""
    if rows is None or device == "cpu":
        return []
    x = torch.empty(rows, 4096, dtype=torch.float16, device=device)
    return [x, torch.empty(4096, 4096, dtype=torch.uint8, device="meta")]
