"""8-bit stand-ins for subclasses of nn.Embedding that scale or shift what it looks up."""

from __future__ import annotations

from typing import Any

from torch import nn

from gptj_q8.nn.embedding import Q8Embedding

_made: dict[type[nn.Embedding], type[Q8Embedding]] = {}


def wrapped(float_class: type[nn.Embedding]) -> type[Q8Embedding]:
    """Returns a Q8Embedding with the forward of `float_class`.

    That forward must look rows up through `super().forward` alone. Python then finds Q8Embedding's,
    which stands between `float_class` and nn.Embedding in the order of the bases.
    """
    if float_class not in _made:
        _made[float_class] = type(f"Q8{float_class.__name__}", (float_class, _Wrapped), {})
    return _made[float_class]


class _Wrapped(Q8Embedding):
    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle cannot find the class by its name.
        return _unfilled, (self.float_class,), self.__dict__


def _unfilled(float_class: type[nn.Embedding]) -> Q8Embedding:
    made = wrapped(float_class)
    return made.__new__(made)
