"""One fine-tuning step of GPT-J-6B at full size, random weights: its peak memory and its time.

    python -m benchmarks.finetune_memory --json benchmarks/results/finetune-memory.json

LoRA of rank 16 on the six matrices of each block, in float32; bfloat16 arithmetic, checkpointing,
AdamW8bit, one sequence; each length in a process of its own. Memory is anonymous memory (RssAnon,
polled), imports and building included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.full_size import GIGA, LAYERS, build, peak_anonymous_memory
from benchmarks.machine import new_results

TOKENS = (2048, 512)
RANK = 16


def main(argv: list[str]) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    made.add_argument("--layers", type=int, default=LAYERS, help="fewer for a dry run")
    made.add_argument("--rank", type=int, default=RANK)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    made.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = made.parse_args(argv)
    if options.here:
        print(json.dumps(measure(options.layers, options.tokens[0], options.rank)))
        return 0
    results = []
    for tokens in options.tokens:
        size = ("--layers", str(options.layers), "--rank", str(options.rank))
        command = [sys.executable, "-m", "benchmarks.finetune_memory", "--here", *size]
        done = subprocess.run([*command, "--tokens", str(tokens)], stdout=subprocess.PIPE)
        if done.returncode:
            print(f"{tokens} tokens: FAILED, exit status {done.returncode}")
            return 1
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print("\n".join(f"{name:28} {value}" for name, value in results[-1].items()) + "\n")
    if options.json:
        draft = options.json.with_suffix(".part")
        head = asdict(new_results(torch.device("cpu"), "benchmarks.finetune_memory", argv))
        kept = {
            name: head[name] for name in ("created", "command", "commit", "machine", "versions")
        }
        draft.write_text(json.dumps({**kept, "steps": results}, indent=1) + "\n")
        os.replace(draft, options.json)
    return 0


def measure(layers: int, tokens: int, rank: int) -> dict[str, Any]:
    """Builds the model and takes one step, here."""
    from gptj_q8.memory import Setting, estimate
    from gptj_q8.optim import AdamW8bit

    peaks: dict[str, float] = {}
    seconds: dict[str, float] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        with peak_anonymous_memory(0.005) as peak:
            yield
        peaks[name], seconds[name] = peak() / GIGA, time.perf_counter() - begun

    torch.manual_seed(0)
    with part("build"):
        model = trainable(build("gptj_q8", layers)[0], rank)
        optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = example(tokens)
    with part("forward"):
        loss = model(ids, labels=ids).loss
    with part("backward"):
        loss.backward()
    with part("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    guess = estimate(model.config, Setting(tokens=tokens, rank=rank))
    return {
        "tokens": tokens,
        "layers": layers,
        "rank": rank,
        "loss": loss.item(),
        "threads": torch.get_num_threads(),
        "peak_rss_anon_gb": round(max(peaks.values()), 4),
        "estimate_gb": round(guess.total / GIGA, 4),
        "peaks_gb": {name: round(value, 4) for name, value in peaks.items()},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "step_s": round(sum(s for name, s in seconds.items() if name != "build"), 2),
    }


def trainable(model: Any, rank: int) -> Any:
    """The model with an adapter, ready to train."""
    from gptj_q8.lora import add_lora, prepare_for_finetuning

    return prepare_for_finetuning(add_lora(model, r=rank), verbose=False)


def example(tokens: int) -> Tensor:
    """Token ids [1, tokens]."""
    return torch.randint(50257, (1, tokens), generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
