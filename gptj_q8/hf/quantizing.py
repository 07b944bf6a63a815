"""A float checkpoint on its way through Transformers into 8-bit modules."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from gptj_q8 import convert, tied
from gptj_q8.checkpoint import stored
from gptj_q8.checkpoint.shards import Entry
from gptj_q8.config import Q8Config
from gptj_q8.models.layers import Quantized

logger = logging.getLogger(__name__)


class Quantizing:
    """One such checkpoint and the model that it is loaded into.

    Each weight is quantized as it comes: given a skeleton with uint8 weights, Transformers up to
    5.22 would cast the checkpoint to uint8 first.
    model: without data yet; entries: what the files hold. ValueError if there is nothing to
    quantize, and ValueError or TypeError for a module that cannot be.
    """

    def __init__(self, model: Any, config: Q8Config, entries: Mapping[str, Entry]) -> None:
        groups = convert.targets(model, config, model.all_tied_weights_keys)
        if not groups:
            raise ValueError("gptj_q8: the model has no nn.Linear or nn.Embedding to quantize")
        if unmatched := convert.unmatched_exemptions(model, config):
            logger.warning("modules_to_not_convert matches no module: %s", ", ".join(unmatched))
        for names in groups:
            convert.check_convertible("from_pretrained", names[0], model.get_submodule(names[0]))
        convert.warn_of_float(model, groups, config)
        self._model, self._config = model, config
        # Name of each module to quantize -> those that share its weight, itself too.
        self._groups = {name: names for names in groups for name in names}
        self._refused: list[str] = []
        # Transformers casts weights to the model's dtype before we see them, and what that rounds
        # away adds to our error (bfloat16 from float16: 4 % more). So where the dtypes differ, let
        # the weights to quantize arrive in float32.
        names = self._restore_fp32_names = model._keep_in_fp32_modules_strict
        dtypes = {entry.dtype for entry in entries.values() if len(entry.shape) > 1}
        if any(dtype is not None and dtype != model.dtype for dtype in dtypes):
            exact = {rf"(?:^|\.){re.escape(name)}\.weight$" for name in self._groups}
            model._keep_in_fp32_modules_strict = set(names or ()) | exact

    def takes(self, param_name: str) -> bool:
        """Whether this parameter is a weight to quantize."""
        module_name, _, own_name = param_name.rpartition(".")
        return own_name == "weight" and module_name in self._groups

    def take(self, param_name: str, weight: Tensor, missing_keys: set[str]) -> dict[str, Tensor]:
        """Puts an 8-bit module in the place of one whose weight has come; returns its parts."""
        name = param_name.removesuffix(".weight")
        module = self._model.get_submodule(name)
        try:
            convert.refuse_not_finite({param_name: weight})
        except ValueError as error:
            # Transformers turns what is raised here into a line of its loading report, so this
            # waits until all is loaded.
            self._refused.append(str(error))
            return {}
        if isinstance(module, Quantized):
            self._take_tied_twice(name, module, weight)
            return {}
        dtype = module.weight.dtype
        module.weight = nn.Parameter(weight, requires_grad=False)
        names = [name, *(other for other in self._groups[name] if other != name)]
        first = convert.swap(self._model, names, self._config)
        for other in names:
            layer = self._model.get_submodule(other)
            layer.dtype = dtype
            missing_keys.discard(f"{other}.weight")
        tied.tie_codes(self._model)
        return {f"{name}.{part}": getattr(first, part) for part in stored.PARTS}

    def _take_tied_twice(self, name: str, layer: Quantized, weight: Tensor) -> None:
        """Takes in a tied weight that the checkpoint holds under both names."""
        twin = layer.to_float(nn.Parameter(weight, requires_grad=False))
        own: Any = convert.from_float(twin, self._config)
        if torch.equal(own.codes, layer.codes) and torch.equal(own.absmax, layer.absmax):
            return
        # Transformers, too, believes the weights over config.json's tie_word_embeddings.
        logger.warning("%s is stored with values of its own, so it will not be tied", name)
        own.dtype = layer.dtype
        tied.untie(self._model, name)
        self._model.set_submodule(name, own)

    def finish(self) -> None:
        """Leaves the loaded model as it was but for its 8-bit modules.

        ValueError that names every weight with NaN or Inf.
        """
        self._model._keep_in_fp32_modules_strict = self._restore_fp32_names
        if self._refused:
            raise ValueError("; ".join(self._refused))


class QuantizeOnLoad(ConversionOps):
    """Hands the weights that Transformers has just read to a `Quantizing`."""

    def __init__(self, quantizing: Quantizing) -> None:
        self.quantizing = quantizing

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """input_dict: full parameter name -> tensor, or a list of one."""
        missing = missing_keys if missing_keys is not None else set()
        loaded = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if self.quantizing.takes(name):
                loaded.update(self.quantizing.take(name, weight, missing))
            else:
                loaded[name] = weight
        return loaded
