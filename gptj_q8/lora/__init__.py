"""LoRA through PEFT, with layers of ours over 8-bit weights. Importing this registers them."""

from gptj_q8.lora import registration as registration
from gptj_q8.lora.add import add_lora
from gptj_q8.lora.merging import merge
from gptj_q8.lora.prepare import prepare_for_finetuning

__all__ = ["add_lora", "merge", "prepare_for_finetuning"]
