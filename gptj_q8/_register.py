"""Makes our parts known to PyTorch, Transformers and PEFT, whichever is imported first.

They find ops, quantizers and layers in tables of theirs, not by entry points, and take about a
second each to import, so `import gptj_q8` must not import them. It leaves a hook behind for each.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

# Module to wait for -> module of ours that registers something there, and what is lost if it fails.
_WAITING = {
    "torch": ("gptj_q8.ops", "torch.ops.gptj_q8 will be empty"),
    "transformers.quantizers.auto": ("gptj_q8.hf", "from_pretrained will not load 8-bit models"),
    "transformers.modeling_utils": (
        "gptj_q8.hf.patches",
        "what Transformers does wrong with 8 bits will not be refused, nor cards written",
    ),
    "peft": ("gptj_q8.lora", "PEFT's adapters will not work on 8-bit layers"),
}


def register() -> None:
    """Registers now where the other module is loaded, else as soon as it is."""
    for name in _WAITING:
        # One that another loading of this module left there would search through ours, and so on.
        sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "gptj_q8_waits_for", "") != name]
        if name in sys.modules:
            _import_ours(name)
        else:
            sys.meta_path.insert(0, _Hook(name))


def _import_ours(name: str) -> None:
    ours, loss = _WAITING[name]
    try:
        importlib.import_module(ours)
    except (ImportError, AttributeError) as error:
        # Our modules and kernels work without their help, so leave their import in peace.
        warnings.warn(f"gptj_q8: {loss}: {error}", stacklevel=2)


def guard(owner: type, method: str, check: Callable[..., None]) -> None:
    """Lets `check` look at the arguments of another library's method, and raise, before it runs.

    Done twice it is as done once. AttributeError for a method that is not there.
    """
    original = getattr(owner, method)
    if hasattr(original, "gptj_q8_checks"):
        return

    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(checked, "gptj_q8_checks", check)  # noqa: B010
    is_static = isinstance(inspect.getattr_static(owner, method), staticmethod)
    setattr(owner, method, staticmethod(checked) if is_static else checked)


def follow(owner: type, method: str, after: Callable[..., None]) -> None:
    """Calls `after` with the arguments of another library's method when that has returned.

    Done twice it is as done once. AttributeError for a method that is not there.
    """
    original = getattr(owner, method)
    if hasattr(original, "gptj_q8_follows"):
        return

    @functools.wraps(original)
    def followed(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        after(*args, **kwargs)
        return result

    setattr(followed, "gptj_q8_follows", after)  # noqa: B010
    setattr(owner, method, followed)


class _Hook(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, and runs `_import_ours` once it is loaded."""

    def __init__(self, name: str) -> None:
        self.gptj_q8_waits_for = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.gptj_q8_waits_for:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _import_ours(fullname)

        # The loader was made for this one module, so changing it changes nothing else.
        setattr(spec.loader, "exec_module", load_and_register)  # noqa: B010
        return spec
