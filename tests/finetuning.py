"""A short fine-tuning of a tiny GPT-J, and a signal in its midst."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from tiny import QUICK

import gptj_q8
from gptj_q8.train.listener import Listener
from gptj_q8.train.report import Report
from gptj_q8.train.run import finetune
from gptj_q8.train.settings import Settings
from gptj_q8.train.texts import Document

TEXT = (
    "".join(f"{word} y {word} son dos {word}s.\n" for word in ("gato", "perro", "pan", "mes")) * 9
)
DOCUMENTS = [Document(TEXT, where="text", is_file=True)]
SETTINGS = Settings(
    rank=4, alpha=8, dropout=0.1, learning_rate=2e-2, epochs=2, batch_size=4, sequence_length=32,
    held_out=0.1, save_every=2,
)  # fmt: skip


def load(source: Path) -> Any:
    return gptj_q8.from_pretrained(source, dtype=torch.float32, quantization_config=QUICK)


def tune(source: Path, tokenizer: Any, **changes: Any) -> Report:
    """Fine-tunes a fresh model; changes: of `finetune`'s arguments, `output` among them."""
    options = {"documents": DOCUMENTS, "settings": SETTINGS}
    return finetune(load(source), tokenizer, **{**options, **changes})


class StopAt(Listener):
    """Sends a signal after a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.at, self.number, self.told = step, number, 0

    def step(self, step: int, *_: float) -> None:
        if step == self.at:
            os.kill(os.getpid(), self.number)

    def stopping(self) -> None:
        self.told += 1
