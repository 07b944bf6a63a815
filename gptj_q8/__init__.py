"""GPT-J in 8 bits: block-wise nonlinear codes, decoded inside the matrix product.

Importing this package registers its ops with PyTorch and its quantizer with Transformers, as soon
as each of them is imported: from then on Transformers loads and saves 8-bit models itself.

    model = gptj_q8.from_pretrained("EleutherAI/gpt-j-6b")  # in 8 bits, weight by weight
    model.save_pretrained("gpt-j-8bit")
    model = gptj_q8.add_lora(model, r=16)
    gptj_q8.prepare_for_finetuning(model)

Where to begin:

- load a model in 8 bits: `from_pretrained`, `Q8Config`
- quantize one in memory, and back: `quantize_`, `dequantize_`
- convert one from file to file: `convert_checkpoint`, in `gptj_q8.checkpoint`
- let it write, and time that: `gptj_q8.generate`
- fine-tune in a loop of yours: `add_lora`, `prepare_for_finetuning`, `merge`; `gptj_q8.optim`
- fine-tune on files, from texts to an adapter: `gptj_q8.train.run`, with `gptj_q8.train.settings`
  and `gptj_q8.train.texts`
- count the memory that this takes, and take less: `gptj_q8.memory`, `save_memory`
- measure what 8 bits cost a model: `gptj_q8.evaluate`
- see what works on this machine: `gptj_q8.doctor`
- run scripts written for hivemind/gpt-j-6B-8bit: `gptj_q8.hivemind`
- try all this without a download: `gptj_q8.demo`
- work on layers and adapters: `gptj_q8.nn`, `gptj_q8.lora`, `gptj_q8.models`
- work on kernels: `gptj_q8.ops`, `gptj_q8.codebooks`, `gptj_q8.backends` and among them the
  specification, `gptj_q8.backends.reference`; `gptj_q8.tune`
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from gptj_q8 import _register

if TYPE_CHECKING:  # what editors and type checkers see of the names below
    from gptj_q8 import backends as backends
    from gptj_q8 import codebooks as codebooks
    from gptj_q8 import demo as demo
    from gptj_q8 import doctor as doctor
    from gptj_q8 import evaluate as evaluate
    from gptj_q8 import ops as ops
    from gptj_q8 import optim as optim
    from gptj_q8.checkpoint import convert_checkpoint as convert_checkpoint
    from gptj_q8.config import Q8Config as Q8Config
    from gptj_q8.convert import dequantize_ as dequantize_
    from gptj_q8.convert import quantize_ as quantize_
    from gptj_q8.lora import add_lora as add_lora
    from gptj_q8.lora import prepare_for_finetuning as prepare_for_finetuning
    from gptj_q8.lora.merging import merge as merge
    from gptj_q8.models.gptj_attention import set_attn_implementation as set_attn_implementation
    from gptj_q8.models.gptj_modules import save_memory as save_memory
    from gptj_q8.models.gptj_modules import set_chunked_loss as set_chunked_loss
    from gptj_q8.nn import Q8Embedding as Q8Embedding
    from gptj_q8.nn import Q8Linear as Q8Linear
    from gptj_q8.nn.loss import linear_cross_entropy as linear_cross_entropy
    from gptj_q8.pretrained import from_pretrained as from_pretrained

__version__ = "0.1.0"

# Imported when first asked for, so that `import gptj_q8` and `gptj-q8 --help` stay quick.
_HOMES = {
    "Q8Config": "gptj_q8.config",
    "Q8Embedding": "gptj_q8.nn",
    "Q8Linear": "gptj_q8.nn",
    "add_lora": "gptj_q8.lora",
    "convert_checkpoint": "gptj_q8.checkpoint",
    "dequantize_": "gptj_q8.convert",
    "from_pretrained": "gptj_q8.pretrained",
    "linear_cross_entropy": "gptj_q8.nn.loss",
    "merge": "gptj_q8.lora",
    "prepare_for_finetuning": "gptj_q8.lora",
    "quantize_": "gptj_q8.convert",
    "save_memory": "gptj_q8.models.gptj_modules",
    "set_attn_implementation": "gptj_q8.models.gptj_attention",
    "set_chunked_loss": "gptj_q8.models.gptj_modules",
}
_MODULES = ("backends", "codebooks", "demo", "doctor", "evaluate", "ops", "optim")
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None and (name.startswith("_") or not importlib.util.find_spec(f"gptj_q8.{name}")):
        raise AttributeError(f"module 'gptj_q8' has no attribute {name!r}")
    # PyTorch first: a thread that imports it meanwhile, and so our ops, would wait for us.
    importlib.import_module("torch")
    if home is None:
        return importlib.import_module(f"gptj_q8.{name}")
    found = globals()[name] = getattr(importlib.import_module(home), name)
    return found


_register.register()
