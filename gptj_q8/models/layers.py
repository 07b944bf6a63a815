"""Which 8-bit module stands in for which class of float ones."""

import re

from torch import nn

from gptj_q8.nn import Q8Conv1D, Q8Embedding, Q8Linear
from gptj_q8.nn.wrapped import wrapped

Quantized = Q8Linear | Q8Embedding

# By name, so that no family of models is imported for it.
_BY_NAME: dict[str, type[Quantized]] = {
    "transformers.pytorch_utils.Conv1D": Q8Conv1D,
    # Computes as nn.Linear does, unfused.
    "transformers.models.falcon.modeling_falcon.FalconLinear": Q8Linear,
}
# Thirty families (OPT, Bart, Gemma, ...) have copies of these few: word embeddings times a factor,
# and position embeddings at ids that are computed or shifted.
_WRAPPERS = re.compile(
    r"transformers\.models\.\w+\.modeling_\w+\.\w+(ScaledWordEmbedding|LearnedPositionalEmbedding)"
)


def stand_in(float_class: type[nn.Module]) -> type[Quantized] | None:
    """Returns the 8-bit class for modules of exactly this class; None where there is none.

    Other subclasses of nn.Linear and nn.Embedding have none, for what they compute may differ.
    """
    if float_class is nn.Linear:
        return Q8Linear
    if float_class is nn.Embedding:
        return Q8Embedding
    name = f"{float_class.__module__}.{float_class.__qualname__}"
    if issubclass(float_class, nn.Embedding) and _WRAPPERS.fullmatch(name):
        return wrapped(float_class)
    return _BY_NAME.get(name)
