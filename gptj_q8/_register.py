"""Makes the quantizer known to Transformers whenever, before or after, Transformers is imported.

Transformers finds quantizers in a table, not by entry points, and takes over a second to import,
so `import gptj_q8` must not import it. It leaves a hook behind instead.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Registers now if Transformers' table of quantizers is loaded, else as soon as it is."""
    if _TABLE in sys.modules:
        _import_quantizer()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def _import_quantizer() -> None:
    try:
        importlib.import_module("gptj_q8.hf")
    except ImportError as error:
        # Our modules and kernels work without Transformers' help, so leave its import in peace.
        warnings.warn(f"gptj_q8: from_pretrained will not load 8-bit models: {error}", stacklevel=2)


class _Hook(importlib.abc.MetaPathFinder):
    """Lets the other finders find the table, and runs `_import_quantizer` once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TABLE:
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
            _import_quantizer()

        # The loader was made for this one module, so changing it changes nothing else.
        setattr(spec.loader, "exec_module", load_and_register)  # noqa: B010
        return spec
