"""What Transformers asks of a quantizer: loads, saves and dequantizes 8-bit models."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from gptj_q8 import convert, tied
from gptj_q8.checkpoint import naming, old, stored
from gptj_q8.checkpoint.adopting import Adopting
from gptj_q8.checkpoint.shards import Entry
from gptj_q8.config import FORMAT_VERSION, QUANT_METHOD, Q8Config
from gptj_q8.hf.quantizing import QuantizeOnLoad, Quantizing
from gptj_q8.models.layers import Quantized
from gptj_q8.nn.parts import check_stored_parts


class Q8HfQuantizer(HfQuantizer):
    """What Transformers asks of a quantizer.

    A float checkpoint is loaded into the float skeleton (see `Quantizing`). A stored 8-bit model is
    loaded into a skeleton of 8-bit modules, and so is a checkpoint of the hivemind family, which is
    known by its tensors, whatever config.json says (see `Adopting`).
    """

    quantization_config: Q8Config
    pre_quantized: bool

    def __init__(self, quantization_config: Q8Config, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._float_rules: Any = None  # by which Transformers names tensors when it saves the model
        self._loads_state_dict = False  # and not files, whose headers can be checked beforehand
        self._files: dict[str, str] = {}  # that each 8-bit module's scales are in, for messages
        self._adopting: Adopting | None = None  # a checkpoint of the hivemind family
        self._quantizing: Quantizing | None = None  # a float checkpoint

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
        return self._quantizing is not None and self._quantizing.takes(param_name)

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes per element once loaded; Transformers reserves a GPU's memory by it."""
        if self.param_needs_quantization(model, param_name):
            return 1 + 4 / self.quantization_config.block_size
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        assert self._quantizing is not None
        return QuantizeOnLoad(self._quantizing)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        entries: Mapping[str, Entry] = stored.entries(checkpoint_files or ())
        if old.quantized_names(entries):
            entries = self._adopt(model, entries)
        if self.pre_quantized:
            self._prepare_8bit_skeleton(model, entries)
        else:
            self._quantizing = Quantizing(model, self.quantization_config, entries)

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

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._quantizing is not None:
            self._quantizing.finish()
            self._quantizing, self.pre_quantized = None, True
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
