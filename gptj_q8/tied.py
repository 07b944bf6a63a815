"""Tied embeddings: what Transformers must know of layers that share their codes."""

from typing import Any

from gptj_q8.checkpoint.stored import PARTS
from gptj_q8.models.layers import Quantized


def tie_codes(model: Any) -> list[str]:
    """Tells Transformers that the codes are tied where it knows the weights to be.

    Returns the names of the modules that take another's codes.
    """
    targets = []
    keys: dict[str, str] = {}
    for target, source in list(model.all_tied_weights_keys.items()):
        names = target.removesuffix(".weight"), source.removesuffix(".weight")
        if not target.endswith(".weight"):
            continue
        layer, other = (model.get_submodule(name) for name in names)
        if not isinstance(layer, Quantized) or not isinstance(other, Quantized):
            continue
        layer.tie(other)
        targets.append(names[0])
        del model.all_tied_weights_keys[target]
        # Transformers looks this up among the parameters only; the layers see to the buffers.
        model.all_tied_weights_keys[f"{names[0]}.codes"] = f"{names[1]}.codes"
        keys.update({f"{names[0]}.{part}": f"{names[1]}.{part}" for part in PARTS})
    if keys:
        gone = {f"{name}.weight" for name in targets}
        kept = {k: v for k, v in model._tied_weights_keys.items() if k not in gone}
        model._tied_weights_keys = {**kept, **keys}
    return targets


def untie(model: Any, name: str) -> None:
    """Forgets that module `name` was to share its codes."""
    model.get_submodule(name).untie()
    own = {f"{name}.{part}" for part in PARTS}
    for mapping in (model.all_tied_weights_keys, model._tied_weights_keys):
        for target, source in list(mapping.items()):
            if target in own or source in own:
                del mapping[target]


def tie_weights(model: Any) -> None:
    """Undoes `tie_codes`."""
    tied = model.all_tied_weights_keys
    for target, source in list(tied.items()):
        if target.endswith(".codes"):
            del tied[target]
            tied[f"{target.removesuffix('.codes')}.weight"] = (
                f"{source.removesuffix('.codes')}.weight"
            )
    # The class has the names of the float weights.
    vars(model).pop("_tied_weights_keys", None)
