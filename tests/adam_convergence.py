"""Trains the demo's model, all of it, from random weights: 8-bit AdamW beside PyTorch's in float32.

python -m tests.adam_convergence

writes the mean of the last losses of every seed to adam_convergence.json beside this file, with
which test_optim_training.py compares. Two to three minutes on one core.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GPTJForCausalLM

from gptj_q8.demo import model_dir, text
from gptj_q8.demo.report import describe_machine
from gptj_q8.optim import AdamW8bit

RECORD = Path(__file__).with_suffix(".json")
SEEDS = range(5)
STEPS, LAST = 200, 50
BATCH, WINDOW = 2, 64
LEARNING_RATE = 1e-3


@cache
def ids() -> torch.Tensor:
    """The first 300,000 tokens or so of the demo's text."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    return torch.tensor(tokenizer(text("train")[:1_000_000], verbose=False)["input_ids"])


def train(kind: type[torch.optim.Optimizer], seed: int) -> tuple[float, torch.optim.Optimizer]:
    """The mean of the last losses, in nats a token, and the optimizer as it is then.

    The seed draws the weights and the windows of text, so both optimizers see the same.
    """
    torch.manual_seed(seed)
    model = GPTJForCausalLM(AutoConfig.from_pretrained(model_dir(), use_cache=False))
    optimizer = kind(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        starts = torch.randint(len(ids()) - WINDOW, (BATCH,)).tolist()
        windows = torch.stack([ids()[start : start + WINDOW] for start in starts])
        loss = model(windows, labels=windows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-LAST:]) / LAST, optimizer


def main() -> None:
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "command": "python -m tests.adam_convergence",
        "machine": describe_machine(),
    }
    for kind in (torch.optim.AdamW, AdamW8bit):
        record[kind.__name__] = [round(train(kind, seed)[0], 4) for seed in SEEDS]
        print(kind.__name__, record[kind.__name__], flush=True)
    RECORD.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
