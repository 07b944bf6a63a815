"""What the model writes, before it learns and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gptj_q8.generate import generate
from gptj_q8.train.settings import Settings
from gptj_q8.train.texts import Document, hold_out

SAMPLE_TOKENS = 60
PROMPTS = 2


@dataclass(frozen=True)
class Sample:
    """What the model made of a prompt before it learned and after."""

    prompt: str
    before: str
    after: str


def beginnings(documents: Sequence[Document], settings: Settings) -> list[str]:
    """Beginnings of held-out texts, or of others where none is held out."""
    train, held_out = hold_out(documents, settings.held_out, settings.seed)
    found: list[str] = []
    for document in held_out or train:
        if document.prompt:
            found.append(document.prompt)
        lines = document.text.split("\n") if not document.prompt else []
        found += [" ".join(line.split()[:3]) for line in lines if len(line.split()) > 3]
    found = list(dict.fromkeys(found)) or [documents[0].text[:20]]
    return found[:: max(1, len(found) // PROMPTS)][:PROMPTS]


def sample(model: Any, tokenizer: Any, prompts: Sequence[str], seed: int) -> dict[str, str]:
    """What the model makes of each prompt; the random numbers of others stay as they are."""
    model.eval()
    made = {}
    devices = [model.device] if model.device.type == "cuda" else []
    for prompt in prompts:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            made[prompt] = generate(model, tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS).text
    return made
