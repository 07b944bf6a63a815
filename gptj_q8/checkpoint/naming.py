"""The names of a checkpoint's tensors and those that Transformers gives them while loading.

Transformers renames tensors of some families when it loads and saves, and fuses or splits some. The
parts of 8-bit weights are renamed as the weights are; fused or split they cannot be.
"""

from collections.abc import Container, Iterable, Mapping
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
)

from gptj_q8.checkpoint.stored import PARTS


def model_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Returns the checkpoint's name for each name that the model knows, as far as they tell.

    A checkpoint's name that no rule changes, or that the model has already, stands for itself.
    """
    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    known = model.state_dict().keys()
    found = {}
    # In the order in which Transformers goes through them: some rules depend on it.
    for name in sorted(names, key=dot_natural_key):
        new = name
        for rule in rules:
            new, _ = rule.rename_source_key(new)
        found[name if _weight(name) in known and _weight(new) not in known else new] = name
    return found


def base_name(module: str, prefix: str, own_name: str, names: Mapping[str, str]) -> str | None:
    """Returns the checkpoint's name of `module` if it holds `own_name` of it, else None.

    prefix: the attribute that holds the body of a model with a head. A checkpoint of the body alone
    lacks it, and so does a model that is the body. names: see `model_names`.
    """
    for base in _spellings(module, prefix):
        if name := names.get(f"{base}.{own_name}"):
            return name.removesuffix(f".{own_name}")
    return None


def module_name(base: str, prefix: str, modules: Container[str]) -> str | None:
    """Returns the model's name for a module of the checkpoint, None if the model lacks it."""
    return next((name for name in _spellings(base, prefix) if name in modules), None)


def _spellings(module: str, prefix: str) -> tuple[str, str, str]:
    return module, f"{prefix}.{module}", module.removeprefix(f"{prefix}.")


def keep_parts_whole(model: Any, layers: Iterable[str]) -> list[Any]:
    """Takes from the rules by which Transformers saves `model` those that fuse or split layers.

    Returns the rules as they were. The layers are then stored under the model's own names.
    """
    rules = getattr(model, "_weight_conversions", None)
    if rules is None:  # as Transformers finds them for a model that was not loaded
        rules = get_model_conversion_mapping(model, add_legacy=False)
        rules = [rule for rule in rules if not isinstance(rule, PrefixChange)]
    codes = [f"{name}.codes" for name in layers]
    model._weight_conversions = [
        rule
        for rule in rules
        if not (isinstance(rule, WeightConverter) and _would_take(rule.reverse_transform(), codes))
    ]
    return rules


def _would_take(rule: Any, names: Iterable[str]) -> bool:
    return any(rule.rename_source_key(name)[1] is not None for name in names)


def _weight(name: str) -> str:
    """The name that the model had for it before its layers became 8-bit ones."""
    base, _, own_name = name.rpartition(".")
    return f"{base}.weight" if own_name in PARTS else name
