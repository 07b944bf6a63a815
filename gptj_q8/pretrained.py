"""Loads a model in 8 bits, in whatever form it is stored."""

import os
from pathlib import Path
from typing import Any

from gptj_q8.checkpoint import adapters, old, stored
from gptj_q8.checkpoint.files import find
from gptj_q8.checkpoint.source import faults_named, local_directory, refuse_unsafe
from gptj_q8.config import QUANT_METHOD, Q8Config
from gptj_q8.models import sdpa_of

# What from_pretrained must know to find config.json.
_HUB_ARGUMENTS = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *model_args: Any,
    quantization_config: Q8Config | None = None,
    **kwargs: Any,
) -> Any:
    """Loads a causal language model in 8 bits, whether it is stored so or in float.

    Checkpoints of the hivemind/gpt-j-6B-8bit family keep their codes, scales and tables; adapters
    in them are attached as PEFT's. For other models `import gptj_q8` and
    `AutoModel...from_pretrained` do as well.

    name_or_path: a directory or a Hub id; of a directory that `save_pretrained` filled with
        adapters, the model is loaded that they were trained on, and they in the place of its own.
    quantization_config: how to quantize a float model; None means `Q8Config()`.
    attn_implementation: "sdpa", which Transformers before 5.24 lacks for GPT-J, unless "eager" is
        asked for.

    Other arguments are those of `AutoModelForCausalLM.from_pretrained`. ValueError for a model that
    another method has quantized, for damaged files, and for a pickle that asks to run code.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    refuse_unsafe(kwargs)
    if (base := _base_of_adapter(Path(name_or_path))) is not None:
        loaded = from_pretrained(
            base, *model_args, quantization_config=quantization_config, **kwargs
        )
        _load_adapter(loaded[0] if isinstance(loaded, tuple) else loaded, name_or_path)
        return loaded
    config = kwargs.get("config")
    if config is None or isinstance(config, str | os.PathLike):
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        config = AutoConfig.from_pretrained(config or name_or_path, **hub)
    present = getattr(config, "quantization_config", None) or {}
    method = present.get("quant_method") if isinstance(present, dict) else present.quant_method
    if method not in (None, QUANT_METHOD):
        raise ValueError(
            f"{name_or_path}: is quantized already ({method}); name the float model it was made of"
        )
    if quantization_config is not None or not present:
        kwargs["quantization_config"] = quantization_config or Q8Config()
    attention = kwargs.get("attn_implementation", config._attn_implementation)
    wants_weights = kwargs.get("output_attentions", config.output_attentions)
    if attention == "sdpa" or (attention is None and not wants_weights):
        kwargs["attn_implementation"] = sdpa_of(config.model_type) or attention
    with faults_named(name_or_path):
        return AutoModelForCausalLM.from_pretrained(name_or_path, *model_args, **kwargs)


def _base_of_adapter(directory: Path) -> str | None:
    """Where the model of the adapter in `directory` is; None if that holds a model, or nothing."""
    path = directory / adapters.CONFIG
    if not path.exists() or (directory / "config.json").exists():
        return None
    base = adapters.read_config(directory).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path}: does not say which model the adapter is for")
    return str(base)


def _load_adapter(model: Any, directory: str | os.PathLike[str]) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):
        model.delete_adapter(model.active_adapters())
    model.load_adapter(str(directory), is_trainable=True)


def load_as_stored(name: str, **kwargs: Any) -> Any:
    """Loads a causal language model in floats or in 8 bits, as it is stored.

    name: a directory or a Hub id; the rest as in `from_pretrained`. Transformers alone does not see
    that a checkpoint of the hivemind family is in 8 bits, for config.json says nothing of it.
    """
    from transformers import AutoModelForCausalLM

    directory = local_directory(name)
    if old.quantized_names(stored.entries(find(directory))):
        return from_pretrained(directory, **kwargs)
    return AutoModelForCausalLM.from_pretrained(directory, **kwargs)
