"""The model to convert: its folder, its configuration, what goes along with its weights."""

import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from gptj_q8.checkpoint import stored
from gptj_q8.checkpoint.directory import SETTINGS, TOKENIZER
from gptj_q8.checkpoint.files import find

# What goes along with the weights as it is.
COMPANIONS = (*TOKENIZER, SETTINGS, "LICENSE*", "NOTICE*")


def local_directory(source: str | Path, revision: str | None = None) -> Path:
    """Returns the directory of `source`, downloaded if it is a Hub id."""
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", source):
        raise FileNotFoundError(f"{source}: neither a directory nor a Hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["model*.safetensors", "*.json", "README.md", *COMPANIONS]
    try:
        directory = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        if not any(directory.glob("model*.safetensors")):
            snapshot_download(source, revision=revision, allow_patterns=["pytorch_model*.bin"])
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{source} is no folder here and could not be fetched from the Hub: {reason}"
        ) from error
    return directory


@contextmanager
def faults_named(name: str | os.PathLike[str] | None) -> Iterator[None]:
    """Names the file at fault where Transformers' errors do not; name: a directory or a Hub id.

    Transformers reads an index, and a pickle if config.json has no dtype, before our quantizer is
    asked. ValueError.
    """
    try:
        yield
    except (ValueError, RuntimeError, pickle.UnpicklingError) as error:
        if name is not None and Path(name).is_dir():
            with suppress(FileNotFoundError):  # the weights may have other names
                stored.entries(find(Path(name)))
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(f"{name}: its weights are no plain state dict") from error
        raise


def refuse_unsafe(options: Mapping[str, Any]) -> None:
    """ValueError for weights_only=False, with which PyTorch would run what a pickle asks for."""
    if options.get("weights_only") is False:
        raise ValueError("from_pretrained: weights_only=False would run code from a checkpoint")


def copy_companions(source: Path, target: Path) -> None:
    """Copies what goes along with the weights: tokenizer, generation settings, licence."""
    for pattern in COMPANIONS:
        for path in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(path, target / path.name)


def empty_model(directory: Path) -> tuple[Any, Any]:
    """Returns the model's configuration and the model without data."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    if getattr(config, "quantization_config", None) is not None:
        method = config.quantization_config.get("quant_method")
        raise ValueError(
            f"{directory}: is quantized already ({method}); name the float model it was made of"
        )
    name = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, str(name), None)  # a file may say anything
    with torch.device("meta"):
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return config, kind(config)
        return config, transformers.AutoModelForCausalLM.from_config(config)
