"""A checkpoint of the hivemind family on its way through Transformers into 8-bit modules."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from gptj_q8.checkpoint import adapters, old
from gptj_q8.checkpoint.shards import Entry, Shard
from gptj_q8.config import Q8Config
from gptj_q8.models.layers import Quantized
from gptj_q8.nn.parts import HIVEMIND_BLOCK_SIZE, HIVEMIND_NAMES, sort_levels
from gptj_q8.nn.quantized import FrozenCodes


class Adopting:
    """One such checkpoint and the model that it is loaded into.

    stored: what its files hold; model: without data yet. ValueError or TypeError, naming file and
    tensor, for what does not fit.
    """

    def __init__(self, stored: Mapping[str, Entry], model: Any) -> None:
        from transformers.core_model_loading import WeightRenaming

        old.check(stored)
        old.check_model(stored, model)
        self._stored = stored
        self._adapters = adapters.find(stored, model)
        modules = "|".join(map(re.escape, old.quantized_names(stored)))
        self.renamings = [
            WeightRenaming(rf"^({modules})\.{theirs}$", rf"\1.{ours}")
            for ours, theirs in HIVEMIND_NAMES.items()
            if ours != theirs
        ]
        """How Transformers is to rename what it reads."""

    @property
    def config(self) -> Q8Config:
        """What the model's config.json will say of it."""
        return Q8Config(HIVEMIND_BLOCK_SIZE, old.CODEBOOK)

    @property
    def dropped(self) -> list[str]:
        """Patterns of what Transformers must not wonder at."""
        return [rf"{re.escape(name)}$" for name in self._stored if old.is_dropped(name)]

    def finish(self, model: Any) -> None:
        """Does what renaming does not, once the model is loaded.

        ValueError if a layer that has an adapter was offloaded to the disk.
        """
        # Transformers would rename the tensors back when it saves the model.
        model._weight_conversions = [
            each for each in model._weight_conversions if each not in self.renamings
        ]
        for layer in model.modules():
            if isinstance(layer, Quantized):
                _finish_layer(layer)
        if self._adapters:
            self._refuse_on_disk(model)
            files = {self._stored[each.first].file for each in self._adapters}
            files |= {self._stored[each.second].file for each in self._adapters}
            shards = {file: Shard(file) for file in files}
            config = adapters.peft_config(self._adapters, model, model.name_or_path)
            state = adapters.peft_state(self._adapters, self._stored, shards)
            adapters.attach(model, config, state)

    def _refuse_on_disk(self, model: Any) -> None:
        # Offloaded data is looked up by the names that layers have before PEFT wraps them.
        for each in self._adapters:
            if model.get_submodule(each.module).codes.is_meta:
                raise ValueError(
                    f"{self._stored[each.first].file}: {each.first} is an adapter for a layer "
                    'that device_map puts on the "disk"; rewrite the checkpoint first '
                    "(gptj-q8 convert), which takes its adapters out"
                )


def _finish_layer(layer: Quantized) -> None:
    codes, codebook = sort_levels(layer.codes.data, layer.codebook)
    if codebook is not layer.codebook:
        layer.codes = FrozenCodes(codes, requires_grad=False)
    # Transformers 5.17 leaves float16 as it is. In a pickle one table may serve all layers, and
    # tensors that share memory are not saved.
    layer.absmax = layer.absmax.float()
    layer.codebook = codebook.to(torch.float32, copy=True)
