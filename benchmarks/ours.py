"""gptj_q8 as the benchmarks reach it, with words for what is missing."""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import OURS, UnavailableError


@functools.cache
def op(name: str, backend: str = "auto") -> Callable[..., Any]:
    """An op through the dispatch table ("auto"), or one backend's function for it."""
    import gptj_q8  # noqa: F401  (registers the ops)

    if backend == "auto":
        return getattr(torch.ops.gptj_q8, name)
    from gptj_q8 import backends

    if reason := backends.unavailable(backend):
        raise UnavailableError(reason)
    if not hasattr(backends.load(backend), name):
        raise UnavailableError(f"the backend {backend} lacks {name}")
    return getattr(backends.load(backend), name)


reference = functools.partial(op, backend="reference")


def codebook(name: str, weight: Tensor, block_size: int) -> Tensor:
    from gptj_q8.codebooks import CODEBOOKS

    return CODEBOOKS[name](weight, block_size).to(weight.device)


def system_name(backend: str) -> str:
    return OURS if backend == "auto" else f"{OURS} {backend}"


def peer(package: str) -> Any:
    """Imports a peer's module; UnavailableError in words where it is missing or broken."""
    # bitsandbytes logs at every call that it rounds bfloat16 to float16 for its int8 product;
    # torchao tells of each GPU library that it cannot load, and makes PyTorch warn of its enums.
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{error.name or package} is not installed") from error
    except Exception as error:
        reason = f"{package} fails to import ({type(error).__name__})"
        raise UnavailableError(reason) from error
