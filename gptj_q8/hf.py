"""The Transformers quantizer: loads, saves and dequantizes 8-bit models.

Importing this module registers it.
"""

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from gptj_q8 import convert, tied
from gptj_q8.checkpoint import naming, old, stored
from gptj_q8.checkpoint.adopting import Adopting
from gptj_q8.checkpoint.shards import Entry
from gptj_q8.config import FORMAT_VERSION, QUANT_METHOD, Q8Config
from gptj_q8.models.layers import Quantized
from gptj_q8.nn.quantized import check_stored_parts

logger = logging.getLogger(__name__)


class Q8HfQuantizer(HfQuantizer):
    """What Transformers asks of a quantizer.

    A float checkpoint is loaded into the float skeleton, and each weight is quantized as it comes:
    given a skeleton with uint8 weights, Transformers up to 5.22 would cast the checkpoint to uint8
    first. A stored 8-bit model is loaded into a skeleton of 8-bit modules, and so is a checkpoint
    of the hivemind family, which is known by its tensors, whatever config.json says.
    """

    quantization_config: Q8Config
    pre_quantized: bool

    def __init__(self, quantization_config: Q8Config, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        # Name of each module to quantize while loading -> those that share its weight, itself too.
        self._groups: dict[str, list[str]] = {}
        self._refused: list[str] = []
        self._restore_fp32_names: Any = None
        self._float_rules: Any = None  # by which Transformers names tensors when it saves the model
        self._loads_state_dict = False  # and not files, whose headers can be checked beforehand
        self._files: dict[str, str] = {}  # that each 8-bit module's scales are in, for messages
        self._adopting: Adopting | None = None  # a checkpoint of the hivemind family

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        # Without adapters, too, Trainer may train what is float: norms and biases.
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module_name, _, own_name = param_name.rpartition(".")
        return own_name == "weight" and module_name in self._groups

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes per element once loaded; Transformers reserves a GPU's memory by it."""
        if self.param_needs_quantization(model, param_name):
            return 1 + 4 / self.quantization_config.block_size
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOnLoad(self)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        entries: Mapping[str, Entry] = stored.entries(checkpoint_files or ())
        if old.quantized_names(entries):
            entries = self._adopt(model, entries)
        if self.pre_quantized:
            self._prepare_8bit_skeleton(model, entries)
        else:
            self._prepare_float_skeleton(model, entries)

    def _adopt(self, model: Any, entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
        """Returns the entries of a checkpoint of the hivemind family as if it were one of ours."""
        if not self.pre_quantized and self.quantization_config.to_dict() != Q8Config().to_dict():
            raise ValueError(
                "from_pretrained: the checkpoint is in 8 bits already, which are kept; "
                "quantization_config is for float models"
            )
        self._adopting = Adopting(entries, model)
        self.quantization_config, self.pre_quantized = self._adopting.config, True
        _ignore_keys(model, "unexpected", self._adopting.dropped)
        return old.renamed(entries)

    def get_weight_conversions(self) -> list[Any]:
        renamings = self._adopting.renamings if self._adopting else []
        return [*super().get_weight_conversions(), *renamings]

    def _prepare_float_skeleton(self, model: Any, entries: Mapping[str, Entry]) -> None:
        config = self.quantization_config
        groups = convert.targets(model, config, model.all_tied_weights_keys)
        if not groups:
            raise ValueError("gptj_q8: the model has no nn.Linear or nn.Embedding to quantize")
        if unmatched := convert.unmatched_exemptions(model, config):
            logger.warning("modules_to_not_convert matches no module: %s", ", ".join(unmatched))
        for names in groups:
            convert.check_convertible("from_pretrained", names[0], model.get_submodule(names[0]))
        convert.warn_of_float(model, groups, config)
        self._groups = {name: names for names in groups for name in names}
        # Transformers casts weights to the model's dtype before we see them, and what that rounds
        # away adds to our error (bfloat16 from float16: 4 % more). So where the dtypes differ, let
        # the weights to quantize arrive in float32.
        names = self._restore_fp32_names = model._keep_in_fp32_modules_strict
        dtypes = {entry.dtype for entry in entries.values() if len(entry.shape) > 1}
        if any(dtype is not None and dtype != model.dtype for dtype in dtypes):
            exact = {rf"(?:^|\.){re.escape(name)}\.weight$" for name in self._groups}
            model._keep_in_fp32_modules_strict = set(names or ()) | exact

    def _prepare_8bit_skeleton(self, model: Any, entries: Mapping[str, Entry]) -> None:
        block_size = self.quantization_config.block_size
        prefix = model.base_model_prefix
        self._loads_state_dict = not entries
        stored.check(entries, block_size)
        unclaimed = set(stored.quantized_names(entries))
        known = naming.model_names(model, entries)
        absent = []
        for group in convert.targets(model, self.quantization_config, model.all_tied_weights_keys):
            bases = {naming.base_name(name, prefix, "codes", known) for name in group} - {None}
            if entries and not bases:
                # Stored in float, or a new head that the checkpoint knows nothing of.
                absent += [n for n in group if naming.base_name(n, prefix, "weight", known) is None]
                continue
            unclaimed -= bases
            for name in group:
                layer: Any = convert.shell(model.get_submodule(name), block_size)
                for base in bases:
                    stored.check_shape(entries, f"{base}.codes", layer.codes.shape)
                    self._files[name] = f"{entries[f'{base}.absmax'].file}: "
                model.set_submodule(name, layer)
        _refuse_unclaimed(model, absent, unclaimed, entries)
        targets = tied.tie_codes(model)
        _ignore_keys(model, "missing", [rf"^{name}\.(absmax|codebook)$" for name in targets])
        own_names = [name.removeprefix(f"{prefix}.") for name, _ in layers(model)]
        _ignore_keys(model, "unexpected", [rf"(^|\.){name}\.weight$" for name in own_names])

    def quantize_loaded(
        self, model: Any, param_name: str, weight: Tensor, missing_keys: set[str]
    ) -> dict[str, Tensor]:
        """Puts an 8-bit module in the place of one whose weight has come; returns its parts."""
        name = param_name.removesuffix(".weight")
        module = model.get_submodule(name)
        try:
            convert.refuse_not_finite({param_name: weight})
        except ValueError as error:
            # Transformers turns what is raised here into a line of its loading report, so this
            # waits until _process_model_after_weight_loading.
            self._refused.append(str(error))
            return {}
        if isinstance(module, Quantized):
            self._load_tied_twice(model, name, module, weight)
            return {}
        dtype = module.weight.dtype
        module.weight = nn.Parameter(weight, requires_grad=False)
        names = [name, *(other for other in self._groups[name] if other != name)]
        first = convert.swap(model, names, self.quantization_config)
        for other in names:
            layer = model.get_submodule(other)
            layer.dtype = dtype
            missing_keys.discard(f"{other}.weight")
        tied.tie_codes(model)
        return {f"{name}.{part}": getattr(first, part) for part in stored.PARTS}

    def _load_tied_twice(self, model: Any, name: str, layer: Quantized, weight: Tensor) -> None:
        """Takes in a tied weight that the checkpoint holds under both names."""
        twin = layer.to_float(nn.Parameter(weight, requires_grad=False))
        own: Any = convert.from_float(twin, self.quantization_config)
        if torch.equal(own.codes, layer.codes) and torch.equal(own.absmax, layer.absmax):
            return
        # Transformers, too, believes the weights over config.json's tie_word_embeddings.
        logger.warning("%s is stored with values of its own, so it will not be tied", name)
        own.dtype = layer.dtype
        tied.untie(model, name)
        model.set_submodule(name, own)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._refused:
            raise ValueError("; ".join(self._refused))
        if not self.pre_quantized:
            model._keep_in_fp32_modules_strict = self._restore_fp32_names
            self._groups = {}
            self.pre_quantized = True
        if self._adopting is not None:
            self._adopting.finish(model)
            self._adopting = None
        for name, layer in layers(model):
            scales = {"absmax": layer.absmax, "codebook": layer.codebook}
            if self._loads_state_dict:
                _refuse_missing(name, scales)
            # Disk offload leaves tensors without data, and has read them from checked files.
            check_stored_parts(f"{self._files.get(name, '')}{name}", scales, "")
        return model

    def attach(self, model: Any) -> None:
        """Tells a model that was quantized in memory."""
        tied.tie_codes(model)
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = QUANT_METHOD
        self.postprocess_model(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, Any]:
        """Returns what save_pretrained writes."""
        metadata = {"format_version": str(FORMAT_VERSION)}
        state = model.state_dict()
        own_names = [name for name, _ in layers(model)]
        if getattr(model, "_hf_peft_config_loaded", False):
            # Adapters are written alone, but PEFT adds embeddings that have one.
            frozen = {
                f"{name}.{own}"
                for name, layer in layers(model)
                for own, tensor in layer.state_dict(keep_vars=True).items()
                if not tensor.requires_grad
            }
            return {name: t for name, t in state.items() if name not in frozen}, metadata
        if own_names:
            guard, empty = stored.guard(own_names[0])
            state[guard] = empty
            rules = naming.keep_parts_whole(model, own_names)
            if self._float_rules is None:
                self._float_rules = rules
        return state, metadata

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        # Not config.dtype, Transformers' default, which model.to(dtype) does not change.
        return super().dequantize(model, model.dtype if dtype is None else dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        convert.decode_layers(model, dtype)
        tied.tie_weights(model)
        model.to(dtype)
        if self._float_rules is not None:
            model._weight_conversions = self._float_rules
        if hasattr(model.config, "_is_quantized"):
            del model.config._is_quantized
        return model


class _QuantizeOnLoad(ConversionOps):
    """Quantizes the weights that Transformers has just read."""

    def __init__(self, quantizer: Q8HfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """input_dict: full parameter name -> tensor, or a list of one."""
        missing = missing_keys if missing_keys is not None else set()
        loaded = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if self.quantizer.param_needs_quantization(model, name):
                loaded.update(self.quantizer.quantize_loaded(model, name, weight, missing))
            else:
                loaded[name] = weight
        return loaded


def layers(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Name and module of every 8-bit layer."""
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            yield name, module


def _ignore_keys(model: Any, kind: str, patterns: Sequence[str]) -> None:
    attribute = f"_keys_to_ignore_on_load_{kind}"
    setattr(model, attribute, set(getattr(model, attribute) or ()) | set(patterns))


def _refuse_missing(name: str, scales: Mapping[str, Tensor]) -> None:
    """ValueError if Transformers did not load one of these buffers."""
    for part, tensor in scales.items():
        if not getattr(tensor, "_is_hf_initialized", False):
            raise ValueError(f"the state_dict lacks {name}.{part}")


def _refuse_unclaimed(
    model: nn.Module, absent: Sequence[str], unclaimed: set[str], entries: Mapping[str, Entry]
) -> None:
    """ValueError if an 8-bit weight has the shape of one that the checkpoint lacks.

    That is a weight under a name that nobody here understands.
    """
    shapes = {entries[f"{name}.codes"].shape: name for name in unclaimed}
    for name in absent:
        shell = convert.shell(model.get_submodule(name), block_size=32)
        if other := shapes.get(tuple(shell.codes.shape)):
            raise ValueError(f"the checkpoint holds no {name}, but an 8-bit {other} of its shape")


# Assigned rather than registered through Transformers' decorators, which raise when this module is
# imported again.
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = Q8Config
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = Q8HfQuantizer
