"""A fine-tuning step in 8 bits beside the same model frozen in bfloat16, the same LoRA on both.

    python -m benchmarks.finetune_speed --json benchmarks/results/finetune-speed.json

Four full-width blocks of GPT-J with random weights, embedding and head; adapters of rank 16 in
bfloat16 on the six matrices of each block, checkpointing, AdamW8bit, and all that
`gptj_q8.save_memory` does, for both. Step by step in turns; the ratio is the median of those within
each round, so that what slows a whole round cancels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune_memory import RANK, example, trainable
from benchmarks.full_size import SYSTEMS, build
from benchmarks.machine import new_results

LAYERS, TOKENS, ROUNDS = 4, (512, 1024, 2048), 5


def main(argv: list[str]) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--layers", type=int, default=LAYERS)
    made.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    made.add_argument("--rounds", type=int, default=ROUNDS)
    made.add_argument("--profile", action="store_true", help="tell where the time of a step goes")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = made.parse_args(argv)
    steps = {system: make_step(system, options.layers) for system in SYSTEMS}
    found = []
    for tokens in options.tokens:
        if options.profile:
            for system, step in steps.items():
                print(system, tokens, profile(step, tokens), sep="\n")
            continue
        found.append(compare(steps, tokens, options.rounds))
        print("  ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    if options.json:
        head = asdict(new_results(torch.device("cpu"), "benchmarks.finetune_speed", argv))
        kept = {
            name: head[name] for name in ("created", "command", "commit", "machine", "versions")
        }
        draft = options.json.with_suffix(".part")
        draft.write_text(json.dumps({**kept, "layers": options.layers, "rows": found}, indent=1))
        os.replace(draft, options.json)
    return 0


def make_step(system: str, layers: int) -> Callable[[int], None]:
    """A function that takes one training step on so many tokens."""
    from gptj_q8.optim import AdamW8bit

    torch.manual_seed(0)
    model: Any = trainable(build(system, layers)[0], RANK)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in adapters:  # in float32 PEFT would cast x and the output in the other's favour
        parameter.data = parameter.data.bfloat16()
    optimizer = AdamW8bit(adapters, lr=1e-5)

    def step(tokens: int) -> None:
        ids = example(tokens)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(steps: dict[str, Callable[[int], None]], tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of each system's steps and their ratio."""
    samples: dict[str, list[float]] = {system: [] for system in steps}
    for number in range(rounds + 1):
        order = list(steps) if number % 2 else list(reversed(steps))
        for system in order:
            begun = time.perf_counter()
            steps[system](tokens)
            if number:  # the first wakes threads and fills caches
                samples[system].append(time.perf_counter() - begun)
    ratios = [a / b for a, b in zip(samples["gptj_q8"], samples["bfloat16"], strict=True)]
    medians = {f"{name}_s": round(statistics.median(s), 3) for name, s in samples.items()}
    return {"tokens": tokens, **medians, "ratio": round(statistics.median(ratios), 4)}


def profile(step: Callable[[int], None], tokens: int) -> str:
    """A table of the ops that take the most time."""
    step(tokens)
    with torch.profiler.profile() as found:
        step(tokens)
    return str(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
