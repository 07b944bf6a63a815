"""Opens what commands are given by name: models, tokenizers, texts."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from gptj_q8.cli.errors import CliError, sentence

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from gptj_q8.train.texts import Document

DEMO = "demo"
# Parameters. Two threads make the demo's 6 million 1.45 times as fast (8 x 128 tokens in 148 ms and
# not 215; AMD EPYC, Zen 5, 2026-11-24); but where other programs use the cores, threads that wait
# for each other can make it a hundred times as slow.
SMALL = 20_000_000
ADAPTER_CONFIG = "adapter_config.json"


def model_path(name: str) -> str:
    """The folder or Hugging Face id that a name stands for."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            if (path / ADAPTER_CONFIG).exists():
                raise CliError(f"{name} holds an adapter: name its model, and it with --adapter")
            raise CliError(f"{name} holds no model: it has no config.json")
        return name
    if name == DEMO:
        from gptj_q8.demo import model_dir

        return str(model_dir())
    if path.exists():
        raise CliError(f"{name} is a file; a model is a folder with config.json and its weights")
    # An id is `owner/name` or `name`. Anything else, and what would lie in a folder that there
    # is, was meant as a path; looking for it on the network would only take long to say so.
    in_a_folder = "/" in name and path.parent.is_dir()
    if in_a_folder or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CliError(f"there is no model at {name}")
    return name


def device(name: str) -> torch.device:
    """The device that a name stands for, checked to be there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise CliError(
            f"device {name!r} cannot be used here ({reason}); `gptj-q8 doctor` tells what can"
        ) from error
    return found


def model(name: str, dtype: str, on: torch.device, adapter: Path | None = None) -> PreTrainedModel:
    """Loads a model, original or 8-bit, with an adapter if one is named, ready to run."""
    import torch

    from gptj_q8.pretrained import load_as_stored

    if adapter is not None:
        check_adapter(adapter)
    loaded: PreTrainedModel = load_as_stored(
        model_path(name),
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        device_map={"": on},
    )
    if adapter is not None:
        if getattr(loaded, "peft_config", None):
            raise CliError(
                f"{name} has adapters already, which --adapter would take the place of; "
                "gptj-q8 convert takes them out"
            )
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    return loaded.eval()


def spare_threads(model: PreTrainedModel) -> None:
    """Makes a small model on a CPU compute on one thread, unless OMP_NUM_THREADS is set."""
    import torch

    small = model.device.type == "cpu" and model.num_parameters() < SMALL
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def check_adapter(folder: Path) -> None:
    """CliError unless there is an adapter in PEFT's format in `folder`; ValueError if damaged."""
    from gptj_q8.checkpoint.adapters import read_config
    from gptj_q8.train.folder import RECORD

    if not (folder / ADAPTER_CONFIG).exists():
        if (folder / RECORD).exists():
            raise CliError(
                f"{folder} holds a run that has not ended: go on with it (gptj-q8 finetune ... "
                "--resume)"
            )
        what = "holds no adapter: it has no" if folder.is_dir() else "is no folder with an"
        raise CliError(f"{folder} {what} {ADAPTER_CONFIG}")
    read_config(folder)


def trainable_model(name: str, dtype: str, on: torch.device) -> PreTrainedModel:
    """Loads a model in 8 bits, quantizing it if it is in float."""
    import torch

    from gptj_q8.pretrained import from_pretrained

    loaded: PreTrainedModel = from_pretrained(
        model_path(name), dtype=getattr(torch, dtype), device_map={"": on}
    )
    return loaded


def config(name: str) -> PreTrainedConfig:
    """The configuration of a model."""
    from transformers import AutoConfig

    path = model_path(name)
    try:
        return AutoConfig.from_pretrained(path)
    except OSError as error:
        if name in str(error) or Path(path).exists():
            raise
        # Offline, Transformers does not say what it looked for: perhaps a folder misspelt.
        why = f"could not be fetched from the Hub: {sentence(error)}"
        raise CliError(f"{name} is no folder here and {why}") from error


def tokenizer(chosen: str | None, *models: str | None) -> PreTrainedTokenizerBase:
    """The chosen tokenizer, or that of the first model that has one."""
    from transformers import AutoTokenizer

    from gptj_q8.checkpoint.directory import holds_tokenizer

    names = [chosen] if chosen else [name for name in models if name]
    for name in names:
        path = model_path(name)
        config(name)  # fails here where the model, not its tokenizer, is amiss
        try:
            found = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            if Path(path).is_dir() and holds_tokenizer(Path(path)):
                why = sentence(error)
                raise CliError(f"{name}: its tokenizer cannot be read: {why}") from error
            continue
        # From a folder without any tokenizer Transformers makes one that knows no word.
        if found.vocab_size > 0:
            return found
    advice = "" if chosen else "; name one with --tokenizer"
    raise CliError(f"{names[0]} has no tokenizer{advice}")


def is_demo(data: str) -> bool:
    """Whether a name of data stands for the demo's, and not for a file or folder here."""
    return data == DEMO and not Path(data).exists()


def text(name: str) -> str:
    """Reads a UTF-8 text: a file, plain or compressed, `-` for stdin, or the demo's."""
    from gptj_q8.train.texts import decode, read_text

    if name == "-":
        content = decode(sys.stdin.buffer.read(), name)
    elif is_demo(name):
        from gptj_q8.demo import text as demo_text

        return demo_text("held_out")
    else:
        content = read_text(Path(name))
    if not content.strip():
        raise CliError(f"{name} is empty")
    return content


def documents(name: str) -> list[Document]:
    """Reads what to fine-tune on: files, folders, a dataset, or the demo's proverbs."""
    from gptj_q8.train.texts import read_documents

    return demo_documents() if is_demo(name) else read_documents(name)


def demo_documents() -> list[Document]:
    """The demo's proverbs."""
    from gptj_q8.demo import proverbs
    from gptj_q8.train.texts import Document

    return [Document(proverbs(), where="the demo's proverbs", is_file=True)]


def token_ids(tokens: PreTrainedTokenizerBase, content: str, limit: int | None) -> torch.Tensor:
    """A text's ids as they are, with no token added at either end."""
    import torch

    # `verbose=False`: longer than the model's context is what a sliding window is for.
    ids = tokens(content, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids[:limit])


def quieten() -> None:
    """Leaves libraries their errors only; their bars and hints would tear the screen."""
    # Transformers imports torchao where it is installed, which tells of each GPU library that it
    # cannot load, and makes PyTorch warn of its enums.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|torch|torchao|huggingface_hub)\b.*")
    warnings.showwarning = _say_warning

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()  # else it tells of every retry; its import sets it back
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _say_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning's sentence, without the place in the code that a user did not write."""
    print(f"gptj-q8: {message}", file=sys.stderr)
